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
    harness::Harness,
    load::latency,
    report::{Goal, Measure, Outcome},
    store::{SequenceCheck, Store, stamp},
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
    let server = harness.server(&harness.database().await?).await?;
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
    let (first, second) = (harness.server(&database).await?, harness.server(&database).await?);
    let WatchLoad { accounts, jobs, senders, watchers: at_first } = watch_load(first.address).await?;
    let at_second = Store::milepost(second.address, &accounts.customer_key, jobs, CONNECTIONS).await?;
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
    let accounts = Accounts::create(server).await?;
    let jobs: Arc<[String]> = accounts.create_jobs(server, WATCHERS).await?.into();
    let senders = Store::milepost(server, &accounts.provider_key, Arc::clone(&jobs), CONNECTIONS).await?;
    let watchers = Store::milepost(server, &accounts.customer_key, Arc::clone(&jobs), CONNECTIONS).await?;
    Ok(WatchLoad { accounts, jobs, senders, watchers })
}

/// Times since the start of a round: when measuring begins, and when the round ends.
fn times(harness: &Harness) -> (Duration, Duration) {
    let from = (harness.options.round() / 5).min(Duration::from_secs(3));
    (from, from + harness.options.round())
}

/// The number of events that each job gets in a round.
pub(super) fn events_per_job(harness: &Harness) -> usize {
    let (_, until) = times(harness);
    usize::try_from(until.as_millis() / INTERVAL.as_millis()).unwrap_or(usize::MAX)
}

/// Measures the delays of a round, and checks that each watcher receives every event of
/// its job once and in order.
pub(super) async fn round(harness: &Harness, senders: &Store, watchers: &Store) -> Result<Measure> {
    let open = |log: usize| async move { watchers.watch(log, log).await };
    let event_streams: Vec<_> = stream::iter(0..WATCHERS).map(open).buffered(100).try_collect().await?;
    let started = Instant::now();
    let (from, _) = times(harness);
    // The number of events that each watcher must receive, set after the last append.
    let (total_sender, total) = watch::channel(None::<usize>);
    let mut reading = JoinSet::new();
    for (mut event_stream, after) in event_streams {
        let mut total = total.clone();
        reading.spawn(async move {
            let (mut order, mut count, mut delays) = (SequenceCheck::after(after), 0, Vec::new());
            loop {
                let received = tokio::select! {
                    received = event_stream.next() => received?,
                    changed = total.changed() => { changed?; Vec::new() }
                };
                let now = started.elapsed();
                for event in received {
                    order.check(event)?;
                    count += 1;
                    let sent = Duration::from_nanos(event.stamp);
                    if sent >= from {
                        delays.push(now.saturating_sub(sent));
                    }
                }
                match *total.borrow() {
                    Some(total) if count == total => return Ok::<_, crate::Error>(delays),
                    Some(total) if count > total => {
                        return Err(format!("a watcher received {count} events of {total}").into());
                    }
                    _ => {}
                }
            }
        });
    }
    let sent = send(senders, started, events_per_job(harness)).await?;
    total_sender.send(Some(sent))?;
    let mut delays = Vec::new();
    while let Some(read) = timeout(TIMEOUT, reading.join_next()).await? {
        delays.extend(read??);
    }
    let latencies = latency(&delays);
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
