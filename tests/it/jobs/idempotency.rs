//! A repeated write with a natural key takes effect once, and its answer sets `existed`.

use milepost_client::pb::{self, ErrorReason, NewEvent};
use prost_types::{Timestamp, Value};
use tonic::{Code, Request};
use uuid::Uuid;

use crate::support::{
    TestServer, assert_refused, complete, info, named, progress, registration, step, with_metadata,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_registration_changes_nothing_and_sets_existed() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let mut request = registration("1.0.0", &[("load", 10), ("report", 1)]);
    request.steps[0].metadata =
        vec![pb::MetadataConfiguration { name: "mean".to_owned(), ..Default::default() }];
    let first =
        provider.configurations.register_job_configuration(request.clone()).await.unwrap().into_inner();
    assert!(!first.existed);
    let before = server.stored().await;
    let again =
        provider.configurations.register_job_configuration(request.clone()).await.unwrap().into_inner();
    assert!(again.existed);
    assert_eq!(again.job_configuration, first.job_configuration);

    type Change = fn(&mut pb::RegisterJobConfigurationRequest);
    let changes: [(Change, &str); 7] = [
        (|r| r.name = "Other".to_owned(), "name"),
        (|r| r.steps[1].points = 2, "steps[1].points"),
        (|r| r.steps[1].name = "Other".to_owned(), "steps[1].name"),
        (|r| r.steps[0].metadata[0].units = "HU".to_owned(), "steps[0].metadata[0].units"),
        (|r| r.steps.swap(0, 1), "steps"),
        (|r| r.steps.truncate(1), "steps"),
        (|r| r.steps.insert(1, registration("1.0.0", &[("archive", 1)]).steps.remove(0)), "steps[1]"),
    ];
    for (change, field) in changes {
        let mut other = request.clone();
        change(&mut other);
        let refusal = assert_refused(
            provider.configurations.register_job_configuration(other).await,
            Code::AlreadyExists,
            ErrorReason::JobConfigurationDiffers,
        );
        assert_eq!(refusal.fields, [field]);
    }
    assert_eq!(server.stored().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_concurrent_identical_registrations_insert_one_row_and_all_succeed() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let provider = server.provider().await;
    let request = registration("1.0.0", &[("load", 10), ("report", 1)]);
    let calls: Vec<_> = (0..10)
        .map(|n| {
            let mut caller = if n % 2 == 0 { provider.clone() } else { replica.same(&provider) };
            let request = request.clone();
            tokio::spawn(async move { caller.configurations.register_job_configuration(request).await })
        })
        .collect();
    let mut ids = Vec::new();
    let mut new = 0;
    for call in calls {
        let response = call.await.unwrap().unwrap().into_inner();
        new += usize::from(!response.existed);
        ids.push(response.job_configuration.unwrap().id);
    }
    ids.dedup();
    assert_eq!((ids.len(), new), (1, 1));
    assert_eq!(server.count("job_configurations").await, 1);
    assert_eq!(server.count("step_configurations").await, 2);
}

fn by_id(customer_id: &str) -> Option<pb::create_job_request::Customer> {
    Some(pb::create_job_request::Customer::CustomerId(customer_id.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_create_job_changes_nothing_and_sets_existed() {
    let server = TestServer::start().await;
    let (mut provider, customer, other) =
        (server.provider().await, server.customer().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let request = provider.new_job(&customer);
    let first = provider.jobs.create_job(request.clone()).await.unwrap().into_inner();
    assert!(!first.existed);

    // A request without a version matches even though a later version exists.
    provider.register(registration("2.0.0", &[])).await;
    let same_version = pb::CreateJobRequest { configuration_version: "1.0.0".to_owned(), ..request.clone() };
    for request in [request.clone(), same_version] {
        let again = provider.jobs.create_job(request).await.unwrap().into_inner();
        assert!(again.existed);
        assert_eq!(again.job, first.job);
    }

    let cases = [
        (pb::CreateJobRequest { customer: by_id(&other.id), ..request.clone() }, "customer_id"),
        (pb::CreateJobRequest { provider_job_name: "x".to_owned(), ..request.clone() }, "provider_job_name"),
        (
            pb::CreateJobRequest { configuration_version: "2.0.0".to_owned(), ..request.clone() },
            "configuration_version",
        ),
    ];
    for (request, field) in cases {
        let answer = provider.jobs.create_job(request).await;
        let refusal = assert_refused(answer, Code::AlreadyExists, ErrorReason::JobDiffers);
        assert_eq!(refusal.fields, [field]);
    }
    assert_eq!(server.count("jobs").await, 1);

    // A closed job is answered in the same way.
    provider.append(&first.job.unwrap(), [complete()]).await;
    let again = provider.jobs.create_job(request).await.unwrap().into_inner();
    assert!(again.existed && again.job.unwrap().closed_at.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_concurrent_identical_create_jobs_insert_one_job() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let request = provider.new_job(&customer);
    let calls: Vec<_> = (0..10)
        .map(|_| {
            let (mut caller, request) = (provider.clone(), request.clone());
            tokio::spawn(async move { caller.jobs.create_job(request).await })
        })
        .collect();
    let mut new = 0;
    for call in calls {
        new += usize::from(!call.await.unwrap().unwrap().into_inner().existed);
    }
    assert_eq!((new, server.count("jobs").await), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_batch_is_answered_with_its_stored_events_even_after_the_job_is_closed() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1), ("report", 1)]).await;
    let first = [step("load"), with_metadata(info("half"), [("mean", Value::from(0.5))])];
    let second = [step("report"), complete()];
    let answers = [provider.append(&job, first.clone()).await, provider.append(&job, second.clone()).await];
    let before = server.stored().await;

    for (batch, answer) in [first, second].into_iter().zip(answers) {
        let expected: Vec<_> =
            answer.into_iter().map(|event| pb::AppendedEvent { existed: true, ..event }).collect();
        assert_eq!(provider.append(&job, batch).await, expected, "status and progress as of each event");
    }
    assert_eq!(server.stored().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_new_events_of_a_mixed_batch_are_appended_in_request_order() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let (a, b, c, d) = (info("a"), info("b"), info("c"), info("d"));
    provider.append(&job, [b.clone(), d.clone()]).await;
    let appended = provider.append(&job, [a, b, c, d]).await;
    let answered: Vec<_> = appended.iter().map(|event| (event.sequence, event.existed)).collect();
    assert_eq!(answered, [(3, false), (1, true), (4, false), (2, true)]);
    let names: Vec<_> = provider.list(&job).await.into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["b", "d", "a", "c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mixed_batch_to_a_closed_job_is_refused_as_a_whole() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let done = complete();
    provider.append(&job, [done.clone()]).await;
    let refused = provider.try_append(&job, [done, info("late")]).await;
    assert_refused(refused, Code::FailedPrecondition, ErrorReason::JobClosed);
    assert_eq!(provider.list(&job).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_event_id_with_other_content_is_refused_with_the_fields_that_differ() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1), ("report", 1)]).await;
    let mut stored = with_metadata(step("load"), [("mean", Value::from(0.5)), ("unit", Value::from("HU"))]);
    stored.occurred_at = Some(Timestamp { seconds: 1_700_000_000, nanos: 123_456_789 });
    provider.append(&job, [stored.clone()]).await;

    let cases = [
        (NewEvent { kind: pb::EventKind::Info.into(), ..stored.clone() }, "events[1].kind"),
        (named(stored.clone(), "other"), "events[1].name"),
        (NewEvent { step_tag: "report".to_owned(), ..stored.clone() }, "events[1].step_tag"),
        (NewEvent { metadata: None, ..stored.clone() }, "events[1].metadata"),
        (
            with_metadata(stored.clone(), [("mean", Value::from("0.5")), ("unit", Value::from("HU"))]),
            "events[1].metadata",
        ),
        (NewEvent { occurred_at: None, ..stored.clone() }, "events[1].occurred_at"),
    ];
    for (event, field) in cases {
        let answer = provider.try_append(&job, [info("new"), event]).await;
        let refusal = assert_refused(answer, Code::AlreadyExists, ErrorReason::EventDiffers);
        assert!(refusal.fields.iter().all(|found| found.starts_with(field)), "{field}: {:?}", refusal.fields);
        assert!(!refusal.fields.is_empty());
    }
    assert_eq!(provider.list(&job).await.len(), 1, "no event of a refused batch is stored");
    let moved = progress("report", 0);
    provider.append(&job, [moved.clone()]).await;
    let answer = provider.try_append(&job, [NewEvent { step_percent: None, ..moved.clone() }]).await;
    let refusal = assert_refused(answer, Code::AlreadyExists, ErrorReason::EventDiffers);
    assert_eq!(refusal.fields, ["events[0].step_percent"]);
    assert!(provider.append(&job, [moved]).await[0].existed);

    // `occurred_at` is compared in microseconds and an id without regard to case.
    let mut same = stored.clone();
    same.id = stored.id.to_uppercase();
    same.occurred_at = Some(Timestamp { seconds: 1_700_000_000, nanos: 123_456_000 });
    assert!(provider.append(&job, [same]).await[0].existed);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_jobs_may_have_events_with_the_same_id() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let (one, two) = (provider.job(&customer).await, provider.job(&customer).await);
    let event = info("x");
    assert!(!provider.append(&one, [event.clone()]).await[0].existed);
    assert!(!provider.append(&two, [event]).await[0].existed);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_without_an_id_is_appended_each_time_it_is_sent() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let event = NewEvent { id: String::new(), ..info("x") };
    let appended = provider.append(&job, [event.clone(), event]).await;
    assert_eq!((appended[0].sequence, appended[1].sequence), (1, 2));
    assert_ne!(appended[0].id, appended[1].id);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_concurrent_identical_batches_are_appended_once() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let batch = [info("a"), info("b"), info("c")];
    let calls: Vec<_> = (0..10)
        .map(|n| {
            let mut caller = if n % 2 == 0 { provider.clone() } else { replica.same(&provider) };
            let (job, batch) = (job.clone(), batch.clone());
            tokio::spawn(async move { caller.append(&job, batch).await })
        })
        .collect();
    let mut new = 0;
    for call in calls {
        let appended = call.await.unwrap();
        assert_eq!(appended.iter().map(|event| event.sequence).collect::<Vec<_>>(), [1, 2, 3]);
        new += appended.iter().filter(|event| !event.existed).count();
    }
    assert_eq!(new, 3);
    assert_eq!(provider.list(&job).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_close_changes_nothing_and_sets_existed() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let first = provider.close(&job).await.unwrap();
    assert!(!first.existed);
    let by_provider_job_id = pb::CloseJobRequest {
        job: Some(pb::close_job_request::Job::ProviderJobId(job.provider_job_id.clone())),
        reason: "another reason".to_owned(),
    };
    let again = provider.jobs.close_job(Request::new(by_provider_job_id)).await.unwrap().into_inner();
    assert!(again.existed);
    assert_eq!(again.job, first.job);
    assert_eq!(provider.list(&job).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_create_job_is_compared_even_if_its_customer_is_disabled() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let stored = provider.new_job(&customer);
    let job = provider.jobs.create_job(stored.clone()).await.unwrap().into_inner().job.unwrap();
    server
        .database
        .execute(&format!("UPDATE users SET disabled_at = now() WHERE id = '{}'", customer.id))
        .await;

    let again = provider.jobs.create_job(stored.clone()).await.unwrap().into_inner();
    assert!(again.existed && again.job.unwrap().id == job.id);
    let renamed = pb::CreateJobRequest { provider_job_name: "Another".to_owned(), ..stored.clone() };
    let of_other_customer =
        pb::CreateJobRequest { customer: by_id(&Uuid::now_v7().to_string()), ..stored.clone() };
    let of_other_tag = pb::CreateJobRequest { configuration_tag: "none".to_owned(), ..stored.clone() };
    for (request, field) in [
        (renamed, "provider_job_name"),
        (of_other_customer, "customer_id"),
        (of_other_tag, "configuration_tag"),
    ] {
        let refused = provider.jobs.create_job(request).await;
        let refusal = assert_refused(refused, Code::AlreadyExists, ErrorReason::JobDiffers);
        assert_eq!(refusal.fields, [field]);
    }
    let new = pb::CreateJobRequest { provider_job_id: "new".to_owned(), ..stored };
    let refused = provider.jobs.create_job(new).await;
    assert_refused(refused, Code::NotFound, ErrorReason::ResourceNotFound);
}
