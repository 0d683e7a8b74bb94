//! Outages of the database: what calls and watches get during and after one. Also, no
//! kind of call or watch uses up the database connections of the others.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb::{self, ErrorReason, watch_events_response::Message};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::support::{
    CONNECTIONS, Caller, Mode, TestServer, User, Watch, assert_refused, info, registration, within_timeout,
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

async fn health(server: &TestServer, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.to_owned() };
    HealthClient::new(server.channel.clone()).check(request).await.unwrap().into_inner().status()
}

async fn wait_for_readiness(server: &TestServer, wanted: ServingStatus) {
    let request = HealthCheckRequest { service: String::new() };
    let mut statuses = HealthClient::new(server.channel.clone()).watch(request).await.unwrap().into_inner();
    while statuses.next().await.expect("the health stream stays open").unwrap().status() != wanted {}
}

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
async fn events_until(watch: &mut Watch, last: &str) -> Vec<String> {
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
    within_timeout("readiness", wait_for_readiness(&server, ServingStatus::Serving)).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
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
    within_timeout("the server not to be ready", wait_for_readiness(&server, ServingStatus::NotServing))
        .await;
    assert!(began.elapsed() < DETECTION, "the outage was known after {:?}", began.elapsed());
    assert_all_refused_at_once(&mut provider, &customer, &job).await;
    assert_eq!(health(&server, "liveness").await, ServingStatus::Serving);
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
            tokio::join!(append, watched, wait_for_readiness(&server, ServingStatus::Serving));
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
    within_timeout("readiness", wait_for_readiness(&server, ServingStatus::Serving)).await;
    proxy.set(Mode::Refuse);
    within_timeout("the server not to be ready", wait_for_readiness(&server, ServingStatus::NotServing))
        .await;
    let nearby = server.replica().await;
    let users = [nearby.provider().await, nearby.provider().await];

    // Connecting now takes longer than the database may take for one answer.
    proxy.set(Mode::Delay(Duration::from_millis(120)));
    for user in users {
        within_timeout("readiness", wait_for_readiness(&server, ServingStatus::Serving)).await;
        let request = pb::GetCurrentUserRequest {};
        server.same(&user).auth.get_current_user(request).await.unwrap();
        // Broken connections alone are not an outage.
        server.database.execute(END_CONNECTIONS).await;
        let lost = timeout(DETECTION, wait_for_readiness(&server, ServingStatus::NotServing)).await;
        assert!(lost.is_err(), "a database with high latency counted as unavailable");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_with_high_database_latency_appends_to_a_job_that_another_one_appends_to_all_the_time() {
    let (far, proxy) = TestServer::through_proxy().await;
    within_timeout("readiness", wait_for_readiness(&far, ServingStatus::Serving)).await;
    proxy.set(Mode::Refuse);
    within_timeout("the server not to be ready", wait_for_readiness(&far, ServingStatus::NotServing)).await;
    proxy.set(Mode::Delay(Duration::from_millis(30)));
    let near = far.replica().await;
    let (mut provider, customer) = (near.provider().await, near.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let mut writers = JoinSet::new();
    for _ in 0..16 {
        let (mut provider, job) = (provider.clone(), job.clone());
        writers.spawn(async move {
            loop {
                provider.append(&job, [info("busy")]).await;
            }
        });
    }
    within_timeout("readiness", wait_for_readiness(&far, ServingStatus::Serving)).await;
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

/// Sessions of milepost that have a lock or an open transaction.
const LOCK_OR_TRANSACTION: &str =
    "SELECT pid::text || ' ' || state || ' ' || query AS text FROM pg_stat_activity AS a
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'milepost'
      AND (state <> 'idle' OR EXISTS (SELECT FROM pg_locks AS l WHERE l.pid = a.pid))";

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_calls_leave_no_lock_or_transaction_behind() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    // The calls are cancelled after 0 to 6 ms; the longest takes some milliseconds.
    for round in 0..60_u64 {
        let cancel_after = Duration::from_micros(round * 100);
        let email = format!("cancelled-{round}@example.com");
        let sign_up = pb::SignUpRequest {
            role: pb::UserRole::Provider.into(),
            email: email.clone(),
            password: crate::support::PASSWORD.to_owned(),
            ..Default::default()
        };
        let log_in =
            pb::LogInRequest { email: provider.email.clone(), password: crate::support::PASSWORD.to_owned() };
        let rename = pb::UpdateCurrentUserRequest {
            user: Some(pb::User { first_name: email, ..Default::default() }),
            update_mask: Some(prost_types::FieldMask { paths: vec!["first_name".to_owned()] }),
        };
        let password = pb::ChangePasswordRequest {
            current_password: crate::support::PASSWORD.to_owned(),
            new_password: crate::support::PASSWORD.to_owned(),
        };
        let token = pb::CreateWatchTokenRequest {
            job: Some(pb::create_watch_token_request::Job::JobId(job.id.clone())),
            ..Default::default()
        };
        let registered = registration(&format!("2.0.{round}"), &[("load", 1), ("report", 2)]);
        let new_job = provider.new_job(&customer);
        let closed = provider.job(&customer).await;
        let close = pb::CloseJobRequest {
            job: Some(pb::close_job_request::Job::JobId(closed.id.clone())),
            reason: String::new(),
        };
        let Caller { auth, configurations, jobs, .. } = provider.key.clone();
        let (anonymous, session) = (server.anonymous().auth, provider.session.auth.clone());
        let mut appender = provider.clone();
        macro_rules! cancelled {
            ($($call:expr),* $(,)?) => { tokio::join!($(timeout(cancel_after, async { $call.await })),*) };
        }
        let _cancelled = cancelled!(
            anonymous.clone().sign_up(sign_up),
            anonymous.clone().log_in(log_in),
            session.clone().update_current_user(rename),
            session.clone().change_password(password),
            session.clone().create_api_key(pb::CreateApiKeyRequest::default()),
            auth.clone().create_watch_token(token),
            configurations.clone().register_job_configuration(registered),
            jobs.clone().create_job(new_job),
            jobs.clone().close_job(close),
            appender.try_append(&job, [info("cancelled")]),
        );
    }
    // Sooner than Postgres's own timeouts, which are 5 s.
    let released = async {
        loop {
            let holding = server.database.texts(LOCK_OR_TRANSACTION).await;
            if holding.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if timeout(Duration::from_secs(3), released).await.is_err() {
        panic!("{:?}", server.database.texts(LOCK_OR_TRANSACTION).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_available_while_all_pooled_connections_are_in_use() {
    let server = TestServer::start().await;
    within_timeout("readiness", wait_for_readiness(&server, ServingStatus::Serving)).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let mut locker = server.database.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE").await.unwrap();
    // Two users, since one of them uses half of the connections at most.
    let reading: Vec<_> = (0..2 * CONNECTIONS)
        .map(|number| {
            let (user, job) = (if number % 2 == 0 { &provider } else { &customer }, job.clone());
            let mut user = user.clone();
            tokio::spawn(async move { user.get(&job).await })
        })
        .collect();
    within_timeout("reads on all connections", async {
        while server.database.waiting_for_locks().await.len() < CONNECTIONS {}
    })
    .await;
    // Long enough for some checks of availability.
    let lost = timeout(Duration::from_secs(3), wait_for_readiness(&server, ServingStatus::NotServing)).await;
    assert!(lost.is_err(), "a busy database counted as unavailable");
    assert!(server.database.waiting_for_locks().await.len() >= CONNECTIONS, "all connections stayed in use");
    drop(locker);
    for read in reading {
        assert_eq!(within_timeout("an answer", read).await.unwrap(), job);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_receive_events_while_calls_use_all_pooled_connections() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let mut elsewhere = replica.same(&provider);
    elsewhere.append(&job, [info("before")]).await;
    let mut watch = customer.clone().watch(&job).await;
    watch.caught_up().await;
    // Two users, since one of them uses half of the connections at most.
    let other = server.provider().await;
    let mut locker = server.database.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE job_configurations IN ACCESS EXCLUSIVE MODE").await.unwrap();
    for number in 0..2 * CONNECTIONS {
        let mut provider = if number % 2 == 0 { provider.clone() } else { other.clone() };
        let request = pb::ListJobConfigurationsRequest::default();
        tokio::spawn(async move { provider.configurations.list_job_configurations(request).await });
    }
    within_timeout("calls on all connections", async {
        while server.database.waiting_for_locks().await.len() < CONNECTIONS {}
    })
    .await;
    elsewhere.append(&job, [info("meanwhile")]).await;
    let received = timeout(Duration::from_secs(1), watch.events(1)).await;
    assert_eq!(received.expect("the watch does not wait for a pooled connection")[0].name, "meanwhile");
    assert!(
        server.database.waiting_for_locks().await.len() >= CONNECTIONS,
        "calls used all connections throughout"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_watches_that_replay_leave_connections_for_calls() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("past")]).await;
    let mut locker = server.database.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE events IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let mut watches = Vec::new();
    for _ in 0..30 {
        watches.push(customer.clone().watch(&job).await);
    }
    within_timeout("replays that wait for the lock", async {
        while server.database.waiting_for_locks().await.len() < CONNECTIONS / 4 {}
    })
    .await;
    for _ in 0..20 {
        let read = timeout(Duration::from_secs(2), provider.get(&job)).await;
        assert!(read.is_ok(), "watches use all connections");
    }
    drop(locker);
    for mut watch in watches {
        assert_eq!(watch.caught_up().await.0.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_watches_that_read_the_end_of_the_log_leave_connections_for_calls() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let mut watches = Vec::new();
    for _ in 0..30 {
        let mut watch = customer.clone().watch(&job).await;
        watch.caught_up().await;
        watches.push(watch);
    }
    let mut locker = server.database.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE").await.unwrap();
    // As if retention had removed an event before the tail read it. Each watch has to
    // check in the database whether it missed an event.
    server.database.execute("UPDATE event_log SET position = position + 1").await;
    within_timeout("watches that wait for the lock", async {
        while server.database.waiting_for_locks().await.len() < CONNECTIONS / 4 {}
    })
    .await;
    for _ in 0..20 {
        let credentials =
            pb::LogInRequest { email: customer.email.clone(), password: crate::support::PASSWORD.to_owned() };
        let mut anonymous = server.anonymous();
        let logged_in = timeout(Duration::from_secs(2), anonymous.auth.log_in(credentials)).await;
        logged_in.expect("watches use all connections").unwrap();
    }
    drop(locker);
    provider.append(&job, [info("after")]).await;
    for mut watch in watches {
        assert_eq!(events_until(&mut watch, "after").await, ["after"]);
    }
}
