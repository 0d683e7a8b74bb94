//! Old and new servers on one database, and the migration between them.

use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use diesel_async::SimpleAsyncConnection as _;
use milepost::{db::migrations, pb};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::support::{ServerProcess, TestDatabase, TestServer, User, info, within_timeout};

/// How many migrations there are.
const APPLIED: &str = "SELECT version AS text FROM __diesel_schema_migrations ORDER BY version";
/// Of all tables.
const COLUMNS: &str = "SELECT table_name || '.' || column_name AS text FROM information_schema.columns
    WHERE table_schema = 'public' ORDER BY 1";
/// Of a release to come.
const NEXT: &str = "20991231000001";
/// Longest that an append may take while a migration waits for a table: one
/// wait of its, and the way there and back.
const HELD_UP: Duration = Duration::from_secs(3);

fn milepost(database: &TestDatabase, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
    command
        .args(arguments)
        .env("DATABASE_URL", &database.url)
        .env("MILEPOST_UNSAFE_DATABASE", "true")
        .env("MILEPOST_LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Several processes bring the schema up to date at once: none fails, and each
/// migration is applied by one of them.
async fn all_at_once(database: &TestDatabase, missing: usize) {
    let migrating: Vec<_> = (0..4)
        .map(|_| {
            let command =
                milepost(database, &["migrate"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
            command.unwrap().wait_with_output()
        })
        .collect();
    let mut serving = Vec::new();
    for _ in 0..2 {
        serving.push(milepost(database, &["serve", "--migrate"]).stdout(Stdio::piped()).spawn().unwrap());
    }
    let mut applied = 0;
    for output in within_timeout("migrations", futures_util::future::join_all(migrating)).await {
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        applied += String::from_utf8(output.stdout).unwrap().matches("applied ").count();
    }
    for mut server in serving {
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        let line = within_timeout("a server", lines.next_line()).await.unwrap();
        assert!(line.is_some_and(|line| line.contains("listens")), "it serves");
        server.kill().await.unwrap();
    }
    // What is missing to the sum a server has applied.
    assert!(applied <= missing, "{applied} of {missing} applied");
    let expected = TestDatabase::migrated().await.texts(APPLIED).await;
    assert_eq!(database.texts(APPLIED).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_migrate_at_once_take_turns() {
    let all = TestDatabase::migrated().await.texts(APPLIED).await.len();
    let empty = TestDatabase::empty().await;
    all_at_once(&empty, all).await;

    let partly = TestDatabase::migrated().await;
    migrations::revert(&partly.url, None, 2).await.unwrap();
    all_at_once(&partly, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_told_to_migrate_refuses_an_older_schema_and_leaves_it_as_it_is() {
    let empty = TestDatabase::empty().await;
    let partly = TestDatabase::migrated().await;
    migrations::revert(&partly.url, None, 2).await.unwrap();
    for database in [empty, partly] {
        let before = database.texts(COLUMNS).await;
        let refusal = ServerProcess::refused_with(&database.url, &["--unsafe-database"]).await;
        assert!(refusal.contains("`milepost migrate`") && refusal.lines().count() == 1, "{refusal}");
        assert_eq!(database.texts(COLUMNS).await, before);
    }
}

/// Appends, reads and lists until it is told to stop; how often, and how long
/// the longest append took.
struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    work: JoinHandle<Duration>,
}

impl Load {
    async fn start(mut provider: User, customer: &User) -> Self {
        let job = provider.job(customer).await;
        let mut watch = customer.clone().watch(&job).await;
        watch.caught_up().await;
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (told, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let work = tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            while !told.load(Relaxed) {
                let started = Instant::now();
                provider.append(&job, [info("under load")]).await;
                longest = longest.max(started.elapsed());
                watch.events(1).await;
                provider.get(&job).await;
                assert_eq!(provider.list(&job).await.len(), counted.fetch_add(1, Relaxed) + 1);
            }
            longest
        });
        Self { stop, rounds, work }
    }

    /// Some rounds more have gone well.
    async fn goes_on(&self) {
        let before = self.rounds.load(Relaxed);
        within_timeout("some rounds", async {
            while self.rounds.load(Relaxed) < before + 5 && !self.work.is_finished() {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    async fn stop(self) -> Duration {
        self.stop.store(true, Relaxed);
        self.work.await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_schema_that_expands_is_served_by_the_old_server_without_a_failed_call() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let load = Load::start(provider.clone(), &customer).await;
    load.goes_on().await;
    server
        .database
        .execute(&format!(
            "BEGIN;
             ALTER TABLE jobs ADD COLUMN tint text;
             ALTER TABLE events ADD COLUMN tint text;
             ALTER TABLE users ADD COLUMN tint text NOT NULL DEFAULT 'none';
             ALTER TABLE api_keys ADD COLUMN tint text;
             CREATE TABLE tints (id uuid PRIMARY KEY, job_id uuid NOT NULL REFERENCES jobs (id));
             INSERT INTO __diesel_schema_migrations (version) VALUES ('{NEXT}');
             COMMIT"
        ))
        .await;
    load.goes_on().await;
    // An old server may still be started, until the schema says otherwise.
    let mut old = ServerProcess::on(&server.database).await;
    old.same(&provider).auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap();
    old.terminate().await;
    assert_eq!(old.exit().await.code(), Some(0));
    load.goes_on().await;
    load.stop().await;
    provider.job(&customer).await;
    provider.register(crate::support::registration("2.0.0", &[("load", 1)])).await;
    server.provider().await;

    server.database.execute(&format!("UPDATE schema_compatibility SET oldest_server = '{NEXT}'")).await;
    let refusal = ServerProcess::refused_with(&server.database.url, &["--unsafe-database"]).await;
    assert!(refusal.contains(NEXT) && refusal.lines().count() == 1, "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_waits_for_a_table_does_not_hold_appends_up() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    // One that has a foreign key to jobs, for which it locks that table.
    let down = include_str!("../../migrations/2026-11-23-000005_watch_tokens/down.sql");
    let forget = "DELETE FROM __diesel_schema_migrations WHERE version = '20261123000005'";
    server.database.execute(&format!("{down}; {forget}")).await;
    let load = Load::start(provider.clone(), &customer).await;
    load.goes_on().await;
    // Somebody else's long transaction on the same table.
    let mut other = server.database.connect().await;
    other.batch_execute("BEGIN; UPDATE jobs SET provider_job_name = 'x' WHERE false").await.unwrap();
    let url = server.database.url.clone();
    let migrating = tokio::spawn(async move { migrations::migrate(&url, None).await });
    let waiting = "SELECT pid::text AS text FROM pg_stat_activity WHERE datname = current_database()
        AND application_name = 'milepost migrate' AND wait_event_type = 'Lock'";
    for _ in 0..2 {
        within_timeout("the migration to wait", async {
            while server.database.texts(waiting).await.is_empty() {}
        })
        .await;
        within_timeout("the migration to wait no more", async {
            while !server.database.texts(waiting).await.is_empty() {}
        })
        .await;
        load.goes_on().await;
    }
    other.batch_execute("COMMIT").await.unwrap();
    let applied = within_timeout("the migration", migrating).await.unwrap().unwrap();
    assert_eq!(applied, ["20261123000005"]);
    load.goes_on().await;
    let longest = load.stop().await;
    assert!(longest < HELD_UP, "an append took {longest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_waits_to_migrate_can_be_told_to_go() {
    let database = TestDatabase::migrated().await;
    migrations::revert(&database.url, None, 4).await.unwrap();
    // What those who migrate take turns by, and a table that one of those changes.
    for held in ["SELECT pg_advisory_xact_lock(x'6d696c65706f7374'::bigint)", "LOCK TABLE removed_logs"] {
        let mut holder = database.connect().await;
        holder.batch_execute(&format!("BEGIN; {held}")).await.unwrap();
        let mut server = milepost(&database, &["serve", "--migrate"]).spawn().unwrap();
        within_timeout("somebody who waits", async {
            while database.waiting_for_locks().await.is_empty() {}
        })
        .await;
        let (told, pid) = (Instant::now(), server.id().expect("it runs").to_string());
        assert!(Command::new("kill").arg(&pid).status().await.unwrap().success());
        let ended = within_timeout("the exit", server.wait()).await.unwrap();
        assert_eq!(ended.code(), Some(0), "{held}");
        assert!(told.elapsed() < Duration::from_secs(3), "it waited, {held}");
    }
}
