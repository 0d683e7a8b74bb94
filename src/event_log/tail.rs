//! Follows what was committed, in the order of the log, once per process.
//!
//! The tail's head is the position up to which it has delivered every event to
//! the mailboxes. Positions have no gaps, so that the tail can tell whether an
//! event that this process committed is the next one: then it is delivered at
//! once. All other events are read from the database, when another replica
//! notifies this one, and by a sweep, since a notification may be lost.
//!
//! When the database is another one than before, the tail asks whether it still has
//! what was delivered. If not, every watcher has to compare its own position.
//!
//! No event holds up the others. A page that cannot be read is halved, down to a single
//! event. If that one cannot be read either, the tail goes on behind it, and the watches
//! that need it read the log for themselves: they end with an error when they come to it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    abort::abort_on_panic,
    event::{CommittedEvent, LogEvent},
    job_cache::JobCache,
    mailbox::{Mailboxes, Subscription},
    position::{Position, Run},
    scope::Filter,
};
use crate::{
    db::{Database, Identified as _, OwnConnection},
    error::{Error, Result},
    models::{event::Event, history::LogEnd},
    telemetry::metrics::{Metrics, Received},
};

/// How often the log is read without a notification: half of the second within
/// which an event must be found whose notification was lost.
const SWEEP: Duration = Duration::from_millis(500);
/// How old the last read of the log's end may be for a heartbeat.
const CURRENT: Duration = Duration::from_secs(1);
/// Why the log could not be read, if a read does not end.
const TOO_LONG: &str = "reading the log took too long";
/// Most events read by one query.
const PAGE: i64 = 1_000;

