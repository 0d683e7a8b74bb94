//! The event log: the ordered events of every job, and those who watch them.
//!
//! A file imports only from files of lower floors.
//!
//! | floor | file | what it does |
//! |---|---|---|
//! | 8 | `mod.rs` | [`EventLog`], the handle that services use |
//! | 7 | `silence` | writes the events of jobs whose providers are silent |
//! | 6 | `append` | many callers, few transactions |
//! | 6 | `watch` | the one loop behind every watch: the past, then the tail |
//! | 6 | `list` | pages of one job's events |
//! | 6 | `export` | the events of many jobs, job by job |
//! | 6 | `retention` | removes the events that are not kept |
//! | 6 | `step_times` | keeps what estimates rest on |
//! | 5 | `reader` | what watches and lists need of the database, the job cache and the tail |
//! | 5 | `walk` | reads events job by job |
//! | 4 | `tail` | follows what was committed, in order, once per process |
//! | 3 | `mailbox` | the events that wait for each watcher |
//! | 3 | `job_cache` | what never changes about jobs, their steps and configurations |
//! | 2 | `event` | a row, encoded once for all watchers |
//! | 3 | `page_size` | how many events one query reads |
//! | 2 | `position` | how far a watch has read; resume tokens |
//! | 1 | `scope` | which events a watch asks for |
//! | 1 | `abort` | ends the process when a vital task panics |
//! | 1 | `background` | what the tasks have in common that work by themselves |

mod abort;
mod append;
mod background;
mod event;
mod export;
mod job_cache;
mod list;
mod mailbox;
mod page_size;
mod position;
mod reader;
mod retention;
mod scope;
mod silence;
mod step_times;
mod tail;
mod walk;
mod watch;

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{append::Appender, job_cache::JobCache, reader::Reader, tail::Tail};
pub(crate) use self::{
    append::{Appended, Batch, NewEvent, PendingAnswer, Step, StreamOrder},
    event::LogEvent,
    export::{EventExport, ExportPoint, ExportQuery, Exported},
    position::ResumeToken,
    scope::{Filter, Scope},
    watch::{Body, EndReason, Message, Start, Watch, WatchQuery},
};
pub(crate) use crate::config::EventLogSettings;
use crate::{
    auth::Credential,
    db::{Database, notifier::Notifier},
    error::{Error, Result},
    models::{
        audit_entry::{AuditAct, AuditEntry, Origin},
        caller::{Customer, Provider, Tenant, Viewer},
        job::JobKey,
        job_identity::JobIdentity,
    },
    progress::{EventKind, JobStatus},
    telemetry::Telemetry,
    usage::EventUsage,
};

/// The event log: appends, pages and watches.
#[derive(Clone, Debug)]
pub struct EventLog {
    pub(crate) jobs: JobCache,
    pub(crate) appender: Appender,
    reader: Arc<Reader>,
    pub(crate) settings: EventLogSettings,
    /// Which providers have used up a quota.
    pub(crate) usage: EventUsage,
}

impl EventLog {
    /// Reads where the log ends, and starts to append and to follow the log.
    pub(crate) async fn start(
        database: Database,
        notifier: Notifier,
        settings: EventLogSettings,
        usage: EventUsage,
        telemetry: Telemetry,
    ) -> Result<Self> {
        let jobs = JobCache::new(database.clone(), settings.cache_bytes() / 8 * 7);
        let metrics = Arc::clone(&telemetry.metrics);
        let tail = Tail::start(database.clone(), jobs.clone(), Arc::clone(&metrics)).await?;
        let appender = Appender::start(
            database.clone(),
            Arc::clone(&tail),
            notifier,
            settings.cache_bytes() / 8,
            usage.clone(),
            telemetry,
        )
        .map_err(Error::internal)?;
        if let Some(age) = settings.retention {
            retention::start(&database, age, Arc::downgrade(&tail), Arc::clone(&metrics));
        }
        step_times::start(&database, Arc::downgrade(&tail));
        silence::start(&database, jobs.clone(), &appender, Arc::clone(&metrics));
        let reader = Arc::new(Reader::new(database, jobs.clone(), tail, metrics));
        Ok(Self { jobs, appender, reader, settings, usage })
    }

