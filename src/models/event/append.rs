//! The statement that appends events to many jobs.

use chrono::{DateTime, Utc};
use diesel::QueryResult;
use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _};
use futures_util::future::join;
use uuid::Uuid;

use crate::{
    db::OwnConnection,
    error::{Error, Result, violated},
    models::audit_entry::AuditEntry,
    progress::{EventKind, JobState, JobStatus},
};

mod sql {
    #![allow(clippy::too_many_arguments, reason = "an array for each column of the rows")]

    use diesel::{
        pg::sql_types::{Array, Bytea, Inet, Timestamptz, Uuid as SqlUuid},
        sql_types::{BigInt, Bool, Integer, Nullable, Record, SmallInt, Text},
    };

    use crate::schema::sql_types;

    diesel::define_sql_function! {
        /// See migrations/2026-11-26-000005_event_log/up.sql.
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
        /// See migrations/2026-11-26-000009_audit/up.sql.
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

/// Events for many jobs, to be appended in one transaction. They are kept column by
/// column, as the SQL function takes them.
#[derive(Debug, Default)]
pub struct AppendStatement<'a> {
    jobs: AppendJobs<'a>,
    events: AppendEvents<'a>,
    /// Audit entries with the number of their job, from 1.
    audit: Vec<(i32, &'a AuditEntry)>,
}

/// An event to append. For the columns see [`Event`](super::Event).
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the columns of Event")]
pub struct NewRow<'a> {
    pub id: Uuid,
    /// A client made the id, so that the event may be stored already.
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

/// What became of one job's part of an [`AppendStatement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppendOutcome {
    /// The job's events are committed.
    Committed {
        /// The position of the job's first event is the next one.
        after_position: i64,
        /// `created_at` of the events.
        at: DateTime<Utc>,
    },
    /// The job is not at the given sequence any more; nothing was written.
    Moved,
    /// An event with the same id of a client is stored; nothing was written.
    Stored,
}

impl<'a> AppendStatement<'a> {
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

    /// Adds the audit entry to write if the append closes the job that was added last.
    pub fn audit(&mut self, entry: &'a AuditEntry) {
        self.audit.push((count(self.jobs.ids.len()), entry));
    }

    /// Appends in one statement, which is one transaction. Returns the outcome of each
    /// job in the order in which the jobs were added: the order of their ids, so that
    /// two servers cannot deadlock.
    pub async fn execute(&self, connection: &OwnConnection) -> Result<Vec<AppendOutcome>> {
        let answer = match self.call(connection, false).await {
            Err(error) if violated(&error) == Some("events_job_id_id_key") => {
                self.call(connection, true).await?
            }
            answer => answer?,
        };
        self.outcomes(answer)
    }

    /// Appends in a transaction that is open already, and commits it; see
    /// [`LockedJob::append`](super::LockedJob::append).
    pub(super) async fn execute_and_commit(&self, connection: &OwnConnection) -> Result<Vec<AppendOutcome>> {
        let mut shared: &AsyncPgConnection = connection;
        let (answer, ended) = join(self.call(connection, true), shared.batch_execute("COMMIT")).await;
        ended?;
        self.outcomes(answer?)
    }

    fn outcomes(&self, (position, at, outcomes): Answer) -> Result<Vec<AppendOutcome>> {
        if outcomes.len() != self.jobs.ids.len() {
            return Err(Error::internal("not as many outcomes as jobs"));
        }
        let (mut position, at) = (position.unwrap_or_default(), at.unwrap_or_default());
        let outcomes =
            outcomes.into_iter().zip(&self.jobs.event_counts).map(|(outcome, count)| match outcome {
                0 => {
                    let after_position = position;
                    position += i64::from(*count);
                    AppendOutcome::Committed { after_position, at }
                }
                1 => AppendOutcome::Moved,
                _ => AppendOutcome::Stored,
            });
        Ok(outcomes.collect())
    }

    /// With `check_ids` the function finds the jobs of which an event is stored already;
    /// without it, such an event violates a constraint.
    async fn call(&self, mut connection: &AsyncPgConnection, check_ids: bool) -> QueryResult<Answer> {
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
            return whole(diesel::select(append).load(&mut connection).await?);
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
        whole(audited.load(&mut connection).await?)
    }
}

/// The one row of a statement that was read to its end. `get_result` returns after the
/// row, before it knows whether the commit that follows succeeded.
fn whole(rows: Vec<Answer>) -> QueryResult<Answer> {
    rows.into_iter().next().ok_or(diesel::NotFound)
}

/// Position before the first event, time, and the outcome of each job.
type Answer = (Option<i64>, Option<DateTime<Utc>>, Vec<i16>);

/// All counts are bounded by the size of a round, far below 2³¹.
fn count<N: TryInto<i32>>(n: N) -> i32 {
    n.try_into().unwrap_or(i32::MAX)
}
