//! What watches and lists need of the database, the job cache and the tail.

use std::{sync::Arc, time::Instant};

use diesel_async::AsyncPgConnection;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout_at,
};
use uuid::Uuid;

use super::{event::LogEvent, job_cache::JobCache, position::Position, scope::Scope, tail::Tail};
use crate::{
    db::Database,
    error::{Error, Resource, Result},
    models::{
        event::{Event, JobHead},
        retention,
    },
    progress::JobState,
    telemetry::metrics::Metrics,
};

#[derive(Debug)]
pub(crate) struct Reader {
    pub(super) database: Database,
    job_cache: JobCache,
    pub(super) tail: Arc<Tail>,
    pub(super) metrics: Arc<Metrics>,
    /// Permits of watches that read the past: half of the pool, so that calls find a
    /// connection however many watches have fallen behind.
    permits: Semaphore,
}

/// Where the log of a scope ends.
pub(super) struct LogEnd {
    pub(super) position: Position,
    /// The state of the job there, in a scope of one job.
    pub(super) job: Option<JobState>,
}

pub(super) async fn head(connection: &mut AsyncPgConnection, job_id: Uuid) -> Result<JobHead> {
    let head = JobHead::load(connection, &[job_id]).await?.pop();
    head.ok_or_else(|| Error::not_found(Resource::Job, &job_id))
}

impl Reader {
    pub(super) fn new(
        database: Database,
        job_cache: JobCache,
        tail: Arc<Tail>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let permits = Semaphore::new((database.settings().connections / 2).max(1));
        Self { database, job_cache, tail, metrics, permits }
    }

    /// A permit to read the past; none if there is none before `until`.
    pub(super) async fn permit(&self, until: Option<Instant>) -> Result<Option<SemaphorePermit<'_>>> {
        let permit = self.permits.acquire();
        let permit = match until {
            None => permit.await,
            Some(until) => match timeout_at(until.into(), permit).await {
                Ok(permit) => permit,
                Err(_) => return Ok(None),
            },
        };
        permit.map(Some).map_err(Error::internal)
    }

    /// Encodes rows of the log for watchers.
    pub(super) async fn encode(
        &self,
        connection: &mut AsyncPgConnection,
        rows: Vec<Event>,
    ) -> Result<Vec<Arc<LogEvent>>> {
        let rows = self.job_cache.with_jobs(connection, rows).await?;
        Ok(rows.into_iter().map(|(row, job)| Arc::new(LogEvent::new(&row, job, None))).collect())
    }

    pub(super) async fn log_end(&self, scope: &Scope) -> Result<LogEnd> {
        let mut connection = self.database.get().await?;
        match scope {
            Scope::Job(job) => {
                let state = head(&mut connection, job.id).await?.state();
                let position = Position { cursor: state.last_sequence, removals: 0 };
                Ok(LogEnd { position, job: Some(state) })
            }
            Scope::All { .. } => {
                let (cursor, removals) = retention::log_end(&mut connection).await?;
                Ok(LogEnd { position: Position { cursor, removals }, job: None })
            }
        }
    }

    /// The cursor of a watch from the beginning: in a scope of all jobs, just before
    /// the oldest event that is kept.
    pub(super) async fn before_oldest(&self, scope: &Scope, end: &LogEnd) -> Result<i64> {
        match scope {
            Scope::Job(_) => Ok(0),
            Scope::All { .. } => {
                let oldest = Event::oldest_kept(&mut *self.database.get().await?).await?;
                let end = end.position.cursor;
                Ok(oldest.map_or(end, |position| position - 1).min(end))
            }
        }
    }
}