/// Delivers committed events to the mailboxes.
#[derive(Debug)]
pub(crate) struct Tail {
    state: Mutex<State>,
    mailboxes: Arc<Mailboxes>,
    woken: Notify,
    database: Database,
    job_cache: JobCache,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct State {
    head: i64,
    /// The history of the head, and the database in which it was read.
    run: Run,
    /// How many logs retention had removed when the tail last saw that no removed
    /// event lies beyond the head.
    removals: i64,
    /// When the read of the log's end began that found everything delivered.
    read_through: Instant,
    /// How many events the last sweep found that no notification has announced
    /// since.
    unannounced: usize,
    /// How many events the next query reads.
    page: i64,
}

impl Tail {
    /// Reads where the log ends, and follows it from there for as long as the tail
    /// is used.
    pub(crate) async fn start(
        database: Database,
        job_cache: JobCache,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>> {
        let read_through = Instant::now();
        let mut connection = database.connect().await?;
        let LogEnd { position: head, removals, history } = LogEnd::read(&mut connection).await?;
        let run = Run { identity: connection.identity(), history };
        drop(connection);
        let tail = Arc::new(Self {
            state: Mutex::new(State { head, run, removals, read_through, unannounced: 0, page: PAGE }),
            mailboxes: Arc::default(),
            woken: Notify::new(),
            database,
            job_cache,
            metrics,
        });
        let follower = Arc::downgrade(&tail);
        tail.database.spawn(abort_on_panic(async move {
            // A connection of the tail's own: all watchers wait for the tail, which
            // must not wait for a connection of the pool behind calls.
            let mut kept = None;
            let mut failing = false;
            let mut sweeps = false;
            while let Some(tail) = follower.upgrade() {
                match tail.catch_up(&mut kept, sweeps).await {
                    Ok(()) => failing = false,
                    // Logged once an outage, not at every attempt.
                    Err(error) => {
                        if !std::mem::replace(&mut failing, true) {
                            tracing::warn!(error = &error as &dyn std::error::Error, "cannot read the log");
                        }
                    }
                }
                // `Notify` keeps a notification that came meanwhile.
                sweeps = tokio::time::timeout(SWEEP, tail.woken.notified()).await.is_err();
                // A commit may become visible a moment before its notification comes.
                if std::mem::take(&mut tail.state.lock().unannounced) > 0 && sweeps {
                    tail.metrics.watches.sweep_finds.inc();
                }
            }
        }));
        Ok(tail)
    }

    /// Has the tail read the log now, since another process may have committed.
    pub(crate) fn wake(&self) {
        self.woken.notify_one();
    }

    /// Delivers events that this process committed in a run, in the order of the log, as
    /// far as they follow the head. Where events of others come first, or the head is one
    /// of another run, the tail reads them all from the database.
    pub(crate) fn offer(&self, run: Run, events: &[CommittedEvent], received_at: Instant) {
        let mut state = self.state.lock();
        if state.run.identity != run.identity {
            return self.wake();
        }
        // The history may have begun with these events.
        state.run = run;
        for event in events {
            if event.row.position > state.head + 1 {
                return self.wake();
            }
            if event.row.position <= state.head {
                state.unannounced = state.unannounced.saturating_sub(1);
            }
            self.deliver(&mut state, event, Received { at: received_at, own: true });
        }
    }

    /// A mailbox for the events of this filter that are committed from now on.
    pub(crate) fn subscribe(&self, filter: Arc<Filter>) -> Subscription {
        self.mailboxes.subscribe(filter)
    }

    /// The position up to which every event has been delivered, and its run, if the log was
    /// read to its end less than a second ago.
    pub(crate) fn current(&self) -> Option<(Run, Position)> {
        let state = self.state.lock();
        let State { head, run, removals, .. } = *state;
        let position = Position { history: run.history, log: head, cursor: head, removals, walk: None };
        (state.read_through.elapsed() < CURRENT).then_some((run, position))
    }

    /// Age of the oldest event that waits for a watcher which had caught up.
    pub(crate) fn watch_lag(&self) -> Duration {
        self.mailboxes.lag()
    }

    /// How long ago the log was last read to its end: whatever was committed before then
    /// was delivered.
    pub(crate) fn lag(&self) -> Duration {
        self.state.lock().read_through.elapsed()
    }

    /// Reads from the head to the end of the log. `sweeps` says that no notification
    /// asked for it.
    async fn catch_up(&self, kept: &mut Option<OwnConnection>, sweeps: bool) -> Result<()> {
        let at = Instant::now();
        let mut connection = self.database.kept_or_new(kept).await?;
        let LogEnd { position: end, removals, .. } =
            self.database.in_time(self.enter(&mut connection), TOO_LONG).await?;
        loop {
            let (head, page) = {
                let mut state = self.state.lock();
                if state.head >= end {
                    state.read_through = at;
                    state.removals = removals;
                    *kept = Some(connection);
                    return Ok(());
                }
                (state.head, state.page)
            };
            match self.database.in_time(self.read_page(&mut connection, head, end, page), TOO_LONG).await {
                Ok((events, through)) => self.deliver_page(&events, head, through, sweeps, at),
                // An event that cannot be read: the next pages are shorter, until it is alone.
                Err(Error::Internal(_)) if page > 1 => self.state.lock().page = page / 2,
                Err(Error::Internal(source)) => {
                    self.database.in_time(self.skip(&mut connection, head + 1, &*source), TOO_LONG).await?;
                }
                // The database is away, or too slow for so long a page.
                Err(error) => {
                    self.state.lock().page = (page / 2).max(1);
                    return Err(error);
                }
            }
        }
    }

    /// The events after the head, and how far the log was read for them.
    async fn read_page(
        &self,
        connection: &mut OwnConnection,
        head: i64,
        end: i64,
        page: i64,
    ) -> Result<(Vec<CommittedEvent>, i64)> {
        // No further than the page is long, so that a page of one event is the next one.
        let through = end.min(head + page);
        let rows = Event::list_of_log(connection, head, through, page).await?;
        Ok((self.job_cache.with_jobs(connection, rows).await?, through))
    }

    fn deliver_page(&self, events: &[CommittedEvent], head: i64, through: i64, sweeps: bool, at: Instant) {
        let mut state = self.state.lock();
        if i64::try_from(events.len()).is_ok_and(|read| read < through - head) {
            // Only retention makes gaps in the positions: each watcher has to
            // check whether it lost an event by that.
            self.mailboxes.overflow_all();
        }
        if sweeps {
            state.unannounced += events.len();
        }
        for event in events {
            self.deliver(&mut state, event, Received { at, own: false });
        }
        state.head = state.head.max(through);
        state.page = (state.page * 2).min(PAGE);
    }

    /// Goes on behind an event that cannot be read. The watches of its job, and those of all
    /// jobs of its job's provider or customer, read the log for themselves; where not even its
    /// job can be read, every watch does.
    async fn skip(
        &self,
        connection: &mut OwnConnection,
        position: i64,
        cause: &(dyn std::error::Error + Send + Sync + 'static),
    ) -> Result<()> {
        let job = match Event::job_at(connection, position).await {
            Ok(job) => job,
            Err(Error::Internal(_)) => None,
            Err(error) => return Err(error),
        };
        let identity = match job {
            Some(id) => self.job_cache.list(connection, &[id]).await?.remove(&id),
            None => None,
        };
        tracing::error!(position, ?job, %cause, "an event cannot be read: the log goes on behind it");
        self.metrics.watches.unreadable.inc();
        let mut state = self.state.lock();
        if state.head < position {
            match (job, identity) {
                (_, Some(job)) => {
                    for topic in [job.id, job.provider_id, job.customer_id] {
                        self.mailboxes.overflow(topic, |scope| scope.contains(&job));
                    }
                }
                // A job without a row belongs to nobody: only open watches of it need the event.
                (Some(id), None) => self.mailboxes.overflow(id, |_| true),
                (None, None) => self.mailboxes.overflow_all(),
            }
            state.head = position;
        }
        Ok(())
    }

    /// Delivers an event, unless it was delivered before, and moves the head to it.
    fn deliver(&self, state: &mut State, event: &CommittedEvent, received: Received) {
        let CommittedEvent { row, job, .. } = event;
        if row.position > state.head {
            let topics = [job.id, job.provider_id, job.customer_id];
            self.mailboxes.deliver(topics, state.run, || LogEvent::new(event, Some(received)));
            state.head = row.position;
        }
    }

    /// Reads where the log ends, and notes in which run it is read on. If what was delivered
    /// is lost there, the head goes to the end, and each watcher reads the log, which compares
    /// its position.
    async fn enter(&self, connection: &mut OwnConnection) -> Result<LogEnd> {
        loop {
            // Before the end is read: offers may overtake that read, and move the head beyond
            // the end that it returns.
            let (head, before) = {
                let state = self.state.lock();
                (state.head, state.run)
            };
            let end = LogEnd::read(connection).await?;
            let run = Run { identity: connection.identity(), history: end.history };
            let may_be_lost = run.identity != before.identity || end.position < head;
            let lost = may_be_lost && end.kept(connection, before.history, head).await?.is_none();
            let mut state = self.state.lock();
            if state.head == head {
                state.run = run;
            } else if may_be_lost {
                // An offer of the run before may have come meanwhile.
                continue;
            }
            if lost {
                tracing::error!(
                    head,
                    end = end.position,
                    "the log was set back: events that were sent are lost"
                );
                state.head = end.position;
                self.mailboxes.overflow_all();
            }
            return Ok(end);
        }
    }
}
