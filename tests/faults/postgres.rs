//! The Postgres that both servers use: one primary, and for a replication fault a standby
//! that takes its place. Both are on one disk, which can be filled.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use milepost::db::migrations;
use tokio::process::Command;
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::{clock::Clock, context::within, node::Node, temporary::TemporaryDir};

const TIMEOUT: Duration = Duration::from_secs(120);

pub struct Postgres {
    pub nodes: [Node; 2],
    /// Which node is the primary.
    primary: usize,
    clock: Clock,
    disk: Option<PathBuf>,
    disk_size_mib: u64,
}

impl Postgres {
    /// Starts and migrates Postgres, on a small tmpfs of its own where this process
    /// may mount one.
    pub async fn start(dir: &TemporaryDir, seconds: u64) -> Self {
        let path = dir.path().join("disk");
        fs::create_dir(&path).unwrap();
        let disk_size_mib = 2_048 + 8 * seconds;
        let options = format!("size={disk_size_mib}m,mode=0755");
        let arguments = ["-t", "tmpfs", "-o", &options, "milepost-faults"];
        let mount = Command::new("mount").args(arguments).arg(&path).output().await;
        let mounted = mount.is_ok_and(|output| output.status.success());
        // Beside the disk, so that the clock can be moved while the disk is full.
        let clock_dir = dir.path().join("database-clock");
        fs::create_dir(&clock_dir).unwrap();
        let nodes = ["a", "b"].map(|name| Node::new(path.join(name), Clock::new(&clock_dir)));
        let disk = mounted.then_some(path);
        let mut postgres = Self { nodes, primary: 0, clock: Clock::new(&clock_dir), disk, disk_size_mib };
        postgres.nodes[0].create().await;
        postgres.nodes[0].start();
        postgres.until_connected("postgres").await;
        let create = "CREATE DATABASE milepost";
        postgres.primary().connect_to_postgres().await.batch_execute(create).await.unwrap();
        migrations::migrate(&postgres.primary().url("milepost"), None).await.unwrap();
        postgres
    }

    pub fn primary(&self) -> &Node {
        &self.nodes[self.primary]
    }

    fn primary_mut(&mut self) -> &mut Node {
        &mut self.nodes[self.primary]
    }

    /// The node that is not the primary: its standby, its predecessor, or none.
    pub fn other(&self) -> &Node {
        &self.nodes[1 - self.primary]
    }

    pub fn other_mut(&mut self) -> &mut Node {
        &mut self.nodes[1 - self.primary]
    }

    pub fn has_own_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Connects directly to the primary.
    pub async fn connect(&self) -> Client {
        self.primary().connect().await
    }

