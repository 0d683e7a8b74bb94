//! Events, the log's position, and the one way to append.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    error::{Result, violated},
    models::{audit_entry::AuditEntry, caller::Sight},
    progress::{EventKind, JobState, JobStatus, Progress, StepSet},
    schema::{events, jobs},
};

/// An event of the log.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = events, check_for_backend(diesel::pg::Pg))]
pub struct Event {
    /// The job that it belongs to.
    pub job_id: Uuid,
    /// 1, 2, 3 … within the job.
    pub sequence: i64,
    /// 1, 2, 3 … within the log.
    pub position: i64,
    /// Unique within the job.
    pub id: Uuid,
    /// What it says.
    pub kind: EventKind,
    /// For people.
    pub name: String,
    /// The step that it belongs to.
    pub step_configuration_id: Option<Uuid>,
    /// An encoded `google.protobuf.Struct`; empty for none.
    pub event_metadata: Vec<u8>,
    /// By the provider's clock.
    pub occurred_at: Option<DateTime<Utc>>,
    /// The job's status after it.
    pub status: JobStatus,
    /// The job's points after it.
    pub points_done: i64,
    /// The job's percent after it.
    pub percent: i16,
    /// By the database's clock, under the job's lock.
    pub created_at: DateTime<Utc>,
}

impl Event {
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

    /// Those of the log's events after a position and up to another that
    /// belong to jobs in sight whose logs are not being removed, ascending.
    pub async fn list_in_sight(
        connection: &mut AsyncPgConnection,
        sight: Sight,
        after: i64,
        through: i64,
        limit: i64,
    ) -> Result<Vec<Self>> {
        let mut query = events::table
            .inner_join(jobs::table.on(jobs::id.eq(events::job_id)))
            .filter(events::position.gt(after))
            .filter(events::position.le(through))
            .filter(jobs::events_removed.eq(false))
            .order(events::position)
            .limit(limit)
            .select(Self::as_select())
            .into_boxed();
        query = match sight {
            Sight::Provider(id) => query.filter(jobs::provider_id.eq(id)),
            Sight::Customer(id) => query.filter(jobs::customer_id.eq(id)),
            Sight::Job(id) => query.filter(jobs::id.eq(id)),
        };
        Ok(query.load(connection).await?)
    }

    /// The position of the oldest event of the log that is kept.
    pub async fn oldest_kept(connection: &mut AsyncPgConnection) -> Result<Option<i64>> {
        let oldest = events::table.select(events::position).order(events::position);
        Ok(oldest.first(connection).await.optional()?)
    }

    /// The stored ones among a job's events of these ids. Takes the connection
    /// shared, so that such look-ups of many jobs can be in flight at once.
    pub async fn list_by_ids(
        mut connection: &AsyncPgConnection,
        job_id: Uuid,
        ids: &[Uuid],
    ) -> Result<Vec<Self>> {
        Ok(events::table
            .filter(events::job_id.eq(job_id))
            .filter(events::id.eq_any(ids))
            .select(Self::as_select())
            .load(&mut connection)
            .await?)
    }
}

/// What never changes of a job, and what its log derives.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = jobs, check_for_backend(diesel::pg::Pg))]
pub struct JobHead {
    /// Its id.
    pub id: Uuid,
    /// Who runs it.
    pub provider_id: Uuid,
    /// Whom it is run for.
    pub customer_id: Uuid,
    /// What it looks like.
    pub job_configuration_id: Uuid,
    /// Its provider's id for it.
    pub provider_job_id: String,
    status: JobStatus,
    points_done: i64,
    points_total: i64,
    percent: i16,
    steps_done: Vec<u8>,
    last_sequence: i64,
    closed_at: Option<DateTime<Utc>>,
    /// Its events are removed, or about to be.
    pub events_removed: bool,
}

impl JobHead {
    /// After its last event.
    pub fn state(&self) -> JobState {
        JobState {
            last_sequence: self.last_sequence,
            status: self.status,
            closed: self.closed_at.is_some(),
            progress: Progress {
                points_done: self.points_done,
                points_total: self.points_total,
                percent: self.percent,
            },
            steps_done: StepSet::from_bytes(&self.steps_done),
        }
    }

    /// Those of these jobs that exist, in no order. Looks at no tenant.
    pub async fn load(connection: &mut AsyncPgConnection, ids: &[Uuid]) -> Result<Vec<Self>> {
        let query = jobs::table.select(Self::as_select()).into_boxed();
        let query = match ids {
            // Postgres plans an array anew at each call, which costs more than
            // the look-up.
            [id] => query.filter(jobs::id.eq(*id)),
            ids => query.filter(jobs::id.eq_any(ids)),
        };
        Ok(query.load(connection).await?)
    }

    /// A provider's job by the provider's id for it. Looks at no tenant beyond
    /// the id given.
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
}

