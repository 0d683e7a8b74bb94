//! 10,000 watches, each on a stream of its own: how fast one event reaches all of them,
//! and how much memory they take in the server.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost_testing::ServerProcess;
use tokio::{sync::Notify, task::JoinSet, time::timeout};

use crate::{
    Result,
    accounts::Accounts,
    events::SequenceCheck,
    harness::{Harness, serve},
    peers::{self, Peer, PeerKind},
    report::{Goal, Measure, Outcome, median},
    store::{EventStream, Store},
};

pub(super) const STREAMS: usize = 10_000;
/// Streams of the row of idle ones. A user has at most 99,999.
const IDLE_STREAMS: usize = 100_000;
/// Connections, each with an equal share of the streams.
pub(super) const CONNECTIONS: usize = 20;
/// Events in a round.
const EVENTS: usize = 50;
/// Limit for the arrival of an event at all streams.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Open watches, each read by a task of its own. They are closed when dropped.
pub(crate) struct Watchers {
    deliveries: Arc<Deliveries>,
    _readers: JoinSet<()>,
}

/// Counts the events that all streams have received.
#[derive(Default)]
struct Deliveries {
    streams: usize,
    received: AtomicUsize,
    /// When the last stream received the latest event.
    complete_at: Mutex<Option<Instant>>,
    error: Mutex<Option<String>>,
    /// Notified when an event is complete or a stream fails.
    changed: Notify,
}

impl Deliveries {
    fn count_one(&self) {
        if (self.received.fetch_add(1, Ordering::AcqRel) + 1).is_multiple_of(self.streams) {
            *self.complete_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            self.changed.notify_one();
        }
    }

    fn fail(&self, error: &crate::Error) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
        self.changed.notify_one();
    }

    fn check(&self) -> Result<()> {
        let error = self.error.lock().unwrap_or_else(PoisonError::into_inner).take();
        error.map_or(Ok(()), |error| Err(error.into()))
    }
}

impl Watchers {
    /// Opens [`STREAMS`] streams, spread evenly over the store's connections and logs.
    pub(super) async fn open(store: &Store) -> Result<Self> {
        Self::open_some(store, STREAMS).await
    }

    async fn open_some(store: &Store, streams: usize) -> Result<Self> {
        let open = |number: usize| async move { store.watch(number, number % store.logs.len()).await };
        let event_streams: Vec<(EventStream, Option<i64>)> =
            stream::iter(0..streams).map(open).buffer_unordered(200).try_collect().await?;
        Ok(Self::of(event_streams))
    }

    /// Reads these streams of one log. With each comes the last sequence, if it is known.
    pub(super) fn of(event_streams: Vec<(EventStream, Option<i64>)>) -> Self {
        let deliveries = Arc::new(Deliveries { streams: event_streams.len(), ..Deliveries::default() });
        let mut readers = JoinSet::new();
        for (mut event_stream, after) in event_streams {
            let deliveries = Arc::clone(&deliveries);
            readers.spawn(async move {
                let mut order = SequenceCheck::after(after);
                loop {
                    let received = event_stream.next().await.and_then(|events| {
                        events.into_iter().try_for_each(|event| {
                            order.check(event)?;
                            deliveries.count_one();
                            Ok(())
                        })
                    });
                    if let Err(error) = received {
                        return deliveries.fail(&error);
                    }
                }
            });
        }
        Self { deliveries, _readers: readers }
    }

    /// Fails if a stream has ended or received a wrong event so far.
    pub(super) fn check(&self) -> Result<()> {
        self.deliveries.check()
    }

    /// Appends an event to the first log, which all streams watch. Returns the time until
    /// the last stream has received it.
    pub(super) async fn append_and_wait(&self, store: &Store) -> Result<Duration> {
        let mut writer = store.writer(0);
        let started = Instant::now();
        writer.append(&store.logs, 0, 0).await?;
        timeout(TIMEOUT, self.deliveries.changed.notified()).await?;
        self.deliveries.check()?;
        let complete_at = self.deliveries.complete_at.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(complete_at.ok_or("not all streams received the event")? - started)
    }
}

/// The peers of both rows.
const PEERS: [PeerKind; 3] = [PeerKind::Etcd, PeerKind::DurableStreams, PeerKind::Nats];

/// A server and one job there.
struct Milepost {
    servers: [ServerProcess; 1],
    jobs: Arc<[String]>,
    watchers: Store,
    provider: Store,
}

impl Milepost {
    async fn start(harness: &Harness) -> Result<Self> {
        let servers = [serve(&harness.database().await?).await];
        let address = servers[0].address;
        let accounts = Accounts::create(address).await;
        let jobs: Arc<[String]> = accounts.create_jobs(address, 1).await?.into();
        let watchers = Store::milepost(address, &accounts.customer, Arc::clone(&jobs), CONNECTIONS).await?;
        let provider = Store::milepost(address, &accounts.provider, Arc::clone(&jobs), 1).await?;
        Ok(Self { servers, jobs, watchers, provider })
    }
}

