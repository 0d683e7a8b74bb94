//! The one loop behind every watch. A watch subscribes first, then reads the past,
//! then follows the tail, so that no event falls between the two. A watch whose
//! mailbox overflowed reads the log again from its position: nothing is held for it,
//! and nothing is lost. The past of one job and a short past of all jobs are read in the
//! order of the log; a long past of all jobs is a walk of the scope's jobs (`walk`).
//!
//! ```text
//!  opened ──▶ Past ──`caught_up` sent──▶ Behind ──log read to its end──▶ Live
//!                                          ▲                               │
//!                       end of the log read│            mailbox overflowed,│
//!                                          └──────── Missed ◀──────────────┘
//!                                                      an event is missing, or
//!                                                      the database is another one
//!  any phase ──`end` sent──▶ Ended
//! ```

mod message;
mod past;
mod woken;

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{Sleep, sleep_until};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

pub(crate) use self::message::{Body, EndReason, Message, Start, WatchQuery};
use self::{
    past::{Page, Past},
    woken::Woken,
};
use super::{
    event::LogEvent,
    mailbox::{Delivered, Delivery, Subscription},
    page_size::PAGE_BYTES,
    position::{Position, ResumeToken, Run, Walk},
    reader::{Reached, Reader, Standing},
    scope::{Filter, Scope},
};
use crate::{
    auth::Credential,
    error::{Error, Result},
    limits::{MESSAGE_BYTES, METADATA_BYTES},
    models::{caller::Tenant, job_identity::Configuration},
    progress::JobState,
    telemetry::metrics::Open,
};

/// Pause before the database is asked again after it did not answer.
const RETRY: Duration = Duration::from_millis(250);
/// Bytes of a message beside its events.
const MESSAGE_MARGIN: usize = 1024;
/// Most bytes of an event beside its metadata.
const EVENT_MARGIN: usize = 8 * 1024;

// A page of the past is cut behind the event that passes its bound, and then fits in one
// message.
const _: () = assert!(PAGE_BYTES + METADATA_BYTES + EVENT_MARGIN <= MESSAGE_BYTES - MESSAGE_MARGIN);

#[derive(Debug)]
pub(crate) struct Watch {
    reader: Arc<Reader>,
    credential: Arc<Credential>,
    draining: CancellationToken,
    /// Completes when the credential ends or the server drains; none before the first call of
    /// `next`, and while `next` runs.
    ending: Option<Woken<EndReason>>,
    filter: Arc<Filter>,
    subscription: Subscription,
    heartbeat: Heartbeat,
    phase: Phase,
    past: Past,
    /// How far the client has been sent everything.
    position: Position,
    pending: Pending,
    /// The latest known state of the job, in a watch of one job.
    job: Option<JobState>,
    /// That of the job, in a watch of one job that is about to send `caught_up`.
    configuration: Option<Arc<Configuration>>,
    _counted: Open,
}

/// See the diagram at the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Past,
    Behind,
    Live,
    Missed,
    Ended,
}

#[derive(Debug)]
struct Heartbeat {
    interval: Duration,
    due_at: Instant,
    /// Fires when the heartbeat is due or before: a message moves the heartbeat alone, since a
    /// timer costs more to move.
    timer: Pin<Box<Sleep>>,
}

impl Heartbeat {
    fn new(interval: Duration) -> Self {
        let due_at = Instant::now() + interval;
        Self { interval, due_at, timer: Box::pin(sleep_until(due_at.into())) }
    }

    /// Returns once the heartbeat is due. Cancel-safe.
    async fn due(&mut self) {
        loop {
            self.timer.as_mut().await;
            if self.is_due() {
                return;
            }
            self.timer.as_mut().reset(self.due_at.into());
        }
    }

    fn is_due(&self) -> bool {
        self.due_at <= Instant::now()
    }
}

/// Events of the scope that were read or delivered and are still to be sent.
#[derive(Debug)]
struct Pending {
    events: VecDeque<Arc<LogEvent>>,
    /// The cursor moves here once no event is pending.
    read_to: i64,
    /// The walk moves here once no event is pending.
    walk: Option<Walk>,
}

