//! The one loop behind every watch: subscribe first, then read the past, then
//! follow the tail. A watcher whose mailbox overflowed reads the log again from
//! where it is; nothing is held for it, and nothing is lost.

mod end;
mod query;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use self::end::{LogEnd, before_oldest};
pub(crate) use self::query::{Body, EndReason, Filter, Message, Scope, Start, WatchQuery};
use super::{
    EventLog,
    event::LogEvent,
    position::{Binding, Position},
    tail::{Delivered, Delivery, Subscription, log_events},
};
use crate::{
    auth::Credential,
    error::{Error, Result},
    limits::MESSAGE_BYTES,
    models::{event::Event, retention::Removed},
    progress::JobState,
    telemetry::metrics::Open,
};

/// Events of the past read at once, and most bytes of them that wait to be sent:
/// fewer are read where they are large.
const PAGE: i64 = 200;
const PENDING_BYTES: usize = 256 * 1024;
/// Positions of the log that one query looks through for those in sight.
const WINDOW: i64 = 10_000;
/// Pause before the database is asked again after it did not answer.
const RETRY: Duration = Duration::from_millis(250);
/// Room in a message for all but its events.
const MESSAGE_MARGIN: usize = 1024;

/// An open watch.
#[derive(Debug)]
pub(crate) struct Watch {
    log: EventLog,
    credential: Arc<Credential>,
    draining: CancellationToken,
    filter: Arc<Filter>,
    heartbeat: Duration,
    binding: Binding,
    subscription: Subscription,
    /// Everything in scope up to here was sent or filtered.
    cursor: i64,
    /// See [`Position::removals`].
    removals: i64,
    /// Read, beyond the cursor, in scope; not sent yet.
    pending: VecDeque<Arc<LogEvent>>,
    /// Where the cursor moves once nothing is pending.
    read_to: i64,
    /// Most events of the next page.
    page: i64,
    /// It was asked for everything that is kept.
    from_beginning: bool,
    /// The past ends here; beyond, the subscription delivers.
    past_end: i64,
    caught_up: bool,
    /// Something was missed: the log has it.
    missed: bool,
    /// The latest known of the one job.
    job: Option<JobState>,
    /// When a heartbeat is due.
    beat_at: Instant,
    ended: bool,
    /// It follows the tail: it has been sent everything before.
    follows: bool,
    _counted: Open,
}

impl Watch {
    /// Opens a watch: subscribes, and looks where the log ends.
    pub(crate) async fn open(
        log: EventLog,
        query: WatchQuery,
        credential: Arc<Credential>,
        draining: CancellationToken,
    ) -> Result<Self> {
        let WatchQuery { filter, start, heartbeat } = query;
        let from_beginning = matches!(start, Start::Beginning);
        let binding = Binding::new(&filter);
        let resumed = match &start {
            Start::Resume(token) => Some(binding.place(token)?),
            Start::Beginning | Start::AfterSequence(_) | Start::Now => None,
        };
        // Before the log's end is looked up: whatever is committed after that
        // look is delivered.
        let filter = Arc::new(filter);
        let subscription = log.0.tail.subscribe(Arc::clone(&filter));
        let scope = &filter.scope;
        let end = LogEnd::look(&log, scope).await?;
        let Position { cursor, removals } = match (start, resumed) {
            (Start::Beginning, _) => {
                Position { cursor: before_oldest(&log, scope, &end).await?, ..end.place }
            }
            (Start::AfterSequence(cursor), _) => Position { cursor, ..end.place },
            (_, Some(place)) => place,
            _ => end.place,
        };
        let past_end = end.place.cursor;
        if cursor > past_end {
            return Err(Error::PositionBeyondLog);
        }
        let watches = &log.0.metrics.watches;
        let counted = Open::of(match scope {
            Scope::Job(_) => &watches.of_one_job,
            Scope::All { .. } => &watches.of_all_jobs,
        });
        Ok(Self {
            log,
            credential,
            draining,
            filter,
            heartbeat,
            binding,
            subscription,
            cursor,
            removals,
            pending: VecDeque::new(),
            read_to: cursor,
            page: PAGE,
            from_beginning,
            past_end,
            caught_up: false,
            missed: false,
            job: end.job,
            beat_at: Instant::now() + heartbeat,
            ended: false,
            follows: false,
            _counted: counted,
        })
    }

