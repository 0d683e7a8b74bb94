//! etcd, three nodes of Patroni and HAProxy on loopback, and what happens to a primary.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use milepost_testing::{
    TemporaryDir, TestDatabase, http,
    installed::{make_postgres_dir, newest_postgres, postgres_command, python_with},
    own_address,
    processes::{self, Signal, signal_those_that_run},
    start_etcd, until,
};
use serde_json::Value;
use tokio::{
    process::Child,
    time::{sleep, timeout},
};

/// The settings of the cluster, in Patroni's words. They are the ones that decide how long a
/// failover takes.
pub const SETTINGS: &str = "ttl: 20, loop_wait: 4, retry_timeout: 5, synchronous_mode: quorum, \
                            synchronous_node_count: 1";
/// The settings of HAProxy's checks.
pub const CHECKS: &str = "inter 1s fall 2 rise 1 on-marked-down shutdown-sessions";
/// Longest that the cluster may take to be complete, at first and again after a fault.
const LIMIT: Duration = Duration::from_secs(120);
const PATRONI: &str = "patroni[etcd3,psycopg3]==4.*";
const NAMES: [&str; 3] = ["a", "b", "c"];
/// For how long a primary sends nothing to its standbys before it is killed.
const UNSENT: Duration = Duration::from_millis(500);
/// Longest wait for an answer of a node's REST API, which a frozen node does not give.
const ANSWER: Duration = Duration::from_secs(1);
/// A switchover is answered when it is done.
const SWITCHOVER_ANSWER: Duration = Duration::from_secs(60);
const LOG_TAIL_LINES: usize = 40;

/// The processes end when this is dropped and when the test process exits.
pub struct Cluster {
    nodes: Vec<Node>,
    haproxy: SocketAddr,
    // Before `dir`, so that no Patroni starts a Postgres again that the watchdog has stopped.
    _others: Vec<Child>,
    dir: TemporaryDir,
}

/// A Patroni and its Postgres.
struct Node {
    name: &'static str,
    api: SocketAddr,
    postgres: SocketAddr,
    patroni: Child,
}

/// When a fault began, when another node was promoted, and when all three nodes were in step
/// again.
pub struct Failover {
    pub began: Instant,
    pub promoted: Instant,
    pub completed: Instant,
}

/// What Patroni says about a node.
#[derive(Debug)]
struct Member {
    name: String,
    role: String,
    state: String,
    timeline: Option<i64>,
}

impl Cluster {
    /// Returns once all three nodes run.
    pub async fn start() -> Self {
        let dir = TemporaryDir::new();
        // Not below `target`, and not with a Python of `PATH`: the user of Postgres may be unable
        // to enter the home directory in which they are.
        python_with("/usr/bin/python3", &[PATRONI], &dir.path().join("venv")).await;
        let etcd_address = own_address("127.0.0.1");
        make_postgres_dir(&dir.path().join("etcd"));
        let etcd = start_etcd(postgres_command("etcd"), &dir, "etcd", etcd_address);
        let addresses = NAMES.map(|name| (name, own_address("127.0.0.1"), own_address("127.0.0.1")));
        let nodes = addresses.map(|(name, api, postgres)| {
            make_postgres_dir(&dir.path().join(name));
            let configuration =
                patroni_configuration(&dir.path().join(name), name, api, postgres, etcd_address);
            fs::write(dir.path().join(format!("{name}.yml")), configuration).unwrap();
            Node { name, api, postgres, patroni: start_patroni(&dir, name) }
        });
        let haproxy = own_address("127.0.0.1");
        fs::write(dir.path().join("haproxy.cfg"), haproxy_configuration(haproxy, &nodes)).unwrap();
        let proxy = start(&dir, "haproxy", "haproxy", &["-db", "-f", "haproxy.cfg"]);
        let cluster = Self { nodes: nodes.into(), haproxy, _others: vec![etcd, proxy], dir };
        cluster.complete_after(0).await;
        let primary = cluster.node(&cluster.primary().await).postgres;
        let admin = TestDatabase::served(format!("postgresql://postgres@{primary}/postgres"));
        admin.execute("CREATE ROLE milepost LOGIN").await;
        admin.execute("CREATE DATABASE milepost OWNER milepost").await;
        cluster
    }

    /// The database by the addresses of all nodes.
    pub fn url_of_nodes(&self) -> String {
        let addresses: Vec<String> = self.nodes.iter().map(|node| node.postgres.to_string()).collect();
        format!("postgresql://milepost@{}/milepost", addresses.join(","))
    }

