//! A primary and a standby, which can be promoted without the last commits, or can keep commits
//! waiting.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use milepost::db::migrations;
use tokio::task::spawn_blocking;

use super::{TemporaryDir, TestDatabase, process::is_root, within_timeout};

/// Two servers, `a` and at first its standby `b`. When this is dropped, the watchdog of the
/// directory stops them.
pub struct Replication {
    dir: TemporaryDir,
    bin: PathBuf,
}

impl Replication {
    /// A migrated database on the primary, which the standby follows.
    pub async fn start() -> Self {
        let bin = newest_postgres();
        let replication = Self { dir: TemporaryDir::new(), bin };
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
        let position = "SELECT position::text AS text FROM event_log";
        let [a, b] = ["a", "b"].map(|server| self.on(server));
        within_timeout("the standby to catch up", async {
            let committed = a.texts("SELECT pg_current_wal_lsn()::text AS text").await.remove(0);
            let replayed = format!("SELECT (pg_last_wal_replay_lsn() >= '{committed}')::text AS text");
            while b.texts(&replayed).await != ["true"] {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(a.texts(position).await, b.texts(position).await);
        })
        .await;
    }

    /// From now on each commit waits for the standby.
    pub async fn make_synchronous(&self) {
        self.set("a", "synchronous_standby_names", "*").await;
        let standbys = "SELECT count(*)::text AS text FROM pg_stat_replication WHERE sync_state = 'sync'";
        within_timeout("the standby to be synchronous", async {
            while self.on("a").texts(standbys).await != ["1"] {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
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
        within_timeout("the standby to stop receiving", async {
            while self.on("b").texts(receivers).await != ["0"] {
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
        let program = self.bin.join(program);
        let mut command = Command::new(if is_root() { Path::new("setpriv") } else { &program });
        if is_root() {
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(&program);
        }
        command.args(arguments).current_dir(self.dir.path());
        let Output { status, stdout, stderr } =
            spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(status.success(), "{}: {stdout}{stderr}", program.display());
    }
}

/// Makes a directory for the user as whom Postgres runs, since it refuses to run as root.
pub fn make_postgres_dir(path: &Path) {
    fs::create_dir(path).unwrap();
    if is_root() {
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let postgres = passwd.lines().find(|line| line.starts_with("postgres:")).unwrap();
        let ids: Vec<u32> = postgres.split(':').filter_map(|field| field.parse().ok()).collect();
        chown(path, Some(ids[0]), Some(ids[1])).unwrap();
    }
}

/// The directory of the programs of the newest Postgres.
pub fn newest_postgres() -> PathBuf {
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = installed
        .filter_map(|version| Some((version.file_name().to_str()?.parse::<u32>().ok()?, version.path())))
        .max();
    newest.expect("a Postgres of Debian's packages").1.join("bin")
}