    /// The next message; `None` after the end. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Result<Message>> {
        let (credential, draining) = (Arc::clone(&self.credential), self.draining.clone());
        while !self.ended {
            let advanced = tokio::select! {
                biased;
                () = credential.ended() => Ok(Some(self.end(EndReason::CredentialEnded))),
                () = draining.cancelled() => Ok(Some(self.end(EndReason::Draining))),
                advanced = self.advance() => advanced,
            };
            match advanced {
                Ok(None) => {}
                Ok(Some(message)) => {
                    let now = Instant::now();
                    self.beat_at = now + self.heartbeat;
                    // The first has waited longest.
                    if let Body::Events(events) = &message.body
                        && let Some(received) = events.first().and_then(|event| event.received)
                    {
                        self.log.0.metrics.watches.sent(received, now);
                    }
                    return Some(Ok(message));
                }
                Err(Error::EventsExpired { .. }) => return Some(Ok(self.end(EndReason::EventsExpired))),
                // The stream stays; it goes on when the database is back.
                Err(Error::Unavailable(_)) => tokio::time::sleep(RETRY).await,
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// One step further: a message, or something was read.
    async fn advance(&mut self) -> Result<Option<Message>> {
        if !self.has_pending() {
            // Boxed: thousands of watches that wait must not each have room for
            // what reading takes.
            if self.missed {
                Box::pin(self.look_again()).await?;
                return Ok(None);
            }
            if self.is_behind() && !self.is_silent() {
                Box::pin(self.read_past()).await?;
                return Ok(None);
            }
            if self.caught_up && !self.is_over() && !self.wait().await {
                return Ok(None);
            }
        }
        // Asked before a message is made: making one moves the cursor, and an
        // `end` that came while it was held back would skip what it says.
        if self.credential.confirmed().await.is_err() {
            return Ok(Some(self.end(EndReason::CredentialEnded)));
        }
        Ok(self.say())
    }

    fn has_pending(&self) -> bool {
        !self.pending.is_empty() || self.cursor < self.read_to
    }

    fn is_behind(&self) -> bool {
        self.cursor < self.past_end
    }

    /// Whether reading a past of which nothing is to be sent takes so long that
    /// the client might take the watch for dead.
    fn is_silent(&self) -> bool {
        !self.caught_up && self.beat_at <= Instant::now() && self.log.0.tail.current().is_some()
    }

    /// Whether the one job's log was sent to its very end.
    fn is_over(&self) -> bool {
        self.job.is_some_and(|job| job.closed && job.last_sequence <= self.cursor)
    }

    /// What is to be said now, to be sent at once.
    fn say(&mut self) -> Option<Message> {
        if self.has_pending() {
            self.take_pending()
        } else if self.is_behind() {
            Some(self.message(Body::Heartbeat))
        } else if !self.caught_up {
            self.caught_up = true;
            Some(self.message(Body::CaughtUp(self.job)))
        } else if self.is_over() {
            Some(self.end(EndReason::JobClosed))
        } else {
            self.beat()
        }
    }

    /// Reads a page of the log from the cursor towards the end of the past;
    /// [`Error::EventsExpired`] if not all of it is there any more.
    async fn read_past(&mut self) -> Result<()> {
        let turn = self.log.0.readers.acquire();
        let turn = if self.caught_up || self.beat_at <= Instant::now() {
            turn.await
        } else {
            match tokio::time::timeout_at(self.beat_at.into(), turn).await {
                Ok(turn) => turn,
                // Others take long: the client is to hear that it is not forgotten.
                Err(_) => return Ok(()),
            }
        };
        let turn = turn.map_err(Error::internal)?;
        let mut connection = self.log.0.database.get().await?;
        let page = self.page;
        let (rows, read_to) = match &self.filter.scope {
            Scope::Job(job) => {
                let through = self.past_end;
                let rows =
                    Event::list_of_job(&mut connection, job.id, self.cursor, through, &[], page).await?;
                // A log is removed from its beginning on: a page may be full and
                // yet not be the next one.
                let whole = page.min(through - self.cursor);
                if count(&rows) < whole || rows.last().is_some_and(|row| row.sequence != self.cursor + whole)
                {
                    drop((connection, turn));
                    // It may have gone on before it was closed and removed.
                    self.job = LogEnd::look(&self.log, &self.filter.scope).await?.job;
                    return Err(Error::EventsExpired { first_sequence: None });
                }
                let read_to = rows.last().map_or(through, |row| row.sequence);
                (rows, read_to)
            }
            Scope::All { viewer, configuration_tag, counterpart_id } => {
                let through = self.past_end.min(self.cursor + WINDOW);
                let visibility = viewer.visibility();
                let rows = if through - self.cursor <= page && self.removals == 0 {
                    // So few are read whole: to plan for those in sight costs
                    // more than to leave the others out.
                    Event::list_of_log(&mut connection, self.cursor, through, page).await?
                } else {
                    Event::list_visible(&mut connection, visibility, self.cursor, through, page).await?
                };
                let whole = count(&rows) < page;
                let read_to =
                    if whole { None } else { rows.last().map(|row| row.position) }.unwrap_or(through);
                let removed = Removed {
                    visibility,
                    configuration_tag,
                    counterpart_id: *counterpart_id,
                    after_position: self.cursor,
                    since: self.removals,
                    // Who asked for what is kept misses nothing of a log that went
                    // before they came to it, unless the tail has the rest of it.
                    except_between: (self.from_beginning && !self.caught_up)
                        .then_some((read_to, self.past_end)),
                };
                // After the page: logs are marked as removed before any event
                // of theirs is.
                let (removals, lost) = removed.check(&mut connection).await?;
                if lost {
                    return Err(Error::EventsExpired { first_sequence: None });
                }
                self.removals = removals;
                (rows, read_to)
            }
        };
        let mut events = log_events(&mut connection, &self.log.0.job_cache, rows).await?;
        drop((connection, turn));
        let mut bytes = 0;
        let fit = events.iter().take_while(|event| {
            let room = bytes < PENDING_BYTES;
            bytes += event.encoded.len();
            room
        });
        let fit = fit.count();
        if fit < events.len() {
            events.truncate(fit);
            self.page = i64::try_from(fit).unwrap_or(PAGE).min(PAGE);
            self.read_to = events.last().map_or(read_to, |event| self.filter.scope.place(event));
        } else {
            self.page = (page * 2).min(PAGE);
            self.read_to = read_to;
        }
        self.pending = events.into_iter().filter(|event| self.filter.scope.contains(event)).collect();
        Ok(())
    }

    /// The past now ends where the log does.
    async fn look_again(&mut self) -> Result<()> {
        let turn = self.log.0.readers.acquire().await.map_err(Error::internal)?;
        let end = LogEnd::look(&self.log, &self.filter.scope).await?;
        drop(turn);
        if end.place.cursor < self.cursor {
            return Err(Error::PositionBeyondLog);
        }
        self.past_end = end.place.cursor;
        self.job = end.job;
        self.missed = false;
        Ok(())
    }

    /// Waits for what is committed next; whether a heartbeat is due instead.
    async fn wait(&mut self) -> bool {
        if !std::mem::replace(&mut self.follows, true) {
            self.subscription.follows();
        }
        let due = tokio::time::Instant::from_std(self.beat_at);
        tokio::select! {
            biased;
            delivery = self.subscription.next() => {
                self.receive(delivery);
                false
            }
            () = tokio::time::sleep_until(due) => true,
        }
    }

    fn receive(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Events(events) => self.accept(events),
            Delivery::Overflowed => {
                self.log.0.metrics.watches.overflows.inc();
                (self.missed, self.follows) = (true, false);
            }
        }
    }

    /// A heartbeat, if everything up to the log's end was delivered and sent.
    fn beat(&mut self) -> Option<Message> {
        // First how far everything has been delivered, then whether any of it
        // waits here.
        let Some(head) = self.log.0.tail.current() else {
            self.beat_at = Instant::now() + RETRY;
            return None;
        };
        if let Some(delivery) = self.subscription.take() {
            self.receive(delivery);
            return None;
        }
        if let Scope::All { .. } = self.filter.scope {
            self.cursor = self.cursor.max(head.cursor);
            self.read_to = self.cursor;
            self.removals = self.removals.max(head.removals);
        }
        Some(self.message(Body::Heartbeat))
    }

    /// Takes in what was delivered; what was read from the log already is
    /// dropped.
    fn accept(&mut self, events: VecDeque<Delivered>) {
        for Delivered { event, first_sequence, .. } in events {
            let place = self.filter.scope.place(&event);
            if place <= self.read_to {
                continue;
            }
            if let Scope::Job(_) = self.filter.scope
                && first_sequence > self.read_to + 1
            {
                self.missed = true;
                return;
            }
            self.read_to = place;
            if self.filter.scope.contains(&event) {
                self.pending.push_back(event);
            }
        }
        self.past_end = self.past_end.max(self.read_to);
    }

    /// The next message's worth of what is pending, without what is filtered.
    fn take_pending(&mut self) -> Option<Message> {
        let mut events = Vec::new();
        let mut room = MESSAGE_BYTES - MESSAGE_MARGIN;
        while let Some(event) = self.pending.front() {
            let wanted = self.filter.wants(event);
            let bytes = event.encoded.len();
            if wanted && bytes > room && !events.is_empty() {
                break;
            }
            let Some(event) = self.pending.pop_front() else { break };
            self.cursor = self.filter.scope.place(&event);
            self.note(&event);
            if wanted {
                room = room.saturating_sub(bytes);
                events.push(event);
            }
        }
        if self.pending.is_empty() {
            self.cursor = self.read_to;
        }
        (!events.is_empty()).then(|| self.message(Body::Events(events)))
    }

    /// The one job's latest known state.
    fn note(&mut self, event: &LogEvent) {
        if let Some(job) = &mut self.job
            && event.sequence > job.last_sequence
        {
            job.last_sequence = event.sequence;
            job.status = event.status;
            job.progress = event.progress;
            job.closed = event.closes();
        }
    }

    fn end(&mut self, reason: EndReason) -> Message {
        self.ended = true;
        self.message(Body::End(reason, self.job))
    }

    fn message(&self, body: Body) -> Message {
        let place = Position { cursor: self.cursor, removals: self.removals };
        Message { resume_token: self.binding.token(place), body }
    }
}

fn count(rows: &[Event]) -> i64 {
    i64::try_from(rows.len()).unwrap_or(i64::MAX)
}
