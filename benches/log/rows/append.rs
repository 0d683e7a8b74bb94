//! Unary appends of one event, beside etcd's `Put`.

use std::{sync::Arc, time::Instant};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{Row, fan_out};
use crate::{
    Result,
    bed::{Bed, Process},
    check::{Checker, check_etcd},
    load::{Calls, Worker, drive},
    report::{Goal, Outcome},
    store::{Acked, Store, Writer, stamp},
    tenant::{self, Tenant},
};

/// How a row loads.
struct Shape {
    connections: usize,
    in_flight: usize,
    jobs: usize,
    /// Jobs that are watched and not appended to.
    idle: usize,
    replicas: usize,
    goal: Option<Goal>,
    /// What counts is the median latency rather than the rate.
    latency: bool,
}

fn shape(row: Row) -> Shape {
    let usual = Shape {
        connections: 8,
        in_flight: 32,
        jobs: 1_000,
        idle: 0,
        replicas: 1,
        goal: None,
        latency: false,
    };
    match row {
        Row::Append8x32 => Shape { goal: Some(Goal::AtLeast(1.1)), ..usual },
        Row::Append8x1 => Shape { in_flight: 1, goal: Some(Goal::AtLeast(1.0)), ..usual },
        Row::Append1x1 => {
            Shape { connections: 1, in_flight: 1, goal: Some(Goal::AtMost(1.1)), latency: true, ..usual }
        }
        Row::Idle10000 => Shape { idle: 1_000, ..usual },
        Row::OneJob32 => Shape { in_flight: 4, jobs: 1, ..usual },
        Row::TwoReplicas => Shape { replicas: 2, ..usual },
        Row::Publish100
        | Row::Watch1000
        | Row::FanOut
        | Row::Memory
        | Row::Flat
        | Row::Replay
        | Row::GetJob
        | Row::GetCurrentUser
        | Row::Reconnect1000
        | Row::Sleepers100
        | Row::ReplicaDelay => usual,
    }
}

/// One who appends to its share of the logs, one after the other.
struct Appender {
    writer: Writer,
    logs: Arc<[String]>,
    /// Its logs: every `stride`th, from this one on.
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

pub(super) async fn unary(bed: &Bed, row: Row) -> Result<Vec<Outcome>> {
    let shape = shape(row);
    let database = bed.database().await?;
    let mut servers = Vec::new();
    for _ in 0..shape.replicas {
        servers.push(bed.server(&database).await?);
    }
    let tenant = Tenant::create(servers[0].address).await?;
    let jobs = tenant.jobs(servers[0].address, shape.jobs + shape.idle).await?;
    let idle: Arc<[String]> = jobs[shape.jobs..].into();
    let jobs: Arc<[String]> = jobs[..shape.jobs].into();
    let etcd = bed.etcd().await?;

    let ours = stores(&servers, &tenant, &jobs, shape.connections).await?;
    let theirs = match &etcd {
        Some(etcd) => vec![Store::etcd(etcd.address, Arc::clone(&jobs), shape.connections).await?],
        None => Vec::new(),
    };
    let idle = if idle.is_empty() {
        Vec::new()
    } else {
        stand_idle(&servers[0], etcd.as_ref(), &tenant, idle).await?
    };
    let reader = &tenant::connect(servers[0].address, &tenant.customer_key, 1).await?[0];
    let (unit, peer) = if shape.latency { ("ms p50", "etcd Put") } else { ("events/s", "etcd Put") };
    let mut outcome = Outcome::new(row.name(), unit, peer, shape.goal);
    let measure = |calls: &Calls| if shape.latency { calls.p50() } else { calls.rate(1.0) };
    let mut checker = Checker::default();
    for store in &ours {
        checker.check(reader, &jobs, &warm(store).await?).await?;
    }
    for _ in 0..bed.options.rounds {
        bed.checkpoint().await?;
        let (acked, calls) = round(bed, &shape, &ours).await?;
        outcome.milepost(measure(&calls));
        checker.check(reader, &jobs, &acked).await?;
        if !theirs.is_empty() {
            bed.checkpoint().await?;
            let before = theirs[0].writer(0).append(&jobs, 0, 0).await?.sequence;
            let (acked, calls) = round(bed, &shape, &theirs).await?;
            outcome.peer(measure(&calls));
            check_etcd(before, &acked)?;
        }
    }
    idle.iter().try_for_each(fan_out::Audience::check)?;
    Ok(vec![outcome])
}

/// A store for each replica, with its share of the connections.
async fn stores(
    servers: &[Process],
    tenant: &Tenant,
    jobs: &Arc<[String]>,
    connections: usize,
) -> Result<Vec<Store>> {
    let mut stores = Vec::new();
    for server in servers {
        let share = connections / servers.len();
        stores.push(Store::milepost(server.address, &tenant.provider_key, Arc::clone(jobs), share).await?);
    }
    Ok(stores)
}

async fn stand_idle(
    server: &Process,
    etcd: Option<&Process>,
    tenant: &Tenant,
    logs: Arc<[String]>,
) -> Result<Vec<fan_out::Audience>> {
    let ours = Store::milepost(server.address, &tenant.customer_key, Arc::clone(&logs), fan_out::CONNECTIONS);
    let mut audiences = vec![fan_out::Audience::gather(&ours.await?).await?];
    if let Some(etcd) = etcd {
        let theirs = Store::etcd(etcd.address, logs, fan_out::CONNECTIONS).await?;
        audiences.push(fan_out::Audience::gather(&theirs).await?);
    }
    Ok(audiences)
}

/// An event for each log: a round is about jobs that run, not about the first
/// that the server hears of each.
async fn warm(store: &Store) -> Result<Vec<Acked>> {
    let append = |log: usize| async move { store.writer(log).append(&store.logs, log, 0).await };
    stream::iter(0..store.logs.len()).map(append).buffer_unordered(32).try_collect().await
}

/// All that was acknowledged, and how long it took.
async fn round(bed: &Bed, shape: &Shape, stores: &[Store]) -> Result<(Vec<Acked>, Calls)> {
    let count = shape.connections * shape.in_flight;
    let started = Instant::now();
    let appender = |number: usize| {
        let store = &stores[number % stores.len()];
        // Two replicas append to the same jobs, so that they meet.
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
    let (workers, calls) = drive((0..count).map(appender).collect(), &bed.options).await?;
    for worker in &workers {
        in_order(worker, stores[0].logs.len())?;
    }
    Ok((workers.into_iter().flat_map(|worker| worker.acked).collect(), calls))
}

/// Whoever waits for each answer gets rising sequences of a job.
fn in_order(worker: &Appender, logs: usize) -> Result<()> {
    let mut last = vec![0; logs];
    for event in &worker.acked {
        if event.sequence <= last[event.log] {
            return Err(format!("event {} came after event {}", event.sequence, last[event.log]).into());
        }
        last[event.log] = event.sequence;
    }
    Ok(())
}