    /// A function that has the tail read the log, for as long as the tail is used.
    pub(crate) fn waker(&self) -> impl Fn() + Send + Sync + 'static {
        let tail = Arc::downgrade(&self.reader.tail);
        move || tail.upgrade().into_iter().for_each(|tail| tail.wake())
    }

    /// Age of the oldest event that waits for a watcher which had caught up.
    pub(crate) fn watch_lag(&self) -> Duration {
        self.reader.tail.watch_lag()
    }

    /// How long ago this server last had read the log to its end.
    pub(crate) fn tail_lag(&self) -> Duration {
        self.reader.tail.lag()
    }

    /// Closes a job of the provider. Returns the job's id and whether it had been closed
    /// by CloseJob before; [`Error::JobClosed`] if it is complete.
    pub(crate) async fn close(
        &self,
        credential: Arc<Credential>,
        provider: Provider,
        job: &JobKey,
        reason: String,
        origin: &Origin,
    ) -> Result<(Uuid, bool)> {
        let viewer = provider.into();
        let job = self.jobs.find(viewer, job).await?;
        let (id, entry) = (job.id, origin.entry(AuditAct::JobClosed));
        match self.append_for(credential, viewer, job, EventKind::Close, reason, entry).await {
            Ok(_) => Ok((id, false)),
            // Only `close` closes a job that is not complete.
            Err(Error::JobClosed { status, .. }) if status != JobStatus::Complete => Ok((id, true)),
            Err(error) => Err(error),
        }
    }

    /// Asks the provider of a job of the customer to stop it. Returns whether that was asked
    /// before; [`Error::JobClosed`] if the job was closed without.
    pub(crate) async fn request_cancellation(
        &self,
        credential: Arc<Credential>,
        customer: Customer,
        job: &JobKey,
        reason: String,
        origin: &Origin,
    ) -> Result<bool> {
        let viewer = customer.into();
        let job = self.jobs.find(viewer, job).await?;
        let (kind, entry) = (EventKind::CancellationRequested, origin.entry(AuditAct::CancellationRequested));
        let appended = self.append_for(credential, viewer, job, kind, reason, entry).await?;
        Ok(appended.events.is_empty())
    }

    /// Appends an event that only the server writes, for a user who asked for it, with its audit
    /// entry.
    async fn append_for(
        &self,
        credential: Arc<Credential>,
        user: Viewer,
        job: Arc<JobIdentity>,
        kind: EventKind,
        reason: String,
        entry: AuditEntry,
    ) -> Result<Appended> {
        let entry = AuditEntry { user_id: Some(user.id()), job_id: Some(job.id), ..entry };
        let configuration = self.jobs.configuration(user.tenant(), job.configuration_id).await?;
        let weights = Arc::clone(&configuration.weights);
        let batch = Batch::by_server(job, weights, kind, reason, Some(entry));
        let answer = self.appender.submit(credential, batch, StreamOrder::default(), Box::new(())).await?;
        answer.wait().await
    }

    /// A page of a job's events after a sequence, ascending, of some kinds (empty: all
    /// kinds); and the last sequence that was looked through, if there are events
    /// behind it.
    pub(crate) async fn list(
        &self,
        tenant: Tenant,
        job: &JobIdentity,
        after: i64,
        kinds: &[EventKind],
        limit: i64,
    ) -> Result<(Vec<Arc<LogEvent>>, Option<i64>)> {
        list::list(&self.reader, tenant, job, after, kinds, limit).await
    }

    /// Begins an export of events, or goes on with one from a point.
    pub(crate) fn export(&self, query: ExportQuery, point: Option<ExportPoint>) -> EventExport {
        EventExport::new(Arc::clone(&self.reader), query, point)
    }

    /// Opens a watch; it ends with the credential and when the server drains.
    pub(crate) async fn watch(
        &self,
        query: WatchQuery,
        credential: Arc<Credential>,
        draining: CancellationToken,
    ) -> Result<Watch> {
        Watch::open(Arc::clone(&self.reader), query, credential, draining).await
    }
}