impl Watch {
    pub(crate) async fn open(
        reader: Arc<Reader>,
        query: WatchQuery,
        credential: Arc<Credential>,
        draining: CancellationToken,
    ) -> Result<Self> {
        let WatchQuery { filter, start, heartbeat } = query;
        let reached = match &start {
            Start::Beginning => Reached::Nothing,
            Start::AfterSequence(sequence) => Reached::Sequence(*sequence),
            Start::Resume(token) => Reached::Position(token.position(&filter)?),
            Start::Now => Reached::Everything,
        };
        // Before the end of the log is read: whatever is committed after that read is
        // delivered.
        let filter = Arc::new(filter);
        let subscription = reader.tail.subscribe(Arc::clone(&filter));
        let scope = &filter.scope;
        let Standing { position, end, job, identity } =
            reader.standing(credential.caller().tenant(), scope, reached).await?;
        let watches = &reader.metrics.watches;
        let counted = Open::of(match scope {
            Scope::Job(_) => &watches.of_one_job,
            Scope::All { .. } => &watches.of_all_jobs,
        });
        Ok(Self {
            credential,
            draining,
            ending: None,
            subscription,
            heartbeat: Heartbeat::new(heartbeat),
            phase: Phase::Past,
            past: Past::new(end, identity, matches!(start, Start::Beginning)),
            position,
            pending: Pending { events: VecDeque::new(), read_to: position.cursor, walk: position.walk },
            job,
            configuration: None,
            _counted: counted,
            reader,
            filter,
        })
    }

