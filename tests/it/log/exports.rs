//! ExportEvents and ExportJobs: everything once, over interruptions, removals and other servers.

use std::collections::BTreeMap;

use milepost_client::pb::{
    self, ErrorReason, Event, EventKind, Job, export_events_response, export_jobs_response,
};
use prost_types::{Value, value::Kind};
use tonic::{Code, Status};

use super::retention::{completed, remove_all};
use crate::support::{
    TestServer, User, assert_refused, assert_violations, complete, info, step, with_metadata, within_timeout,
};

/// More streams than an export of these tests needs that is resumed after each message.
const MOST_STREAMS: usize = 100;

/// The rows of an export of events, in their order, and the count at its end. After each message
/// the stream is given up and resumed, if `resumes`.
async fn events(
    user: &mut User,
    request: &pb::ExportEventsRequest,
    resumes: bool,
) -> Result<(Vec<(Job, Event)>, i64), Status> {
    let mut request = request.clone();
    let mut rows = Vec::new();
    for _ in 0..MOST_STREAMS {
        let mut stream = user.events.export_events(request.clone()).await?.into_inner();
        while let Some(answer) = within_timeout("a message", stream.message()).await? {
            request.resume_token = answer.resume_token;
            assert!(request.resume_token.len() <= 200);
            match answer.message.unwrap() {
                export_events_response::Message::Events(events) => {
                    for of_job in events.jobs {
                        let job = of_job.job.unwrap();
                        rows.extend(of_job.events.into_iter().map(|event| (job.clone(), event)));
                    }
                }
                export_events_response::Message::End(end) => {
                    assert_eq!(within_timeout("the end", stream.message()).await?, None);
                    return Ok((rows, end.count));
                }
            }
            if resumes {
                break;
            }
        }
    }
    panic!("no end within {MOST_STREAMS} streams");
}

/// As [`events`], of jobs.
async fn jobs(
    user: &mut User,
    request: &pb::ExportJobsRequest,
    resumes: bool,
) -> Result<(Vec<Job>, i64), Status> {
    let mut request = request.clone();
    let mut rows = Vec::new();
    for _ in 0..MOST_STREAMS {
        let mut stream = user.jobs.export_jobs(request.clone()).await?.into_inner();
        while let Some(answer) = within_timeout("a message", stream.message()).await? {
            request.resume_token = answer.resume_token;
            match answer.message.unwrap() {
                export_jobs_response::Message::Jobs(jobs) => rows.extend(jobs.jobs),
                export_jobs_response::Message::End(end) => return Ok((rows, end.count)),
            }
            if resumes {
                break;
            }
        }
    }
    panic!("no end within {MOST_STREAMS} streams");
}

fn names(rows: &[(Job, Event)]) -> Vec<String> {
    rows.iter().map(|(job, event)| format!("{} {}", job.provider_job_name, event.name)).collect()
}

