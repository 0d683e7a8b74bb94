//! The heart: the ordered log of every job, and those who watch it.
//!
//! `append` is the only way in: many callers, few transactions. `tail` follows
//! what was committed, by this replica or another, in order, once per process.
//! `watch` is the one loop behind every watch: the past, then the tail. `wire`
//! makes of a row what is sent, once for all watchers. `expiry` removes what
//! retention does not keep.

mod append;
pub(crate) mod event;
mod job_cache;
pub(crate) mod plan;
mod position;
mod retention;
mod round;
mod tail;
pub(crate) mod watch;

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use futures_util::FutureExt as _;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use self::event::WatchedEvents;
use self::{
    append::Appender,
    event::LogEvent,
    job_cache::JobCache,
    plan::{Appended, Batch, NewEvent, Step},
    tail::{Tail, log_events},
    watch::{Watch, WatchQuery},
};
pub(crate) use self::{
    job_cache::{Configuration, JobIdentity},
    position::ResumeToken,
    round::StreamOrder,
};
use crate::{
    auth::Credential,
    db::{
        Database,
        notifier::{Notification, Notifier},
    },
    error::{Error, Resource, Result, Violations},
    models::{
        audit_entry::{AuditAct, AuditEntry, Origin},
        caller::{Provider, Viewer},
        event::{Event, JobHead},
        job::JobKey,
    },
    progress::{EventKind, JobStatus},
    telemetry::{Telemetry, metrics::Metrics},
};

/// Sequences that one page of a filtered list looks through.
const LIST_WINDOW: i64 = 5_000;

/// A job that is open has all its events for so long at least.
const SHORTEST_RETENTION: Duration = Duration::from_secs(1);

/// What the operator decides about the log.
#[derive(Clone, Debug)]
pub struct EventLogSettings {
    /// Most unanswered batches of one publish stream.
    pub publish_window: usize,
    /// How long after a job has closed its events are kept; `None`: for good.
    pub retention: Option<Duration>,
}

/// The log: appends to it, pages and watches of it.
#[derive(Clone, Debug)]
pub struct EventLog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    database: Database,
    job_cache: JobCache,
    tail: Arc<Tail>,
    appender: Appender,
    notifier: Notifier,
    /// Turns of watches that read the past: half of the pool, so that however
    /// many have fallen behind, calls find a connection.
    readers: Semaphore,
    metrics: Arc<Metrics>,
    settings: EventLogSettings,
}

