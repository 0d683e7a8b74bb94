//! Old and new servers on one database, and the migrations between their schemas.

use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use diesel_async::SimpleAsyncConnection as _;
use milepost::db::migrations;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::support::{ServerProcess, TestDatabase, TestServer, User, info, operate, within_timeout};

const APPLIED: &str = "SELECT version AS text FROM __diesel_schema_migrations ORDER BY version";
const COLUMNS: &str = "SELECT table_name || '.' || column_name AS text FROM information_schema.columns
    WHERE table_schema = 'public' ORDER BY 1";
/// A migration of a later release.
const NEXT: &str = "20991231000001";
/// The migration that creates watch_tokens. Its foreign key locks the table jobs.
const WATCH_TOKENS: &str = "20261126000007";
/// A migration that was applied by versions of milepost before the first release
/// and does not exist any more.
const UNRELEASED: &str = "20261123000001";

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

/// A database whose connections also look for tables in the schema `aside`.
async fn database_with_aside() -> TestDatabase {
    let database = TestDatabase::migrated().await;
    let url = format!("{}?options=-csearch_path%3Dpublic,aside", database.url);
    database.through(url)
}

/// Makes the migration of watch_tokens a pending one. Its table and its view are put into
/// the schema `aside` rather than dropped, so that a server on [`database_with_aside`] finds
/// them there.
async fn unapply_watch_tokens(database: &TestDatabase) {
    database
        .execute(&format!(
            "CREATE SCHEMA aside;
             ALTER VIEW credentials SET SCHEMA aside;
             ALTER TABLE watch_tokens SET SCHEMA aside;
             DELETE FROM __diesel_schema_migrations WHERE version = '{WATCH_TOKENS}'"
        ))
        .await;
}

