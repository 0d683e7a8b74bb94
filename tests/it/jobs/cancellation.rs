//! RequestCancellation: a customer asks, the provider hears of it and decides.

use milepost_client::pb::{self, ApiKeyScope, ErrorReason, EventKind, JobStatus};
use tonic::{Code, Status};

use crate::support::{TestServer, User, assert_refused, assert_violations, complete, info};

async fn request(
    customer: &mut User,
    job: &pb::Job,
    reason: &str,
) -> Result<pb::RequestCancellationResponse, Status> {
    let request = pb::RequestCancellationRequest { job_id: job.id.clone(), reason: reason.to_owned() };
    Ok(customer.session.jobs.request_cancellation(request).await?.into_inner())
}

async fn append(provider: &mut User, job: &pb::Job, event: pb::NewEvent) -> pb::AppendEventsResponse {
    let job = Some(pb::append_events_request::Job::JobId(job.id.clone()));
    let request = pb::AppendEventsRequest { job, events: vec![event], ..Default::default() };
    provider.events.append_events(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_provider_hears_of_a_requested_cancellation_and_decides() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let mut elsewhere = replica.same(&provider);
    let mut watch = elsewhere.watch(&job).await;
    watch.caught_up().await;
    // The replica remembers the job's state from before.
    assert_eq!(append(&mut elsewhere, &job, info("began")).await.cancellation_requested_at, None);
    watch.events(1).await;

    let asked = request(&mut customer, &job, "not needed any more").await.unwrap();
    assert!(!asked.existed);
    let told = watch.events(1).await.remove(0);
    let expected = (EventKind::CancellationRequested, "not needed any more", 2, JobStatus::Running);
    assert_eq!((told.kind(), told.name.as_str(), told.sequence, told.status()), expected);
    let job = asked.job.unwrap();
    assert_eq!((job.status(), job.last_sequence), (JobStatus::Running, 2));
    assert_eq!(job.cancellation_requested_at, told.created_at);
    assert!(told.created_at.is_some());

    for provider in [&mut provider, &mut elsewhere] {
        let event = info("going on");
        for existed in [false, true] {
            let answer = append(provider, &job, event.clone()).await;
            assert_eq!(answer.events[0].existed, existed);
            assert_eq!(answer.cancellation_requested_at, told.created_at);
        }
    }
    let again = request(&mut customer, &job, "another reason").await.unwrap();
    assert!(again.existed);
    assert_eq!(again.job.unwrap().last_sequence, 4);

    append(&mut provider, &job, complete()).await;
    assert!(request(&mut customer, &job, "").await.unwrap().existed, "on a closed job, too");
    let kinds: Vec<_> = provider.list(&job).await.iter().map(pb::Event::kind).collect();
    use EventKind::{CancellationRequested, Complete, Info};
    assert_eq!(kinds, [Info, CancellationRequested, Info, Info, Complete]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pending_job_stays_pending_and_a_closed_one_refuses() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let pending = request(&mut customer, &job, "").await.unwrap().job.unwrap();
    assert_eq!((pending.status(), pending.last_sequence), (JobStatus::Pending, 1));
    let appended = append(&mut provider, &job, info("began")).await;
    assert_eq!(appended.events[0].status(), JobStatus::Running);
    let closed = provider.job(&customer).await;
    provider.close(&closed).await.unwrap();
    assert_refused(
        request(&mut customer, &closed, "").await,
        Code::FailedPrecondition,
        ErrorReason::JobClosed,
    );
    assert_eq!(provider.list(&closed).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_write_one_event() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    let calls = (0..40).map(|number| {
        let mut customer = if number % 2 == 0 { server.same(&customer) } else { replica.same(&customer) };
        let job = job.clone();
        async move { request(&mut customer, &job, &format!("{number}")).await.unwrap() }
    });
    let answers = futures_util::future::join_all(calls).await;
    assert_eq!(answers.iter().filter(|answer| !answer.existed).count(), 1);
    assert_eq!(provider.list(&job).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_customers_key_needs_the_scope_append() {
    let server = TestServer::start().await;
    let (_provider, mut customer, job) = server.job(&[]).await;
    let asked = pb::RequestCancellationRequest { job_id: job.id.clone(), reason: String::new() };
    let without = customer.jobs.request_cancellation(asked.clone()).await;
    assert_refused(without, Code::PermissionDenied, ErrorReason::ScopeRequired);
    let (_, secret) = customer.create_key(&[ApiKeyScope::Append]).await;
    let mut with = server.with_secret(&secret);
    assert!(!with.jobs.request_cancellation(asked).await.unwrap().into_inner().existed);

    let long = pb::RequestCancellationRequest { job_id: "x".to_owned(), reason: "x".repeat(257) };
    let answer = with.jobs.request_cancellation(long).await;
    assert_violations(answer, &["job_id", "reason"]);
}
