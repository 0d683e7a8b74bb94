//! Creating, finding, listing and closing jobs.

use milepost_client::pb::{
    self, ErrorReason, JobOpenness, JobStatus, close_job_request, get_job_request::Job as ByKey,
};
use tonic::{Code, Status};

use crate::support::{
    TestServer, User, assert_refused, assert_violations, complete, error, info, registration, step,
};

async fn find(user: &mut User, job: ByKey) -> Result<pb::GetJobResponse, Status> {
    Ok(user.jobs.get_job(pb::GetJobRequest { job: Some(job) }).await?.into_inner())
}

/// `provider_job_id` of each job that matches, over all pages.
async fn list(user: &mut User, filter: pb::JobFilter, page_size: i32) -> Vec<String> {
    let mut request = pb::ListJobsRequest { filter: Some(filter), page_size, ..Default::default() };
    let mut listed = Vec::new();
    loop {
        let page = user.jobs.list_jobs(request.clone()).await.unwrap().into_inner();
        listed.extend(page.jobs.into_iter().map(|job| job.provider_job_id));
        if page.next_page_token.is_empty() {
            return listed;
        }
        request.page_token = page.next_page_token;
    }
}

fn by(filter: pb::JobFilter) -> pb::ListJobsRequest {
    pb::ListJobsRequest { filter: Some(filter), ..Default::default() }
}

