//! Failovers of a real cluster: Patroni with three nodes and quorum commit, one server that
//! knows the nodes and one that knows HAProxy. Nothing that was acknowledged is lost, and
//! neither a server nor a watch ends.
//!
//! `cargo test --test patroni` needs Debian's etcd-server, haproxy, postgresql and python3-venv.
//! It installs Patroni itself, in its temporary directory.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    reason = "a test fails by a panic, and the other lints do not help in test code"
)]

mod cluster;
mod load;

use std::time::{Duration, Instant};

use cluster::{Cluster, Failover};
use load::{Acknowledgements, Load};
use milepost_testing::{ServerProcess, machine, print_line};
use tokio::process::Command;

/// For how long a primary is frozen: longer than its key lives.
const FREEZE: Duration = Duration::from_secs(30);
/// Without the lines of single calls, which would fill the printed end of a log.
const LOG_LEVEL: &str = "info,milepost::server::calls=warn,milepost::services=error";
/// How the two servers find their database.
const SERVERS: [&str; 2] = ["three hosts", "HAProxy"];

struct World {
    servers: [ServerProcess; 2],
    cluster: Cluster,
}

impl World {
    async fn start() -> Self {
        let cluster = Cluster::start().await;
        let urls = [cluster.url_of_nodes(), cluster.url_of_haproxy()];
        let mut migrate = Command::new(env!("CARGO_BIN_EXE_milepost"));
        let migrated = migrate.arg("migrate").env("DATABASE_URL", &urls[0]).output().await.unwrap();
        assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
        let [first, second] = urls.map(|url| {
            let log_level = ("MILEPOST_LOG_LEVEL", LOG_LEVEL.to_owned());
            ServerProcess::start_with("127.0.0.1", vec![("DATABASE_URL", url), log_level])
        });
        Self { servers: [first.await, second.await], cluster }
    }

    fn pids(&self) -> Vec<u32> {
        self.servers.iter().flat_map(ServerProcess::pids).collect()
    }
}

/// What explains a failure is removed with the temporary directories.
impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (server, name) in self.servers.iter().zip(SERVERS) {
                println!("== the server by {name}\n{}", cluster::tail(&server.log()));
            }
            println!("{}", self.cluster.log_tails());
        }
    }
}

/// Prints when after the beginning of a fault a node was promoted, for how long each server
/// acknowledged no append, and when the cluster was complete again.
async fn report(fault: &str, failover: Failover, acknowledgements: &Acknowledgements) {
    acknowledgements.wait_for_each().await;
    let Failover { began, promoted, completed } = failover;
    let [first, second] = [0, 1].map(|server| acknowledgements.longest_gap(server, began));
    let times = [promoted - began, first, second, completed - began];
    let times = times.map(|time| format!("{:>13.1} s", time.as_secs_f64()));
    print_line(format!("{fault:<24}{}", times.concat()));
}

async fn fail_over(cluster: &mut Cluster, acknowledgements: &Acknowledgements) {
    acknowledgements.wait_for_each().await;
    let [first, second] = SERVERS;
    print_line(format!("{:<24}{:>15}{:>30}{:>15}", "", "", "without an append by", "cluster"));
    print_line(format!("{:<24}{:>15}{first:>15}{second:>15}{:>15}", "fault", "promotion", "complete"));
    report("primary killed", cluster.kill_primary().await, acknowledgements).await;
    report("switchover", cluster.switch_over().await, acknowledgements).await;
    let fault = format!("primary frozen for {} s", FREEZE.as_secs());
    report(&fault, cluster.freeze_primary(FREEZE).await, acknowledgements).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_and_no_watch_ends_when_patroni_fails_over() {
    let began = Instant::now();
    let mut world = World::start().await;
    print_line(format!("\n{}; {}; {}", machine(), world.cluster.versions().await, cluster::SETTINGS));
    print_line(format!("HAProxy: {}", cluster::CHECKS));
    print_line(format!("started in {:.0} s", began.elapsed().as_secs_f64()));
    let pids = world.pids();
    let mut load = Load::start([&world.servers[0], &world.servers[1]]).await;
    let acknowledgements = load.acknowledgements.clone();
    tokio::select! {
        () = fail_over(&mut world.cluster, &acknowledgements) => {}
        () = load.failure() => {}
    }
    let totals = load.finish().await;
    assert_eq!(world.pids(), pids, "no server was started again");
    print_line(format!(
        "{} events in {} batches, {} of them sent more than once, received by {} watchers; {:.0} s in all",
        totals.events,
        totals.batches,
        totals.repeated_batches,
        totals.watchers,
        began.elapsed().as_secs_f64()
    ));
}
