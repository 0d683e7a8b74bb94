//! `AppendEvents` with one event, compared with what its peers append durably.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost_testing::ServerProcess;

use super::{
    Row, fan_out,
    statement::{self, Statement},
};
use crate::{
    Result,
    accounts::{self, Accounts},
    check::{Checker, check_peer},
    events::{Acked, stamp},
    harness::{Harness, serve},
    load::{Calls, Worker, drive},
    peers::{self, Peer, PeerKind},
    report::{Goal, Measure, Outcome},
    store::{Store, Writer},
};

/// The load of a row.
struct RowLoad {
    connections: usize,
    /// Calls in flight on each connection.
    in_flight: usize,
    jobs: usize,
    /// Jobs that are watched but not appended to.
    idle_jobs: usize,
    replicas: usize,
    peers: &'static [PeerKind],
    /// Against etcd; if [`Self::by_latency`], against the append statement.
    goal: Option<Goal>,
    /// The value is the median latency, not the rate.
    by_latency: bool,
}

/// Compared in the rows that have a goal.
const ALL: [PeerKind; 4] = [PeerKind::Etcd, PeerKind::Nats, PeerKind::DurableStreams, PeerKind::Naive];

fn row_load(row: Row) -> RowLoad {
    let default = RowLoad {
        connections: 8,
        in_flight: 32,
        jobs: 1_000,
        idle_jobs: 0,
        replicas: 1,
        peers: &[PeerKind::Etcd],
        goal: None,
        by_latency: false,
    };
    match row {
        Row::Append8x32 => RowLoad { peers: &ALL, goal: Some(Goal::AtLeast(1.1)), ..default },
        Row::Append8x1 => RowLoad { in_flight: 1, peers: &ALL, goal: Some(Goal::AtLeast(1.0)), ..default },
        Row::Append1x1 => RowLoad {
            connections: 1,
            in_flight: 1,
            peers: &ALL,
            goal: Some(Goal::AtMost(1.5)),
            by_latency: true,
            ..default
        },
        Row::Idle10000 => RowLoad { idle_jobs: 1_000, ..default },
        Row::OneJob32 => RowLoad { in_flight: 4, jobs: 1, ..default },
        Row::TwoReplicas => RowLoad { replicas: 2, ..default },
        Row::Publish100
        | Row::Watch1000
        | Row::FanOut
        | Row::Memory
        | Row::Idle100000
        | Row::Flat
        | Row::Page
        | Row::Replay
        | Row::GetJob
        | Row::GetCurrentUser
        | Row::Reconnect1000
        | Row::StalledWatchers100
        | Row::Neighbour
        | Row::ReplicaDelay => default,
    }
}

/// Appends to its share of the logs, one after the other.
struct Appender {
    writer: Writer,
    logs: Arc<[String]>,
    /// Its logs are `first`, `first + stride`, and so on.
    first: usize,
    stride: usize,
    next: usize,
    started: Instant,
    acked: Vec<Acked>,
}

impl Worker for Appender {
    async fn work(&mut self) -> Result<()> {
        let acked = self.writer.append(&self.logs, self.next, stamp(self.started)).await?;
        self.acked.push(acked);
        self.next += self.stride;
        if self.next >= self.logs.len() {
            self.next = self.first;
        }
        Ok(())
    }
}

pub(super) async fn unary(harness: &Harness, row: Row) -> Result<Vec<Outcome>> {
    let load = row_load(row);
    let database = harness.database().await?;
    let mut servers = Vec::new();
    for _ in 0..load.replicas {
        servers.push(serve(&database).await);
    }
    let accounts = Accounts::create(servers[0].address).await;
    let jobs = accounts.create_jobs(servers[0].address, load.jobs + load.idle_jobs).await?;
    let idle_jobs: Arc<[String]> = jobs[load.jobs..].into();
    let jobs: Arc<[String]> = jobs[..load.jobs].into();
    let peers = start_peers(harness, &load, &jobs).await?;
    let milepost_stores = stores(&servers, &accounts, &jobs, load.connections).await?;
    let idle_watchers = if idle_jobs.is_empty() {
        Vec::new()
    } else {
        open_idle_watchers(&servers[0], &peers, &accounts, idle_jobs).await?
    };
    let reader = &accounts::connect(servers[0].address, &accounts.customer, 1).await?[0];
    let mut checker = Checker::default();
    for store in &milepost_stores {
        checker.check(reader, &jobs, &warm_up(store).await?).await?;
    }
    let [mut outcome, mut cost] = outcomes(&load, &row.name(), &peers);
    let statement = if load.by_latency { Statement::find(harness, &database).await? } else { None };
    for number in 0..harness.options.rounds {
        harness.checkpoint().await?;
        let before = harness.milepost_processor_time(&servers);
        let round = round(harness, &load, &milepost_stores).await?;
        cost.add_milepost(round.cost(harness.milepost_processor_time(&servers) - before));
        outcome.add_milepost(round.measure(&load));
        checker.check(reader, &jobs, &round.acked).await?;
        if let Some(statement) = &statement {
            let run = statement.run(harness, statement::ONE_EVENT, number).await?;
            outcome.add(statement::NAME, run.latency);
            cost.add(statement::NAME, run.cost);
        }
        for (peer, store) in &peers {
            harness.checkpoint().await?;
            let (round, of_event) = peer_round(harness, &load, peer, store).await?;
            outcome.add(peer.kind.append(), round.measure(&load));
            cost.add(peer.kind.append(), of_event);
        }
    }
    idle_watchers.iter().try_for_each(fan_out::Watchers::check)?;
    Ok(vec![outcome, cost])
}

