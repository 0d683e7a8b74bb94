//! Outages of the database: what calls and watches get during and after one. A database
//! with high latency is none.

use std::time::Duration;

use futures_util::future::join_all;
use milepost_client::pb::{self, ErrorReason, watch_events_response::Message};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{
    Caller, Mode, TestServer, User, Watch, assert_refused, info, processes::Stopped, registration,
    within_timeout,
};

/// Longest time for a refusal once the outage is known; far below any timeout.
const REFUSAL: Duration = Duration::from_secs(1);
/// Longest time until the outage of a database that does not answer is known.
const DETECTION: Duration = Duration::from_secs(4);
/// Longest time from the end of the outage to full service.
const RECOVERY: Duration = Duration::from_secs(2);
/// The same after [`Mode::Discard`]. Connections begun during the outage never get an
/// answer and first have to time out.
const RECOVERY_FROM_SILENCE: Duration = Duration::from_secs(3);

#[track_caller]
fn assert_unavailable<T: std::fmt::Debug>(method: &str, answer: Result<T, Status>) {
    assert!(answer.is_err(), "{method}: {answer:?}");
    let refusal = assert_refused(answer, Code::Unavailable, ErrorReason::DatabaseUnavailable);
    assert!(refusal.details.retry_info().is_some_and(|info| info.retry_delay.is_some()), "{method}");
}

/// Asserts that calls of every kind are refused as unavailable, each within [`REFUSAL`].
async fn assert_all_refused_at_once(provider: &mut User, customer: &User, job: &pb::Job) {
    let by_id = || Some(pb::get_job_request::Job::JobId(job.id.clone()));
    let new_job = provider.new_job(customer);
    let Caller { mut auth, mut configurations, mut jobs, mut events } = provider.key.clone();
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let listed = Some(pb::list_events_request::Job::JobId(job.id.clone()));
    macro_rules! refused {
        ($($name:literal: $call:expr;)*) => {$(
            let answer = timeout(REFUSAL, $call).await;
            assert_unavailable($name, answer.unwrap_or_else(|_| panic!("{} is not refused at once", $name)));
        )*};
    }
    refused! {
        "LogIn": auth.log_in(pb::LogInRequest { email: provider.email.clone(), password: "wrong password".into() });
        "ListApiKeys": provider.session.auth.list_api_keys(pb::ListApiKeysRequest::default());
        "RegisterJobConfiguration": configurations.register_job_configuration(registration("9.9.9", &[]));
        "CreateJob": jobs.create_job(new_job);
        "GetJob": jobs.get_job(pb::GetJobRequest { job: by_id() });
        "ListJobs": jobs.list_jobs(pb::ListJobsRequest::default());
        "ListEvents": events.list_events(pb::ListEventsRequest { job: listed, ..Default::default() });
        "WatchEvents": events.watch_events(pb::WatchEventsRequest { scope, ..Default::default() });
        "AppendEvents": provider.try_append(job, [info("refused")]);
        "CloseJob": provider.close(job);
    }
    let batch = pb::PublishEventsRequest {
        batch_id: "1".into(),
        job: Some(pb::publish_events_request::Job::JobId(job.id.clone())),
        expected_sequence: None,
        events: vec![info("refused")],
    };
    let publish =
        async { events.publish_events(tokio_stream::once(batch)).await?.into_inner().message().await };
    assert_unavailable(
        "PublishEvents",
        timeout(REFUSAL, publish).await.expect("PublishEvents is refused at once"),
    );
}

/// The names of the events that a live watch receives, up to the name `last`. Any other
/// message is a panic.
pub(super) async fn events_until(watch: &mut Watch, last: &str) -> Vec<String> {
    let mut names = Vec::new();
    while names.last().is_none_or(|name| name != last) {
        match watch.next().await.unwrap() {
            Some(Message::Events(watched)) => {
                names.extend(watched.events.into_iter().map(|event| event.name))
            }
            other => panic!("{other:?} after {names:?}"),
        }
    }
    names
}

