//! What watches and lists need of the database, the job cache and the tail.

use std::{sync::Arc, time::Instant};

use diesel_async::AsyncPgConnection;
use tokio::time::timeout_at;
use uuid::Uuid;

use super::{event::LogEvent, job_cache::JobCache, position::Position, scope::Scope, tail::Tail};
use crate::{
    db::{Connection, Database, Identified, Identity, read},
    error::{Error, Resource, Result},
    models::{
        caller::Tenant,
        event::{Event, StoredState},
        history::LogEnd,
        job_identity::{Configuration, JobIdentity},
    },
    progress::JobState,
    telemetry::metrics::Metrics,
    turns::{Permits, Turns},
};

#[derive(Debug)]
pub(crate) struct Reader {
    pub(super) database: Database,
    job_cache: JobCache,
    pub(super) tail: Arc<Tail>,
    pub(super) metrics: Arc<Metrics>,
    /// Permits of watches that read the past, given to the tenants in turns: half of the pool,
    /// so that calls find a connection however many watches have fallen behind. One tenant has
    /// at most a quarter of the pool.
    permits: Turns<Tenant>,
}

/// What a watch has read before it reads the past.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reached {
    Nothing,
    /// In a scope of one job: every event up to this sequence.
    Sequence(i64),
    /// As far as it came in this or an earlier stream.
    Position(Position),
    Everything,
}

/// Where a watch stands, and the past that it has before it.
pub(super) struct Standing {
    pub(super) position: Position,
    /// The cursor of the end of the log.
    pub(super) end: i64,
    /// The state of the job there, in a scope of one job.
    pub(super) job: Option<JobState>,
    /// The database in which these were read.
    pub(super) identity: Identity,
}

pub(super) async fn state(connection: &mut AsyncPgConnection, job_id: Uuid) -> Result<JobState> {
    let state = StoredState::load(connection, &[job_id]).await?.remove(&job_id);
    state.ok_or_else(|| Error::not_found(Resource::Job, &job_id))
}

impl Reader {
    pub(super) fn new(
        database: Database,
        job_cache: JobCache,
        tail: Arc<Tail>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let connections = database.settings().connections;
        let permits = Turns::new((connections / 2).max(1), (connections / 4).max(1));
        Self { database, job_cache, tail, metrics, permits }
    }

    /// A permit to read the past, when it is the tenant's turn; none if that is not before
    /// `until`.
    pub(super) async fn permit(&self, tenant: Tenant, until: Option<Instant>) -> Option<Permits<Tenant>> {
        let permit = self.permits.acquire(tenant);
        match until {
            None => Some(permit.await),
            Some(until) => timeout_at(until.into(), permit).await.ok(),
        }
    }

    /// Encodes rows of the log for watchers.
    pub(super) async fn encode(
        &self,
        connection: &mut impl Identified,
        rows: Vec<Event>,
    ) -> Result<Vec<Arc<LogEvent>>> {
        let rows = self.job_cache.with_jobs(connection, rows).await?;
        Ok(rows.iter().map(|event| Arc::new(LogEvent::new(event, None))).collect())
    }

    /// The configuration of a job of this database; none if another database has taken its
    /// place, where the job may be lost.
    pub(super) async fn configuration(
        &self,
        tenant: Tenant,
        job: &JobIdentity,
        identity: Identity,
    ) -> Result<Option<Arc<Configuration>>> {
        let found = self.job_cache.configuration(tenant, job.configuration_id).await;
        if self.database.identity() != Some(identity) {
            return Ok(None);
        }
        found.map(Some)
    }

    /// Reads where the log of a scope ends, and finds there the position of a watch that has
    /// reached this much: [`Error::LogSetBack`] if a part of that is lost.
    pub(super) async fn standing(&self, tenant: Tenant, scope: &Scope, reached: Reached) -> Result<Standing> {
        read!(self.database, tenant, |connection| Self::standing_on(connection, scope, reached))
    }

    async fn standing_on(connection: &mut Connection, scope: &Scope, reached: Reached) -> Result<Standing> {
        let identity = connection.identity();
        let job = match scope {
            Scope::Job(job) => Some(state(connection, job.id).await?),
            Scope::All { .. } => None,
        };
        // After the job's state, so that the job's last event is in this history.
        let log = LogEnd::read(connection).await?;
        let end = job.as_ref().map_or(log.position, |job| job.last_sequence);
        let at = |cursor, position| Position {
            history: log.history,
            log: position,
            cursor,
            removals: log.removals,
            walk: None,
        };
        let position = match (reached, scope) {
            (Reached::Position(reached), _) => {
                let kept = log.kept(connection, reached.history, reached.log).await?;
                let kept = kept.filter(|_| reached.cursor <= end).ok_or(Error::LogSetBack)?;
                let walk = match reached.walk {
                    // Unsent events of the walk may be lost, and others be at their positions:
                    // these are read when the walk is done.
                    Some(walk) => Some(walk.up_to(log.kept_through(connection, reached.history).await?)),
                    None => None,
                };
                let walk = walk.filter(|walk| walk.end > reached.cursor);
                Position { history: log.history, removals: reached.removals.min(kept), walk, ..reached }
            }
            (Reached::Nothing, Scope::Job(_)) => at(0, 0),
            // Just before the oldest event that is kept.
            (Reached::Nothing, Scope::All { .. }) => {
                let oldest = Event::oldest_kept(connection).await?;
                let before = oldest.map_or(end, |position| position - 1).min(end);
                at(before, before)
            }
            (Reached::Sequence(sequence), _) if sequence > end => return Err(Error::PositionBeyondLog),
            (Reached::Sequence(sequence), Scope::Job(job)) => {
                at(sequence, log_position(connection, job.id, sequence).await?)
            }
            (Reached::Everything, Scope::Job(job)) => at(end, log_position(connection, job.id, end).await?),
            (Reached::Sequence(_) | Reached::Everything, Scope::All { .. }) => at(end, end),
        };
        Ok(Standing { position, end, job, identity })
    }
}

/// The position of an event of a job. Where retention has removed the event, the job is
/// closed and a watch of it ends: 0 says that nothing can be lost.
async fn log_position(connection: &mut AsyncPgConnection, job_id: Uuid, sequence: i64) -> Result<i64> {
    if sequence == 0 {
        return Ok(0);
    }
    Ok(Event::position(connection, job_id, sequence).await?.unwrap_or_default())
}