/// The row itself, and the processor time of an event.
fn outcomes(load: &RowLoad, name: &str, peers: &[(Peer, Store)]) -> [Outcome; 2] {
    let unit = if load.by_latency { "ms p50" } else { "events/s" };
    let mut outcome = Outcome::new(name, unit);
    let mut cost = Outcome::new(format!("{name}-cost"), "µs/event");
    if load.by_latency {
        outcome = outcome.compared_with(statement::NAME, load.goal);
        cost = cost.compared_with(statement::NAME, None);
    }
    for (peer, _) in peers {
        let is_etcd = peer.kind == PeerKind::Etcd;
        outcome =
            outcome.compared_with(peer.kind.append(), load.goal.filter(|_| is_etcd && !load.by_latency));
        let goal = Goal::AtMost(1.0);
        cost = cost.compared_with(peer.kind.append(), (is_etcd && load.goal.is_some()).then_some(goal));
    }
    [outcome, cost]
}

/// Starts the peers of a row and opens their logs.
async fn start_peers(harness: &Harness, load: &RowLoad, logs: &Arc<[String]>) -> Result<Vec<(Peer, Store)>> {
    let mut started = Vec::new();
    for kind in peers::available(harness, load.peers).await? {
        let peer = Peer::start(harness, kind, logs.len()).await?;
        let store = peer.store(logs, load.connections).await?;
        warm_up(&store).await?;
        started.push((peer, store));
    }
    Ok(started)
}

/// Opens a store for each replica, with an equal share of the connections.
async fn stores(
    servers: &[ServerProcess],
    accounts: &Accounts,
    jobs: &Arc<[String]>,
    connections: usize,
) -> Result<Vec<Store>> {
    let mut stores = Vec::new();
    for server in servers {
        let share = connections / servers.len();
        stores.push(Store::milepost(server.address, &accounts.provider, Arc::clone(jobs), share).await?);
    }
    Ok(stores)
}

/// Opens 10,000 watches of the logs in milepost, and as many in each peer.
async fn open_idle_watchers(
    server: &ServerProcess,
    peers: &[(Peer, Store)],
    accounts: &Accounts,
    logs: Arc<[String]>,
) -> Result<Vec<fan_out::Watchers>> {
    let user = &accounts.customer;
    let store = Store::milepost(server.address, user, Arc::clone(&logs), fan_out::CONNECTIONS).await?;
    let mut watchers = vec![fan_out::Watchers::open(&store).await?];
    for (peer, _) in peers {
        let store = peer.store(&logs, fan_out::CONNECTIONS).await?;
        watchers.push(fan_out::Watchers::open(&store).await?);
    }
    Ok(watchers)
}

/// Appends an event to each log, so that no round measures a job's first event, for
/// which the server must load the job.
async fn warm_up(store: &Store) -> Result<Vec<Acked>> {
    let append = |log: usize| async move { store.writer(log).append(&store.logs, log, 0).await };
    stream::iter(0..store.logs.len()).map(append).buffer_unordered(32).try_collect().await
}

/// What was appended in a round.
struct Round {
    acked: Vec<Acked>,
    calls: Calls,
}

impl Round {
    fn measure(&self, load: &RowLoad) -> Measure {
        if load.by_latency { self.calls.p50() } else { self.calls.rate(1.0) }
    }

    /// What an event has cost of this processor time.
    fn cost(&self, time: Duration) -> Measure {
        Measure::cost(time, self.acked.len())
    }
}

/// Loads a peer for one round. Returns what was appended and the cost of an event.
async fn peer_round(
    harness: &Harness,
    load: &RowLoad,
    peer: &Peer,
    store: &Store,
) -> Result<(Round, Measure)> {
    let (stored, before) = (store.stored().await?, peer.processor_time(harness)?);
    let round = round(harness, load, std::slice::from_ref(store)).await?;
    let cost = round.cost(peer.processor_time(harness)? - before);
    check_peer(store, stored, &round.acked).await?;
    Ok((round, cost))
}

/// Loads the stores for one round.
async fn round(harness: &Harness, load: &RowLoad, stores: &[Store]) -> Result<Round> {
    let count = load.connections * load.in_flight;
    let started = Instant::now();
    let appender = |number: usize| {
        let store = &stores[number % stores.len()];
        // Two replicas append to the same jobs at the same time.
        let first = number / stores.len() % store.logs.len();
        let stride = (count / stores.len()).min(store.logs.len());
        Appender {
            writer: store.writer(number / stores.len()),
            logs: Arc::clone(&store.logs),
            first,
            stride,
            next: first,
            started,
            acked: Vec::new(),
        }
    };
    let (workers, calls) = drive((0..count).map(appender).collect(), &harness.options).await?;
    for worker in &workers {
        check_order(worker, stores[0].logs.len())?;
    }
    Ok(Round { acked: workers.into_iter().flat_map(|worker| worker.acked).collect(), calls })
}

/// Checks that an appender, which waits for each answer, received rising sequences of
/// each log.
fn check_order(worker: &Appender, logs: usize) -> Result<()> {
    let mut last = vec![0; logs];
    for event in &worker.acked {
        if event.sequence <= last[event.log] {
            return Err(format!(
                "sequence {} was acknowledged after sequence {}",
                event.sequence, last[event.log]
            )
            .into());
        }
        last[event.log] = event.sequence;
    }
    Ok(())
}