    /// The database by the address of HAProxy.
    pub fn url_of_haproxy(&self) -> String {
        format!("postgresql://milepost@{}/milepost", self.haproxy)
    }

    /// The versions of Patroni and Postgres, as in `Patroni 4.1.5, Postgres 15.18`.
    pub async fn versions(&self) -> String {
        let state = request(self.nodes[0].api, "GET /patroni", "", ANSWER).await.unwrap();
        let state: Value = serde_json::from_str(&state).unwrap();
        let patroni = state["patroni"]["version"].as_str().unwrap();
        let postgres = state["server_version"].as_i64().unwrap();
        format!("Patroni {patroni}, Postgres {}.{}", postgres / 10_000, postgres % 10_000)
    }

    /// Kills Patroni and Postgres of the primary, and starts them again once another node is
    /// promoted. A moment earlier it stops to send to the standbys, so that everything is lost
    /// that is then acknowledged without them.
    pub async fn kill_primary(&mut self) -> Failover {
        let (primary, timeline) = (self.primary().await, self.timeline().await);
        let processes = self.node(&primary).processes(self.dir.path());
        let senders: Vec<u32> = processes.iter().copied().filter(|pid| is_walsender(*pid)).collect();
        assert!(!senders.is_empty(), "the primary has standbys");
        signal_those_that_run(&senders, Signal::STOP);
        sleep(UNSENT).await;
        let began = Instant::now();
        signal_those_that_run(&processes, Signal::KILL);
        let promoted = self.promoted_instead_of(&primary).await;
        let node = self.nodes.iter_mut().find(|node| node.name == primary).unwrap();
        node.patroni.wait().await.unwrap();
        node.patroni = start_patroni(&self.dir, node.name);
        self.complete_after(timeline).await;
        Failover { began, promoted, completed: Instant::now() }
    }

    /// Makes another node the primary, as an operator does.
    pub async fn switch_over(&self) -> Failover {
        let (primary, timeline) = (self.primary().await, self.timeline().await);
        let began = Instant::now();
        let body = format!(r#"{{"leader": "{primary}"}}"#);
        let switchover = request(self.node(&primary).api, "POST /switchover", &body, SWITCHOVER_ANSWER);
        let (answer, promoted) = tokio::join!(switchover, self.promoted_instead_of(&primary));
        assert!(answer.as_ref().is_some_and(|answer| answer.contains("switched over")), "{answer:?}");
        self.complete_after(timeline).await;
        Failover { began, promoted, completed: Instant::now() }
    }

    /// Stops all processes of the primary for this time, as a machine does that hangs.
    pub async fn freeze_primary(&self, time: Duration) -> Failover {
        let (primary, timeline) = (self.primary().await, self.timeline().await);
        let processes = self.node(&primary).processes(self.dir.path());
        let began = Instant::now();
        signal_those_that_run(&processes, Signal::STOP);
        let ((), promoted) = tokio::join!(sleep(time), self.promoted_instead_of(&primary));
        signal_those_that_run(&processes, Signal::CONT);
        self.complete_after(timeline).await;
        Failover { began, promoted, completed: Instant::now() }
    }

    /// The last lines of each log.
    pub fn log_tails(&self) -> String {
        let logs = ["etcd", "haproxy"].into_iter().chain(NAMES);
        let tails = logs.map(|name| {
            let path = self.dir.path().join(format!("{name}.log"));
            format!("== {name}\n{}\n", tail(&fs::read_to_string(path).unwrap_or_default()))
        });
        tails.collect()
    }

    fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.name == name).unwrap()
    }

    async fn primary(&self) -> String {
        let members = self.members().await;
        members.into_iter().find(is_primary).expect("the cluster has a primary").name
    }

    async fn timeline(&self) -> i64 {
        self.members().await.iter().filter_map(|member| member.timeline).max().unwrap()
    }

    /// Waits until a Postgres other than this one is no standby.
    async fn promoted_instead_of(&self, primary: &str) -> Instant {
        let standbys: Vec<TestDatabase> = self
            .nodes
            .iter()
            .filter(|node| node.name != primary)
            .map(|node| TestDatabase::served(format!("postgresql://postgres@{}/postgres", node.postgres)))
            .collect();
        until(LIMIT, "a promotion", async || {
            for standby in &standbys {
                if standby.texts("SELECT pg_is_in_recovery()::text AS text").await == ["false"] {
                    return true;
                }
            }
            false
        })
        .await;
        Instant::now()
    }

    /// Waits until one node is the primary, each of the others may be the next one, and all are
    /// on the same timeline after this one. (Each failover starts a timeline. A node that wakes
    /// still says for a moment what was true when it was frozen.)
    async fn complete_after(&self, timeline: i64) {
        until(LIMIT, "three nodes in step", async || {
            let members = self.members().await;
            let standby = |member: &&Member| member.role == "quorum_standby" && member.state == "streaming";
            members.len() == NAMES.len()
                && members.iter().filter(|member| is_primary(member)).count() == 1
                && members.iter().filter(standby).count() == NAMES.len() - 1
                && members[0].timeline.is_some_and(|of_all| of_all > timeline)
                && members.iter().all(|member| member.timeline == members[0].timeline)
        })
        .await;
    }

    /// The state of all nodes by the first node that answers; empty if none does.
    async fn members(&self) -> Vec<Member> {
        for node in &self.nodes {
            let Some(answer) = request(node.api, "GET /cluster", "", ANSWER).await else { continue };
            let Ok(cluster) = serde_json::from_str::<Value>(&answer) else { continue };
            let members = cluster["members"].as_array().map(Vec::as_slice).unwrap_or_default();
            let text = |member: &Value, name: &str| member[name].as_str().unwrap_or_default().to_owned();
            let member = |member| Member {
                name: text(member, "name"),
                role: text(member, "role"),
                state: text(member, "state"),
                timeline: member["timeline"].as_i64(),
            };
            return members.iter().map(member).collect();
        }
        Vec::new()
    }
}

