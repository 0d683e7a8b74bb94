//! What callers and watchers meet while the database is away, and when it is
//! back; and that nobody keeps it from others.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost::pb::{self, ErrorReason, watch_events_response::Message};
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

/// Longest that a refusal may take once the database is known to be away: far
/// from any time-out.
const AT_ONCE: Duration = Duration::from_secs(1);
/// Longest until a database that is silent is known to be away.
const KNOWN: Duration = Duration::from_secs(4);
/// Longest until all is well after its return.
const BACK: Duration = Duration::from_secs(2);
/// The same after a silence: whoever had begun to connect meanwhile hears
/// nothing any more, and first waits in vain.
const BACK_FROM_SILENCE: Duration = Duration::from_secs(3);

async fn health(server: &TestServer, service: &str) -> ServingStatus {
    let asked = HealthCheckRequest { service: service.to_owned() };
    HealthClient::new(server.channel.clone()).check(asked).await.unwrap().into_inner().status()
}

async fn wait_for_readiness(server: &TestServer, wanted: ServingStatus) {
    let asked = HealthCheckRequest { service: String::new() };
    let mut statuses = HealthClient::new(server.channel.clone()).watch(asked).await.unwrap().into_inner();
    while statuses.next().await.expect("the stream goes on").unwrap().status() != wanted {}
}

#[track_caller]
fn assert_away<T: std::fmt::Debug>(what: &str, answer: Result<T, Status>) {
    assert!(answer.is_err(), "{what}: {answer:?}");
    let refusal = assert_refused(answer, Code::Unavailable, ErrorReason::DatabaseUnavailable);
    assert!(refusal.details.retry_info().is_some_and(|info| info.retry_delay.is_some()), "{what}");
}

