//! The delay from sending an event to its arrival at the watcher, at a constant rate.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant as TokioInstant, sleep_until, timeout},
};

use crate::{
    Result,
    accounts::Accounts,
    harness::{Harness, serve},
    load::latency,
    report::{Goal, Measure, Outcome},
    store::{SequenceCheck, Store, delays, stamp},
};

/// Watchers, each of its own job.
const WATCHERS: usize = 1_000;
/// Time between two events of a job.
const INTERVAL: Duration = Duration::from_millis(200);
/// Connections of the watchers, and the same number for the senders.
const CONNECTIONS: usize = 8;
/// Limit for the arrival of the last event.
const TIMEOUT: Duration = Duration::from_secs(30);

pub(super) async fn watchers(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let server = serve(&harness.database().await?).await;
    let WatchLoad { jobs, senders, watchers, .. } = watch_load(server.address).await?;
    let etcd = harness.etcd().await?;
    let etcd_load = match &etcd {
        Some(etcd) => Some((
            Store::etcd(etcd.address, Arc::clone(&jobs), CONNECTIONS).await?,
            Store::etcd(etcd.address, jobs, CONNECTIONS).await?,
        )),
        None => None,
    };
    let mut outcome = Outcome::new(name, "ms p99", "etcd Watch", Some(Goal::AtMostAnd(0.5, 10.0)));
    for _ in 0..harness.options.rounds {
        harness.checkpoint().await?;
        outcome.add_milepost(round(harness, &senders, &watchers).await?);
        if let Some((senders, watchers)) = &etcd_load {
            harness.checkpoint().await?;
            outcome.add_peer(round(harness, senders, watchers).await?);
        }
    }
    Ok(vec![outcome])
}

/// The same load through one replica, watched at another replica, compared with
/// watching at the same one.
pub(super) async fn replicas(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let database = harness.database().await?;
    let (first, second) = (serve(&database).await, serve(&database).await);
    let WatchLoad { accounts, jobs, senders, watchers: at_first } = watch_load(first.address).await?;
    let at_second = Store::milepost(second.address, &accounts.customer, jobs, CONNECTIONS).await?;
    let mut outcome = Outcome::new(name, "ms p99", "same replica", None);
    for _ in 0..harness.options.rounds {
        harness.checkpoint().await?;
        outcome.add_milepost(round(harness, &senders, &at_second).await?);
        harness.checkpoint().await?;
        outcome.add_peer(round(harness, &senders, &at_first).await?);
    }
    Ok(vec![outcome])
}

/// Jobs at one server, and the connections that append to them and watch them.
pub(super) struct WatchLoad {
    pub(super) accounts: Accounts,
    pub(super) jobs: Arc<[String]>,
    pub(super) senders: Store,
    pub(super) watchers: Store,
}

pub(super) async fn watch_load(server: SocketAddr) -> Result<WatchLoad> {
    let accounts = Accounts::create(server).await;
    let jobs: Arc<[String]> = accounts.create_jobs(server, WATCHERS).await?.into();
    let senders = Store::milepost(server, &accounts.provider, Arc::clone(&jobs), CONNECTIONS).await?;
    let watchers = Store::milepost(server, &accounts.customer, Arc::clone(&jobs), CONNECTIONS).await?;
    Ok(WatchLoad { accounts, jobs, senders, watchers })
}

/// The number of events that each job gets in a round.
pub(super) fn events_per_job(harness: &Harness) -> usize {
    let until = harness.options.warm_up() + harness.options.round();
    usize::try_from(until.as_millis() / INTERVAL.as_millis()).unwrap_or(usize::MAX)
}

/// Measures the delays of a round, and checks that each watcher receives every event of
/// its job once and in order.
pub(super) async fn round(harness: &Harness, senders: &Store, watchers: &Store) -> Result<Measure> {
    let open = |log: usize| async move { watchers.watch(log, log).await };
    let event_streams: Vec<_> = stream::iter(0..WATCHERS).map(open).buffered(100).try_collect().await?;
    let started = Instant::now();
    let from = harness.options.warm_up();
    let (total_sender, total) = watch::channel(None);
    let mut reading = JoinSet::new();
    for (event_stream, after) in event_streams {
        let order = SequenceCheck::after(after);
        reading.spawn(delays(event_stream, order, started, from, total.clone()));
    }
    let sent = send(senders, started, events_per_job(harness)).await?;
    total_sender.send(Some(sent))?;
    let mut all = Vec::new();
    while let Some(read) = timeout(TIMEOUT, reading.join_next()).await? {
        all.extend(read??);
    }
    let latencies = latency(&all);
    Ok(Measure { value: latencies[1], latencies: Some(latencies) })
}

/// Appends this number of events to each job, one every `INTERVAL`; the jobs start one
/// after the other. Returns the number.
async fn send(senders: &Store, started: Instant, events_per_job: usize) -> Result<usize> {
    let mut sending = JoinSet::new();
    for log in 0..senders.logs.len() {
        let (mut writer, logs) = (senders.writer(log), Arc::clone(&senders.logs));
        let phase = INTERVAL.mul_f64(f64::from(u32::try_from(log)?) / f64::from(u32::try_from(WATCHERS)?));
        sending.spawn(async move {
            let mut due = TokioInstant::from_std(started) + phase;
            for _ in 0..events_per_job {
                sleep_until(due).await;
                writer.append(&logs, log, stamp(started)).await?;
                due += INTERVAL;
            }
            Ok::<_, crate::Error>(())
        });
    }
    while let Some(sent) = sending.join_next().await {
        sent??;
    }
    Ok(events_per_job)
}