    /// The next message; `None` after the `end`. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Result<Message>> {
        let mut ending = self.ending.take().unwrap_or_else(|| self.ending());
        let message = self.next_before(&mut ending).await;
        self.ending = Some(ending);
        message
    }

    /// Waits for the end of the credential and for the drain, which all watches of a server or of
    /// a user wait for.
    fn ending(&self) -> Woken<EndReason> {
        let (credential, draining) = (Arc::clone(&self.credential), self.draining.clone());
        Woken::new(async move {
            tokio::select! {
                biased;
                () = credential.ended() => EndReason::CredentialEnded,
                () = draining.cancelled() => EndReason::Draining,
            }
        })
    }

    /// The next message; an `end` if `ending` completes first.
    async fn next_before(&mut self, ending: &mut Woken<EndReason>) -> Option<Result<Message>> {
        while self.phase != Phase::Ended {
            let advanced = tokio::select! {
                biased;
                reason = &mut *ending => Ok(Some(self.end(reason))),
                advanced = self.advance() => advanced,
            };
            match advanced {
                Ok(None) => {}
                Ok(Some(message)) => {
                    let now = Instant::now();
                    self.heartbeat.due_at = now + self.heartbeat.interval;
                    // The first event of a message has waited longest.
                    if let Body::Events(events) = &message.body
                        && let Some(received) = events.first().and_then(|event| event.received)
                    {
                        self.reader.metrics.watches.sent(received, now);
                    }
                    return Some(Ok(message));
                }
                Err(Error::EventsExpired { .. }) => return Some(Ok(self.end(EndReason::EventsExpired))),
                Err(Error::LogSetBack) => return Some(Ok(self.end(EndReason::LogSetBack))),
                // The stream stays open and goes on when the database is available, or other
                // calls of the user have left it a connection.
                Err(Error::Unavailable(_) | Error::Overloaded { .. }) => tokio::time::sleep(RETRY).await,
                Err(error) => {
                    self.phase = Phase::Ended;
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// One step: reads, waits, or makes a message.
    async fn advance(&mut self) -> Result<Option<Message>> {
        if !self.has_pending() {
            // Boxed, so that thousands of watches that wait need no memory for the
            // state of a read.
            if self.phase == Phase::Missed {
                Box::pin(self.read_log_end()).await?;
                return Ok(None);
            }
            if self.is_behind() && !self.is_silent() {
                Box::pin(self.read_past()).await?;
                return Ok(None);
            }
            // `caught_up` comes next.
            if let (Scope::Job(job), None) = (&self.filter.scope, &self.configuration)
                && !self.caught_up()
                && !self.is_behind()
            {
                let (reader, tenant, job) = (Arc::clone(&self.reader), self.tenant(), Arc::clone(job));
                let identity = self.past.identity();
                let read = apart(async move { reader.configuration(tenant, &job, identity).await });
                self.configuration = Box::pin(read).await??;
                if self.configuration.is_none() {
                    Box::pin(self.read_log_end()).await?;
                }
                return Ok(None);
            }
            if self.caught_up() && !self.is_over() && !self.wait().await {
                return Ok(None);
            }
        }
        // Before a message is made, since that moves the position: an `end` that came
        // while the message was held back would skip its events.
        if self.credential.confirmed().await.is_err() {
            return Ok(Some(self.end(EndReason::CredentialEnded)));
        }
        Ok(self.next_message())
    }

    fn has_pending(&self) -> bool {
        let Pending { events, read_to, walk } = &self.pending;
        !events.is_empty() || self.position.cursor < *read_to || self.position.walk != *walk
    }

    fn is_behind(&self) -> bool {
        self.position.cursor < self.past.end()
    }

    /// Whether `caught_up` was sent.
    fn caught_up(&self) -> bool {
        self.phase != Phase::Past
    }

    /// Whether reading a past without matching events has taken so long that a
    /// heartbeat is due.
    fn is_silent(&self) -> bool {
        !self.caught_up() && self.heartbeat.is_due() && self.reader.tail.current().is_some()
    }

    /// Whether the log of the one job is closed and was sent to its end.
    fn is_over(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.closed && job.last_sequence <= self.position.cursor)
    }

    fn next_message(&mut self) -> Option<Message> {
        if self.has_pending() {
            self.take_pending()
        } else if self.is_behind() {
            Some(self.message(Body::Heartbeat))
        } else if !self.caught_up() {
            self.phase = Phase::Behind;
            let state = self.job.clone().zip(self.configuration.take());
            Some(self.message(Body::CaughtUp(state)))
        } else if self.is_over() {
            Some(self.end(EndReason::JobClosed))
        } else {
            self.heartbeat_message()
        }
    }

    /// Reads a page of the past; [`Error::EventsExpired`] if a part of it was removed.
    async fn read_past(&mut self) -> Result<()> {
        // While a heartbeat is still to come, other watches must not keep this one from
        // sending it.
        let until = (!self.caught_up() && !self.heartbeat.is_due()).then_some(self.heartbeat.due_at);
        let (reader, filter) = (Arc::clone(&self.reader), Arc::clone(&self.filter));
        let (tenant, position, caught_up) = (self.tenant(), self.position, self.caught_up());
        let mut past = self.past.take();
        let (past, page) = apart(async move {
            let page = match reader.permit(tenant, until).await {
                Some(_permit) => Some(past.read(&reader, tenant, &filter.scope, position, caught_up).await),
                None => None,
            };
            (past, page)
        })
        .await?;
        self.past = past;
        let Some(page) = page else { return Ok(()) };
        match page {
            Ok(None) => self.read_log_end().await,
            Ok(Some(Page { events, read_to, walk, removals })) => {
                self.pending = Pending { events: events.into(), read_to, walk };
                self.position.removals = removals;
                Ok(())
            }
            Err(expired @ Error::EventsExpired { .. }) => {
                // The job may have had more events before it was closed and removed.
                if self.job.is_some() {
                    self.job = self.standing(Reached::Everything).await?.job;
                }
                Err(expired)
            }
            // An event that cannot be read ends the watch when it is alone on its page, so
            // that all events before it are sent.
            Err(Error::Internal(_)) if self.past.shorten() => Ok(()),
            Err(error) => {
                self.past.shorten();
                Err(error)
            }
        }
    }

    /// Reads where the log ends: the past reaches up to there. [`Error::LogSetBack`] if a part
    /// of what was sent or filtered is lost.
    async fn read_log_end(&mut self) -> Result<()> {
        let standing = self.standing(Reached::Position(self.position)).await;
        if let Err(Error::NotFound { .. }) = standing {
            // The job itself is lost.
            return Err(Error::LogSetBack);
        }
        let Standing { position, end, job, identity } = standing?;
        self.position = position;
        self.past.go_on(end, identity);
        self.pending.walk = position.walk;
        self.job = job;
        if self.phase == Phase::Missed {
            self.phase = Phase::Behind;
        }
        Ok(())
    }

    /// See [`Reader::standing`].
    async fn standing(&self, reached: Reached) -> Result<Standing> {
        let (reader, filter, tenant) = (Arc::clone(&self.reader), Arc::clone(&self.filter), self.tenant());
        apart(async move {
            let _permit = reader.permit(tenant, None).await;
            reader.standing(tenant, &filter.scope, reached).await
        })
        .await?
    }

    /// Whose permits and connections the watch uses.
    fn tenant(&self) -> Tenant {
        self.credential.caller().tenant()
    }

    /// Waits for the next delivery; whether a heartbeat is due instead.
    async fn wait(&mut self) -> bool {
        if self.phase != Phase::Live {
            self.phase = Phase::Live;
            self.subscription.follow();
        }
        tokio::select! {
            biased;
            delivery = self.subscription.next() => {
                self.receive(delivery);
                false
            }
            () = self.heartbeat.due() => true,
        }
    }

    fn receive(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Events(run, events) => self.accept(run, events),
            Delivery::Overflowed => {
                self.reader.metrics.watches.overflows.inc();
                self.phase = Phase::Missed;
            }
        }
    }

    /// Makes delivered events pending, except those that were read from the log before.
    fn accept(&mut self, run: Run, events: VecDeque<Delivered>) {
        if !self.is_of(run) {
            return;
        }
        let scope = &self.filter.scope;
        for Delivered { event, first_sequence, .. } in events {
            let cursor = event.cursor_in(scope);
            if cursor <= self.pending.read_to {
                continue;
            }
            if let Scope::Job(_) = scope
                && first_sequence > self.pending.read_to + 1
            {
                self.phase = Phase::Missed;
                return;
            }
            self.pending.read_to = cursor;
            if scope.contains(&event.job) {
                self.pending.events.push_back(event);
            }
        }
        self.past.extend(self.pending.read_to);
    }

    /// Whether the position is one of this run. If the run is one of another database, the log
    /// is read, which compares the position.
    fn is_of(&mut self, run: Run) -> bool {
        if run.identity != self.past.identity() {
            self.phase = Phase::Missed;
            return false;
        }
        // The run's history may have begun since the end of the log was read.
        self.position.history = run.history;
        true
    }

    /// A heartbeat, if every event up to the end of the log was delivered and sent.
    fn heartbeat_message(&mut self) -> Option<Message> {
        // In this order: first how far events have been delivered, then whether one of
        // them waits in the mailbox.
        let Some((run, delivered)) = self.reader.tail.current() else {
            self.heartbeat.due_at = Instant::now() + RETRY;
            return None;
        };
        if !self.is_of(run) {
            return None;
        }
        if let Some(delivery) = self.subscription.take() {
            self.receive(delivery);
            return None;
        }
        if let Scope::All { .. } = self.filter.scope {
            self.move_to(self.position.cursor.max(delivered.cursor));
            self.position.removals = self.position.removals.max(delivered.removals);
            self.pending.read_to = self.position.cursor;
        }
        Some(self.message(Body::Heartbeat))
    }

    /// One message of pending events that match the filter, if there are any.
    fn take_pending(&mut self) -> Option<Message> {
        let walks = self.position.walk.is_some();
        let mut events = Vec::new();
        let mut room = MESSAGE_BYTES - MESSAGE_MARGIN;
        while let Some(event) = self.pending.events.front() {
            let matches = self.filter.matches(event.kind, &event.job);
            let bytes = event.encoded.len();
            // Within a page of a walk, the position has no place to stop at.
            if matches && bytes > room && !events.is_empty() && !walks {
                break;
            }
            let Some(event) = self.pending.events.pop_front() else { break };
            if walks {
                self.position.log = self.position.log.max(event.position);
            } else {
                self.position.cursor = event.cursor_in(&self.filter.scope);
                self.position.log = event.position;
            }
            self.note(&event);
            if matches {
                room = room.saturating_sub(bytes);
                events.push(event);
            }
        }
        if self.pending.events.is_empty() {
            self.position.walk = self.pending.walk;
            self.move_to(self.pending.read_to);
        }
        (!events.is_empty()).then(|| self.message(Body::Events(events)))
    }

    /// Moves the cursor past what is not of the scope: in a watch of one job, every event is.
    fn move_to(&mut self, cursor: i64) {
        // A page of a walk leaves the cursor where it is.
        if self.position.cursor < cursor
            && let Scope::All { .. } = self.filter.scope
        {
            self.position.log = cursor;
        }
        self.position.cursor = cursor;
    }

    /// Keeps the state of the one job up to date.
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
        self.phase = Phase::Ended;
        self.message(Body::End(reason, self.job.clone()))
    }

    fn message(&self, body: Body) -> Message {
        Message { resume_token: ResumeToken::new(&self.filter, self.position).encode(), body }
    }
}

/// Does a read in a task of its own, which ends when this is dropped. The transport does not
/// poll a body for which the client has left no window: a read within the body would then hold
/// its permit and its connection until the client reads on.
async fn apart<T: Send + 'static>(read: impl Future<Output = T> + Send + 'static) -> Result<T> {
    AbortOnDropHandle::new(tokio::spawn(read)).await.map_err(Error::internal)
}
