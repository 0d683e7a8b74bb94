//! What was committed, in order, once per process.
//!
//! The tail's head is the position through which it has handed everything to
//! the mailboxes of those who watch. What this process committed itself is
//! handed on directly if it is the next in line, which positions without gaps
//! tell; anything else is read from the database: when the notifier rings, and
//! by a sweep, since a bell may be lost.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use diesel_async::AsyncPgConnection;
use tokio::sync::Notify;
use uuid::Uuid;

use super::{
    event::LogEvent,
    job_cache::{JobCache, JobIdentity},
    position::Position,
    vital,
    watch::Filter,
};
use crate::{
    db::Database,
    error::{Error, Result},
    models::{event::Event, retention::log_end},
    telemetry::metrics::{Metrics, Received},
};

/// How often the log is looked at without a bell. Half of the second within
/// which an event whose bell was lost must be found.
const SWEEP: Duration = Duration::from_millis(500);
/// How old a look at the log's end may be to say that all is well.
const CURRENT: Duration = Duration::from_secs(1);
/// Events read at once.
const PAGE: i64 = 1_000;
/// Most that waits in one mailbox: past either, its watcher reads the log.
const MAILBOX_EVENTS: usize = 256;
const MAILBOX_BYTES: usize = 256 * 1024;

/// Hands committed events to mailboxes.
#[derive(Debug)]
pub(crate) struct Tail {
    inner: Mutex<Inner>,
    bell: Notify,
    database: Database,
    job_cache: JobCache,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Inner {
    head: i64,
    /// How many logs retention had removed when it was last seen that none of
    /// it lies beyond the head.
    removals: i64,
    /// When a look at the log's end began that found it delivered.
    read_through: Instant,
    /// By topic (a job, a provider or a customer), then by number.
    mailboxes: BTreeMap<(Uuid, u64), Arc<Mailbox>>,
    next_number: u64,
    /// What the last sweep found, as far as nobody has announced it since.
    unannounced: usize,
}

impl Tail {
    /// Looks where the log ends, and follows it from there as long as the tail
    /// is used.
    pub(crate) async fn start(
        database: Database,
        job_cache: JobCache,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>> {
        let read_through = Instant::now();
        let (head, removals) = log_end(&mut *database.get().await?).await?;
        let (mailboxes, next_number) = (BTreeMap::new(), 0);
        let inner = Inner { head, removals, read_through, mailboxes, next_number, unannounced: 0 };
        let tail =
            Arc::new(Self { inner: Mutex::new(inner), bell: Notify::new(), database, job_cache, metrics });
        let reader = Arc::downgrade(&tail);
        tokio::spawn(vital(async move {
            // Its own: what all watchers wait for does not wait behind calls.
            let mut kept = None;
            let mut reads = true;
            let mut sweeps = false;
            while let Some(tail) = reader.upgrade() {
                let limit = tail.database.settings().longest_use();
                let caught_up = tokio::time::timeout(limit, tail.catch_up(&mut kept, sweeps)).await;
                match caught_up.unwrap_or_else(|_| Err(Error::unavailable("a look took too long"))) {
                    Ok(()) => reads = true,
                    // Told once, not at every look.
                    Err(error) => {
                        if std::mem::take(&mut reads) {
                            tracing::warn!(error = &error as &dyn std::error::Error, "cannot read the log");
                        }
                    }
                }
                // A bell that rang meanwhile is kept.
                sweeps = tokio::time::timeout(SWEEP, tail.bell.notified()).await.is_err();
                // A commit may be seen a moment before its bell is heard.
                if std::mem::take(&mut tail.lock().unannounced) > 0 && sweeps {
                    tail.metrics.watches.sweep_finds.inc();
                }
            }
        }));
        Ok(tail)
    }

    /// Something may have been committed elsewhere.
    pub(crate) fn ring(&self) {
        self.bell.notify_one();
    }

    /// Hands on what this process committed, in the order of the log, as far as
    /// it is the next in line. Where others come first, the reader finds it all.
    pub(crate) fn offer(&self, events: &[(Event, Arc<JobIdentity>)], received_at: Instant) {
        let mut inner = self.lock();
        for (row, job) in events {
            if row.position > inner.head + 1 {
                return self.ring();
            }
            if row.position <= inner.head {
                inner.unannounced = inner.unannounced.saturating_sub(1);
            }
            inner.deliver(row, job, Received { at: received_at, own: true });
        }
    }

    /// A mailbox into which everything is delivered that is committed on this
    /// topic from now on.
    pub(crate) fn subscribe(self: &Arc<Self>, filter: Arc<Filter>) -> Subscription {
        let mut inner = self.lock();
        let key = (filter.topic(), inner.next_number);
        let mailbox = Arc::new(Mailbox { filter, inner: Mutex::default(), filled: Notify::new() });
        inner.next_number += 1;
        inner.mailboxes.insert(key, Arc::clone(&mailbox));
        Subscription { tail: Arc::clone(self), key, mailbox }
    }

    /// Through where everything has been delivered, if the log was read to its
    /// end less than a second ago.
    pub(crate) fn current(&self) -> Option<Position> {
        let inner = self.lock();
        let place = Position { cursor: inner.head, removals: inner.removals };
        (inner.read_through.elapsed() < CURRENT).then_some(place)
    }

    /// Age of the oldest event that waits for a watcher which had caught up.
    pub(crate) fn lag(&self) -> Duration {
        let mailboxes: Vec<_> = self.lock().mailboxes.values().cloned().collect();
        let oldest = mailboxes.iter().filter_map(|mailbox| mailbox.lock().waits_since()).min();
        oldest.map(|since| since.elapsed()).unwrap_or_default()
    }

    /// Reads from the head to the log's end; unasked, if this is a sweep.
    async fn catch_up(&self, kept: &mut Option<AsyncPgConnection>, sweeps: bool) -> Result<()> {
        let at = Instant::now();
        let before = self.lock().head;
        let mut connection = self.database.kept_or_new(kept).await?;
        let (end, removals) = log_end(&mut connection).await?;
        if end < before {
            self.go_back(end);
        }
        loop {
            let head = {
                let mut inner = self.lock();
                if inner.head >= end {
                    inner.read_through = at;
                    inner.removals = removals;
                    *kept = Some(connection);
                    return Ok(());
                }
                inner.head
            };
            let rows = Event::list_of_log(&mut connection, head, end, PAGE).await?;
            let read = i64::try_from(rows.len()).map_err(Error::internal)?;
            let whole = read < PAGE;
            let through = if whole { end } else { rows.last().map_or(end, |row| row.position) };
            let events = with_jobs(&mut connection, &self.job_cache, rows).await?;
            let mut inner = self.lock();
            if read < through - head {
                // Positions have no gaps but where retention was faster: all
                // who watch have to look what that is to them.
                inner.mailboxes.values().for_each(|mailbox| mailbox.overflow());
            }
            if sweeps {
                inner.unannounced += events.len();
            }
            let received = Received { at, own: false };
            events.iter().for_each(|(row, job)| inner.deliver(row, job, received));
            inner.head = inner.head.max(through);
        }
    }

    /// The database is of an earlier time than what was sent from it, as after the
    /// restore of a back-up: all who watch have to look what that is to them.
    fn go_back(&self, end: i64) {
        tracing::error!(end, "the log is shorter than it was");
        let mut inner = self.lock();
        inner.head = end;
        inner.mailboxes.values().for_each(|mailbox| mailbox.overflow());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here can panic half-way.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// To each mailbox, unless it has been already, and the head moves to it.
    /// Encoded only if anybody watches.
    fn deliver(&mut self, row: &Event, job: &Arc<JobIdentity>, received: Received) {
        if row.position <= self.head {
            return;
        }
        let mut event = None;
        for topic in [job.id, job.provider_id, job.customer_id] {
            for (_, mailbox) in self.mailboxes.range((topic, 0)..=(topic, u64::MAX)) {
                let received = Some(received);
                mailbox.put(
                    event.get_or_insert_with(|| Arc::new(LogEvent::new(row, Arc::clone(job), received))),
                );
            }
        }
        self.head = row.position;
    }
}

/// Rows of the log, each with what never changes about its job.
pub(crate) async fn with_jobs(
    connection: &mut AsyncPgConnection,
    job_cache: &JobCache,
    rows: Vec<Event>,
) -> Result<Vec<(Event, Arc<JobIdentity>)>> {
    let mut ids: Vec<Uuid> = rows.iter().map(|row| row.job_id).collect();
    ids.sort_unstable();
    ids.dedup();
    let jobs = job_cache.list(connection, &ids).await?;
    rows.into_iter()
        .map(|row| {
            let job = jobs.get(&row.job_id).ok_or_else(|| Error::internal("an event without its job"))?;
            Ok((row, Arc::clone(job)))
        })
        .collect()
}

/// The same, as watchers receive them.
pub(crate) async fn log_events(
    connection: &mut AsyncPgConnection,
    job_cache: &JobCache,
    rows: Vec<Event>,
) -> Result<Vec<Arc<LogEvent>>> {
    let rows = with_jobs(connection, job_cache, rows).await?;
    Ok(rows.into_iter().map(|(row, job)| Arc::new(LogEvent::new(&row, job, None))).collect())
}

/// What waits for one watcher. Bounded: one that does not keep up forgets it
/// all and is told to read the log.
#[derive(Debug)]
pub(crate) struct Mailbox {
    filter: Arc<Filter>,
    inner: Mutex<Waiting>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Delivered>,
    bytes: usize,
    overflowed: bool,
    follows: Follows,
}

/// An event that waits; of those in a row that its watcher did not ask for only the
/// last, which tells how far the log is.
#[derive(Debug)]
pub(crate) struct Delivered {
    pub(crate) event: Arc<LogEvent>,
    /// Of the first of them.
    pub(crate) first_sequence: i64,
    wanted: bool,
}

/// How far a watcher is.
#[derive(Clone, Copy, Debug, Default)]
enum Follows {
    /// It reads the past that it asked for.
    #[default]
    NotYet,
    Now,
    /// It did, but missed what came at this time.
    Since(Instant),
}

impl Waiting {
    /// When the oldest event came that waits for a watcher which had caught up.
    fn waits_since(&self) -> Option<Instant> {
        match self.follows {
            Follows::NotYet => None,
            Follows::Now => {
                self.events.iter().find(|waits| waits.wanted)?.event.received.map(|received| received.at)
            }
            Follows::Since(at) => Some(at),
        }
    }
}

impl Mailbox {
    fn put(&self, event: &Arc<LogEvent>) {
        let mut waiting = self.lock();
        if waiting.overflowed {
            return;
        }
        let (wanted, mut first_sequence) = (self.filter.wants(event), event.sequence);
        if !wanted && let Some(last) = waiting.events.pop_back_if(|last| !last.wanted) {
            waiting.bytes -= last.event.encoded.len();
            first_sequence = last.first_sequence;
        }
        if waiting.events.len() >= MAILBOX_EVENTS || waiting.bytes + event.encoded.len() > MAILBOX_BYTES {
            drop(waiting);
            return self.overflow();
        }
        waiting.bytes += event.encoded.len();
        waiting.events.push_back(Delivered { event: Arc::clone(event), first_sequence, wanted });
        drop(waiting);
        self.filled.notify_one();
    }

    fn overflow(&self) {
        let mut waiting = self.lock();
        let follows = match (waiting.follows, waiting.waits_since()) {
            (Follows::Now, Some(at)) => Follows::Since(at),
            (follows, _) => follows,
        };
        *waiting = Waiting { overflowed: true, follows, ..Waiting::default() };
        drop(waiting);
        self.filled.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A mailbox that is delivered to as long as this lives.
#[derive(Debug)]
pub(crate) struct Subscription {
    tail: Arc<Tail>,
    key: (Uuid, u64),
    mailbox: Arc<Mailbox>,
}

/// What a look into the mailbox brings.
#[derive(Debug)]
pub(crate) enum Delivery {
    /// In the order of the log; never empty.
    Events(VecDeque<Delivered>),
    /// More came than the mailbox holds, from now on it is delivered again:
    /// what was missed is in the log.
    Overflowed,
}

impl Subscription {
    /// What waits now.
    pub(crate) fn take(&self) -> Option<Delivery> {
        let mut mailbox = self.mailbox.lock();
        let follows = mailbox.follows;
        let waiting = std::mem::replace(&mut *mailbox, Waiting { follows, ..Waiting::default() });
        drop(mailbox);
        if waiting.overflowed {
            Some(Delivery::Overflowed)
        } else if waiting.events.is_empty() {
            None
        } else {
            Some(Delivery::Events(waiting.events))
        }
    }

    /// Its watcher has been sent everything else.
    pub(crate) fn follows(&self) {
        self.mailbox.lock().follows = Follows::Now;
    }

    /// What comes next. Cancel-safe: nothing is taken before it is returned.
    pub(crate) async fn next(&self) -> Delivery {
        loop {
            if let Some(delivery) = self.take() {
                return delivery;
            }
            self.mailbox.filled.notified().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.tail.lock().mailboxes.remove(&self.key);
    }
}
