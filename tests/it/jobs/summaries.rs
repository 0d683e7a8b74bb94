//! SummarizeJobs: counts by group, and durations.

use std::collections::BTreeMap;

use milepost_client::pb::{
    self, ErrorReason, JobStatus, SummaryAttribute, SummaryPeriod, job_group::Key,
    summarize_jobs_request::GroupBy,
};
use tonic::{Code, Status};

use crate::support::{TestServer, User, assert_refused, assert_violations, complete, info};

async fn summarize(
    user: &mut User,
    request: pb::SummarizeJobsRequest,
) -> Result<pb::SummarizeJobsResponse, Status> {
    Ok(user.jobs.summarize_jobs(request).await?.into_inner())
}

fn by(group_by: GroupBy) -> pb::SummarizeJobsRequest {
    pb::SummarizeJobsRequest { group_by: Some(group_by), ..Default::default() }
}

fn label(key: &str, value: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(key.to_owned(), value.to_owned())])
}

/// The key and the number of jobs of each group.
fn counts(answer: &pb::SummarizeJobsResponse) -> Vec<(Option<Key>, i64)> {
    answer.groups.iter().map(|group| (group.key.clone(), group.figures.as_ref().unwrap().jobs)).collect()
}

fn statuses(figures: &pb::JobFigures) -> Vec<(JobStatus, i64)> {
    figures.statuses.iter().map(|count| (count.status(), count.jobs)).collect()
}

fn at(time: &str) -> prost_types::Timestamp {
    let time = chrono::DateTime::parse_from_rfc3339(time).unwrap();
    prost_types::Timestamp { seconds: time.timestamp(), nanos: 0 }
}

/// A provider with jobs of two customers, which were created and closed at set times.
struct Scene {
    server: TestServer,
    provider: User,
    customers: [User; 2],
}

