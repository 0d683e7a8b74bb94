//! A pooler between milepost and its database: refused if its connections have no sessions
//! of their own, as in pgbouncer's transaction mode, and usable otherwise.
//!
//! `cargo test --test poolers` needs Debian's pgbouncer.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::process::{Output, Stdio};

use futures_util::future::join_all;
use milepost::cli::one_line;
use milepost_testing::{
    PgBouncer, ServerProcess, TestDatabase, TestServer, complete, database, step, within_timeout,
};
use tokio::process::Command;

const REFUSAL: &str = "the database is behind a pooler in transaction or statement mode";
const SESSION: &[&str] = &["pool_mode=session", "default_pool_size=400"];

/// The error of a connection for LISTEN.
async fn refusal_to_listen(url: &str) -> Option<String> {
    database(url, None).connect_to_listen().await.err().map(|error| one_line(&error))
}

async fn migrate(url: &str) -> Output {
    let migrating = Command::new(env!("CARGO_BIN_EXE_milepost"))
        .arg("migrate")
        .env("DATABASE_URL", url)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    within_timeout("the end of milepost migrate", migrating).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn transaction_and_statement_mode_are_recognised_whatever_the_pool() {
    let database = TestDatabase::migrated().await;
    for pool_mode in ["transaction", "statement"] {
        for (size, order) in [
            (1, ""),
            (2, ""),
            (3, ""),
            (20, ""),
            (1, "server_round_robin=1"),
            (2, "server_round_robin=1"),
            (4, "server_round_robin=1"),
            (20, "server_round_robin=1"),
            (1, "server_reset_query_always=1"),
            (20, "server_reset_query_always=1"),
        ] {
            let settings = [&format!("pool_mode={pool_mode}"), &format!("default_pool_size={size}"), order];
            let bouncer = PgBouncer::start(&database.url, &settings).await;
            use_at_once(&bouncer.url, size).await;
            let refused = refusal_to_listen(&bouncer.url).await.unwrap_or_default();
            assert!(refused.contains(REFUSAL), "{settings:?}: {refused}");
        }
    }
}

/// Lets the pool connect as many backends as it needs for so many clients.
async fn use_at_once(url: &str, clients: usize) {
    let uses = (0..clients).map(async |_| {
        let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.simple_query("SELECT pg_sleep(0.3)").await.unwrap();
    });
    within_timeout("the pool to be filled", join_all(uses)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transaction_mode_is_recognised_while_others_use_the_pool() {
    let database = TestDatabase::migrated().await;
    for size in [3, 8] {
        let pool = format!("default_pool_size={size}");
        let bouncer = PgBouncer::start(&database.url, &["pool_mode=transaction", &pool]).await;
        // Each takes the backends that the others look for.
        for refused in join_all((0..6).map(|_| refusal_to_listen(&bouncer.url))).await {
            let refused = refused.unwrap_or_default();
            assert!(refused.contains(REFUSAL), "{size}: {refused}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_their_own_are_never_taken_for_a_pooler() {
    let database = TestDatabase::migrated().await;
    let bouncer = PgBouncer::start(&database.url, SESSION).await;
    for url in [&database.url, &bouncer.url] {
        for refused in join_all((0..20).map(|_| refusal_to_listen(url))).await {
            assert_eq!(refused, None, "{url}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn serve_and_migrate_refuse_transaction_mode_in_one_line() {
    let database = TestDatabase::migrated().await;
    let bouncer = PgBouncer::start(&database.url, &["pool_mode=transaction"]).await;
    let migrated = migrate(&bouncer.url).await;
    assert!(!migrated.status.success());
    let migrated = String::from_utf8(migrated.stderr).unwrap();
    for refused in [ServerProcess::refused_on(&bouncer.url).await, migrated] {
        assert_eq!(refused.lines().count(), 1, "{refused}");
        for words in [REFUSAL, " answered on ", "SET: connect to Postgres directly", "pool_mode=session"] {
            assert!(refused.contains(words), "{words:?} is not in {refused}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_does_not_listen_through_a_pooler_that_leaves_session_mode() {
    let database = TestDatabase::migrated().await;
    let mut bouncer = PgBouncer::start(&database.url, SESSION).await;
    let server = ServerProcess::on(&database.through(bouncer.url.clone())).await;
    bouncer.replace(&["pool_mode=transaction"]).await;
    server.logged(REFUSAL, 1).await;
    bouncer.replace(SESSION).await;
    server.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_work_through_a_pooler_in_session_mode() {
    let database = TestDatabase::empty().await;
    let bouncer = PgBouncer::start(&database.url, SESSION).await;
    let migrated = migrate(&bouncer.url).await;
    assert!(migrated.status.success(), "{migrated:?}");

    let server = TestServer::on(database.through(bouncer.url.clone())).await;
    let replica = server.replica().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    let mut watch = replica.same(&customer).watch(&job).await;
    watch.caught_up().await;
    provider.append(&job, [step("load"), complete()]).await;
    assert_eq!(watch.read_to_end().await.events.len(), 2);
    // The sessions of the pooler are those of its clients.
    let settings = "SELECT DISTINCT application_name AS text FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'idle'
            AND application_name <> ''";
    assert_eq!(database.texts(settings).await, ["milepost"]);
}