    async fn until_connected(&self, database: &str) {
        let url = self.primary().url(database);
        within(TIMEOUT, "Postgres to execute a query", async {
            while !is_ready(&url).await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    /// Returns once the primary executes a query.
    pub async fn wait_until_ready(&self) {
        self.until_connected("milepost").await;
    }

    /// Kills the primary: see [`Node::kill`].
    pub async fn kill(&mut self) {
        self.primary_mut().kill().await;
    }

    /// Stops the primary by a fast shutdown.
    pub async fn stop(&mut self) {
        self.primary_mut().stop().await;
    }

    /// Starts the primary on the same data.
    pub async fn start_again(&mut self) {
        self.primary_mut().start();
        self.wait_until_ready().await;
    }

    /// Whether the primary runs.
    pub fn is_running(&mut self) -> bool {
        self.primary_mut().is_running()
    }

    /// Sets by how many seconds Postgres's clock is ahead of the real one.
    pub fn move_clock(&self, seconds: i64) {
        self.clock.set(seconds);
    }

    /// Makes a standby and returns once it has all commits of the primary.
    pub async fn build_standby(&mut self) {
        self.other().copy(self.primary()).await;
        self.other_mut().start();
        self.wait_until_in_step().await;
    }

    /// The stopped former primary starts as the standby of its successor.
    pub async fn return_as_standby(&mut self) {
        self.other().follow(self.primary());
        self.other_mut().start();
        self.wait_until_in_step().await;
    }

    /// Returns once the standby has all commits that the primary has now.
    pub async fn wait_until_in_step(&self) {
        let primary = self.connect().await;
        let position = texts(&primary, "SELECT pg_current_wal_lsn()").await.remove(0);
        let has_all = format!("SELECT pg_last_wal_replay_lsn() >= '{position}' FROM pg_stat_wal_receiver");
        within(TIMEOUT, "the standby to catch up", async {
            loop {
                if let Ok(standby) = self.other().try_connect().await
                    && try_texts(&standby, &has_all).await == ["t"]
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    /// From now on each commit waits for the standby.
    pub async fn make_synchronous(&self) {
        let primary = self.connect().await;
        set(&primary, "synchronous_standby_names", "*").await;
        let synchronous = "SELECT sync_state FROM pg_stat_replication";
        within(TIMEOUT, "the standby to be synchronous", async {
            while texts(&primary, synchronous).await != ["sync"] {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        // Commits from before the setting have reached the standby then.
        tokio::time::sleep(Duration::from_millis(200)).await;
        self.wait_until_in_step().await;
    }

    /// From now on the standby gets no commits. Returns once it has replayed those that it
    /// has got.
    pub async fn part(&self) {
        let standby = self.other().connect().await;
        set(&standby, "primary_conninfo", "").await;
        let parted = "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver) \
            AND pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()";
        within(TIMEOUT, "the standby to stop receiving", async {
            while texts(&standby, parted).await != ["t"] {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    /// The standby becomes the primary, whatever the other node does.
    pub async fn promote(&mut self) {
        let standby = self.other().connect().await;
        assert_eq!(texts(&standby, "SELECT pg_promote(true, 30)").await, ["t"]);
        self.primary = 1 - self.primary;
        self.wait_until_ready().await;
    }

    /// Fills the disk: shrinks the tmpfs to the size of its files.
    pub async fn fill_disk(&self) {
        loop {
            let used_kib = used_kib(self.disk()).await;
            // Fails if files have grown meanwhile.
            if self.remount(&format!("{used_kib}k")).await {
                return;
            }
        }
    }

    /// How much of the disk is used, as text.
    pub async fn disk_usage(&self) -> String {
        let Some(disk) = &self.disk else { return "Postgres has no disk of its own".to_owned() };
        format!("{} of {} MiB of disk used", used_kib(disk).await / 1024, self.disk_size_mib)
    }

    pub async fn free_disk(&self) {
        assert!(
            self.remount(&format!("{}m", self.disk_size_mib)).await,
            "remounting the disk at its full size failed"
        );
    }

    /// Whether the tmpfs could be given this size.
    async fn remount(&self, size: &str) -> bool {
        let options = format!("remount,size={size}");
        let mount = Command::new("mount").args(["-o", &options]).arg(self.disk()).output().await;
        mount.unwrap().status.success()
    }

    fn disk(&self) -> &Path {
        self.disk.as_deref().expect("Postgres has a disk of its own")
    }
}

async fn is_ready(url: &str) -> bool {
    let Ok((client, connection)) = tokio_postgres::connect(url, tokio_postgres::NoTls).await else {
        return false;
    };
    tokio::spawn(connection);
    client.simple_query("SELECT 1").await.is_ok()
}

/// Changes a setting of a whole server.
pub async fn set(client: &Client, name: &str, value: &str) {
    client.batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'")).await.unwrap();
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
}

/// The first column of each row.
pub async fn texts(client: &Client, sql: &str) -> Vec<String> {
    first_column(client.simple_query(sql).await.unwrap())
}

/// As [`texts`]; nothing if the query fails.
async fn try_texts(client: &Client, sql: &str) -> Vec<String> {
    client.simple_query(sql).await.map(first_column).unwrap_or_default()
}

fn first_column(messages: Vec<SimpleQueryMessage>) -> Vec<String> {
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}

async fn used_kib(disk: &Path) -> u64 {
    let output = Command::new("df").args(["--output=used", "-k"]).arg(disk).output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().last().unwrap().trim().parse().unwrap()
}
