//! A primary and a standby, which can be promoted without the last commits, or can keep commits
//! waiting.

use std::{path::PathBuf, time::Duration};

use milepost::db::migrations;

use super::{
    TemporaryDir, TestDatabase,
    installed::{make_postgres_dir, newest_postgres, postgres_command},
    within_timeout,
};

/// Two servers, `a` and at first its standby `b`. When this is dropped, the watchdog of the
/// directory stops them.
pub struct Replication {
    dir: TemporaryDir,
}

impl Replication {
    /// A migrated database on the primary, which the standby follows.
    pub async fn start() -> Self {
        let replication = Self { dir: TemporaryDir::new() };
        for name in ["a", "b"] {
            make_postgres_dir(&replication.host(name));
        }
        let data = replication.data("a");
        replication
            .run(
                "initdb",
                &["--no-sync", "--auth=trust", "--username=milepost", "--encoding=UTF8", "-D", &data],
            )
            .await;
        replication.start_server("a").await;
        replication.execute("a", "CREATE DATABASE milepost").await;
        migrations::migrate(&replication.url(&["a"]), None).await.unwrap();
        let (host, data) = (replication.host("a").display().to_string(), replication.data("b"));
        replication
            .run(
                "pg_basebackup",
                &[
                    "--write-recovery-conf",
                    "--checkpoint=fast",
                    "--no-sync",
                    "-h",
                    &host,
                    "-U",
                    "milepost",
                    "-D",
                    &data,
                ],
            )
            .await;
        replication.start_server("b").await;
        replication
    }

    /// The database by a URL with both hosts.
    pub fn database(&self) -> TestDatabase {
        TestDatabase::served(self.url(&["a", "b"]))
    }

    /// The database on one of the servers.
    pub fn on(&self, server: &str) -> TestDatabase {
        TestDatabase::served(self.url(&[server]))
    }

    /// Returns once the standby has all commits of the primary.
    pub async fn in_step(&self) {
        let committed = self.on("a").texts("SELECT pg_current_wal_lsn()::text AS text").await.remove(0);
        let replayed = format!("SELECT (pg_last_wal_replay_lsn() >= '{committed}')::text AS text");
        self.wait("the standby to catch up", "b", &replayed, "true").await;
        let position = "SELECT position::text AS text FROM event_log";
        assert_eq!(self.on("a").texts(position).await, self.on("b").texts(position).await);
    }

    /// From now on each commit waits for the standby.
    pub async fn make_synchronous(&self) {
        self.set("a", "synchronous_standby_names", "*").await;
        let standbys = "SELECT count(*)::text AS text FROM pg_stat_replication WHERE sync_state = 'sync'";
        self.wait("the standby to be synchronous", "a", standbys, "1").await;
    }

    /// The standby gets commits again.
    pub async fn join(&self) {
        let primary = format!("host={} user=milepost", self.host("a").display());
        self.set("b", "primary_conninfo", &primary).await;
    }

    /// From now on the standby gets no commits.
    pub async fn part(&self) {
        self.set("b", "primary_conninfo", "").await;
        let receivers = "SELECT count(*)::text AS text FROM pg_stat_wal_receiver";
        self.wait("the standby to stop receiving", "b", receivers, "0").await;
    }

    /// Waits until a query of one row gives this text on a server.
    async fn wait(&self, awaited: &str, server: &str, query: &str, text: &str) {
        within_timeout(awaited, async {
            while self.on(server).texts(query).await != [text] {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Promotes the standby, while the primary runs on.
    pub async fn promote(&self) {
        self.run("pg_ctl", &["promote", "-s", "-w", "-D", &self.data("b")]).await;
    }

    /// Ends the primary at once.
    pub async fn stop_primary(&self) {
        self.run("pg_ctl", &["stop", "-s", "-m", "immediate", "-D", &self.data("a")]).await;
    }

    async fn start_server(&self, name: &str) {
        let (host, data) = (self.host(name).display().to_string(), self.data(name));
        let options = format!("-k {host} -c listen_addresses='' -c fsync=off");
        let log = format!("{host}/log");
        self.run("pg_ctl", &["start", "-s", "-w", "-D", &data, "-l", &log, "-o", &options]).await;
    }

    async fn set(&self, server: &str, name: &str, value: &str) {
        self.execute(server, &format!("ALTER SYSTEM SET {name} = '{value}'")).await;
        self.execute(server, "SELECT pg_reload_conf()").await;
    }

    async fn execute(&self, server: &str, sql: &str) {
        let url = self.url(&[server]);
        let (hosts, _) = url.rsplit_once('/').unwrap();
        TestDatabase::served(format!("{hosts}/postgres")).execute(sql).await;
    }

    fn url(&self, servers: &[&str]) -> String {
        let hosts = servers
            .iter()
            .map(|server| format!("{}:5432", self.host(server).display().to_string().replace('/', "%2F")));
        format!("postgresql://milepost@{}/milepost", hosts.collect::<Vec<_>>().join(","))
    }

    /// The directory of a server, which also has its socket.
    fn host(&self, server: &str) -> PathBuf {
        self.dir.path().join(server)
    }

    fn data(&self, server: &str) -> String {
        self.host(server).join("data").display().to_string()
    }

    /// Runs a program of Postgres to its end.
    async fn run(&self, program: &str, arguments: &[&str]) {
        let mut command = postgres_command(&newest_postgres().join(program));
        let output = command.args(arguments).current_dir(self.dir.path()).output().await.unwrap();
        let [stdout, stderr] =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(output.status.success(), "{program}: {stdout}{stderr}");
    }
}
