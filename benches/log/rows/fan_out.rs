//! 10,000 streams of one watch each: how fast one event reaches them all, and
//! what they cost in memory.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::{sync::Notify, task::JoinSet, time::timeout};

use crate::{
    Result,
    bed::{Bed, Process},
    report::{Goal, Measure, Outcome, median},
    store::{Feed, Order, Store},
    tenant::Tenant,
};

/// Streams, and the connections that they share equally.
pub(super) const STREAMS: usize = 10_000;
pub(super) const CONNECTIONS: usize = 20;
/// Events of a round.
const EVENTS: usize = 50;
/// Longest that an event may take to reach everybody.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Open streams, each read by a task of its own. They are closed when dropped.
pub(crate) struct Audience {
    board: Arc<Board>,
    _readers: JoinSet<()>,
}

/// Who has received what.
#[derive(Default)]
struct Board {
    received: AtomicUsize,
    /// When everybody had received the event.
    complete: Mutex<Option<Instant>>,
    wrong: Mutex<Option<String>>,
    bell: Notify,
}

impl Board {
    fn receive(&self) {
        if (self.received.fetch_add(1, Ordering::AcqRel) + 1).is_multiple_of(STREAMS) {
            *self.complete.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            self.bell.notify_one();
        }
    }

    fn fail(&self, error: &crate::Error) {
        *self.wrong.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
        self.bell.notify_one();
    }

    fn check(&self) -> Result<()> {
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner).take();
        wrong.map_or(Ok(()), |wrong| Err(wrong.into()))
    }
}

impl Audience {
    /// Opens the streams, over the store's connections and logs in turn.
    pub(super) async fn gather(store: &Store) -> Result<Self> {
        let open = |number: usize| async move { store.watch(number, number % store.logs.len()).await };
        let feeds: Vec<(Feed, Option<i64>)> =
            stream::iter(0..STREAMS).map(open).buffer_unordered(200).try_collect().await?;
        let board = Arc::new(Board::default());
        let mut readers = JoinSet::new();
        for (mut feed, after) in feeds {
            let board = Arc::clone(&board);
            readers.spawn(async move {
                let mut order = Order::after(after);
                loop {
                    let seen = feed.next().await.and_then(|seen| {
                        seen.into_iter().try_for_each(|seen| {
                            order.check(seen)?;
                            board.receive();
                            Ok(())
                        })
                    });
                    if let Err(error) = seen {
                        return board.fail(&error);
                    }
                }
            });
        }
        Ok(Self { board, _readers: readers })
    }

    /// That no stream has ended or got anything wrong so far.
    pub(super) fn check(&self) -> Result<()> {
        self.board.check()
    }

    /// Appends an event to the first log, which all of them watch; from then
    /// until the last of them has it.
    async fn tell(&self, store: &Store) -> Result<Duration> {
        let mut writer = store.writer(0);
        let started = Instant::now();
        writer.append(&store.logs, 0, 0).await?;
        timeout(TIMEOUT, self.board.bell.notified()).await?;
        self.board.check()?;
        let complete = self.board.complete.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(complete.ok_or("not everybody received the event")? - started)
    }
}

/// One job, and the same as a key.
async fn stages(server: &Process, etcd: Option<&Process>) -> Result<(Store, Option<Store>, Store)> {
    let tenant = Tenant::create(server.address).await?;
    let jobs: Arc<[String]> = tenant.jobs(server.address, 1).await?.into();
    let ours = Store::milepost(server.address, &tenant.customer_key, Arc::clone(&jobs), CONNECTIONS).await?;
    let provider = Store::milepost(server.address, &tenant.provider_key, Arc::clone(&jobs), 1).await?;
    let theirs = match etcd {
        Some(etcd) => Some(Store::etcd(etcd.address, jobs, CONNECTIONS).await?),
        None => None,
    };
    Ok((ours, theirs, provider))
}

pub(super) async fn fan_out(bed: &Bed, name: &str) -> Result<Vec<Outcome>> {
    let server = bed.server(&bed.database().await?).await?;
    let etcd = bed.etcd().await?;
    let (ours, theirs, provider) = stages(&server, etcd.as_ref()).await?;
    let our_audience = Audience::gather(&ours).await?;
    let their_audience = match &theirs {
        Some(store) => Some(Audience::gather(store).await?),
        None => None,
    };
    let mut outcome = Outcome::new(name, "receipts/s", "etcd Watch", Some(Goal::AtLeast(2.0)));
    for _ in 0..bed.options.rounds {
        bed.checkpoint().await?;
        outcome.milepost(rate(&our_audience, &provider).await?);
        if let (Some(audience), Some(store)) = (&their_audience, &theirs) {
            bed.checkpoint().await?;
            outcome.peer(rate(audience, store).await?);
        }
    }
    Ok(vec![outcome])
}

/// Receipts a second, the median of some events.
async fn rate(audience: &Audience, writer: &Store) -> Result<Measure> {
    let streams = f64::from(u32::try_from(STREAMS)?);
    let mut rates = Vec::new();
    for _ in 0..EVENTS {
        rates.push(streams / audience.tell(writer).await?.as_secs_f64());
    }
    rates.sort_by(f64::total_cmp);
    Ok(Measure::of(median(&rates).ok_or("no events")?))
}

pub(super) async fn memory(bed: &Bed, name: &str) -> Result<Vec<Outcome>> {
    let mut outcome = Outcome::new(name, "kB/stream", "etcd", Some(Goal::Within(9.0)));
    for _ in 0..bed.options.rounds {
        // Memory that was once used is seldom given back: each round has
        // servers of its own.
        let server = bed.server(&bed.database().await?).await?;
        let etcd = bed.etcd().await?;
        let (ours, theirs, provider) = stages(&server, etcd.as_ref()).await?;
        outcome.milepost(growth(&server, &ours, &provider).await?);
        if let (Some(etcd), Some(store)) = (&etcd, &theirs) {
            outcome.peer(growth(etcd, store, store).await?);
        }
    }
    Ok(vec![outcome])
}

/// In kB a stream.
async fn growth(process: &Process, audience: &Store, writer: &Store) -> Result<Measure> {
    writer.writer(0).append(&writer.logs, 0, 0).await?;
    let before = process.resident_bytes()?;
    let gathered = Audience::gather(audience).await?;
    gathered.tell(writer).await?;
    let bytes = process.resident_bytes()?.saturating_sub(before);
    Ok(Measure::of(f64::from(u32::try_from(bytes)?) / 1e3 / f64::from(u32::try_from(STREAMS)?)))
}
