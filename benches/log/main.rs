//! The benchmark: compares milepost with other systems that its users could choose,
//! called peers.
//!
//! `cargo bench --bench log [-- ROW…]` starts a durable Postgres, the release server
//! and the row's peers, each as a process of its own. It loads milepost and the peers in
//! alternating rounds, each after a CHECKPOINT. The median of the rounds' ratios
//! decides. The programs of the peers are built on first use, below `target/peers`. All answers and received events are checked: a wrong one fails the row.

mod accounts;
mod check;
mod empty;
mod event_service;
mod events;
mod harness;
mod load;
mod peers;
mod report;
mod rows;
mod store;

use std::{net::SocketAddr, panic::AssertUnwindSafe, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum as _};
use futures_util::FutureExt as _;
use milepost_testing::machine;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use self::{harness::Harness, rows::Row};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T, E = Error> = std::result::Result<T, E>;

/// Compares milepost with its peers: etcd, NATS JetStream, Durable Streams, one transaction for each
/// event, the append statement driven by pgbench, COPY, an empty method
#[derive(Clone, Debug, Parser)]
struct Options {
    /// Rows to measure; all of them by default
    #[arg(value_enum)]
    rows: Vec<Row>,

    /// File to write the table to as JSON: for each row and peer an object with row, unit, milepost, peer,
    /// peer_name, ratio, spread, goal, met
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Fail if a peer is not installed and cannot be built; the default is a warning
    #[arg(long)]
    require_peers: bool,

    /// Rounds of milepost, and as many of each peer
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,

    /// Length of a round, in seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,

    /// Events in the large database of the row `flat`, ten to a job; 10000000 for the goal as stated
    #[arg(long, default_value_t = 1_000_000, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(10_000..=100_000_000))]
    flat_events: u32,

    /// A Postgres setting, as NAME=VALUE; may be given several times
    #[arg(long, value_name = "SETTING", value_parser = setting)]
    set: Vec<(String, String)>,

    /// `cargo bench` passes it
    #[arg(long, hide = true)]
    bench: bool,

    /// Serve the empty method at this address; the benchmark starts itself so
    #[arg(long, hide = true, value_name = "ADDRESS")]
    serve_empty: Option<SocketAddr>,
}

impl Options {
    fn round(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// The time before a round in which its load runs already and is not measured.
    fn warm_up(&self) -> Duration {
        (self.round() / 5).min(Duration::from_secs(3))
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    let options = Options::parse();
    raise_file_limit();
    let run = || tokio::runtime::Runtime::new()?.block_on(run(options));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Raises the limit of open files as far as is allowed: a watch by Server-Sent Events has a
/// connection of its own.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Where it fails, the connections do, which says more.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

async fn run(options: Options) -> Result<()> {
    if let Some(address) = options.serve_empty {
        return empty::serve(address).await;
    }
    let rows = if options.rows.is_empty() { Row::value_variants().to_vec() } else { options.rows.clone() };
    let json = options.json.clone();
    let mut conditions =
        format!("rounds: {} of {} s, milepost and peers alternating\n", options.rounds, options.seconds);
    for (name, value) in &options.set {
        conditions.push_str(&format!("Postgres with {name} = {value}\n"));
    }
    let harness = Harness::start(options).await?;
    let measured = tokio::select! {
        measured = measure(&harness, &rows) => measured,
        interrupted = tokio::signal::ctrl_c() => interrupted.map_err(Error::from).and(Err("interrupted".into())),
    };
    let described = harness.postgres_version().await.map(|version| versions(&version));
    harness.stop().await?;
    let (outcomes, failed) = measured?;
    println!("\n{}\n{}\n{conditions}", machine(), described?);
    println!("{}", report::table(&outcomes));
    if let Some(path) = json {
        std::fs::write(path, report::json(&outcomes))?;
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("\n").into()) }
}

/// The versions that were measured.
fn versions(postgres: &str) -> String {
    format!("milepost {}, Postgres {postgres}, {}", env!("CARGO_PKG_VERSION"), peers::versions())
}

/// The outcomes of the rows, and the errors of those that failed. A row that fails does
/// not stop the others.
async fn measure(harness: &Harness, rows: &[Row]) -> Result<(Vec<report::Outcome>, Vec<String>)> {
    let (mut outcomes, mut failed) = (Vec::new(), Vec::new());
    for row in rows {
        // What starts servers and signs up users panics where it fails.
        let measured = AssertUnwindSafe(row.measure(harness)).catch_unwind().await;
        match measured.unwrap_or_else(|_| Err("a panic, see above".into())) {
            Ok(measured) => outcomes.extend(measured),
            Err(error) => {
                let name = row.name();
                eprintln!("{name} FAILED: {error}");
                failed.push(format!("{name}: {error}"));
            }
        }
    }
    Ok((outcomes, failed))
}