impl Node {
    /// Patroni, Postgres and its children. In this order none of them starts another one
    /// while they are stopped.
    fn processes(&self, dir: &Path) -> Vec<u32> {
        let file = dir.join(self.name).join("data/postmaster.pid");
        let postmaster: u32 = fs::read_to_string(file).unwrap().lines().next().unwrap().parse().unwrap();
        let patroni = self.patroni.id().expect("Patroni runs");
        [vec![patroni, postmaster], processes::children(postmaster)].concat()
    }
}

/// Whether this process of Postgres sends commits to a standby.
fn is_walsender(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|title| title.contains("walsender"))
}

fn is_primary(member: &Member) -> bool {
    member.role == "leader" && member.state == "running"
}

/// The last lines of a log.
pub fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

/// A call of Patroni's REST API; `None` without an answer in time.
async fn request(address: SocketAddr, method_and_path: &str, body: &str, limit: Duration) -> Option<String> {
    let (_head, body) = timeout(limit, http(address, method_and_path, body)).await.ok()?.ok()?;
    Some(body)
}

fn start_patroni(dir: &TemporaryDir, name: &str) -> Child {
    start(dir, name, "venv/bin/patroni", &[&format!("{name}.yml")])
}

/// Starts a program as the user of Postgres. It logs to a file in `dir`.
fn start(dir: &TemporaryDir, log: &str, program: &str, arguments: &[&str]) -> Child {
    let mut command = postgres_command(program);
    command.args(arguments);
    dir.run(command, &format!("{log}.log"))
}

fn patroni_configuration(
    dir: &Path,
    name: &str,
    api: SocketAddr,
    postgres: SocketAddr,
    etcd: SocketAddr,
) -> String {
    let bin = newest_postgres();
    let (dir, bin) = (dir.display(), bin.display());
    format!(
        r#"
scope: milepost
name: {name}
restapi: {{listen: "{api}", connect_address: "{api}"}}
etcd3: {{host: "{etcd}"}}
# Where there is a hardware watchdog, it would reset this machine.
watchdog: {{mode: "off"}}
bootstrap:
  dcs: {{{SETTINGS}, postgresql: {{use_pg_rewind: true}}}}
  initdb: [{{encoding: UTF8}}, {{locale: C}}]
  pg_hba: [local all all trust, host all all 127.0.0.1/32 trust, host replication all 127.0.0.1/32 trust]
postgresql:
  listen: "{postgres}"
  connect_address: "{postgres}"
  data_dir: "{dir}/data"
  bin_dir: "{bin}"
  pgpass: "{dir}/pgpass"
  parameters: {{unix_socket_directories: "{dir}"}}
  authentication:
    superuser: {{username: postgres}}
    replication: {{username: replicator}}
    rewind: {{username: postgres}}
"#
    )
}

fn haproxy_configuration(address: SocketAddr, nodes: &[Node]) -> String {
    let server =
        |node: &Node| format!("    server {} {} check port {}\n", node.name, node.postgres, node.api.port());
    let servers: String = nodes.iter().map(server).collect();
    format!(
        "defaults
    mode tcp
    timeout connect 4s
    timeout client 30m
    timeout server 30m
listen primary
    bind {address}
    option httpchk GET /primary
    http-check expect status 200
    default-server {CHECKS}
{servers}"
    )
}
