//! A primary and a standby, which can take the primary's place without the last commits, or
//! can keep commits waiting.

use std::{path::Path, time::Duration};

use milepost::db::migrations;
use tokio_postgres::Client;

use crate::{
    Node, TIMEOUT, TemporaryDir, TestDatabase, connect,
    node::{set, texts, try_texts},
    until, url,
};

/// Two servers of Postgres, `a` and `b`. When their directory is removed, its watchdog stops
/// them.
pub struct Replication {
    nodes: [Node; 2],
    /// Which node is the primary.
    primary: usize,
    _dir: Option<TemporaryDir>,
}

impl Replication {
    /// A migrated database on the primary `a`, which the standby `b` follows.
    pub async fn start() -> Self {
        let dir = TemporaryDir::new();
        let mut replication = Self::start_primary(dir.path(), &[("fsync", "off")], &[]).await;
        replication.build_standby().await;
        Self { _dir: Some(dir), ..replication }
    }

    /// A migrated database on the primary `a`, in a directory that another watchdog guards.
    /// Both servers get these settings and environment variables.
    pub async fn start_primary(
        dir: &Path,
        settings: &[(&'static str, &str)],
        environment: &[(&'static str, &str)],
    ) -> Self {
        let owned = |of: &[(&'static str, &str)]| {
            of.iter().map(|(name, value)| (*name, (*value).to_owned())).collect::<Vec<_>>()
        };
        let settings = [owned(settings), owned(&[("listen_addresses", "")])].concat();
        let nodes = ["a", "b"].map(|name| Node::new(dir.join(name), settings.clone(), owned(environment)));
        let mut replication = Self { nodes, primary: 0, _dir: None };
        let primary = replication.primary_mut();
        primary.create().await;
        primary.start();
        primary.wait_until_ready().await;
        let admin = connect(&primary.url("postgres")).await.unwrap();
        admin.batch_execute("CREATE DATABASE milepost").await.unwrap();
        migrations::migrate(&primary.url("milepost"), None).await.unwrap();
        replication
    }

    /// The database by a URL with both hosts.
    pub fn database(&self) -> TestDatabase {
        TestDatabase::served(url(&[self.nodes[0].dir(), self.nodes[1].dir()], "milepost"))
    }

    /// The database on the server of this name.
    pub fn on(&self, name: &str) -> TestDatabase {
        let node = self.nodes.iter().find(|node| node.dir().ends_with(name)).expect("a node of this name");
        TestDatabase::served(node.url("milepost"))
    }

    pub fn nodes(&self) -> &[Node; 2] {
        &self.nodes
    }

    pub fn primary(&self) -> &Node {
        &self.nodes[self.primary]
    }

    pub fn primary_mut(&mut self) -> &mut Node {
        &mut self.nodes[self.primary]
    }

    /// The node that is not the primary: its standby, its predecessor, or none.
    pub fn other(&self) -> &Node {
        &self.nodes[1 - self.primary]
    }

    pub fn other_mut(&mut self) -> &mut Node {
        &mut self.nodes[1 - self.primary]
    }

    /// Connects directly to the primary.
    pub async fn connect(&self) -> Client {
        self.primary().connect().await
    }

    /// Makes a standby and returns once it has all commits of the primary.
    pub async fn build_standby(&mut self) {
        self.other().copy(self.primary()).await;
        self.other_mut().start();
        self.in_step().await;
    }

    /// The stopped former primary starts as the standby of its successor.
    pub async fn return_as_standby(&mut self) {
        self.other().follow(self.primary());
        self.other_mut().start();
        self.in_step().await;
    }

    /// Returns once the standby has all commits that the primary has now.
    pub async fn in_step(&self) {
        let position = texts(&self.connect().await, "SELECT pg_current_wal_lsn()").await.remove(0);
        let has_all = format!("SELECT pg_last_wal_replay_lsn() >= '{position}' FROM pg_stat_wal_receiver");
        until(TIMEOUT, "the standby to catch up", async || {
            match connect(&self.other().url("milepost")).await {
                Ok(standby) => try_texts(&standby, &has_all).await == ["t"],
                Err(_) => false,
            }
        })
        .await;
    }

    /// From now on each commit waits for the standby.
    pub async fn make_synchronous(&self) {
        let primary = self.connect().await;
        set(&primary, "synchronous_standby_names", "*").await;
        let state = "SELECT sync_state FROM pg_stat_replication";
        until(TIMEOUT, "the standby to be synchronous", async || texts(&primary, state).await == ["sync"])
            .await;
        // Commits from before the setting have reached the standby then.
        tokio::time::sleep(Duration::from_millis(200)).await;
        self.in_step().await;
    }

    /// From now on the standby gets no commits. Returns once it has replayed those that it
    /// has got. What it received may end within a record, which it never replays: so it is
    /// done when it looks for more, and not when the two positions are equal.
    pub async fn part(&self) {
        let standby = self.other().connect().await;
        set(&standby, "primary_conninfo", "").await;
        let parted = "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver) AND EXISTS ( \
            SELECT FROM pg_stat_activity \
            WHERE backend_type = 'startup' AND wait_event = 'RecoveryRetrieveRetryInterval')";
        until(TIMEOUT, "the standby to stop receiving", async || texts(&standby, parted).await == ["t"])
            .await;
    }

    /// The standby gets commits again.
    pub async fn join(&self) {
        set(&self.other().connect().await, "primary_conninfo", &self.primary().conninfo()).await;
    }

    /// Ends the primary at once.
    pub async fn stop_primary(&mut self) {
        self.primary_mut().kill().await;
    }

    /// The standby becomes the primary, whatever the other node does.
    pub async fn promote(&mut self) {
        let standby = self.other().connect().await;
        assert_eq!(texts(&standby, "SELECT pg_promote(true, 30)").await, ["t"]);
        self.primary = 1 - self.primary;
        self.primary().wait_until_ready().await;
    }
}