mod sql {
    #![allow(clippy::too_many_arguments, reason = "an array for each column of the rows")]

    use diesel::{
        pg::sql_types::{Array, Bytea, Inet, Timestamptz, Uuid as SqlUuid},
        sql_types::{BigInt, Bool, Integer, Nullable, Record, SmallInt, Text},
    };

    use crate::schema::sql_types;

    diesel::define_sql_function! {
        /// See migrations/2026-11-23-000004_events/up.sql.
        fn append_events(
            job_id: Array<SqlUuid>,
            job_last_sequence: Array<BigInt>,
            job_event_count: Array<Integer>,
            job_status: Array<sql_types::JobStatus>,
            job_points_done: Array<BigInt>,
            job_percent: Array<SmallInt>,
            job_steps_done: Array<Bytea>,
            job_closed: Array<Bool>,
            event_job: Array<Integer>,
            event_id: Array<SqlUuid>,
            event_id_is_clients: Array<Bool>,
            event_sequence: Array<BigInt>,
            event_kind: Array<sql_types::EventKind>,
            event_name: Array<Text>,
            event_step: Array<Nullable<SqlUuid>>,
            event_metadata: Array<Bytea>,
            event_occurred_at: Array<Nullable<Timestamptz>>,
            event_status: Array<sql_types::JobStatus>,
            event_points_done: Array<BigInt>,
            event_percent: Array<SmallInt>,
            check_ids: Bool,
        ) -> Record<(Nullable<BigInt>, Nullable<Timestamptz>, Array<SmallInt>)>;
    }

    diesel::define_sql_function! {
        /// See migrations/2026-11-23-000007_audit_entries/up.sql.
        fn audit_closed_jobs(
            appended: Record<(Nullable<BigInt>, Nullable<Timestamptz>, Array<SmallInt>)>,
            job: Array<Integer>,
            entry_id: Array<SqlUuid>,
            job_id: Array<Nullable<SqlUuid>>,
            actor: Array<sql_types::AuditActor>,
            actor_user_id: Array<Nullable<SqlUuid>>,
            actor_credential_id: Array<Nullable<SqlUuid>>,
            client_address: Array<Nullable<Inet>>,
            request_id: Array<Nullable<SqlUuid>>,
        ) -> Record<(Nullable<BigInt>, Nullable<Timestamptz>, Array<SmallInt>)>;
    }
}

/// Events for many jobs, to be appended in one transaction: column by column,
/// as the SQL function takes them.
#[derive(Debug, Default)]
pub struct Append<'a> {
    jobs: AppendJobs<'a>,
    events: AppendEvents<'a>,
    /// Of jobs by their number, from 1.
    audit: Vec<(i32, &'a AuditEntry)>,
}

/// An event to be appended. For the columns see [`Event`].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the columns of Event")]
pub struct NewRow<'a> {
    pub id: Uuid,
    /// A client made it: it may be stored already.
    pub id_is_clients: bool,
    pub sequence: i64,
    pub kind: EventKind,
    pub name: &'a str,
    pub step_configuration_id: Option<Uuid>,
    pub event_metadata: &'a [u8],
    pub occurred_at: Option<DateTime<Utc>>,
    pub status: JobStatus,
    pub points_done: i64,
    pub percent: i16,
}

#[derive(Debug, Default)]
struct AppendJobs<'a> {
    ids: Vec<Uuid>,
    last_sequences: Vec<i64>,
    event_counts: Vec<i32>,
    statuses: Vec<JobStatus>,
    points_done: Vec<i64>,
    percents: Vec<i16>,
    steps_done: Vec<&'a [u8]>,
    closed: Vec<bool>,
}

#[derive(Debug, Default)]
struct AppendEvents<'a> {
    jobs: Vec<i32>,
    ids: Vec<Uuid>,
    ids_are_clients: Vec<bool>,
    sequences: Vec<i64>,
    kinds: Vec<EventKind>,
    names: Vec<&'a str>,
    steps: Vec<Option<Uuid>>,
    metadata: Vec<&'a [u8]>,
    occurred_at: Vec<Option<DateTime<Utc>>>,
    statuses: Vec<JobStatus>,
    points_done: Vec<i64>,
    percents: Vec<i16>,
}

/// What became of one job's part of an [`Append`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppendOutcome {
    /// Its events are committed, the first after this position.
    Appended {
        /// Position before the job's first event.
        after_position: i64,
        /// `created_at` of its events.
        at: DateTime<Utc>,
    },
    /// It is not at the sequence that was believed; nothing was written.
    Moved,
    /// An id that a client made is stored already; nothing was written.
    Stored,
}