async fn named(provider: &mut User, customer: &User, name: &str, labels: &[(&str, &str)]) -> Job {
    let labels: BTreeMap<_, _> =
        labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let name = name.to_owned();
    let new = pb::CreateJobRequest { provider_job_name: name, labels, ..provider.new_job(customer) };
    provider.jobs.create_job(new).await.unwrap().into_inner().job.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_has_each_row_once_complete_by_itself_and_in_order() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, other) =
        (server.provider().await, server.customer().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let first = named(&mut provider, &customer, "first", &[("ward", "3b")]).await;
    named(&mut provider, &customer, "none", &[]).await;
    let last = named(&mut provider, &other, "last", &[("ward", "3c")]).await;
    for round in 0..3 {
        provider.append(&last, [info(&format!("{round}"))]).await;
        provider.append(&first, [info(&format!("{round}")), step("load")]).await;
    }
    let whole = pb::ExportEventsRequest::default();
    let expected = [
        "first 0",
        "first load",
        "first 1",
        "first load",
        "first 2",
        "first load",
        "last 0",
        "last 1",
        "last 2",
    ];
    for resumes in [false, true] {
        let (rows, count) = events(&mut provider, &whole, resumes).await.unwrap();
        assert_eq!((names(&rows), count), (expected.map(str::to_owned).to_vec(), 9));
        for (job, log) in [(&first, provider.list(&first).await), (&last, provider.list(&last).await)] {
            let of_job: Vec<_> = rows.iter().filter(|(of, _)| of.id == job.id).collect();
            assert_eq!(of_job.iter().map(|(_, event)| event.clone()).collect::<Vec<_>>(), log);
            let now = provider.get(job).await;
            assert!(of_job.iter().all(|(of, _)| *of == now), "with all that a job has");
        }
        let (rows, count) = jobs(&mut provider, &pb::ExportJobsRequest::default(), resumes).await.unwrap();
        assert_eq!(
            (rows.iter().map(|job| &*job.provider_job_name).collect::<Vec<_>>(), count),
            (vec!["first", "none", "last"], 3)
        );
        assert_eq!(rows[0], provider.get(&first).await);
    }
    let (rows, _) = events(&mut customer, &whole, false).await.unwrap();
    assert_eq!(names(&rows), expected[..6]);
    let (rows, _) = jobs(&mut customer, &pb::ExportJobsRequest::default(), false).await.unwrap();
    assert_eq!(rows.len(), 2);

    // What comes later is not part of an export that began before.
    let mut stream = provider.events.export_events(whole.clone()).await.unwrap().into_inner();
    let begun = stream.message().await.unwrap().unwrap();
    drop(stream);
    provider.append(&last, [info("later")]).await;
    let later = named(&mut provider, &customer, "later", &[]).await;
    provider.append(&later, [info("later")]).await;
    let rest = pb::ExportEventsRequest { resume_token: begun.resume_token, ..whole.clone() };
    let (rows, count) = events(&mut provider, &rest, false).await.unwrap();
    assert_eq!((rows.len(), count), (0, 9));
    assert_eq!(events(&mut provider, &whole, false).await.unwrap().1, 11);
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_times_and_kinds_combine() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let ward = named(&mut provider, &customer, "ward", &[("ward", "3b")]).await;
    let plain = named(&mut provider, &customer, "plain", &[]).await;
    for job in [&ward, &plain] {
        provider.append(job, [info("early"), step("load")]).await;
    }
    provider.append(&ward, [info("late"), complete()]).await;
    let log = provider.list(&ward).await;
    let filter =
        |filter: pb::JobFilter| pb::ExportEventsRequest { filter: Some(filter), ..Default::default() };
    let labels = BTreeMap::from([("ward".to_owned(), "3b".to_owned())]);
    let later = Some(prost_types::Timestamp { seconds: 4_000_000_000, nanos: 0 });
    for (request, expected) in [
        (
            filter(pb::JobFilter { labels, ..Default::default() }),
            vec!["ward early", "ward load", "ward late", "ward done"],
        ),
        (
            filter(pb::JobFilter { text: "AIN".to_owned(), ..Default::default() }),
            vec!["plain early", "plain load"],
        ),
        (
            pb::ExportEventsRequest { kinds: vec![EventKind::Step.into()], ..Default::default() },
            vec!["ward load", "plain load"],
        ),
        (
            pb::ExportEventsRequest { created_from: log[2].created_at, ..Default::default() },
            vec!["ward late", "ward done"],
        ),
        (pb::ExportEventsRequest { created_before: log[0].created_at, ..Default::default() }, vec![]),
        (
            pb::ExportEventsRequest {
                closed_before: later,
                kinds: vec![EventKind::Info.into()],
                ..Default::default()
            },
            vec!["ward early", "ward late"],
        ),
        (pb::ExportEventsRequest { closed_before: log[0].created_at, ..Default::default() }, vec![]),
    ] {
        for resumes in [false, true] {
            let (rows, count) = events(&mut provider, &request, resumes).await.unwrap();
            assert_eq!(names(&rows), expected, "{request:?}");
            assert_eq!(usize::try_from(count).unwrap(), expected.len());
        }
    }
    let closed = pb::ExportJobsRequest { closed_before: later, ..Default::default() };
    assert_eq!(jobs(&mut provider, &closed, false).await.unwrap().0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_logs_and_many_jobs_are_exported_whole_through_any_server() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let large = || Value { kind: Some(Kind::StringValue("x".repeat(15_000))) };
    let mut expected = Vec::new();
    for number in 0..230 {
        let job = named(&mut provider, &customer, &format!("{number:03}"), &[]).await;
        let count = if number % 100 == 7 { 60 } else { number % 3 };
        let batch: Vec<_> = (0..count)
            .map(|event| {
                let event = info(&format!("{event:03}"));
                if number == 107 { with_metadata(event, [("large", large())]) } else { event }
            })
            .collect();
        expected.extend((0..count).map(|event| format!("{number:03} {event:03}")));
        if !batch.is_empty() {
            provider.append(&job, batch).await;
        }
    }
    let mut elsewhere = replica.same(&provider);
    for (user, resumes) in [(&mut provider, false), (&mut elsewhere, true)] {
        let (rows, count) = events(user, &pb::ExportEventsRequest::default(), resumes).await.unwrap();
        assert_eq!(names(&rows), expected);
        assert_eq!(usize::try_from(count).unwrap(), expected.len());
        let (rows, count) = jobs(user, &pb::ExportJobsRequest::default(), resumes).await.unwrap();
        let names: Vec<_> = rows.iter().map(|job| job.provider_job_name.clone()).collect();
        assert_eq!(names, (0..230).map(|number| format!("{number:03}")).collect::<Vec<_>>());
        assert_eq!(count, 230);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_retention_removes_meanwhile_ends_an_export() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let removed = completed(&mut provider, &customer, 1).await;
    remove_all(&server).await;
    let whole = pb::ExportEventsRequest::default();
    let kept = completed(&mut provider, &customer, 2).await;
    let (rows, count) = events(&mut provider, &whole, false).await.unwrap();
    assert!(rows.iter().all(|(job, _)| job.id == kept.id) && count == 3, "not of {}", removed.id);
    assert_eq!(jobs(&mut provider, &pb::ExportJobsRequest::default(), false).await.unwrap().1, 2);

    // The first message has the first job alone, since its events are large.
    let open = provider.job(&customer).await;
    provider.append(&open, [info("open")]).await;
    let large = || Value { kind: Some(Kind::StringValue("x".repeat(15_000))) };
    let big = provider.job(&customer).await;
    for _ in 0..2 {
        let batch: Vec<_> = (0..30).map(|_| with_metadata(info("large"), [("large", large())])).collect();
        provider.append(&big, batch).await;
    }
    let late = completed(&mut provider, &customer, 2).await;
    let mut stream = provider.events.export_events(whole.clone()).await.unwrap().into_inner();
    let begun = stream.message().await.unwrap().unwrap();
    drop(stream);
    remove_all(&server).await;
    let rest = pb::ExportEventsRequest { resume_token: begun.resume_token, ..whole };
    let refused = events(&mut provider, &rest, false).await;
    assert_refused(refused.map(|_| ()), Code::OutOfRange, ErrorReason::EventsExpired);
    // A filter that leaves the removed job out.
    let filter = Some(pb::JobFilter { openness: pb::JobOpenness::Open.into(), ..Default::default() });
    let open = pb::ExportEventsRequest { filter, ..Default::default() };
    assert_eq!(events(&mut provider, &open, true).await.unwrap().1, 61, "not of {}", late.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_bound_to_its_request_and_its_caller() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[]).await;
    provider.append(&job, [info("x")]).await;
    let mut stream =
        provider.events.export_events(pb::ExportEventsRequest::default()).await.unwrap().into_inner();
    let resume_token = stream.message().await.unwrap().unwrap().resume_token;
    let request = pb::ExportEventsRequest { resume_token: resume_token.clone(), ..Default::default() };
    assert_violations(customer.events.export_events(request.clone()).await, &["resume_token"]);
    let other = pb::ExportEventsRequest { kinds: vec![EventKind::Info.into()], ..request.clone() };
    assert_violations(provider.events.export_events(other).await, &["resume_token"]);
    let of_jobs = pb::ExportJobsRequest { resume_token, ..Default::default() };
    assert_violations(provider.jobs.export_jobs(of_jobs).await, &["resume_token"]);
    for token in ["x", "é", &"A".repeat(119), &"A".repeat(100_000)] {
        let request = pb::ExportEventsRequest { resume_token: token.to_owned(), ..Default::default() };
        assert_violations(provider.events.export_events(request).await, &["resume_token"]);
    }
    let reversed = pb::ExportEventsRequest {
        created_from: Some(prost_types::Timestamp { seconds: 2, nanos: 0 }),
        created_before: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
        ..Default::default()
    };
    assert_violations(provider.events.export_events(reversed).await, &["created_before"]);
    let filter = Some(pb::JobFilter { configuration_tag: "unknown".to_owned(), ..Default::default() });
    let unknown = pb::ExportEventsRequest { filter, ..Default::default() };
    assert_refused(
        provider.events.export_events(unknown).await,
        Code::NotFound,
        ErrorReason::ResourceNotFound,
    );
}
