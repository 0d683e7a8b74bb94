//! `AppendEvents` with one event, compared with etcd's `Put`.

use std::{sync::Arc, time::Instant};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost_testing::ServerProcess;

use super::{Row, fan_out};
use crate::{
    Result,
    accounts::{self, Accounts},
    check::{Checker, check_etcd},
    harness::{Harness, Peer, serve},
    load::{Calls, Worker, drive},
    report::{Goal, Outcome},
    store::{Acked, Store, Writer, stamp},
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
    goal: Option<Goal>,
    /// The value is the median latency, not the rate.
    by_latency: bool,
}

fn row_load(row: Row) -> RowLoad {
    let default = RowLoad {
        connections: 8,
        in_flight: 32,
        jobs: 1_000,
        idle_jobs: 0,
        replicas: 1,
        goal: None,
        by_latency: false,
    };
    match row {
        Row::Append8x32 => RowLoad { goal: Some(Goal::AtLeast(1.1)), ..default },
        Row::Append8x1 => RowLoad { in_flight: 1, goal: Some(Goal::AtLeast(1.0)), ..default },
        Row::Append1x1 => RowLoad {
            connections: 1,
            in_flight: 1,
            goal: Some(Goal::AtMost(1.1)),
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
        | Row::Flat
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
    let etcd = harness.etcd().await?;

    let milepost_stores = stores(&servers, &accounts, &jobs, load.connections).await?;
    let etcd_stores = match &etcd {
        Some(etcd) => vec![Store::etcd(etcd.address, Arc::clone(&jobs), load.connections).await?],
        None => Vec::new(),
    };
    let idle_watchers = if idle_jobs.is_empty() {
        Vec::new()
    } else {
        open_idle_watchers(&servers[0], etcd.as_ref(), &accounts, idle_jobs).await?
    };
    let reader = &accounts::connect(servers[0].address, &accounts.customer, 1).await?[0];
    let (unit, peer) = if load.by_latency { ("ms p50", "etcd Put") } else { ("events/s", "etcd Put") };
    let mut outcome = Outcome::new(row.name(), unit, peer, load.goal);
    let measure = |calls: &Calls| if load.by_latency { calls.p50() } else { calls.rate(1.0) };
    let mut checker = Checker::default();
    for store in &milepost_stores {
        checker.check(reader, &jobs, &warm_up(store).await?).await?;
    }
    for _ in 0..harness.options.rounds {
        harness.checkpoint().await?;
        let (acked, calls) = round(harness, &load, &milepost_stores).await?;
        outcome.add_milepost(measure(&calls));
        checker.check(reader, &jobs, &acked).await?;
        if !etcd_stores.is_empty() {
            harness.checkpoint().await?;
            let before = etcd_stores[0].writer(0).append(&jobs, 0, 0).await?.sequence;
            let (acked, calls) = round(harness, &load, &etcd_stores).await?;
            outcome.add_peer(measure(&calls));
            check_etcd(before, &acked)?;
        }
    }
    idle_watchers.iter().try_for_each(fan_out::Watchers::check)?;
    Ok(vec![outcome])
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

/// Opens 10,000 watches of the logs in milepost, and as many in etcd.
async fn open_idle_watchers(
    server: &ServerProcess,
    etcd: Option<&Peer>,
    accounts: &Accounts,
    logs: Arc<[String]>,
) -> Result<Vec<fan_out::Watchers>> {
    let user = &accounts.customer;
    let store = Store::milepost(server.address, user, Arc::clone(&logs), fan_out::CONNECTIONS).await?;
    let mut watchers = vec![fan_out::Watchers::open(&store).await?];
    if let Some(etcd) = etcd {
        let store = Store::etcd(etcd.address, logs, fan_out::CONNECTIONS).await?;
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

/// Loads the stores for one round. Returns the acknowledged events and the calls.
async fn round(harness: &Harness, load: &RowLoad, stores: &[Store]) -> Result<(Vec<Acked>, Calls)> {
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
    Ok((workers.into_iter().flat_map(|worker| worker.acked).collect(), calls))
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