async fn job_called(provider: &mut User, customer: &User, name: &str) -> pb::Job {
    let request = pb::CreateJobRequest {
        provider_job_id: name.to_owned(),
        provider_job_name: format!("job {name}"),
        ..provider.new_job(customer)
    };
    provider.jobs.create_job(request).await.unwrap().into_inner().job.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_job_is_pending_and_visible_to_its_provider_and_its_customer() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    let configuration = provider.configuration(&[("load", 10), ("report", 30)]).await;
    let job = provider.job(&customer).await;
    assert_eq!(job.status(), JobStatus::Pending);
    assert_eq!(job.progress, Some(pb::Progress { points_done: 0, points_total: 40, percent: 0 }));
    assert_eq!((job.last_sequence, job.closed_at), (0, None));
    assert_eq!(
        (
            &job.job_configuration_id,
            &job.configuration_tag,
            &job.configuration_version,
            &job.configuration_name
        ),
        (&configuration.id, &configuration.tag, &configuration.version, &configuration.name)
    );
    let party = |user: &User| pb::Party {
        id: user.id.clone(),
        first_name: "Ada".to_owned(),
        last_name: "Lovelace".to_owned(),
    };
    assert_eq!(
        (job.provider.clone(), job.customer.clone()),
        (Some(party(&provider)), Some(party(&customer)))
    );

    let steps = configuration.steps.iter().map(|step| pb::StepState {
        step_tag: step.tag.clone(),
        step_name: step.name.clone(),
        status: pb::StepStatus::ToCome.into(),
        percent: 0,
    });
    let steps = steps.collect();
    let expected =
        pb::GetJobResponse { job: Some(job.clone()), job_configuration: Some(configuration), steps };
    let by_provider_job_id = ByKey::ProviderJobId(job.provider_job_id.clone());
    assert_eq!(find(&mut provider, by_provider_job_id).await.unwrap(), expected);
    assert_eq!(find(&mut provider, ByKey::JobId(job.id.clone())).await.unwrap(), expected);
    assert_eq!(find(&mut customer, ByKey::JobId(job.id)).await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_job_of_another_user_is_not_found() {
    let server = TestServer::start().await;
    let (_provider, _, job) = server.job(&[("load", 1)]).await;
    for mut other_user in [server.provider().await, server.customer().await] {
        let refusal = assert_refused(
            find(&mut other_user, ByKey::JobId(job.id.clone())).await,
            Code::NotFound,
            ErrorReason::ResourceNotFound,
        );
        assert_eq!(refusal.details.resource_info().unwrap().resource_type, "milepost.v1.Job");
        assert_eq!(list(&mut other_user, pb::JobFilter::default(), 0).await, Vec::<String>::new());
    }
    let mut other_provider = server.provider().await;
    for answer in [
        find(&mut other_provider, ByKey::ProviderJobId(job.provider_job_id.clone())).await.map(|_| ()),
        other_provider.close(&job).await.map(|_| ()),
        other_provider.try_append(&job, [step("load")]).await.map(|_| ()),
    ] {
        assert_refused(answer, Code::NotFound, ErrorReason::ResourceNotFound);
    }
    assert_eq!(server.count("events").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_keeps_the_configuration_that_it_was_created_with() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let first = provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    provider.register(registration("2.0.0", &[("fetch", 7)])).await;

    let found = find(&mut provider, ByKey::JobId(job.id.clone())).await.unwrap();
    assert_eq!(found.job_configuration, Some(first));
    provider.append(&job, [step("load")]).await;
    let refused = provider.try_append(&job, [step("fetch")]).await;
    assert_refused(refused, Code::InvalidArgument, ErrorReason::FieldInvalid);

    let pinned =
        pb::CreateJobRequest { configuration_version: "1.0.0".to_owned(), ..provider.new_job(&customer) };
    let pinned = provider.jobs.create_job(pinned).await.unwrap().into_inner().job.unwrap();
    assert_eq!(pinned.configuration_version, "1.0.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn create_job_requires_an_existing_customer_and_configuration() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let valid = provider.new_job(&customer);
    let other_provider = server.provider().await;
    let unknown_id = "00000000-0000-7000-8000-000000000000";
    let for_customer = |id: &str| {
        let customer = Some(pb::create_job_request::Customer::CustomerId(id.to_owned()));
        pb::CreateJobRequest { customer, ..valid.clone() }
    };

    let cases = [
        (for_customer(unknown_id), "milepost.v1.User"),
        (for_customer(&other_provider.id), "milepost.v1.User"),
        (
            pb::CreateJobRequest { configuration_tag: "other".to_owned(), ..valid.clone() },
            "milepost.v1.JobConfiguration",
        ),
        (
            pb::CreateJobRequest { configuration_version: "9.0.0".to_owned(), ..valid.clone() },
            "milepost.v1.JobConfiguration",
        ),
    ];
    for (request, resource) in cases {
        let refusal = assert_refused(
            provider.jobs.create_job(request).await,
            Code::NotFound,
            ErrorReason::ResourceNotFound,
        );
        assert_eq!(refusal.details.resource_info().unwrap().resource_type, resource);
    }
    let malformed = pb::CreateJobRequest {
        provider_job_id: " scan".to_owned(),
        configuration_tag: String::new(),
        configuration_version: "one".to_owned(),
        provider_job_name: "x".repeat(257),
        ..for_customer("somebody")
    };
    assert_violations(
        provider.jobs.create_job(malformed).await,
        &[
            "provider_job_id",
            "customer_id",
            "configuration_tag",
            "configuration_version",
            "provider_job_name",
        ],
    );
    assert_eq!(server.count("jobs").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_listed_newest_first_and_filters_combine() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let (mut ada, grace) = (server.customer().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let other = pb::RegisterJobConfigurationRequest { tag: "other".to_owned(), ..registration("1.0.0", &[]) };
    provider.register(other).await;

    let mut jobs = Vec::new();
    for (name, customer) in [("a1", &ada), ("a2", &grace), ("b1", &ada), ("b2", &grace)] {
        jobs.push(job_called(&mut provider, customer, name).await);
    }
    let of_other_tag = pb::CreateJobRequest {
        provider_job_id: "c%_".to_owned(),
        configuration_tag: "other".to_owned(),
        ..provider.new_job(&ada)
    };
    provider.jobs.create_job(of_other_tag).await.unwrap();
    provider.append(&jobs[0], [complete()]).await;
    provider.append(&jobs[1], [error("lost")]).await;
    provider.append(&jobs[2], [step("load")]).await;
    provider.close(&jobs[1]).await.unwrap();

    let all = pb::JobFilter::default;
    let from_third = jobs[2].created_at;
    let cases = [
        (all(), vec!["c%_", "b2", "b1", "a2", "a1"]),
        (pb::JobFilter { statuses: vec![JobStatus::Pending.into()], ..all() }, vec!["c%_", "b2"]),
        (
            pb::JobFilter { statuses: vec![JobStatus::Complete.into(), JobStatus::Running.into()], ..all() },
            vec!["b1", "a1"],
        ),
        (pb::JobFilter { openness: JobOpenness::Closed.into(), ..all() }, vec!["a2", "a1"]),
        (pb::JobFilter { openness: JobOpenness::Open.into(), ..all() }, vec!["c%_", "b2", "b1"]),
        (pb::JobFilter { configuration_tag: "other".to_owned(), ..all() }, vec!["c%_"]),
        (pb::JobFilter { counterpart_id: grace.id.clone(), ..all() }, vec!["b2", "a2"]),
        (pb::JobFilter { provider_job_id_prefix: "b".to_owned(), ..all() }, vec!["b2", "b1"]),
        (pb::JobFilter { provider_job_id_prefix: "c%".to_owned(), ..all() }, vec!["c%_"]),
        (pb::JobFilter { provider_job_id_prefix: "_".to_owned(), ..all() }, vec![]),
        (pb::JobFilter { provider_job_name_prefix: "job a".to_owned(), ..all() }, vec!["a2", "a1"]),
        (pb::JobFilter { created_from: from_third, ..all() }, vec!["c%_", "b2", "b1"]),
        (pb::JobFilter { text: "OB B".to_owned(), ..all() }, vec!["b2", "b1"]),
        (pb::JobFilter { text: "C%_".to_owned(), ..all() }, vec!["c%_"]),
        (pb::JobFilter { text: "c__".to_owned(), ..all() }, vec![]),
        (pb::JobFilter { text: "1job".to_owned(), ..all() }, vec![]),
        (pb::JobFilter { created_before: from_third, ..all() }, vec!["a2", "a1"]),
        (
            pb::JobFilter {
                counterpart_id: ada.id.clone(),
                created_from: from_third,
                openness: JobOpenness::Open.into(),
                configuration_tag: "analysis".to_owned(),
                ..all()
            },
            vec!["b1"],
        ),
    ];
    for (filter, expected) in cases {
        for page_size in [0, 1, 2] {
            assert_eq!(list(&mut provider, filter.clone(), page_size).await, expected, "{filter:?}");
        }
    }
    assert_eq!(list(&mut ada, all(), 0).await, ["c%_", "b1", "a1"]);
    let of_provider = pb::JobFilter { counterpart_id: provider.id.clone(), ..all() };
    assert_eq!(list(&mut ada, of_provider, 0).await, ["c%_", "b1", "a1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_searched_by_three_characters_at_least() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let named = async |provider: &mut User, name: &str| {
        let new = pb::CreateJobRequest { provider_job_name: name.to_owned(), ..provider.new_job(&customer) };
        provider.jobs.create_job(new).await.unwrap().into_inner().job.unwrap()
    };
    let job = named(&mut provider, "Größe ΑΒΓ 中文字 \\_%").await;
    named(&mut provider, "another").await;
    let search = |text: &str| {
        let filter = Some(pb::JobFilter { text: text.to_owned(), ..Default::default() });
        pb::ListJobsRequest { filter, ..Default::default() }
    };
    for text in ["größe", "GRÖSSE", "αβγ", "中文字", "\\_%", " \\_", "öße α", &job.provider_job_id]
    {
        let found = provider.jobs.list_jobs(search(text)).await.unwrap().into_inner().jobs;
        let expected = if text == "GRÖSSE" { vec![] } else { vec![job.clone()] };
        assert_eq!(found, expected, "{text}");
    }
    for short in ["x", "中文", "%%"] {
        assert_violations(provider.jobs.list_jobs(search(short)).await, &["filter.text"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_by_an_unknown_configuration_tag_is_not_found_for_a_provider_and_empty_for_a_customer() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    let of_tag = |tag: &str| pb::JobFilter { configuration_tag: tag.to_owned(), ..Default::default() };
    let stored = provider.configuration(&[]).await;
    assert_eq!(
        list(&mut provider, of_tag(&stored.tag), 0).await,
        Vec::<String>::new(),
        "no job of the tag yet"
    );
    let job = provider.job(&customer).await;
    assert_eq!(list(&mut provider, of_tag(&stored.tag), 0).await, [job.provider_job_id]);

    let refusal = assert_refused(
        provider.jobs.list_jobs(by(of_tag("analysys"))).await,
        Code::NotFound,
        ErrorReason::ResourceNotFound,
    );
    let resource = refusal.details.resource_info().unwrap().clone();
    assert_eq!(
        (resource.resource_type.as_str(), resource.resource_name.as_str()),
        ("milepost.v1.JobConfiguration", "analysys")
    );
    assert_eq!(list(&mut customer, of_tag("analysys"), 0).await, Vec::<String>::new());
    for user in [&mut provider, &mut customer] {
        assert_violations(user.jobs.list_jobs(by(of_tag("analysis "))).await, &["filter.configuration_tag"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reversed_creation_time_range_is_refused() {
    let server = TestServer::start().await;
    let mut customer = server.customer().await;
    let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    let range = |from, before| pb::JobFilter {
        created_from: at(from),
        created_before: at(before),
        ..Default::default()
    };
    assert_violations(customer.jobs.list_jobs(by(range(2, 1))).await, &["filter.created_before"]);
    assert_eq!(list(&mut customer, range(2, 2), 0).await, Vec::<String>::new(), "a range may be empty");
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_a_job_cancels_it_unless_it_has_failed() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1), ("report", 1)]).await;
    let cases = [
        (vec![], JobStatus::Cancelled, 0),
        (vec![step("load")], JobStatus::Cancelled, 50),
        (vec![step("load"), error("lost")], JobStatus::Failed, 50),
    ];
    for (events, status, percent) in cases {
        let job = provider.job(&customer).await;
        let before = events.len();
        if before > 0 {
            provider.append(&job, events).await;
        }
        let closed = provider.close(&job).await.unwrap().job.unwrap();
        assert_eq!((closed.status(), closed.progress.unwrap().percent), (status, percent));
        assert!(closed.closed_at.is_some());
        let last = provider.list(&job).await.pop().unwrap();
        assert_eq!((last.kind(), last.sequence), (pb::EventKind::Close, before as i64 + 1));
        assert_eq!((last.name.as_str(), last.status()), ("no longer needed", status));

        let refused = provider.try_append(&job, [step("load")]).await;
        let refusal = assert_refused(refused, Code::FailedPrecondition, ErrorReason::JobClosed);
        assert_eq!(refusal.metadata["status"], status.as_str_name().trim_start_matches("JOB_STATUS_"));
        assert!(refusal.details.precondition_failure().is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_job_has_closed_at_and_updated_at_of_its_last_event() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let [completed, cancelled] = [provider.job(&customer).await, provider.job(&customer).await];
    provider.append(&completed, [info("started"), complete()]).await;
    provider.close(&cancelled).await.unwrap();
    for job in [completed, cancelled] {
        let last = provider.list(&job).await.pop().unwrap();
        let closed = provider.get(&job).await;
        assert!(closed.closed_at.is_some());
        assert_eq!((closed.closed_at, closed.updated_at), (last.created_at, last.created_at));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_job_cannot_be_closed() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [complete()]).await;
    let refusal =
        assert_refused(provider.close(&job).await, Code::FailedPrecondition, ErrorReason::JobClosed);
    assert_eq!(refusal.metadata["status"], "COMPLETE");
    assert_eq!(provider.list(&job).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_valid_job_key_is_refused() {
    let server = TestServer::start().await;
    let (mut provider, _) = (server.provider().await, server.customer().await);
    assert_violations(provider.jobs.get_job(pb::GetJobRequest { job: None }).await, &["job"]);
    let not_an_id = Some(close_job_request::Job::JobId("scan-1".to_owned()));
    let request = pb::CloseJobRequest { job: not_an_id, reason: String::new() };
    assert_violations(provider.jobs.close_job(request).await, &["job_id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_all_jobs_delivers_the_events_of_the_callers_jobs_only() {
    let server = TestServer::start().await;
    let (mut ada, mut grace) = (server.customer().await, server.customer().await);
    let (mut provider, mut other) = (server.provider().await, server.provider().await);
    provider.configuration(&[]).await;
    other.configuration(&[]).await;
    let mut watches = [ada.watch_all().await, provider.watch_all().await, grace.watch_all().await];
    for watch in &mut watches {
        assert_eq!(watch.caught_up().await.0, []);
    }
    let [of_ada, of_provider, of_grace] = &mut watches;

    // One job for each pair of provider and customer.
    let first = provider.job(&ada).await;
    provider.append(&first, [info("first")]).await;
    let second = other.job(&ada).await;
    other.append(&second, [info("second")]).await;
    let third = other.job(&grace).await;
    other.append(&third, [info("third")]).await;
    let fourth = provider.job(&grace).await;
    provider.append(&fourth, [info("fourth")]).await;

    for (watch, expected) in
        [(of_ada, ["first", "second"]), (of_provider, ["first", "fourth"]), (of_grace, ["third", "fourth"])]
    {
        let mut names = Vec::new();
        while names.len() < expected.len() {
            names.extend(watch.events(1).await.into_iter().map(|event| event.name));
        }
        names.sort();
        let mut expected = expected.map(str::to_owned);
        expected.sort();
        assert_eq!(names, expected);
    }
}
