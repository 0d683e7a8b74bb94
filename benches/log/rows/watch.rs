//! From the sender's clock to the watchers', at a steady pace.

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
    bed::Bed,
    load::latency,
    report::{Goal, Measure, Outcome},
    store::{Order, Store, stamp},
    tenant::Tenant,
};

/// Watchers, each of its own job.
const WATCHERS: usize = 1_000;
/// Between two events of one job.
const INTERVAL: Duration = Duration::from_millis(200);
/// Connections of the watchers, and as many of the senders.
const CONNECTIONS: usize = 8;
/// Longest that the last event may be on its way.
const TIMEOUT: Duration = Duration::from_secs(30);

pub(super) async fn watchers(bed: &Bed, name: &str) -> Result<Vec<Outcome>> {
    let server = bed.server(&bed.database().await?).await?;
    let Scene { jobs, senders, watchers, .. } = scene(server.address).await?;
    let etcd = bed.etcd().await?;
    let theirs = match &etcd {
        Some(etcd) => Some((
            Store::etcd(etcd.address, Arc::clone(&jobs), CONNECTIONS).await?,
            Store::etcd(etcd.address, jobs, CONNECTIONS).await?,
        )),
        None => None,
    };
    let mut outcome = Outcome::new(name, "ms p99", "etcd Watch", Some(Goal::AtMostAnd(0.5, 10.0)));
    for _ in 0..bed.options.rounds {
        bed.checkpoint().await?;
        outcome.milepost(round(bed, &senders, &watchers).await?);
        if let Some((senders, watchers)) = &theirs {
            bed.checkpoint().await?;
            outcome.peer(round(bed, senders, watchers).await?);
        }
    }
    Ok(vec![outcome])
}

/// The same load through one replica, watched on another and, beside it, on the
/// same one.
pub(super) async fn replicas(bed: &Bed, name: &str) -> Result<Vec<Outcome>> {
    let database = bed.database().await?;
    let (server, replica) = (bed.server(&database).await?, bed.server(&database).await?);
    let Scene { tenant, jobs, senders, watchers: near } = scene(server.address).await?;
    let far = Store::milepost(replica.address, &tenant.customer_key, jobs, CONNECTIONS).await?;
    let mut outcome = Outcome::new(name, "ms p99", "same replica", None);
    for _ in 0..bed.options.rounds {
        bed.checkpoint().await?;
        outcome.milepost(round(bed, &senders, &far).await?);
        bed.checkpoint().await?;
        outcome.peer(round(bed, &senders, &near).await?);
    }
    Ok(vec![outcome])
}

/// Jobs, those who append to them and those who watch them, at one server.
pub(super) struct Scene {
    pub(super) tenant: Tenant,
    pub(super) jobs: Arc<[String]>,
    pub(super) senders: Store,
    pub(super) watchers: Store,
}

pub(super) async fn scene(server: SocketAddr) -> Result<Scene> {
    let tenant = Tenant::create(server).await?;
    let jobs: Arc<[String]> = tenant.jobs(server, WATCHERS).await?.into();
    let senders = Store::milepost(server, &tenant.provider_key, Arc::clone(&jobs), CONNECTIONS).await?;
    let watchers = Store::milepost(server, &tenant.customer_key, Arc::clone(&jobs), CONNECTIONS).await?;
    Ok(Scene { tenant, jobs, senders, watchers })
}

/// When a round's measure starts and when the round ends, from its start.
fn times(bed: &Bed) -> (Duration, Duration) {
    let from = (bed.options.round() / 5).min(Duration::from_secs(3));
    (from, from + bed.options.round())
}

/// How many events each job gets in a round.
pub(super) fn beats(bed: &Bed) -> usize {
    let (_, until) = times(bed);
    usize::try_from(until.as_millis() / INTERVAL.as_millis()).unwrap_or(usize::MAX)
}

/// The delays of a round; each watcher gets every event of its job, in order.
pub(super) async fn round(bed: &Bed, senders: &Store, watchers: &Store) -> Result<Measure> {
    let open = |log: usize| async move { watchers.watch(log, log).await };
    let feeds: Vec<_> = stream::iter(0..WATCHERS).map(open).buffered(100).try_collect().await?;
    let started = Instant::now();
    let (from, _) = times(bed);
    // How many events each watcher has to get, once that is known.
    let (promise, promised) = watch::channel(None::<usize>);
    let mut reading = JoinSet::new();
    for (mut feed, after) in feeds {
        let mut promised = promised.clone();
        reading.spawn(async move {
            let (mut order, mut count, mut delays) = (Order::after(after), 0, Vec::new());
            loop {
                let seen = tokio::select! {
                    seen = feed.next() => seen?,
                    told = promised.changed() => { told?; Vec::new() }
                };
                let now = started.elapsed();
                for event in seen {
                    order.check(event)?;
                    count += 1;
                    let sent = Duration::from_nanos(event.stamp);
                    if sent >= from {
                        delays.push(now.saturating_sub(sent));
                    }
                }
                match *promised.borrow() {
                    Some(all) if count == all => return Ok::<_, crate::Error>(delays),
                    Some(all) if count > all => return Err(format!("{count} events of {all}").into()),
                    _ => {}
                }
            }
        });
    }
    let sent = send(senders, started, beats(bed)).await?;
    promise.send(Some(sent))?;
    let mut delays = Vec::new();
    while let Some(read) = timeout(TIMEOUT, reading.join_next()).await? {
        delays.extend(read??);
    }
    let latencies = latency(&delays);
    Ok(Measure { value: latencies[1], latencies: Some(latencies) })
}

/// Sends so many events to each job, at its own beat; how many those are.
async fn send(senders: &Store, started: Instant, beats: usize) -> Result<usize> {
    let mut sending = JoinSet::new();
    for log in 0..senders.logs.len() {
        let (mut writer, logs) = (senders.writer(log), Arc::clone(&senders.logs));
        let phase = INTERVAL.mul_f64(f64::from(u32::try_from(log)?) / f64::from(u32::try_from(WATCHERS)?));
        sending.spawn(async move {
            let mut due = TokioInstant::from_std(started) + phase;
            for _ in 0..beats {
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
    Ok(beats)
}
