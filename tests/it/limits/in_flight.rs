//! What one user may have in flight on a server, and how fast.

use std::time::{Duration, Instant};

use diesel_async::SimpleAsyncConnection as _;
use futures_util::future::join_all;
use milepost::limits::{BATCH_EVENTS, MESSAGE_CHARGE_BYTES};
use milepost_client::pb::{self, ErrorReason, publish_events_response::Outcome};
use tokio::task::JoinSet;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::support::{Caller, TestServer, User, assert_refused, info, registration, within_timeout};

async fn who_am_i(caller: &Caller) -> Result<(), Status> {
    caller.current_user().await.map(drop)
}

/// Asserts that there are too many of this; returns when to try again.
#[track_caller]
fn assert_too_many(answer: Result<(), Status>, what: &str) -> Duration {
    let refusal = assert_refused(answer, Code::ResourceExhausted, ErrorReason::Overloaded);
    assert_eq!(refusal.details.quota_failure().expect("a QuotaFailure").violations[0].subject, what);
    refusal.details.retry_info().expect("RetryInfo").retry_delay.expect("a delay")
}

/// Whether a call is refused since there are too many of this.
fn is_too_many(answer: &Result<(), Status>, what: &str) -> bool {
    let failure = answer.as_ref().err().and_then(Status::get_details_quota_failure);
    failure.is_some_and(|failure| failure.violations[0].subject == what)
}

fn batch(job: &pb::Job, events: usize) -> pb::AppendEventsRequest {
    pb::AppendEventsRequest {
        job: Some(pb::append_events_request::Job::JobId(job.id.clone())),
        expected_sequence: None,
        events: (0..events).map(|_| info("x")).collect(),
    }
}