/// A call of every kind is refused at once.
async fn assert_all_refused_at_once(provider: &mut User, customer: &User, job: &pb::Job) {
    let by_id = || Some(pb::get_job_request::Job::JobId(job.id.clone()));
    let new_job = provider.new_job(customer);
    let Caller { mut auth, mut configurations, mut jobs, mut events } = provider.key.clone();
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let listed = Some(pb::list_events_request::Job::JobId(job.id.clone()));
    macro_rules! refused {
        ($($name:literal: $call:expr;)*) => {$(
            let answer = timeout(AT_ONCE, $call).await;
            assert_away($name, answer.unwrap_or_else(|_| panic!("{} takes long", $name)));
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
    assert_away("PublishEvents", timeout(AT_ONCE, publish).await.expect("PublishEvents takes long"));
}

/// The names of the events of a live watch until this one; nothing else is said.
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

async fn goes_away_and_comes_back(mode: Mode) {
    let (server, proxy) = TestServer::through_proxy().await;
    within_timeout("readiness", wait_for_readiness(&server, ServingStatus::Serving)).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    // Notices by itself that the other one has appended.
    let replica = server.replica().await;
    let mut elsewhere = replica.same(&provider);
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let heartbeat_interval = Some(prost_types::Duration { seconds: 5, nanos: 0 });
    let request = pb::WatchEventsRequest { scope, heartbeat_interval, ..Default::default() };
    let mut watch = server.same(&customer).watch_by(request).await.unwrap();
    watch.caught_up().await;

    proxy.set(mode);
    let left = Instant::now();
    // What is under way when it goes is told as well, and so is what comes
    // before that is known.
    let (mut writer, mut reader) = (provider.clone(), provider.clone());
    let get = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(job.id.clone())) };
    let (appended, read) = within_timeout(
        "the first to be refused",
        futures_util::future::join(writer.try_append(&job, [info("lost")]), async {
            reader.jobs.get_job(get).await
        }),
    )
    .await;
    assert_away("the first AppendEvents", appended);
    assert_away("the first GetJob", read);
    within_timeout("not to be ready", wait_for_readiness(&server, ServingStatus::NotServing)).await;
    assert!(left.elapsed() < KNOWN, "known after {:?}", left.elapsed());
    assert_all_refused_at_once(&mut provider, &customer, &job).await;
    assert_eq!(health(&server, "liveness").await, ServingStatus::Serving);
    // Longer than a heartbeat's interval; one would say that all is well.
    let silence = timeout(Duration::from_secs(6), watch.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    // Credentials could not be confirmed for long, which is no excuse.
    assert_all_refused_at_once(&mut provider, &customer, &job).await;

    elsewhere.append(&job, [info("meanwhile")]).await;
    proxy.set(Mode::Pass);
    let returned = Instant::now();
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
    let log = within_timeout("the return", service).await;
    let limit = if mode == Mode::Swallow { BACK_FROM_SILENCE } else { BACK };
    assert!(returned.elapsed() < limit, "back after {:?}", returned.elapsed());
    assert_eq!(log.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["meanwhile", "back"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_connections_are_refused_calls_are_and_then_all_goes_on() {
    goes_away_and_comes_back(Mode::Refuse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_is_silent_calls_are_refused_and_then_all_goes_on() {
    goes_away_and_comes_back(Mode::Swallow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_starts_calls_are_refused_and_then_all_goes_on() {
    goes_away_and_comes_back(Mode::Starting).await;
}

const END_CONNECTIONS: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()";

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_far_away_is_there_nonetheless() {
    let (server, proxy) = TestServer::through_proxy().await;
    within_timeout("readiness", wait_for_readiness(&server, ServingStatus::Serving)).await;
    proxy.set(Mode::Refuse);
    within_timeout("not to be ready", wait_for_readiness(&server, ServingStatus::NotServing)).await;
    let nearby = server.replica().await;
    let users = [nearby.provider().await, nearby.provider().await];

    // To connect takes longer now than it may take to answer.
    proxy.set(Mode::Far(Duration::from_millis(120)));
    for user in users {
        within_timeout("readiness", wait_for_readiness(&server, ServingStatus::Serving)).await;
        let who = pb::GetCurrentUserRequest {};
        server.same(&user).auth.get_current_user(who).await.unwrap();
        // A broken connection is not the database's end, there as anywhere.
        server.database.execute(END_CONNECTIONS).await;
        let lost = timeout(KNOWN, wait_for_readiness(&server, ServingStatus::NotServing)).await;
        assert!(lost.is_err(), "a database that is far away was given up");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_far_from_the_database_appends_to_a_job_that_another_is_busy_with() {
    let (far, proxy) = TestServer::through_proxy().await;
    within_timeout("readiness", wait_for_readiness(&far, ServingStatus::Serving)).await;
    proxy.set(Mode::Refuse);
    within_timeout("not to be ready", wait_for_readiness(&far, ServingStatus::NotServing)).await;
    proxy.set(Mode::Far(Duration::from_millis(30)));
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
    let from_afar = async {
        for _ in 0..5 {
            // While it asks where the job is, the other appends many times.
            provider.append(&job, [info("from afar")]).await;
        }
    };
    let looking = async {
        // Sessions and locks are not looked at in one moment: who is found twice, and
        // has done nothing in between, has held it.
        let mut before = Vec::new();
        loop {
            let now = near.database.texts(HOLDING_THE_LOG).await;
            let holding: Vec<_> = now.iter().filter(|session| before.contains(*session)).collect();
            assert!(holding.is_empty(), "appends to all jobs wait for what is under way to {holding:?}");
            before = now;
        }
    };
    tokio::select! {
        () = from_afar => {}
        () = looking => {}
    }
    writers.abort_all();
    while let Some(ended) = writers.join_next().await {
        assert!(ended.unwrap_err().is_cancelled(), "an append failed");
    }
}

/// Sessions that have the log locked and wait for their client.
const HOLDING_THE_LOG: &str = "SELECT pid::text || ' ' || state_change || ' ' || query AS text
    FROM pg_stat_activity AS a JOIN pg_locks AS l USING (pid)
    WHERE a.datname = current_database() AND a.state LIKE 'idle%' AND l.relation = 'event_log'::regclass";

/// Sessions of servers that have something locked, or a transaction open.
const HOLDING: &str = "SELECT pid::text || ' ' || state || ' ' || query AS text FROM pg_stat_activity AS a
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'milepost'
      AND (state <> 'idle' OR EXISTS (SELECT FROM pg_locks AS l WHERE l.pid = a.pid))";

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_leave_in_the_middle_leave_no_lock_behind() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    // The longest call of them takes some milliseconds.
    for round in 0..60_u64 {
        let moment = Duration::from_micros(round * 100);
        let email = format!("left-{round}@example.com");
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
        macro_rules! leave {
            ($($call:expr),* $(,)?) => { tokio::join!($(timeout(moment, async { $call.await })),*) };
        }
        let _left = leave!(
            anonymous.clone().sign_up(sign_up),
            anonymous.clone().log_in(log_in),
            session.clone().update_current_user(rename),
            session.clone().change_password(password),
            session.clone().create_api_key(pb::CreateApiKeyRequest::default()),
            auth.clone().create_watch_token(token),
            configurations.clone().register_job_configuration(registered),
            jobs.clone().create_job(new_job),
            jobs.clone().close_job(close),
            appender.try_append(&job, [info("left")]),
        );
    }
    // Sooner than Postgres itself would end them, which it does after 5 s.
    let quiet = async {
        loop {
            let holding = server.database.texts(HOLDING).await;
            if holding.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if timeout(Duration::from_secs(3), quiet).await.is_err() {
        panic!("{:?}", server.database.texts(HOLDING).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_whose_connections_are_all_in_use_is_there_nonetheless() {
    let server = TestServer::start().await;
    within_timeout("readiness", wait_for_readiness(&server, ServingStatus::Serving)).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let mut locker = server.database.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let reading: Vec<_> = (0..2 * CONNECTIONS)
        .map(|_| {
            let (mut provider, job) = (provider.clone(), job.clone());
            tokio::spawn(async move { provider.get(&job).await })
        })
        .collect();
    within_timeout("readers that have all connections", async {
        while server.database.waiting_for_locks().await.len() < CONNECTIONS {}
    })
    .await;
    // For as long as the database is asked a few times.
    let lost = timeout(Duration::from_secs(3), wait_for_readiness(&server, ServingStatus::NotServing)).await;
    assert!(lost.is_err(), "a database that is busy was given up");
    assert!(server.database.waiting_for_locks().await.len() >= CONNECTIONS, "it was busy all the time");
    drop(locker);
    for read in reading {
        assert_eq!(within_timeout("an answer", read).await.unwrap(), job);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_hear_of_events_while_calls_have_all_connections() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let mut elsewhere = replica.same(&provider);
    elsewhere.append(&job, [info("before")]).await;
    let mut watch = customer.clone().watch(&job).await;
    watch.caught_up().await;
    let mut locker = server.database.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE job_configurations IN ACCESS EXCLUSIVE MODE").await.unwrap();
    for _ in 0..2 * CONNECTIONS {
        let mut provider = provider.clone();
        let request = pb::ListJobConfigurationsRequest::default();
        tokio::spawn(async move { provider.configurations.list_job_configurations(request).await });
    }
    within_timeout("calls that have all connections", async {
        while server.database.waiting_for_locks().await.len() < CONNECTIONS {}
    })
    .await;
    elsewhere.append(&job, [info("meanwhile")]).await;
    let heard = timeout(Duration::from_secs(1), watch.events(1)).await;
    assert_eq!(heard.expect("it is not held up by calls")[0].name, "meanwhile");
    assert!(server.database.waiting_for_locks().await.len() >= CONNECTIONS, "they had them all the time");
}

#[tokio::test(flavor = "multi_thread")]
async fn however_many_watchers_read_the_past_calls_find_a_connection() {
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
    within_timeout("readers of the past that wait", async {
        while server.database.waiting_for_locks().await.len() < 4 {}
    })
    .await;
    for _ in 0..20 {
        let read = timeout(Duration::from_secs(2), provider.get(&job)).await;
        assert!(read.is_ok(), "watchers hold all connections");
    }
    drop(locker);
    for mut watch in watches {
        assert_eq!(watch.caught_up().await.0.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn however_many_watchers_look_where_the_log_ends_calls_find_a_connection() {
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
    // As if retention had been faster than the tail: all who watch are told that
    // something may have passed them by.
    server.database.execute("UPDATE event_log SET position = position + 1").await;
    within_timeout("watchers that wait", async {
        while server.database.waiting_for_locks().await.len() < CONNECTIONS / 2 {}
    })
    .await;
    for _ in 0..20 {
        let claim =
            pb::LogInRequest { email: customer.email.clone(), password: crate::support::PASSWORD.to_owned() };
        let mut stranger = server.anonymous();
        let logged_in = timeout(Duration::from_secs(2), stranger.auth.log_in(claim)).await;
        logged_in.expect("watchers hold all connections").unwrap();
    }
    drop(locker);
    provider.append(&job, [info("after")]).await;
    for mut watch in watches {
        assert_eq!(events_until(&mut watch, "after").await, ["after"]);
    }
}