impl Scene {
    async fn new() -> Self {
        let server = TestServer::start().await;
        let mut provider = server.provider().await;
        let customers = [server.customer().await, server.customer().await];
        provider.configuration(&[]).await;
        let mut jobs = Vec::new();
        for (customer, labels) in [
            (0, label("ward", "3b")),
            (0, label("ward", "3b")),
            (1, label("ward", "")),
            (1, label("other", "x")),
        ] {
            let new = pb::CreateJobRequest { labels, ..provider.new_job(&customers[customer]) };
            jobs.push(provider.jobs.create_job(new).await.unwrap().into_inner().job.unwrap());
        }
        provider.append(&jobs[0], [complete()]).await;
        provider.append(&jobs[1], [complete()]).await;
        provider.append(&jobs[2], [info("began")]).await;
        for (job, created, closed) in [
            (0, "2026-01-31T22:30:00Z", "'2026-01-31T22:30:10Z'"),
            (1, "2026-01-31T23:30:00Z", "'2026-01-31T23:30:20.5Z'"),
            (2, "2026-03-29T12:00:00Z", "NULL"),
            (3, "2025-03-30T12:00:00Z", "NULL"),
        ] {
            let sql = format!(
                "UPDATE jobs SET created_at = '{created}', closed_at = {closed} WHERE id = '{}'",
                jobs[job].id
            );
            server.database.execute(&sql).await;
        }
        Self { server, provider, customers }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_counted_by_each_group_and_in_all() {
    let Scene { server, mut provider, mut customers } = Scene::new().await;
    let total = summarize(&mut provider, pb::SummarizeJobsRequest::default()).await.unwrap();
    assert!(total.groups.is_empty() && total.next_page_token.is_empty());
    let all = total.total.unwrap();
    use JobStatus::{Complete, Pending, Running};
    assert_eq!((all.jobs, statuses(&all)), (4, vec![(Complete, 2), (Pending, 1), (Running, 1)]));
    let length = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    assert_eq!((all.median_duration, all.p90_duration), (length(10, 0), length(20, 500_000_000)));

    let month = |start: &str| Some(Key::PeriodStart(at(start)));
    let months = summarize(&mut provider, by(GroupBy::Period(SummaryPeriod::Month.into()))).await.unwrap();
    assert_eq!(
        counts(&months),
        [
            (month("2025-03-01T00:00:00Z"), 1),
            (month("2026-01-01T00:00:00Z"), 2),
            (month("2026-03-01T00:00:00Z"), 1)
        ]
    );
    assert_eq!(months.total, Some(all.clone()));
    assert_eq!(statuses(months.groups[1].figures.as_ref().unwrap()), [(Complete, 2)]);
    // One hour east of UTC, and two in summer.
    let vienna = |period: SummaryPeriod| pb::SummarizeJobsRequest {
        time_zone: "Europe/Vienna".to_owned(),
        ..by(GroupBy::Period(period.into()))
    };
    let months = summarize(&mut provider, vienna(SummaryPeriod::Month)).await.unwrap();
    assert_eq!(
        counts(&months),
        [
            (month("2025-02-28T23:00:00Z"), 1),
            (month("2025-12-31T23:00:00Z"), 1),
            (month("2026-01-31T23:00:00Z"), 1),
            (month("2026-02-28T23:00:00Z"), 1)
        ]
    );
    let days = summarize(&mut provider, vienna(SummaryPeriod::Day)).await.unwrap();
    assert_eq!(counts(&days)[3], (month("2026-03-28T23:00:00Z"), 1));
    let weeks = summarize(&mut provider, by(GroupBy::Period(SummaryPeriod::Week.into()))).await.unwrap();
    assert_eq!(counts(&weeks)[2], (month("2026-03-23T00:00:00Z"), 1), "a Monday");
    let years = summarize(&mut provider, by(GroupBy::Period(SummaryPeriod::Year.into()))).await.unwrap();
    assert_eq!(counts(&years).iter().map(|(_, jobs)| *jobs).collect::<Vec<_>>(), [1, 3]);

    let of = |attribute: SummaryAttribute| by(GroupBy::Attribute(attribute.into()));
    let by_status = summarize(&mut provider, of(SummaryAttribute::Status)).await.unwrap();
    let key = |status: JobStatus| Some(Key::Status(status.into()));
    assert_eq!(counts(&by_status), [(key(Complete), 2), (key(Pending), 1), (key(Running), 1)]);
    let by_tag = summarize(&mut provider, of(SummaryAttribute::Configuration)).await.unwrap();
    assert_eq!(counts(&by_tag), [(Some(Key::ConfigurationTag("analysis".to_owned())), 4)]);
    let by_customer = summarize(&mut provider, of(SummaryAttribute::Counterpart)).await.unwrap();
    let mut ids: Vec<String> = customers.iter().map(|customer| customer.id.clone()).collect();
    ids.sort();
    let found: Vec<String> = by_customer
        .groups
        .iter()
        .map(|group| match &group.key {
            Some(Key::Counterpart(party)) => party.id.clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(found, ids);
    let by_provider = summarize(&mut customers[0], of(SummaryAttribute::Counterpart)).await.unwrap();
    let party = pb::Party { id: provider.id.clone(), first_name: "Ada".into(), last_name: "Lovelace".into() };
    assert_eq!(counts(&by_provider), [(Some(Key::Counterpart(party)), 2)]);
    let by_ward = summarize(&mut provider, by(GroupBy::LabelKey("ward".to_owned()))).await.unwrap();
    let value = |value: &str| Some(Key::LabelValue(value.to_owned()));
    assert_eq!(counts(&by_ward), [(None, 1), (value(""), 1), (value("3b"), 2)]);

    let filter = Some(pb::JobFilter { labels: label("ward", "3b"), ..Default::default() });
    let filtered = pb::SummarizeJobsRequest { filter, ..of(SummaryAttribute::Status) };
    let filtered = summarize(&mut provider, filtered).await.unwrap();
    assert_eq!((counts(&filtered), filtered.total.unwrap().jobs), (vec![(key(Complete), 2)], 2));
    let nobody = summarize(&mut server.provider().await, pb::SummarizeJobsRequest::default()).await.unwrap();
    assert_eq!(nobody.total, Some(pb::JobFigures::default()));
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_come_in_pages_that_have_each_of_them_once() {
    let Scene { server: _server, mut provider, .. } = Scene::new().await;
    let whole = summarize(&mut provider, by(GroupBy::LabelKey("ward".to_owned()))).await.unwrap();
    let mut request = pb::SummarizeJobsRequest { page_size: 1, ..by(GroupBy::LabelKey("ward".to_owned())) };
    let mut groups = Vec::new();
    loop {
        let page = summarize(&mut provider, request.clone()).await.unwrap();
        assert_eq!(page.total, whole.total);
        groups.extend(page.groups);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    assert_eq!(groups, whole.groups);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_groups_zones_and_filters_are_refused() {
    let Scene { server: _server, mut provider, .. } = Scene::new().await;
    let zone = |zone: &str, group_by| pb::SummarizeJobsRequest { time_zone: zone.to_owned(), ..by(group_by) };
    let month = || GroupBy::Period(SummaryPeriod::Month.into());
    for zone_name in ["Vienna", "UTC+3", "Europe/Wien'", "+02"] {
        assert_violations(summarize(&mut provider, zone(zone_name, month())).await, &["time_zone"]);
    }
    for zone_name in ["UTC", "Asia/Kolkata", "America/Argentina/Buenos_Aires", "CET"] {
        summarize(&mut provider, zone(zone_name, month())).await.unwrap();
    }
    let status = GroupBy::Attribute(SummaryAttribute::Status.into());
    assert_violations(summarize(&mut provider, zone("UTC", status)).await, &["time_zone"]);
    for (group_by, field) in [
        (GroupBy::Period(0), "period"),
        (GroupBy::Period(9), "period"),
        (GroupBy::Attribute(0), "attribute"),
        (GroupBy::LabelKey(String::new()), "label_key"),
        (GroupBy::LabelKey("ü".repeat(65)), "label_key"),
    ] {
        assert_violations(summarize(&mut provider, by(group_by)).await, &[field]);
    }
    summarize(&mut provider, by(GroupBy::LabelKey("ü".repeat(64)))).await.unwrap();
    let filter = Some(pb::JobFilter { configuration_tag: "unknown".to_owned(), ..Default::default() });
    let unknown = summarize(&mut provider, pb::SummarizeJobsRequest { filter, ..Default::default() }).await;
    assert_refused(unknown, Code::NotFound, ErrorReason::ResourceNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_makes_one_summary_at_a_time() {
    let Scene { server, mut provider, mut customers } = Scene::new().await;
    let mut locker = server.database.lock("jobs").await;
    let mut waiting = provider.clone();
    let first =
        tokio::spawn(async move { summarize(&mut waiting, pb::SummarizeJobsRequest::default()).await });
    server.database.wait_for_locks(1).await;
    let second = summarize(&mut provider, pb::SummarizeJobsRequest::default()).await;
    assert_refused(second, Code::ResourceExhausted, ErrorReason::Overloaded);
    let mut other = customers[0].clone();
    let of_other =
        tokio::spawn(async move { summarize(&mut other, pb::SummarizeJobsRequest::default()).await });
    server.database.wait_for_locks(2).await;
    diesel_async::SimpleAsyncConnection::batch_execute(&mut locker, "ROLLBACK").await.unwrap();
    first.await.unwrap().unwrap();
    of_other.await.unwrap().unwrap();
    summarize(&mut provider, pb::SummarizeJobsRequest::default()).await.unwrap();
    summarize(&mut customers[0], pb::SummarizeJobsRequest::default()).await.unwrap();
}
