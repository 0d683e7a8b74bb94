//! Events, and the states of jobs after their last events.

mod append;
mod locked;
mod query;

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{BigInt, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use self::query::{EventQuery, Rows};
pub use self::{
    append::{AppendConnection, AppendOutcome, AppendStatement, NewRow},
    locked::LockedJob,
};
use crate::{
    error::{Error, Resource, Result},
    models::{
        caller::{Viewer, Visibility},
        job::WalkedJob,
        labels::Labels,
        visible_jobs,
    },
    progress::{EventKind, JobState, JobStatus, Progress},
    schema::{events, job_states, jobs},
};

diesel::define_sql_function! {
    /// See migrations/2026-11-26-000005_event_log/up.sql.
    fn sequence_at(job: SqlUuid, last_sequence: BigInt, log_position: BigInt) -> BigInt;
}

/// An event of the log.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = events, check_for_backend(diesel::pg::Pg))]
pub struct Event {
    pub job_id: Uuid,
    /// 1, 2, 3 … within the job.
    pub sequence: i64,
    /// 1, 2, 3 … within the log.
    pub position: i64,
    /// Unique within the job.
    pub id: Uuid,
    /// See `EventKind` in events.proto.
    pub kind: EventKind,
    /// A text for people; may be empty.
    pub name: String,
    /// The event's step, if it names one.
    pub step_configuration_id: Option<Uuid>,
    /// How far a progress event says that its step is, 0 to 99.
    pub step_percent: Option<i16>,
    /// An encoded `google.protobuf.Struct`; empty for none.
    pub event_metadata: Vec<u8>,
    /// By the provider's clock.
    pub occurred_at: Option<DateTime<Utc>>,
    /// The job's status after this event.
    pub status: JobStatus,
    /// The job's points done after this event.
    pub points_done: i64,
    /// The job's percent after this event.
    pub percent: i16,
    /// By the database's clock, under the job's lock.
    pub created_at: DateTime<Utc>,
}

/// What an event takes in memory, and what it counts against the quota of stored bytes: 256
/// bytes for its columns and index entries, and those of its texts. The SQL function
/// event_bytes says the same.
pub fn event_bytes(name: &str, metadata: &[u8]) -> usize {
    256 + name.len() + metadata.len()
}

impl Event {
    /// See [`event_bytes`].
    pub fn bytes(&self) -> i64 {
        i64::try_from(event_bytes(&self.name, &self.event_metadata)).unwrap_or(i64::MAX)
    }

    /// Events of one job after a sequence and up to another, of some kinds
    /// (empty: all), ascending.
    pub async fn list_of_job(
        connection: &mut AsyncPgConnection,
        job_id: Uuid,
        after: i64,
        through: i64,
        kinds: &[EventKind],
        limit: i64,
    ) -> Result<Vec<Self>> {
        let mut query = events::table
            .filter(events::job_id.eq(job_id))
            .filter(events::sequence.gt(after))
            .filter(events::sequence.le(through))
            .order(events::sequence)
            .limit(limit)
            .select(Self::as_select())
            .into_boxed();
        if !kinds.is_empty() {
            query = query.filter(events::kind.eq_any(kinds));
        }
        Ok(query.load(connection).await?)
    }

    /// Events of the log after a position and up to another, ascending.
    pub async fn list_of_log(
        connection: &mut AsyncPgConnection,
        after: i64,
        through: i64,
        limit: i64,
    ) -> Result<Vec<Self>> {
        Ok(events::table
            .filter(events::position.gt(after))
            .filter(events::position.le(through))
            .order(events::position)
            .limit(limit)
            .select(Self::as_select())
            .load(connection)
            .await?)
    }

    /// Events of the log after a position and up to another, of visible jobs whose
    /// logs are not being removed, ascending.
    pub async fn list_visible(
        connection: &mut AsyncPgConnection,
        visibility: Visibility,
        after: i64,
        through: i64,
        limit: i64,
    ) -> Result<Vec<Self>> {
        let rows = Rows::Visible { visibility, after, through, limit };
        Ok(EventQuery::new(rows).load(connection).await?)
    }

    /// The events of these parts of jobs, job by job, each job's ascending; of jobs whose logs
    /// are being removed, none.
    pub async fn list_of_walk(connection: &mut AsyncPgConnection, parts: &[WalkedJob]) -> Result<Vec<Self>> {
        let jobs: Vec<Uuid> = parts.iter().map(|part| part.job.id).collect();
        let after: Vec<i64> = parts.iter().map(|part| part.after).collect();
        let through: Vec<i64> = parts.iter().map(|part| part.through).collect();
        let rows = Rows::Ranges { jobs: &jobs, after: &after, through: &through };
        Ok(EventQuery::new(rows).load(connection).await?)
    }

    /// The sequence of the last event of each of these jobs up to a position of the log; 0 without
    /// one, and for a job whose events retention removes.
    pub async fn sequences_at(
        connection: &mut AsyncPgConnection,
        jobs: &[Uuid],
        position: i64,
    ) -> Result<HashMap<Uuid, i64>> {
        let sequence = sequence_at(jobs::id, job_states::last_sequence, position);
        let query = jobs::table.inner_join(job_states::table).filter(jobs::id.eq_any(jobs));
        let kept = query.filter(jobs::events_removed.eq(false));
        let sequences: Vec<(Uuid, i64)> = kept.select((jobs::id, sequence)).load(connection).await?;
        Ok(sequences.into_iter().collect())
    }

    /// The position of an event of a job; none without that event.
    pub async fn position(
        connection: &mut AsyncPgConnection,
        job_id: Uuid,
        sequence: i64,
    ) -> Result<Option<i64>> {
        let event = events::table.filter(events::job_id.eq(job_id).and(events::sequence.eq(sequence)));
        Ok(event.select(events::position).first(connection).await.optional()?)
    }

    /// The job of the event at a position of the log; none without that event.
    pub async fn job_at(connection: &mut AsyncPgConnection, position: i64) -> Result<Option<Uuid>> {
        let event = events::table.filter(events::position.eq(position));
        Ok(event.select(events::job_id).first(connection).await.optional()?)
    }

    /// The position of the oldest event of the log that is kept.
    pub async fn oldest_kept(connection: &mut AsyncPgConnection) -> Result<Option<i64>> {
        let oldest = events::table.select(events::position).order(events::position);
        Ok(oldest.first(connection).await.optional()?)
    }

    /// The stored events of a job that have one of these ids. The connection is shared,
    /// so that such queries for many jobs can be in flight at once.
    pub async fn list_by_ids(
        mut connection: &AsyncPgConnection,
        job_id: Uuid,
        ids: &[Uuid],
    ) -> Result<Vec<Self>> {
        Ok(EventQuery::new(Rows::ByIds { job_id, ids }).load(&mut connection).await?)
    }
}

/// The state of a job after its last event, as it is stored.
#[derive(Debug, Queryable, Selectable)]
#[diesel(table_name = job_states, check_for_backend(diesel::pg::Pg))]
pub struct StoredState {
    job_id: Uuid,
    points_total: i64,
    status: JobStatus,
    closed: bool,
    points_done: i64,
    percent: i16,
    last_sequence: i64,
    last_event_id: Option<Uuid>,
    steps: Vec<u8>,
    last_step_sequence: i64,
    silent: bool,
    cancellation_requested_at: Option<DateTime<Utc>>,
}

impl From<StoredState> for JobState {
    fn from(stored: StoredState) -> Self {
        Self {
            last_sequence: stored.last_sequence,
            last_event_id: stored.last_event_id,
            status: stored.status,
            closed: stored.closed,
            progress: Progress {
                points_done: stored.points_done,
                points_total: stored.points_total,
                percent: stored.percent,
            },
            steps: stored.steps.into(),
            last_step_sequence: stored.last_step_sequence,
            silent: stored.silent,
            cancellation: stored.cancellation_requested_at.into(),
        }
    }
}

impl StoredState {
    /// The states of the existing jobs among these, whosever they are.
    pub async fn load(
        connection: &mut AsyncPgConnection,
        job_ids: &[Uuid],
    ) -> Result<HashMap<Uuid, JobState>> {
        let query = job_states::table.select(Self::as_select()).into_boxed();
        let query = match job_ids {
            // Postgres plans a query with an array at each call, which costs more than
            // the query itself.
            [id] => query.filter(job_states::job_id.eq(*id)),
            ids => query.filter(job_states::job_id.eq_any(ids)),
        };
        let states: Vec<Self> = query.load(connection).await?;
        Ok(states.into_iter().map(|state| (state.job_id, state.into())).collect())
    }
}

/// The columns of a job that never change.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = jobs, check_for_backend(diesel::pg::Pg))]
pub struct JobHead {
    pub id: Uuid,
    pub provider_id: Uuid,
    pub customer_id: Uuid,
    /// The configuration that the job is pinned to.
    pub job_configuration_id: Uuid,
    pub configuration_tag: String,
    /// The provider's own id for the job.
    pub provider_job_id: String,
    pub labels: Labels,
    pub points_total: i64,
}

impl JobHead {
    /// The existing jobs among these, in no order, whosever they are.
    pub async fn load(connection: &mut AsyncPgConnection, ids: &[Uuid]) -> Result<Vec<Self>> {
        let query = jobs::table.select(Self::as_select()).into_boxed();
        let query = match ids {
            // As in StoredState::load.
            [id] => query.filter(jobs::id.eq(*id)),
            ids => query.filter(jobs::id.eq_any(ids)),
        };
        Ok(query.load(connection).await?)
    }

    /// A job of this id that the viewer may see.
    pub async fn find(connection: &mut AsyncPgConnection, viewer: Viewer, id: Uuid) -> Result<Option<Self>> {
        let query = jobs::table.find(id).select(Self::as_select()).into_boxed();
        Ok(visible_jobs!(query, viewer.visibility()).first(connection).await.optional()?)
    }

    /// A provider's job by the provider's own id for it.
    pub async fn find_by_provider_job_id(
        connection: &mut AsyncPgConnection,
        provider_id: Uuid,
        provider_job_id: &str,
    ) -> Result<Option<Self>> {
        Ok(jobs::table
            .filter(jobs::provider_id.eq(provider_id))
            .filter(jobs::provider_job_id.eq(provider_job_id))
            .select(Self::as_select())
            .first(connection)
            .await
            .optional()?)
    }

    /// Whether retention removes the job's events, or has removed them.
    pub async fn has_removed_events(connection: &mut AsyncPgConnection, id: Uuid) -> Result<bool> {
        let removed = jobs::table.find(id).select(jobs::events_removed).first(connection).await.optional()?;
        removed.ok_or_else(|| Error::not_found(Resource::Job, &id))
    }
}
