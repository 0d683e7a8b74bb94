//! The pool of connections: its timeouts, and who gets a connection while it is busy.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost::{
    config::{DatabaseSettings, SynchronousCommit},
    db::{Database, Payer},
    error::Error,
    tenant::Tenant,
};
use milepost_client::pb;
use tokio::time::timeout;
use tonic_health::pb::health_check_response::ServingStatus;
use uuid::Uuid;

use super::outages::events_until;
use crate::support::{
    CONNECTIONS, Caller, PASSWORD, TestDatabase, TestServer, info, registration, within_timeout,
};

async fn database(connections: usize, statement_timeout: Duration) -> (TestDatabase, Database) {
    let created = TestDatabase::migrated().await;
    let settings = DatabaseSettings {
        ca: None,
        connections,
        connect_timeout: Duration::from_millis(500),
        statement_timeout,
        synchronous_commit: SynchronousCommit::On,
    };
    let database = Database::new(created.url.clone().into(), settings).unwrap();
    (created, database)
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_locks_and_idle_transactions_end_after_the_statement_timeout() {
    let (created, database) = database(2, Duration::from_millis(300)).await;
    let ended = async |sql: &str| {
        let mut conn = database.get(Payer::Server).await.unwrap();
        let done = within_timeout("the timeout", conn.batch_execute(sql)).await;
        Error::from(done.unwrap_err())
    };
    let error = ended("SELECT pg_sleep(60)").await;
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    let mut locker = created.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE users").await.unwrap();
    let error = ended("SET statement_timeout = 0; SELECT 1 FROM users").await;
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");

    let mut idle = database.get(Payer::Server).await.unwrap();
    idle.batch_execute("BEGIN").await.unwrap();
    let closed = async {
        let idle = "SELECT pid::text AS text FROM pg_stat_activity
            WHERE datname = current_database() AND state = 'idle in transaction' AND application_name = 'milepost'";
        while !created.texts(idle).await.is_empty() {}
    };
    within_timeout("the end of the idle transaction", closed).await;
    let error = Error::from(idle.batch_execute("SELECT 1").await.unwrap_err());
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_waits_for_a_connection_no_longer_than_the_connect_timeout_and_keeps_nobody_waiting() {
    let (_created, database) = database(4, Duration::from_secs(5)).await;
    let [flooding, other] = [(); 2].map(|()| Tenant::of_user(Uuid::now_v7()));
    let half = (database.get(flooding).await.unwrap(), database.get(flooding).await.unwrap());
    let refused = within_timeout("a refusal", database.get(flooding)).await;
    assert!(matches!(refused, Err(Error::Overloaded { .. })), "{refused:?}");
    let others = (database.get(other).await.unwrap(), database.get(other).await.unwrap());
    drop(half);
    drop((database.get(flooding).await.unwrap(), database.get(flooding).await.unwrap(), others));
}

/// Sessions of milepost that have a lock or an open transaction.
const LOCK_OR_TRANSACTION: &str =
    "SELECT pid::text || ' ' || state || ' ' || query AS text FROM pg_stat_activity AS a
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'milepost'
      AND (state <> 'idle' OR EXISTS (SELECT FROM pg_locks AS l WHERE l.pid = a.pid))";

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_calls_leave_no_lock_or_transaction_behind() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    // The calls are cancelled after 0 to 6 ms; the longest takes some milliseconds.
    for round in 0..60_u64 {
        let cancel_after = Duration::from_micros(round * 100);
        let email = format!("cancelled-{round}@example.com");
        let sign_up = pb::SignUpRequest {
            role: pb::UserRole::Provider.into(),
            email: email.clone(),
            password: PASSWORD.to_owned(),
            ..Default::default()
        };
        let log_in = pb::LogInRequest { email: provider.email.clone(), password: PASSWORD.to_owned() };
        let rename = pb::UpdateCurrentUserRequest {
            user: Some(pb::User { first_name: email, ..Default::default() }),
            update_mask: Some(prost_types::FieldMask { paths: vec!["first_name".to_owned()] }),
        };
        let password = pb::ChangePasswordRequest {
            current_password: PASSWORD.to_owned(),
            new_password: PASSWORD.to_owned(),
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
    server.wait_for_health("", ServingStatus::Serving).await;
    let (provider, customer, job) = server.job(&[]).await;
    let locker = server.database.lock("jobs").await;
    // Two users, since one of them uses half of the connections at most.
    let reading: Vec<_> = (0..2 * CONNECTIONS)
        .map(|number| {
            let (user, job) = (if number % 2 == 0 { &provider } else { &customer }, job.clone());
            let mut user = user.clone();
            tokio::spawn(async move { user.get(&job).await })
        })
        .collect();
    server.database.wait_for_locks(CONNECTIONS).await;
    // Long enough for some checks of availability.
    let lost = timeout(Duration::from_secs(3), server.wait_for_health("", ServingStatus::NotServing)).await;
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
    let (provider, customer, job) = server.job(&[]).await;
    let mut elsewhere = replica.same(&provider);
    elsewhere.append(&job, [info("before")]).await;
    let mut watch = customer.clone().watch(&job).await;
    watch.caught_up().await;
    // Two users, since one of them uses half of the connections at most.
    let other = server.provider().await;
    let _locker = server.database.lock("job_configurations").await;
    for number in 0..2 * CONNECTIONS {
        let mut provider = if number % 2 == 0 { provider.clone() } else { other.clone() };
        let request = pb::ListJobConfigurationsRequest::default();
        tokio::spawn(async move { provider.configurations.list_job_configurations(request).await });
    }
    server.database.wait_for_locks(CONNECTIONS).await;
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
    let (mut provider, customer, job) = server.job(&[]).await;
    provider.append(&job, [info("past")]).await;
    let locker = server.database.lock("events").await;
    let mut watches = Vec::new();
    for _ in 0..30 {
        watches.push(customer.clone().watch(&job).await);
    }
    server.database.wait_for_locks(CONNECTIONS / 4).await;
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
    let (mut provider, customer, job) = server.job(&[]).await;
    let mut watches = Vec::new();
    for _ in 0..30 {
        let mut watch = customer.clone().watch(&job).await;
        watch.caught_up().await;
        watches.push(watch);
    }
    let locker = server.database.lock("job_states").await;
    // As if retention had removed an event before the tail read it. Each watch has to
    // check in the database whether it missed an event.
    server.database.execute("UPDATE event_log SET position = position + 1").await;
    server.database.wait_for_locks(CONNECTIONS / 4).await;
    for _ in 0..20 {
        let credentials = pb::LogInRequest { email: customer.email.clone(), password: PASSWORD.to_owned() };
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