async fn test_outage(mode: Mode) {
    let (server, proxy) = TestServer::through_proxy().await;
    server.wait_for_health("", ServingStatus::Serving).await;
    let (mut provider, customer, job) = server.job(&[]).await;
    // Connected without the proxy, so that it appends during the outage.
    let replica = server.replica().await;
    let mut elsewhere = replica.same(&provider);
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let heartbeat_interval = Some(prost_types::Duration { seconds: 5, nanos: 0 });
    let request = pb::WatchEventsRequest { scope, heartbeat_interval, ..Default::default() };
    let mut watch = server.same(&customer).watch_by(request).await.unwrap();
    watch.caught_up().await;

    proxy.set(mode);
    let began = Instant::now();
    // Calls in flight when the outage begins are refused as well, and so are calls
    // made before the outage is known.
    let (mut writer, mut reader) = (provider.clone(), provider.clone());
    let get = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(job.id.clone())) };
    let (appended, read) = within_timeout(
        "the first refusals",
        futures_util::future::join(writer.try_append(&job, [info("lost")]), async {
            reader.jobs.get_job(get).await
        }),
    )
    .await;
    assert_unavailable("the first AppendEvents", appended);
    assert_unavailable("the first GetJob", read);
    server.wait_for_health("", ServingStatus::NotServing).await;
    assert!(began.elapsed() < DETECTION, "the outage was known after {:?}", began.elapsed());
    assert_all_refused_at_once(&mut provider, &customer, &job).await;
    server.wait_for_health("liveness", ServingStatus::Serving).await;
    // Longer than the heartbeat interval. A heartbeat would claim that every committed
    // event was sent.
    let silence = timeout(Duration::from_secs(6), watch.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    // By now the credentials have been unconfirmed for too long; the refusals are the same.
    assert_all_refused_at_once(&mut provider, &customer, &job).await;

    elsewhere.append(&job, [info("meanwhile")]).await;
    proxy.set(Mode::Pass);
    let restored = Instant::now();
    let service = async {
        let append = async {
            while let Err(status) = writer.try_append(&job, [info("back")]).await {
                assert_eq!(status.code(), Code::Unavailable);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let watched = events_until(&mut watch, "back");
        let ((), seen, ()) =
            tokio::join!(append, watched, server.wait_for_health("", ServingStatus::Serving));
        assert_eq!(seen, ["meanwhile", "back"]);
        provider.get(&job).await;
        provider.list(&job).await
    };
    let log = within_timeout("the recovery", service).await;
    let limit = if mode == Mode::Discard { RECOVERY_FROM_SILENCE } else { RECOVERY };
    assert!(restored.elapsed() < limit, "recovered after {:?}", restored.elapsed());
    assert_eq!(log.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["meanwhile", "back"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_refused_while_connections_are_refused_and_succeed_again_afterwards() {
    test_outage(Mode::Refuse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_refused_while_the_database_does_not_answer_and_succeed_again_afterwards() {
    test_outage(Mode::Discard).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_refused_while_the_database_starts_and_succeed_again_afterwards() {
    test_outage(Mode::Starting).await;
}

const END_CONNECTIONS: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()";

#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_high_latency_is_available() {
    let (server, proxy) = TestServer::through_proxy().await;
    server.wait_for_health("", ServingStatus::Serving).await;
    proxy.set(Mode::Refuse);
    server.wait_for_health("", ServingStatus::NotServing).await;
    let nearby = server.replica().await;
    let users = [nearby.provider().await, nearby.provider().await];

    // Connecting now takes longer than the database may take for one answer.
    proxy.set(Mode::Delay(Duration::from_millis(120)));
    for user in users {
        server.wait_for_health("", ServingStatus::Serving).await;
        let request = pb::GetCurrentUserRequest {};
        server.same(&user).auth.get_current_user(request).await.unwrap();
        // Broken connections alone are not an outage.
        server.database.execute(END_CONNECTIONS).await;
        let lost = timeout(DETECTION, server.wait_for_health("", ServingStatus::NotServing)).await;
        assert!(lost.is_err(), "a database with high latency counted as unavailable");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_with_high_database_latency_appends_to_a_job_that_another_one_appends_to_all_the_time() {
    let (far, proxy) = TestServer::through_proxy().await;
    far.wait_for_health("", ServingStatus::Serving).await;
    proxy.set(Mode::Refuse);
    far.wait_for_health("", ServingStatus::NotServing).await;
    proxy.set(Mode::Delay(Duration::from_millis(30)));
    let near = far.replica().await;
    let (provider, _, job) = near.job(&[]).await;
    let mut writers = JoinSet::new();
    for _ in 0..16 {
        let (mut provider, job) = (provider.clone(), job.clone());
        writers.spawn(async move {
            loop {
                provider.append(&job, [info("busy")]).await;
            }
        });
    }
    far.wait_for_health("", ServingStatus::Serving).await;
    let mut provider = far.same(&provider);
    let far_appends = async {
        for _ in 0..5 {
            // While this replica reads the state of the job, the other one appends many times.
            provider.append(&job, [info("high latency")]).await;
        }
    };
    let sampling = async {
        // pg_stat_activity and pg_locks are not read at the same instant. A session has
        // held the lock if it is found twice with the same `state_change`.
        let mut before = Vec::new();
        loop {
            let now = near.database.texts(IDLE_WITH_LOG_LOCK).await;
            let holding: Vec<_> = now.iter().filter(|session| before.contains(*session)).collect();
            assert!(holding.is_empty(), "appends to all jobs wait for the idle sessions {holding:?}");
            before = now;
        }
    };
    tokio::select! {
        () = far_appends => {}
        () = sampling => {}
    }
    writers.abort_all();
    while let Some(ended) = writers.join_next().await {
        assert!(ended.unwrap_err().is_cancelled(), "an append failed");
    }
}

/// Sessions that have a lock on `event_log` and wait for their client.
const IDLE_WITH_LOG_LOCK: &str = "SELECT pid::text || ' ' || state_change || ' ' || query AS text
    FROM pg_stat_activity AS a JOIN pg_locks AS l USING (pid)
    WHERE a.datname = current_database() AND a.state LIKE 'idle%' AND l.relation = 'event_log'::regclass";

/// Backends of the pooled connections and of the tail, but not those that append, LISTEN
/// or check the availability.
const READERS: &str = "SELECT pid::text AS text FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'milepost'
      AND query !~ 'append_events|^LISTEN|^SELECT 1$'";

#[tokio::test(flavor = "multi_thread")]
async fn connections_whose_backend_does_not_answer_are_dropped() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    provider.append(&job, [info("here")]).await;
    let mut watch = customer.clone().watch(&job).await;
    watch.caught_up().await;
    // Whether a call succeeds within 2 s. While connections are dropped, it may be refused.
    let get_job = || {
        let (mut provider, id) = (provider.clone(), job.id.clone());
        async move {
            let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(id)) };
            let answer = timeout(Duration::from_secs(2), provider.jobs.get_job(request)).await;
            answer.is_ok_and(|answer| answer.is_ok())
        }
    };
    join_all((0..30).map(|_| get_job())).await;
    let pids = server.database.texts(READERS).await;
    assert!(pids.len() > 2, "{pids:?}");

    let _stopped = Stopped::new(&pids);
    let replica = server.replica().await;
    replica.same(&provider).append(&job, [info("elsewhere")]).await;
    // The statement timeout is 5 s, but a stopped backend does not enforce it, and its
    // connection stays open.
    let received = timeout(Duration::from_secs(8), watch.events(1)).await;
    assert_eq!(
        received.expect("the tail drops a connection whose backend does not answer")[0].name,
        "elsewhere"
    );
    // A checked-out connection is closed after twice the statement timeout, however early
    // its callers cancel.
    let dropped = async { while !get_job().await {} };
    assert!(timeout(Duration::from_secs(16), dropped).await.is_ok(), "no call succeeds");
    for _ in 0..10 {
        assert!(get_job().await, "a connection to a stopped backend is still in use");
    }
}
