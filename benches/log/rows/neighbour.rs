//! A quiet provider's appends and watch, alone and beside a flood: of another provider, and
//! for comparison of the quiet provider itself. A provider's own appends are served in the
//! order in which they come, so that the latter shows what turns of the providers are worth.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use milepost_client::{
    Client,
    pb::{AppendEventsRequest, NewEvent},
};
use milepost_testing::http;
use prost_types::{Struct, Value, value::Kind};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::Code;

use crate::{
    Result,
    accounts::{self, Accounts},
    check::Checker,
    events::{Acked, SequenceCheck, append_request, delays, new_event, stamp},
    harness::{Harness, serve_with_metrics},
    load::latency,
    report::{Goal, Measure, Outcome, median},
    store::Store,
};

/// Pause of the quiet provider after each append.
const PAUSE: Duration = Duration::from_millis(5);
/// One append in so many measures rounds instead of time.
const ROUNDS_ONE_IN: usize = 4;
/// Batches of 0.99 MB in flight, and as many replays of stored batches of 500.
const IN_FLIGHT: usize = 64;
/// Connections of the flood.
const CONNECTIONS: usize = 8;
const BATCH_EVENTS: usize = 500;
/// Length of an event's metadata in bytes with which 500 events make 0.99 MB.
const METADATA_BYTES: usize = 1_880;
/// Pause of a call of the flood that was refused.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);
/// Limit for the arrival of the last event at the watcher.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The round under way, the append's own, and one that ends before the metric is read again.
const GOAL_ROUNDS: f64 = 3.0;

pub(super) async fn measure(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let (server, metrics) = serve_with_metrics(&harness.database().await?).await;
    let quiet = Accounts::create(server.address).await;
    let jobs: Arc<[String]> = quiet.create_jobs(server.address, 1).await?.into();
    let loud = Accounts::create(server.address).await;
    let of_another = Flood::prepare(server.address, &loud).await?;
    let of_itself = Flood::prepare(server.address, &quiet).await?;
    let neighbour = Neighbour {
        sender: Store::milepost(server.address, &quiet.provider, Arc::clone(&jobs), 1).await?,
        watcher: Store::milepost(server.address, &quiet.customer, Arc::clone(&jobs), 1).await?,
        metrics,
    };
    let reader = &accounts::connect(server.address, &quiet.customer, 1).await?[0];
    let mut checker = Checker::default();
    let mut beside_another = Outcomes::new(name, Some(Goal::Within(GOAL_ROUNDS)));
    let mut in_one_queue = Outcomes::new(&format!("{name}-one-queue"), None);
    for _ in 0..harness.options.rounds {
        harness.checkpoint().await?;
        let alone = neighbour.round(harness).await?;
        checker.check(reader, &jobs, &alone.acked).await?;
        for (flood, outcomes) in [(&of_another, &mut beside_another), (&of_itself, &mut in_one_queue)] {
            harness.checkpoint().await?;
            let running = flood.start();
            let beside = neighbour.round(harness).await?;
            running.stop().await?;
            checker.check(reader, &jobs, &beside.acked).await?;
            outcomes.add(&beside, &alone);
        }
    }
    Ok([beside_another, in_one_queue].into_iter().flat_map(|outcomes| outcomes.0).collect())
}

/// The quiet provider's connections.
struct Neighbour {
    sender: Store,
    watcher: Store,
    metrics: SocketAddr,
}

/// What the quiet provider measured in a round.
#[derive(Default)]
struct Round {
    acked: Vec<Acked>,
    appends: Vec<Duration>,
    deliveries: Vec<Duration>,
    /// Rounds of the server that ended during an append.
    rounds: Vec<f64>,
}

impl Neighbour {
    /// Appends one event after the other and watches their job.
    async fn round(&self, harness: &Harness) -> Result<Round> {
        let started = Instant::now();
        let from = harness.options.warm_up();
        let (stream, after) = self.watcher.watch(0, 0).await?;
        let (total_sender, total) = watch::channel(None);
        let watching = tokio::spawn(delays(stream, SequenceCheck::after(after), started, from, total));
        let mut round = self.append(started, from, from + harness.options.round()).await?;
        total_sender.send(Some(round.acked.len()))?;
        round.deliveries = timeout(TIMEOUT, watching).await???;
        Ok(round)
    }

    async fn append(&self, started: Instant, from: Duration, until: Duration) -> Result<Round> {
        let (mut writer, mut round) = (self.sender.writer(0), Round::default());
        while started.elapsed() < until {
            let counts_rounds = round.acked.len() % ROUNDS_ONE_IN == 0;
            let before = if counts_rounds { rounds_so_far(self.metrics).await? } else { 0.0 };
            let sent = Instant::now();
            round.acked.push(writer.append(&self.sender.logs, 0, stamp(started)).await?);
            let took = sent.elapsed();
            if counts_rounds {
                round.rounds.push(rounds_so_far(self.metrics).await? - before);
            } else if started.elapsed() >= from {
                round.appends.push(took);
            }
            sleep(PAUSE).await;
        }
        Ok(round)
    }
}