/// A provider with a job, to which the server appends without a look-up.
async fn scene(server: &TestServer) -> (User, pb::Job) {
    let (mut provider, _, job) = server.job(&[]).await;
    provider.append(&job, [info("first")]).await;
    (provider, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_beyond_the_rate_of_their_user_are_refused_until_the_time_in_the_refusal() {
    let server = TestServer::with_tenants(|tenants| tenants.calls_per_second = 1).await;
    let (busy, quiet) = (server.provider().await, server.provider().await);
    let answers = join_all((0..20).map(|_| who_am_i(&busy.key))).await;
    let refused = answers.into_iter().find(Result::is_err).expect("more than one a second");
    let delay = assert_too_many(refused, "calls a second of one user");
    assert!(!delay.is_zero() && delay <= Duration::from_secs(2), "{delay:?}");
    within_timeout("a call of another user", async {
        while is_too_many(&who_am_i(&quiet.key).await, "calls a second of one user") {
            tokio::time::sleep(delay).await;
        }
    })
    .await;
    within_timeout("the rate to allow a call", async {
        while let refused @ Err(_) = who_am_i(&busy.key).await {
            tokio::time::sleep(assert_too_many(refused, "calls a second of one user")).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_call_more_than_a_user_may_have_in_flight_is_refused_until_one_of_them_ends() {
    let server = TestServer::with_tenants(|tenants| tenants.calls_in_flight = 2).await;
    let (busy, quiet) = (server.provider().await, server.provider().await);
    let mut locker = server.database.lock("step_configurations").await;
    let mut calls = JoinSet::new();
    for version in ["1.0.0", "2.0.0"] {
        let mut busy = busy.clone();
        calls.spawn(async move { busy.register(registration(version, &[("load", 1)])).await });
    }
    server.database.wait_for_locks(2).await;
    assert_too_many(who_am_i(&busy.key).await, "calls of one user");
    assert_too_many(who_am_i(&busy.session).await, "calls of one user");
    who_am_i(&quiet.key).await.unwrap();
    locker.batch_execute("ROLLBACK").await.unwrap();
    within_timeout("the calls to end", calls.join_all()).await;
    who_am_i(&busy.key).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn events_beyond_the_rate_are_refused_in_calls_and_read_more_slowly_from_streams() {
    let server = TestServer::with_tenants(|tenants| tenants.events_per_second = 500).await;
    let (provider, job) = scene(&server).await;
    let append = || {
        let (mut provider, batch) = (provider.clone(), batch(&job, BATCH_EVENTS));
        async move { provider.events.append_events(batch).await.map(drop) }
    };
    let answers = join_all((0..8).map(|_| append())).await;
    let refused = answers.into_iter().find(Result::is_err).expect("more than 500 events a second");
    assert_too_many(refused, "events a second of one user");

    let begun = Instant::now();
    let batches = (0..3).map(|n| {
        let pb::AppendEventsRequest { events, .. } = batch(&job, BATCH_EVENTS);
        let id = pb::publish_events_request::Job::JobId(job.id.clone());
        pb::PublishEventsRequest { batch_id: n.to_string(), job: Some(id), expected_sequence: None, events }
    });
    let batches = tokio_stream::iter(batches.collect::<Vec<_>>());
    let mut answers = provider.clone().events.publish_events(batches).await.unwrap().into_inner();
    let mut appended = 0;
    while let Some(answer) = within_timeout("an answer", answers.message()).await.unwrap() {
        assert!(matches!(answer.outcome, Some(Outcome::Appended(_))), "{answer:?}");
        appended += 1;
    }
    assert_eq!(appended, 3, "no batch of a stream is refused for its rate");
    // 1,500 events, of which the first 500 may come at once.
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_counts_until_the_log_does_not_hold_it_also_if_its_caller_has_left() {
    const WHAT: &str = "bytes of messages of one user";
    let server = TestServer::with_tenants(|tenants| tenants.bytes_in_flight_mib = 1).await;
    let (provider, job) = scene(&server).await;
    let quiet = server.provider().await;
    let mut locker = server.database.lock_job(&job).await;
    let mut calls = JoinSet::new();
    for _ in 0..2 * 1024 * 1024 / MESSAGE_CHARGE_BYTES {
        let (mut provider, batch) = (provider.clone(), batch(&job, 1));
        calls.spawn(async move { provider.events.append_events(batch).await.map(drop) });
    }
    // As many as there is room for wait for the lock; the others are refused.
    let refused = within_timeout("a refusal", calls.join_next()).await.unwrap().unwrap();
    assert_too_many(refused, WHAT);
    assert!(is_too_many(&who_am_i(&provider.key).await, WHAT));
    who_am_i(&quiet.key).await.unwrap();
    calls.shutdown().await;
    assert!(is_too_many(&who_am_i(&provider.key).await, WHAT), "the log still holds the batches");
    locker.batch_execute("ROLLBACK").await.unwrap();
    within_timeout("room for a call", async { while is_too_many(&who_am_i(&provider.key).await, WHAT) {} })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_waits_for_room_and_goes_on() {
    let server = TestServer::with_tenants(|tenants| tenants.bytes_in_flight_mib = 1).await;
    let (provider, job) = scene(&server).await;
    let mut streams = JoinSet::new();
    // Together they have more unanswered batches than there is room for.
    for _ in 0..20 {
        let id = pb::publish_events_request::Job::JobId(job.id.clone());
        let batches = (0..20).map(move |n| pb::PublishEventsRequest {
            batch_id: format!("{n}{}", "x".repeat(200)),
            job: Some(id.clone()),
            expected_sequence: None,
            events: vec![info("x")],
        });
        let mut provider = provider.clone();
        streams.spawn(async move {
            let batches = tokio_stream::iter(batches);
            let mut answers = provider.events.publish_events(batches).await.unwrap().into_inner();
            let mut appended = 0;
            while let Some(answer) = answers.message().await.unwrap() {
                assert!(matches!(answer.outcome, Some(Outcome::Appended(_))), "{answer:?}");
                appended += 1;
            }
            appended
        });
    }
    let appended = within_timeout("all answers", streams.join_all()).await;
    assert_eq!(appended, [20; 20]);
}