impl EventLog {
    /// Looks where the log ends, and starts to append, to follow and to listen
    /// to other replicas; `credentials_ended` is called when one of them ended
    /// a credential.
    pub async fn start(
        database: Database,
        settings: EventLogSettings,
        telemetry: &Telemetry,
        credentials_ended: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self> {
        let job_cache = JobCache::new(database.clone());
        let tail = Tail::start(database.clone(), job_cache.clone(), Arc::clone(&telemetry.metrics)).await?;
        let received = Arc::downgrade(&tail);
        let notifier = Notifier::start(database.clone(), move |bell| match bell {
            Notification::Log => {
                if let Some(tail) = received.upgrade() {
                    tail.ring();
                }
            }
            Notification::Credentials => credentials_ended(),
        });
        let appender =
            Appender::start(database.clone(), Arc::clone(&tail), notifier.clone(), telemetry.clone())
                .map_err(Error::internal)?;
        let metrics = Arc::clone(&telemetry.metrics);
        if let Some(age) = settings.retention {
            retention::start(database.clone(), age, Arc::downgrade(&tail));
        }
        let readers = Semaphore::new((database.settings().connections / 2).max(1));
        Ok(Self(Arc::new(Inner {
            database,
            job_cache,
            tail,
            appender,
            notifier,
            readers,
            metrics,
            settings,
        })))
    }

    /// How old the oldest event is that a watcher which had caught up was not
    /// sent yet.
    pub(crate) fn watch_lag(&self) -> Duration {
        self.0.tail.lag()
    }

    /// Tells the other replicas that a credential was ended.
    pub fn notify_credentials(&self) {
        self.0.notifier.ring(Notification::Credentials);
    }

    /// Most unanswered batches of one publish stream.
    pub(crate) fn publish_window(&self) -> usize {
        self.0.settings.publish_window
    }

    /// A job that the viewer sees.
    pub(crate) async fn find_job(&self, viewer: Viewer, key: &JobKey) -> Result<Arc<JobIdentity>> {
        self.0.job_cache.find(viewer, key).await
    }

    /// The configuration that a job is pinned to.
    pub(crate) async fn configuration(&self, id: Uuid) -> Result<Arc<Configuration>> {
        self.0.job_cache.configuration(id).await
    }

    /// A job that the provider may append to.
    pub(crate) async fn find_own_job(&self, provider: Provider, key: &JobKey) -> Result<Arc<JobIdentity>> {
        self.0.job_cache.find(provider.into(), key).await
    }

    /// Hands a batch in; the answer comes once it is durable. Batches of one
    /// job are appended in the order in which they are handed in.
    pub(crate) async fn submit(
        &self,
        batch: Batch,
        stream_order: StreamOrder,
    ) -> Result<oneshot::Receiver<Result<Vec<Appended>>>> {
        self.0.appender.submit(batch, stream_order).await
    }

    /// Seals a job of this provider's by an event of kind `close`, named by the
    /// reason. The job's id, and whether it had been sealed so before;
    /// [`Error::JobClosed`] where it is complete.
    pub async fn close(
        &self,
        provider: Provider,
        job: JobKey,
        reason: String,
        origin: &Origin,
    ) -> Result<(Uuid, bool)> {
        let job = self.find_own_job(provider, &job).await?;
        let id = job.id;
        let close = NewEvent {
            id: None,
            kind: EventKind::Close,
            name: reason,
            step: Step::None,
            metadata: Vec::new(),
            occurred_at: None::<DateTime<Utc>>,
        };
        let entry = AuditEntry {
            user_id: Some(provider.id()),
            job_id: Some(id),
            ..origin.entry(AuditAct::JobClosed)
        };
        let batch = Batch {
            job,
            expected_sequence: None,
            events: vec![close],
            at_fault: Violations::default(),
            audit: Some(Box::new(entry)),
        };
        match answered(self.submit(batch, StreamOrder::default()).await?).await {
            Ok(_) => Ok((id, false)),
            // Only `close` closes a job that is not complete.
            Err(Error::JobClosed { status, .. }) if status != JobStatus::Complete => Ok((id, true)),
            Err(error) => Err(error),
        }
    }

    /// A page of a job's events after a sequence, ascending, of some kinds
    /// (empty: all); and the sequence through which was looked, where there is
    /// more behind it.
    pub(crate) async fn list(
        &self,
        job: &JobIdentity,
        after: i64,
        kinds: &[EventKind],
        limit: i64,
    ) -> Result<(Vec<Arc<LogEvent>>, Option<i64>)> {
        let mut connection = self.0.database.get().await?;
        let since = Instant::now();
        let missing = || Error::not_found(Resource::Job, &job.id);
        let state = JobHead::load(&mut connection, &[job.id]).await?.pop().ok_or_else(missing)?.state();
        let end = state.last_sequence;
        if after > end {
            return Err(Error::PositionBeyondLog);
        }
        let through = end.min(after + LIST_WINDOW);
        let rows = Event::list_of_job(&mut connection, job.id, after, through, kinds, limit).await?;
        // After the page: a log is marked as removed before any event of it is.
        if (state.closed || since.elapsed() >= SHORTEST_RETENTION)
            && after < end
            && JobHead::load(&mut connection, &[job.id]).await?.pop().ok_or_else(missing)?.events_removed
        {
            return Err(Error::EventsExpired { first_sequence: Some(end + 1) });
        }
        let full = i64::try_from(rows.len()).is_ok_and(|read| read >= limit);
        let looked = if full { rows.last().map_or(through, |row| row.sequence) } else { through };
        let events = log_events(&mut connection, &self.0.job_cache, rows).await?;
        Ok((events, (looked < end).then_some(looked)))
    }

    /// Opens a watch; it ends with the credential and when the server drains.
    pub(crate) async fn watch(
        &self,
        query: WatchQuery,
        credential: Arc<Credential>,
        draining: CancellationToken,
    ) -> Result<Watch> {
        Watch::open(self.clone(), query, credential, draining).await
    }
}

/// What the log lives by. If it panics, the process ends: a server that seems well
/// and appends nothing, or tells nothing, is worse than none, and one that went on
/// would have to guess what became of what it had begun.
async fn vital(work: impl Future<Output = ()>) {
    if AssertUnwindSafe(work).catch_unwind().await.is_err() {
        tracing::error!("the log cannot go on: the process ends");
        std::process::abort();
    }
}

/// The answer to a batch that was handed in.
pub(crate) async fn answered(answer: oneshot::Receiver<Result<Vec<Appended>>>) -> Result<Vec<Appended>> {
    answer.await.map_err(Error::unavailable)?
}
