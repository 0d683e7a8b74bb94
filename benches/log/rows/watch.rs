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
    events::{SequenceCheck, delays, stamp},
    harness::{Harness, serve},
    load::latency,
    peers::{self, Peer, PeerKind},
    report::{Goal, Measure, Outcome},
    store::{EventStream, Store},
};

/// Watchers, each of its own job.
const WATCHERS: usize = 1_000;
/// Time between two events of a job.
const INTERVAL: Duration = Duration::from_millis(200);
/// Connections of the watchers, and the same number for the senders.
const CONNECTIONS: usize = 8;
/// Limit for the arrival of the last event, beside the time by which it was acknowledged too late.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The peers of the row.
const PEERS: [PeerKind; 4] = [PeerKind::Etcd, PeerKind::DurableStreams, PeerKind::Nats, PeerKind::Naive];

pub(super) async fn watchers(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let servers = [serve(&harness.database().await?).await];
    let WatchLoad { jobs, senders, watchers, .. } = watch_load(servers[0].address).await?;
    let mut peers = Vec::new();
    for kind in peers::available(harness, &PEERS).await? {
        let peer = Peer::start(harness, kind, jobs.len()).await?;
        let (senders, watchers) =
            (peer.store(&jobs, CONNECTIONS).await?, peer.store(&jobs, CONNECTIONS).await?);
        peers.push((peer, senders, watchers));
    }
    let mut p99 = Outcome::new(name, "ms p99");
    let mut p50 = Outcome::new(format!("{name}-p50"), "ms p50");
    let mut cost = Outcome::new(format!("{name}-cost"), "µs/event");
    for (peer, ..) in &peers {
        let (of_p99, of_p50) = goals(peer.kind);
        p99 = p99.compared_with(peer.kind.watch(), of_p99);
        p50 = p50.compared_with(peer.kind.watch(), of_p50);
        cost = cost.compared_with(peer.kind.watch(), None);
    }
    let events = WATCHERS * events_per_job(harness);
    for _ in 0..harness.options.rounds {
        harness.checkpoint().await?;
        let streams = open(&watchers).await?;
        let before = harness.milepost_processor_time(&servers);
        let measure = round(harness, &senders, streams).await?;
        cost.add_milepost(Measure::cost(harness.milepost_processor_time(&servers) - before, events));
        p50.add_milepost(measure.p50());
        p99.add_milepost(measure);
        for (peer, senders, watchers) in std::mem::take(&mut peers) {
            harness.checkpoint().await?;
            let (streams, name) = (open(&watchers).await?, peer.kind.watch());
            let before = peer.processor_time(harness)?;
            let (measure, late) = round_and_delay(harness, &senders, streams).await?;
            cost.add(name, Measure::cost(peer.processor_time(harness)? - before, events));
            p50.add(name, measure.p50());
            p99.add(name, measure);
            // The rounds of a peer that cannot take the load last several times as long as others.
            if late > harness.options.round() / 2 {
                eprintln!("{name} is left out of the rounds that follow");
            } else {
                peers.push((peer, senders, watchers));
            }
        }
    }
    Ok(vec![p99, p50, cost])
}

/// The goals against a peer for the p99 and for the median.
fn goals(kind: PeerKind) -> (Option<Goal>, Option<Goal>) {
    match kind {
        PeerKind::Etcd => (Some(Goal::AtMost(0.5)), Some(Goal::AtMost(1.0))),
        PeerKind::DurableStreams => (Some(Goal::AtMost(1.0)), None),
        PeerKind::Nats | PeerKind::Naive => (None, None),
    }
}

/// The same load through one replica, watched at another replica, compared with
/// watching at the same one.
pub(super) async fn replicas(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let database = harness.database().await?;
    let (first, second) = (serve(&database).await, serve(&database).await);
    let WatchLoad { accounts, jobs, senders, watchers: at_first } = watch_load(first.address).await?;
    let at_second = Store::milepost(second.address, &accounts.customer, jobs, CONNECTIONS).await?;
    let mut outcome = Outcome::new(name, "ms p99").compared_with("same replica", None);
    for _ in 0..harness.options.rounds {
        harness.checkpoint().await?;
        outcome.add_milepost(round(harness, &senders, open(&at_second).await?).await?);
        harness.checkpoint().await?;
        outcome.add_peer(round(harness, &senders, open(&at_first).await?).await?);
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

/// Watches each log from now on. With each stream comes the last sequence, if it is known.
pub(super) async fn open(watchers: &Store) -> Result<Vec<(EventStream, Option<i64>)>> {
    let open = |log: usize| async move { watchers.watch(log, log).await };
    stream::iter(0..WATCHERS).map(open).buffered(100).try_collect().await
}

/// Measures the delays of a round, and checks that each watcher receives every event of
/// its job once and in order.
pub(super) async fn round(
    harness: &Harness,
    senders: &Store,
    event_streams: Vec<(EventStream, Option<i64>)>,
) -> Result<Measure> {
    Ok(round_and_delay(harness, senders, event_streams).await?.0)
}

/// As [`round`], and how much too late the last event was acknowledged.
async fn round_and_delay(
    harness: &Harness,
    senders: &Store,
    event_streams: Vec<(EventStream, Option<i64>)>,
) -> Result<(Measure, Duration)> {
    let started = Instant::now();
    let from = harness.options.warm_up();
    let (total_sender, total) = watch::channel(None);
    let mut reading = JoinSet::new();
    for (event_stream, after) in event_streams {
        let order = SequenceCheck::after(after);
        reading.spawn(delays(event_stream, order, started, from, total.clone()));
    }
    let sent = send(senders, started, events_per_job(harness)).await?;
    let late = started.elapsed().saturating_sub(from + harness.options.round());
    if late > INTERVAL * 2 {
        eprintln!("the last event was acknowledged {late:.1?} too late: the load is more than it can take");
    }
    total_sender.send(Some(sent))?;
    let mut all = Vec::new();
    while let Some(read) = timeout(TIMEOUT + late, reading.join_next()).await? {
        all.extend(read??);
    }
    let latencies = latency(&all);
    Ok((Measure { value: latencies[1], latencies: Some(latencies) }, late))
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