/// Several processes migrate at once: none fails, and each migration is applied by
/// one of them.
async fn migrate_in_parallel(database: &TestDatabase, missing: usize) {
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
        assert!(line.is_some_and(|line| line.contains("listens")), "`serve --migrate` does not serve");
        server.kill().await.unwrap();
    }
    // `serve --migrate` may have applied the others.
    assert!(applied <= missing, "{applied} of {missing} applied");
    let expected = TestDatabase::migrated().await.texts(APPLIED).await;
    assert_eq!(database.texts(APPLIED).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_migrate_at_once_apply_each_migration_once() {
    let all = TestDatabase::migrated().await.texts(APPLIED).await.len();
    let empty = TestDatabase::empty().await;
    migrate_in_parallel(&empty, all).await;

    let partly = TestDatabase::migrated().await;
    unapply_watch_tokens(&partly).await;
    migrate_in_parallel(&partly, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_holds_the_lock_of_migrations_is_in_the_log_and_in_the_error() {
    let database = TestDatabase::migrated().await;
    let key = i64::from_be_bytes(*b"milepost");
    let mut holder = database.connect().await;
    let lock = format!("SET application_name = 'stranded'; SELECT pg_advisory_lock({key})");
    holder.batch_execute(&lock).await.unwrap();
    let pid = "SELECT pid::text AS text FROM pg_locks WHERE locktype = 'advisory' AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let held = format!("the session of pid {} (stranded) idle since 2", database.texts(pid).await[0]);

    let migrate = async || {
        let mut migrating = milepost(&database, &["migrate"]).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(migrating.stderr.take().unwrap()).lines();
        let line = within_timeout("a line of the log", log.next_line()).await.unwrap().unwrap();
        assert!(line.contains("waiting for the lock of migrations") && line.contains(&held), "{line}");
        (migrating, log)
    };
    let (mut migrating, mut log) = migrate().await;
    // As the end of the longest wait does, a cancelled statement ends this one.
    database.wait_for_locks(1).await;
    let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'";
    database.execute(cancel).await;
    let error = within_timeout("the error", log.next_line()).await.unwrap().unwrap();
    assert!(error.contains(&held) && error.contains("canceling"), "{error}");
    assert!(!migrating.wait().await.unwrap().success());

    let (mut migrating, _log) = migrate().await;
    drop(holder);
    let migrated = within_timeout("the migration", migrating.wait()).await.unwrap();
    assert!(migrated.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn serve_without_migrate_refuses_an_older_schema_and_does_not_change_it() {
    let empty = TestDatabase::empty().await;
    let partly = TestDatabase::migrated().await;
    unapply_watch_tokens(&partly).await;
    for database in [empty, partly] {
        let before = database.texts(COLUMNS).await;
        let refusal = ServerProcess::refused_with(&database.url, &["--unsafe-database"]).await;
        assert!(refusal.contains("`milepost migrate`") && refusal.lines().count() == 1, "{refusal}");
        assert_eq!(database.texts(COLUMNS).await, before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_refuses_a_database_of_an_unreleased_version_in_one_line() {
    let database = TestDatabase::migrated().await;
    let made_before = format!(
        "DELETE FROM __diesel_schema_migrations;
         INSERT INTO __diesel_schema_migrations (version) VALUES ('{UNRELEASED}')"
    );
    database.execute(&made_before).await;
    let columns = database.texts(COLUMNS).await;
    for arguments in [&["serve"][..], &["serve", "--migrate"], &["migrate"], &["migrate", "--revert", "1"]] {
        let output = milepost(&database, arguments).output();
        let output = within_timeout("the refusal", output).await.unwrap();
        let refusal = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        let expected = [UNRELEASED, "unreleased", "make a new database"];
        assert!(expected.iter().all(|text| refusal.contains(text)), "{arguments:?}: {refusal}");
        assert_eq!(refusal.lines().count(), 1, "{arguments:?}: {refusal}");
    }
    assert_eq!(database.texts(APPLIED).await, [UNRELEASED]);
    assert_eq!(database.texts(COLUMNS).await, columns);
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_revert_without_yes_is_refused_while_servers_are_connected_and_if_the_database_has_users() {
    let (served, used) = (TestDatabase::migrated().await, TestDatabase::migrated().await);
    let applied = served.texts(APPLIED).await;
    let server = TestServer::on(served.clone()).await;
    operate(&used, &["create", "ops@example.com", "--role", "provider"], "some password").await;
    let revert = async |database: &TestDatabase, arguments: &[&str]| {
        let output = milepost(database, &[&["migrate"], arguments].concat()).output();
        let output = within_timeout("the end of milepost migrate", output).await.unwrap();
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let too_many = (applied.len() + 1).to_string();
    for (database, arguments, words) in [
        (
            &served,
            &["--revert", "1"][..],
            &["servers are connected", "milepost: ", "a Unix socket", "--yes"][..],
        ),
        (&used, &["--revert", "1"], &["users: 1", "make a back-up", "--yes"]),
        (&used, &["--revert", &too_many, "--yes"], &[&too_many, &applied.len().to_string()]),
    ] {
        let (code, refusal) = revert(database, arguments).await;
        assert_eq!((code, refusal.lines().count()), (Some(1), 1), "{arguments:?}: {refusal}");
        assert!(words.iter().all(|word| refusal.contains(word)), "{words:?} in {refusal}");
        assert_eq!(database.texts(APPLIED).await, applied, "{arguments:?}");
    }
    for arguments in [&["--revert", "0"][..], &["--yes"]] {
        assert_eq!(revert(&used, arguments).await.0, Some(2), "{arguments:?}");
    }
    let newest = applied.last().unwrap();
    for database in [&served, &used] {
        let (code, reverted) = revert(database, &["--revert", "1", "--yes"]).await;
        assert_eq!((code, reverted), (Some(0), format!("reverted {newest}\n")));
    }
    drop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_of_a_newer_version_is_not_reverted() {
    let database = TestDatabase::migrated().await;
    database.execute(&format!("INSERT INTO __diesel_schema_migrations (version) VALUES ('{NEXT}')")).await;
    let error = migrations::revert(&database.url, None, 2, true).await.unwrap_err().to_string();
    assert!(error.contains(NEXT) && error.contains("not known"), "{error}");
    assert!(database.texts(APPLIED).await.contains(&NEXT.to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_server_mark_is_the_version_of_a_migration() {
    let mark = "SELECT oldest_server AS text FROM schema_compatibility";
    let database = TestDatabase::migrated().await;
    let marked = database.texts(mark).await;
    assert_eq!(marked.len(), 1);
    assert!(database.texts(APPLIED).await.contains(&marked[0]), "{marked:?}");
}

/// The schema `old`, which comes before `pg_catalog` here, lets Postgres claim another version.
#[tokio::test(flavor = "multi_thread")]
async fn every_command_refuses_a_postgres_below_15_in_one_line() {
    let mut database = TestDatabase::empty().await;
    let claim = "CREATE SCHEMA old;
        CREATE FUNCTION old.current_setting(name text) RETURNS text LANGUAGE sql AS $$
            SELECT CASE name WHEN 'server_version_num' THEN '140010' ELSE pg_catalog.current_setting(name) END
        $$";
    database.execute(claim).await;
    let real = database.clone();
    database.url.push_str("?options=-csearch_path%3Dold,pg_catalog,public");
    for arguments in [
        &["serve"][..],
        &["serve", "--migrate"],
        &["migrate"],
        &["migrate", "--revert", "1", "--yes"],
        &["user", "disable", "ops@example.com"],
    ] {
        let output = within_timeout("the refusal", milepost(&database, arguments).output()).await.unwrap();
        let refusal = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), refusal.lines().count()), (Some(1), 1), "{arguments:?}: {refusal}");
        let expected = ["Postgres 14", "15 or later"];
        assert!(expected.iter().all(|text| refusal.contains(text)), "{arguments:?}: {refusal}");
    }
    assert_eq!(real.texts(COLUMNS).await, Vec::<String>::new());
}

/// A task that appends to one job, watches, reads and lists it until it is stopped.
/// It returns how long the longest append took.
struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    work: JoinHandle<()>,
}

impl Load {
    async fn start(mut provider: User, customer: &User) -> Self {
        let job = provider.job(customer).await;
        let mut watch = customer.clone().watch(&job).await;
        watch.caught_up().await;
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let work = tokio::spawn(async move {
            while !stopped.load(Relaxed) {
                provider.append(&job, [info("under load")]).await;
                watch.events(1).await;
                provider.get(&job).await;
                assert_eq!(provider.list(&job).await.len(), counted.fetch_add(1, Relaxed) + 1);
            }
        });
        Self { stop, rounds, work }
    }

    /// Waits until some more rounds have succeeded.
    async fn continues(&self) {
        let before = self.rounds.load(Relaxed);
        within_timeout("some rounds", async {
            while self.rounds.load(Relaxed) < before + 5 && !self.work.is_finished() {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    async fn stop(self) {
        self.stop.store(true, Relaxed);
        self.work.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_schema_that_expands_is_served_by_the_old_server_without_a_failed_call() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let load = Load::start(provider.clone(), &customer).await;
    load.continues().await;
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
    load.continues().await;
    // An old server may still be started until oldest_server is raised.
    let mut old = ServerProcess::on(&server.database).await;
    old.same(&provider).current_user().await.unwrap();
    old.terminate();
    assert_eq!(old.exit().await.code(), Some(0));
    load.continues().await;
    load.stop().await;
    provider.job(&customer).await;
    provider.register(crate::support::registration("2.0.0", &[("load", 1)])).await;
    server.provider().await;

    server.database.execute(&format!("UPDATE schema_compatibility SET oldest_server = '{NEXT}'")).await;
    let refusal = ServerProcess::refused_with(&server.database.url, &["--unsafe-database"]).await;
    assert!(refusal.contains(NEXT) && refusal.lines().count() == 1, "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_waits_for_a_table_does_not_delay_appends_for_long() {
    let server = TestServer::on(database_with_aside().await).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    unapply_watch_tokens(&server.database).await;
    let load = Load::start(provider.clone(), &customer).await;
    load.continues().await;
    // A long transaction of another client, whose lock of jobs conflicts with the
    // migration's but not with appends.
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
        within_timeout("the migration to pause", async {
            while !server.database.texts(waiting).await.is_empty() {}
        })
        .await;
        load.continues().await;
    }
    other.batch_execute("COMMIT").await.unwrap();
    let applied = within_timeout("the migration", migrating).await.unwrap().unwrap();
    assert_eq!(applied, [WATCH_TOKENS]);
    load.continues().await;
    load.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_waits_to_migrate_exits_on_sigterm() {
    let database = TestDatabase::migrated().await;
    unapply_watch_tokens(&database).await;
    // The advisory lock of migrations, and a table that the pending migration locks.
    for locked in ["SELECT pg_advisory_xact_lock(x'6d696c65706f7374'::bigint)", "LOCK TABLE jobs"] {
        let mut other = database.connect().await;
        other.batch_execute(&format!("BEGIN; {locked}")).await.unwrap();
        let mut server = milepost(&database, &["serve", "--migrate"]).spawn().unwrap();
        database.wait_for_locks(1).await;
        let (terminated, pid) = (Instant::now(), server.id().expect("the server runs").to_string());
        assert!(Command::new("kill").arg(&pid).status().await.unwrap().success());
        let exit = within_timeout("the exit", server.wait()).await.unwrap();
        assert_eq!(exit.code(), Some(0), "{locked}");
        assert!(terminated.elapsed() < Duration::from_secs(3), "the exit waited for a lock: {locked}");
    }
}