/// How many rounds the server has appended.
async fn rounds_so_far(metrics: SocketAddr) -> Result<f64> {
    let (_, samples) = http(metrics, "GET /metrics", "").await?;
    let name = "milepost_transaction_duration_seconds_count ";
    let count = samples.lines().find_map(|line| line.strip_prefix(name));
    Ok(count.ok_or("/metrics has no count of transactions")?.trim().parse()?)
}

/// The rows of the table for one flood.
struct Outcomes([Outcome; 5]);

impl Outcomes {
    fn new(name: &str, rounds: Option<Goal>) -> Self {
        let outcome = |what: &str, unit, goal| {
            Outcome::new(format!("{name}-{what}"), unit).compared_with("alone", goal)
        };
        Self([
            outcome("append", "ms p50", None),
            outcome("append-p99", "ms p99", None),
            outcome("watch", "ms p50", None),
            outcome("watch-p99", "ms p99", None),
            outcome("rounds", "rounds an append", rounds),
        ])
    }

    fn add(&mut self, beside: &Round, alone: &Round) {
        for (of_milepost, round) in [(true, beside), (false, alone)] {
            let (append, delivery) = (latency(&round.appends), latency(&round.deliveries));
            let mut rounds = round.rounds.clone();
            rounds.sort_by(f64::total_cmp);
            let measures = [
                Measure { value: append[0], latencies: Some(append) },
                Measure::of(append[1]),
                Measure { value: delivery[0], latencies: Some(delivery) },
                Measure::of(delivery[1]),
                Measure::of(median(&rounds).unwrap_or(0.0)),
            ];
            for (outcome, measure) in self.0.iter_mut().zip(measures) {
                if of_milepost {
                    outcome.add_milepost(measure);
                } else {
                    outcome.add_peer(measure);
                }
            }
        }
    }
}

/// Appends that one provider keeps in flight.
struct Flood {
    clients: Vec<Client>,
    /// For each of them that many calls are in flight.
    requests: Vec<(AppendEventsRequest, usize)>,
}

struct RunningFlood {
    stop: watch::Sender<bool>,
    calls: JoinSet<Result<()>>,
}

impl Flood {
    /// Creates the jobs, and stores the batch that will be replayed.
    async fn prepare(server: SocketAddr, accounts: &Accounts) -> Result<Self> {
        let clients = accounts::connect(server, &accounts.provider, CONNECTIONS).await?;
        // The quiet provider has a job of its own.
        let mut jobs = accounts.create_more_jobs(server, 1, CONNECTIONS + 1).await?;
        let replayed = append_request(
            jobs.pop().ok_or("no job was created")?,
            (0..BATCH_EVENTS).map(|step| new_event(step, 0)).collect(),
        );
        clients[0].events().append_events(replayed.clone()).await?;
        let mut requests = vec![(replayed, IN_FLIGHT)];
        requests.extend(jobs.into_iter().map(|job| (large_batch(job), IN_FLIGHT / CONNECTIONS)));
        Ok(Self { clients, requests })
    }

    fn start(&self) -> RunningFlood {
        let (stop, stopped) = watch::channel(false);
        let mut calls = JoinSet::new();
        let in_flight = self.requests.iter().flat_map(|(request, count)| (0..*count).map(move |_| request));
        for (request, client) in in_flight.zip(self.clients.iter().cycle()) {
            calls.spawn(append_until(stopped.clone(), client.clone(), request.clone()));
        }
        RunningFlood { stop, calls }
    }
}

impl RunningFlood {
    async fn stop(mut self) -> Result<()> {
        self.stop.send(true)?;
        while let Some(ended) = self.calls.join_next().await {
            ended??;
        }
        Ok(())
    }
}

async fn append_until(
    stopped: watch::Receiver<bool>,
    client: Client,
    request: AppendEventsRequest,
) -> Result<()> {
    while !*stopped.borrow() {
        match client.events().append_events(request.clone()).await {
            Ok(_) => {}
            Err(status) if status.code() == Code::ResourceExhausted => sleep(REFUSED_PAUSE).await,
            // In one queue with the others, it may have waited for too long.
            Err(status) if status.code() == Code::DeadlineExceeded => {}
            Err(status) => return Err(status.into()),
        }
    }
    Ok(())
}

/// A request of 0.99 MB, which is appended each time that it is sent, since its events have no
/// ids.
fn large_batch(job: String) -> AppendEventsRequest {
    let text = Value { kind: Some(Kind::StringValue("x".repeat(METADATA_BYTES))) };
    let metadata = Struct { fields: [("text".to_owned(), text)].into() };
    let event = |step| NewEvent { id: String::new(), metadata: Some(metadata.clone()), ..new_event(step, 0) };
    append_request(job, (0..BATCH_EVENTS).map(event).collect())
}