impl<'a> Append<'a> {
    /// Adds a job's events, which lead from `before` to `after`.
    pub fn add(
        &mut self,
        job_id: Uuid,
        before: &JobState,
        after: &'a JobState,
        rows: impl Iterator<Item = NewRow<'a>>,
    ) {
        let jobs = &mut self.jobs;
        jobs.ids.push(job_id);
        jobs.last_sequences.push(before.last_sequence);
        jobs.event_counts.push(count(after.last_sequence - before.last_sequence));
        jobs.statuses.push(after.status);
        jobs.points_done.push(after.progress.points_done);
        jobs.percents.push(after.progress.percent);
        jobs.steps_done.push(after.steps_done.as_bytes());
        jobs.closed.push(after.closed);
        let job = count(jobs.ids.len());
        let columns = &mut self.events;
        for row in rows {
            columns.jobs.push(job);
            columns.ids.push(row.id);
            columns.ids_are_clients.push(row.id_is_clients);
            columns.sequences.push(row.sequence);
            columns.kinds.push(row.kind);
            columns.names.push(row.name);
            columns.steps.push(row.step_configuration_id);
            columns.metadata.push(row.event_metadata);
            columns.occurred_at.push(row.occurred_at);
            columns.statuses.push(row.status);
            columns.points_done.push(row.points_done);
            columns.percents.push(row.percent);
        }
    }

    /// Adds what is written down if the job that was added last is appended to,
    /// which closes it.
    pub fn audit(&mut self, entry: &'a AuditEntry) {
        self.audit.push((count(self.jobs.ids.len()), entry));
    }

    /// Appends all that was added, in one statement and so in one transaction.
    /// The outcome of each job, in the order in which they were added, which is
    /// to be that of their ids, so that nobody deadlocks.
    pub async fn execute(&self, connection: &mut AsyncPgConnection) -> Result<Vec<AppendOutcome>> {
        let (position, at, outcomes) = match self.call(connection, false).await {
            Err(error) if violated(&error) == Some("events_job_id_id_key") => {
                self.call(connection, true).await?
            }
            answer => answer?,
        };
        let (mut position, at) = (position.unwrap_or_default(), at.unwrap_or_default());
        let outcomes =
            outcomes.into_iter().zip(&self.jobs.event_counts).map(|(outcome, count)| match outcome {
                0 => {
                    let after_position = position;
                    position += i64::from(*count);
                    AppendOutcome::Appended { after_position, at }
                }
                1 => AppendOutcome::Moved,
                _ => AppendOutcome::Stored,
            });
        Ok(outcomes.collect())
    }

    /// `check_ids` finds out which jobs have an event stored already; without
    /// it, such an event violates a constraint.
    async fn call(&self, connection: &mut AsyncPgConnection, check_ids: bool) -> QueryResult<Answer> {
        let (jobs, events) = (&self.jobs, &self.events);
        let append = sql::append_events(
            &jobs.ids,
            &jobs.last_sequences,
            &jobs.event_counts,
            &jobs.statuses,
            &jobs.points_done,
            &jobs.percents,
            &jobs.steps_done,
            &jobs.closed,
            &events.jobs,
            &events.ids,
            &events.ids_are_clients,
            &events.sequences,
            &events.kinds,
            &events.names,
            &events.steps,
            &events.metadata,
            &events.occurred_at,
            &events.statuses,
            &events.points_done,
            &events.percents,
            check_ids,
        );
        if self.audit.is_empty() {
            return whole(diesel::select(append).load(connection).await?);
        }
        let entries = || self.audit.iter().map(|(_, entry)| entry);
        let audited = diesel::select(sql::audit_closed_jobs(
            append,
            self.audit.iter().map(|(job, _)| *job).collect::<Vec<_>>(),
            entries().map(|entry| entry.id).collect::<Vec<_>>(),
            entries().map(|entry| entry.job_id).collect::<Vec<_>>(),
            entries().map(|entry| entry.actor).collect::<Vec<_>>(),
            entries().map(|entry| entry.actor_user_id).collect::<Vec<_>>(),
            entries().map(|entry| entry.actor_credential_id).collect::<Vec<_>>(),
            entries().map(|entry| entry.client_address).collect::<Vec<_>>(),
            entries().map(|entry| entry.request_id).collect::<Vec<_>>(),
        ));
        whole(audited.load(connection).await?)
    }
}

/// The one row of a statement that was read to its end: `get_result` takes the
/// row and leaves, without having heard how the commit that follows it went.
fn whole(rows: Vec<Answer>) -> QueryResult<Answer> {
    rows.into_iter().next().ok_or(diesel::NotFound)
}

/// Position before the first event, time, and the outcome of each job.
type Answer = (Option<i64>, Option<DateTime<Utc>>, Vec<i16>);

/// Counts here are bounded by the size of a round, far below 2³¹.
fn count<N: TryInto<i32>>(n: N) -> i32 {
    n.try_into().unwrap_or(i32::MAX)
}