pub(super) async fn fan_out(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let milepost = Milepost::start(harness).await?;
    let kinds = peers::available(harness, &PEERS).await?;
    let mut outcome = Outcome::new(name, "receipts/s");
    let mut cost = Outcome::new(format!("{name}-cost"), "µs/receipt");
    for &kind in &kinds {
        let is_etcd = kind == PeerKind::Etcd;
        outcome = outcome.compared_with(kind.watch(), is_etcd.then_some(Goal::AtLeast(2.0)));
        cost = cost.compared_with(kind.watch(), is_etcd.then_some(Goal::AtMost(0.5)));
    }
    for _ in 0..harness.options.rounds {
        harness.checkpoint().await?;
        let time = || Ok(harness.milepost_processor_time(&milepost.servers));
        let [rate, of_receipt] = round(&milepost.watchers, &milepost.provider, time).await?;
        outcome.add_milepost(rate);
        cost.add_milepost(of_receipt);
        for &kind in &kinds {
            // A new one for each round: idle streams of one peer would slow the others.
            let peer = Peer::start(harness, kind, 1).await?;
            let store = peer.store(&milepost.jobs, CONNECTIONS).await?;
            harness.checkpoint().await?;
            let [rate, of_receipt] = round(&store, &store, || peer.processor_time(harness)).await?;
            outcome.add(kind.watch(), rate);
            cost.add(kind.watch(), of_receipt);
        }
    }
    if kinds.contains(&PeerKind::Etcd) {
        outcome.either(&mut cost);
    }
    Ok(vec![outcome, cost])
}

/// Opens the streams and measures the received events a second of all streams together, the
/// median over some events, and the processor time of a receipt.
async fn round(store: &Store, writer: &Store, time: impl Fn() -> Result<Duration>) -> Result<[Measure; 2]> {
    let watchers = Watchers::open(store).await?;
    let streams = f64::from(u32::try_from(STREAMS)?);
    watchers.append_and_wait(writer).await?;
    let (mut rates, before) = (Vec::new(), time()?);
    for _ in 0..EVENTS {
        rates.push(streams / watchers.append_and_wait(writer).await?.as_secs_f64());
    }
    let cost = Measure::cost(time()? - before, EVENTS * STREAMS);
    rates.sort_by(f64::total_cmp);
    Ok([Measure::of(median(&rates).ok_or("a round has no events")?), cost])
}

pub(super) async fn memory(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let kinds = peers::available(harness, &PEERS).await?;
    let mut outcome = Outcome::new(name, "kB/stream");
    for (number, kind) in PEERS.into_iter().enumerate() {
        // The goal does not depend on a peer.
        outcome = outcome.compared_with(kind.watch(), (number == 0).then_some(Goal::Within(5.0)));
    }
    for _ in 0..harness.options.rounds {
        // A process seldom returns memory: each round starts new servers.
        let milepost = Milepost::start(harness).await?;
        let bytes = || Ok(milepost.servers[0].resident_bytes());
        outcome.add_milepost(memory_per_stream(bytes, &milepost.watchers, &milepost.provider).await?);
        for &kind in &kinds {
            let peer = Peer::start(harness, kind, 1).await?;
            let store = peer.store(&milepost.jobs, CONNECTIONS).await?;
            let measure = memory_per_stream(|| peer.resident_bytes(), &store, &store).await?;
            outcome.add(kind.watch(), measure);
        }
    }
    Ok(vec![outcome])
}

/// A hundred thousand idle watches of two users, compared with the first 10,000 of them: the
/// memory of each, and the processor time of all. It is that of their heartbeats, one every 15 s.
pub(super) async fn idle(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    const FEW: &str = "of 10,000 streams";
    let mut memory = Outcome::new(name, "kB/stream").compared_with(FEW, None);
    let mut time = Outcome::new(format!("{name}-time"), "% of a core").compared_with(FEW, None);
    for _ in 0..harness.options.rounds {
        let milepost = Milepost::start(harness).await?;
        let [server] = &milepost.servers;
        let before = server.resident_bytes();
        let first = Watchers::open(&milepost.watchers).await?;
        first.append_and_wait(&milepost.provider).await?;
        let few = idle_round(harness, server, before, STREAMS).await?;
        let rest = [
            Watchers::open_some(&milepost.watchers, IDLE_STREAMS / 2 - STREAMS).await?,
            Watchers::open_some(&milepost.provider, IDLE_STREAMS / 2).await?,
        ];
        first.append_and_wait(&milepost.provider).await?;
        let many = idle_round(harness, server, before, IDLE_STREAMS).await?;
        rest.iter().try_for_each(Watchers::check)?;
        memory.add_milepost(many[0]);
        memory.add_peer(few[0]);
        time.add_milepost(many[1]);
        time.add_peer(few[1]);
    }
    Ok(vec![memory, time])
}

/// Leaves the streams alone for a round: the memory of each, and the processor time of all.
async fn idle_round(
    harness: &Harness,
    server: &ServerProcess,
    before: usize,
    streams: usize,
) -> Result<[Measure; 2]> {
    tokio::time::sleep(harness.options.warm_up()).await;
    let (started, time_before) = (Instant::now(), server.processor_time());
    tokio::time::sleep(harness.options.round()).await;
    let busy = (server.processor_time() - time_before).as_secs_f64() / started.elapsed().as_secs_f64();
    let bytes = server.resident_bytes().saturating_sub(before);
    Ok([per_stream(bytes, streams)?, Measure::of(100.0 * busy)])
}

fn per_stream(bytes: usize, streams: usize) -> Result<Measure> {
    Ok(Measure::of(f64::from(u32::try_from(bytes)?) / 1e3 / f64::from(u32::try_from(streams)?)))
}

/// By how much the memory of a process grows with the streams, in kB for each.
async fn memory_per_stream(
    resident_bytes: impl Fn() -> Result<usize>,
    store: &Store,
    writer: &Store,
) -> Result<Measure> {
    writer.writer(0).append(&writer.logs, 0, 0).await?;
    let before = resident_bytes()?;
    let watchers = Watchers::open(store).await?;
    watchers.append_and_wait(writer).await?;
    per_stream(resident_bytes()?.saturating_sub(before), STREAMS)
}
