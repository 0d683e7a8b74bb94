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
    harness::{Harness, Peer, serve},
    report::{Goal, Measure, Outcome, median},
    store::{EventStream, SequenceCheck, Store},
};

pub(super) const STREAMS: usize = 10_000;
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
    received: AtomicUsize,
    /// When the last stream received the latest event.
    complete_at: Mutex<Option<Instant>>,
    error: Mutex<Option<String>>,
    /// Notified when an event is complete or a stream fails.
    changed: Notify,
}

impl Deliveries {
    fn count_one(&self) {
        if (self.received.fetch_add(1, Ordering::AcqRel) + 1).is_multiple_of(STREAMS) {
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
    /// Opens the streams, spread evenly over the store's connections and logs.
    pub(super) async fn open(store: &Store) -> Result<Self> {
        let open = |number: usize| async move { store.watch(number, number % store.logs.len()).await };
        let event_streams: Vec<(EventStream, Option<i64>)> =
            stream::iter(0..STREAMS).map(open).buffer_unordered(200).try_collect().await?;
        let deliveries = Arc::new(Deliveries::default());
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
        Ok(Self { deliveries, _readers: readers })
    }

    /// Fails if a stream has ended or received a wrong event so far.
    pub(super) fn check(&self) -> Result<()> {
        self.deliveries.check()
    }

    /// Appends an event to the first log, which all streams watch. Returns the time until
    /// the last stream has received it.
    async fn append_and_wait(&self, store: &Store) -> Result<Duration> {
        let mut writer = store.writer(0);
        let started = Instant::now();
        writer.append(&store.logs, 0, 0).await?;
        timeout(TIMEOUT, self.deliveries.changed.notified()).await?;
        self.deliveries.check()?;
        let complete_at = self.deliveries.complete_at.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(complete_at.ok_or("not all streams received the event")? - started)
    }
}

/// Opens the stores of one job: milepost for the watchers, etcd if it is installed, and
/// milepost for the appends.
async fn open_stores(server: &ServerProcess, etcd: Option<&Peer>) -> Result<(Store, Option<Store>, Store)> {
    let accounts = Accounts::create(server.address).await;
    let jobs: Arc<[String]> = accounts.create_jobs(server.address, 1).await?.into();
    let milepost =
        Store::milepost(server.address, &accounts.customer, Arc::clone(&jobs), CONNECTIONS).await?;
    let provider = Store::milepost(server.address, &accounts.provider, Arc::clone(&jobs), 1).await?;
    let etcd = match etcd {
        Some(etcd) => Some(Store::etcd(etcd.address, jobs, CONNECTIONS).await?),
        None => None,
    };
    Ok((milepost, etcd, provider))
}

pub(super) async fn fan_out(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let server = serve(&harness.database().await?).await;
    let etcd = harness.etcd().await?;
    let (milepost_store, etcd_store, provider) = open_stores(&server, etcd.as_ref()).await?;
    let milepost_watchers = Watchers::open(&milepost_store).await?;
    let etcd_watchers = match &etcd_store {
        Some(store) => Some(Watchers::open(store).await?),
        None => None,
    };
    let mut outcome = Outcome::new(name, "receipts/s", "etcd Watch", Some(Goal::AtLeast(2.0)));
    for _ in 0..harness.options.rounds {
        harness.checkpoint().await?;
        outcome.add_milepost(rate(&milepost_watchers, &provider).await?);
        if let (Some(watchers), Some(store)) = (&etcd_watchers, &etcd_store) {
            harness.checkpoint().await?;
            outcome.add_peer(rate(watchers, store).await?);
        }
    }
    Ok(vec![outcome])
}

/// Received events a second of all streams together, the median over some events.
async fn rate(watchers: &Watchers, writer: &Store) -> Result<Measure> {
    let streams = f64::from(u32::try_from(STREAMS)?);
    let mut rates = Vec::new();
    for _ in 0..EVENTS {
        rates.push(streams / watchers.append_and_wait(writer).await?.as_secs_f64());
    }
    rates.sort_by(f64::total_cmp);
    Ok(Measure::of(median(&rates).ok_or("a round has no events")?))
}

pub(super) async fn memory(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let mut outcome = Outcome::new(name, "kB/stream", "etcd", Some(Goal::Within(9.0)));
    for _ in 0..harness.options.rounds {
        // A process seldom returns memory: each round starts new servers.
        let server = serve(&harness.database().await?).await;
        let etcd = harness.etcd().await?;
        let (milepost_store, etcd_store, provider) = open_stores(&server, etcd.as_ref()).await?;
        outcome.add_milepost(
            memory_per_stream(|| Ok(server.resident_bytes()), &milepost_store, &provider).await?,
        );
        if let (Some(etcd), Some(store)) = (&etcd, &etcd_store) {
            outcome.add_peer(memory_per_stream(|| etcd.resident_bytes(), store, store).await?);
        }
    }
    Ok(vec![outcome])
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
    let bytes = resident_bytes()?.saturating_sub(before);
    Ok(Measure::of(f64::from(u32::try_from(bytes)?) / 1e3 / f64::from(u32::try_from(STREAMS)?)))
}
