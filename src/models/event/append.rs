//! The statement that appends events to many jobs. The SQL function that it calls gives
//! positions without a gap, and refuses a job whose last sequence is another one than the
//! batch was planned for. `event_log/append/batch.rs` numbers the events of one job.

use std::ops::{Deref, DerefMut};

use chrono::{DateTime, Utc};
use diesel::QueryResult;
use diesel_async::{
    AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _, pooled_connection::PoolableConnection as _,
};
use futures_util::future::join;
use uuid::Uuid;

use crate::{
    db::{Database, OwnConnection},
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

    #[diesel::declare_sql_function]
    extern "SQL" {
        /// See migrations/2026-11-26-000005_event_log/up.sql.
        fn append_events(
            job_id: Array<SqlUuid>,
            job_last_sequence: Array<BigInt>,
            job_last_event_id: Array<Nullable<SqlUuid>>,
            job_event_count: Array<Integer>,
            job_new_event_id: Array<Nullable<SqlUuid>>,
            job_status: Array<sql_types::JobStatus>,
            job_points_done: Array<BigInt>,
            job_percent: Array<SmallInt>,
            job_steps: Array<Bytea>,
            job_last_step_sequence: Array<BigInt>,
            job_closed: Array<Bool>,
            job_status_changes: Array<Bool>,
            job_silent: Array<Bool>,
            job_silence_changes: Array<Bool>,
            job_cancels: Array<Bool>,
            event_job: Array<Integer>,
            event_id: Array<SqlUuid>,
            event_id_is_clients: Array<Bool>,
            event_sequence: Array<BigInt>,
            event_kind: Array<sql_types::EventKind>,
            event_name: Array<Text>,
            event_step: Array<Nullable<SqlUuid>>,
            event_step_percent: Array<Nullable<SmallInt>>,
            event_metadata: Array<Bytea>,
            event_occurred_at: Array<Nullable<Timestamptz>>,
            event_status: Array<sql_types::JobStatus>,
            event_points_done: Array<BigInt>,
            event_percent: Array<SmallInt>,
            check_ids: Bool,
        ) -> Record<(Nullable<BigInt>, Nullable<Timestamptz>, Array<SmallInt>)>;

        /// See migrations/2026-11-26-000009_audit/up.sql.
        fn audit_appends(
            appended: Record<(Nullable<BigInt>, Nullable<Timestamptz>, Array<SmallInt>)>,
            job: Array<Integer>,
            entry_id: Array<SqlUuid>,
            act: Array<sql_types::AuditAct>,
            job_id: Array<Nullable<SqlUuid>>,
            actor: Array<sql_types::AuditActor>,
            actor_user_id: Array<Nullable<SqlUuid>>,
            actor_credential_id: Array<Nullable<SqlUuid>>,
            client_address: Array<Nullable<Inet>>,
            request_id: Array<Nullable<SqlUuid>>,
        ) -> Record<(Nullable<BigInt>, Nullable<Timestamptz>, Array<SmallInt>)>;
    }
}

/// A connection that appends. Its plans of the statements in `append_events` are made once, for
/// arrays of any length, and are kept while the tables grow: every row is found by its key,
/// and no table is read whole. Without these settings each call with a few events would be
/// planned anew. SET clauses of the function would be set and reset at each call.
#[derive(Debug)]
pub struct AppendConnection(OwnConnection);

impl AppendConnection {
    const SETTINGS: &str = "SET plan_cache_mode = force_generic_plan; SET enable_bitmapscan = off; \
                            SET enable_hashjoin = off; SET enable_mergejoin = off";

    /// As [`Database::kept_or_new`].
    pub async fn kept_or_new(database: &Database, kept: &mut Option<Self>) -> Result<Self> {
        if let Some(connection) = kept.take_if(|kept| !kept.0.is_broken()) {
            return Ok(connection);
        }
        let mut connection = database.connect().await?;
        connection.batch_execute(Self::SETTINGS).await?;
        Ok(Self(connection))
    }
}

impl Deref for AppendConnection {
    type Target = OwnConnection;

    fn deref(&self) -> &OwnConnection {
        &self.0
    }
}

impl DerefMut for AppendConnection {
    fn deref_mut(&mut self) -> &mut OwnConnection {
        &mut self.0
    }
}

/// Events for many jobs, to be appended in one transaction.
#[derive(Debug, Default)]
pub struct AppendStatement<'a> {
    jobs: Vec<AppendJob<'a>>,
    /// Events with the number of their job, from 1.
    events: Vec<(i32, NewRow<'a>)>,
    /// Audit entries with the number of their job.
    audit: Vec<(i32, &'a AuditEntry)>,
}

/// A job that leaves the state `before` for the state `after`.
#[derive(Debug)]
struct AppendJob<'a> {
    id: Uuid,
    before: &'a JobState,
    after: &'a JobState,
}

impl AppendJob<'_> {
    fn event_count(&self) -> i64 {
        self.after.last_sequence - self.before.last_sequence
    }

    fn status_changes(&self) -> bool {
        (self.before.status, self.before.closed) != (self.after.status, self.after.closed)
    }

    fn silence_changes(&self) -> bool {
        (self.before.silent, self.before.closed) != (self.after.silent, self.after.closed)
    }
}

/// An event to append. For the columns see [`Event`](super::Event).
#[derive(Clone, Copy, Debug)]
pub struct NewRow<'a> {
    pub id: Uuid,
    /// A client made the id, so that the event may be stored already.
    pub id_is_clients: bool,
    pub sequence: i64,
    pub kind: EventKind,
    pub name: &'a str,
    pub step_configuration_id: Option<Uuid>,
    pub step_percent: Option<i16>,
    pub event_metadata: &'a [u8],
    pub occurred_at: Option<DateTime<Utc>>,
    pub status: JobStatus,
    pub points_done: i64,
    pub percent: i16,
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
    /// The job's last event is not the given one any more; nothing was written.
    Moved,
    /// An event with the same id of a client is stored; nothing was written.
    Stored,
}

impl<'a> AppendStatement<'a> {
    /// Adds a job's events, which lead from `before` to `after`.
    pub fn add(
        &mut self,
        job_id: Uuid,
        before: &'a JobState,
        after: &'a JobState,
        rows: impl Iterator<Item = NewRow<'a>>,
    ) {
        self.jobs.push(AppendJob { id: job_id, before, after });
        let job = count(self.jobs.len());
        self.events.extend(rows.map(|row| (job, row)));
    }

    /// Adds an audit entry to write with the events of the job that was added last.
    pub fn audit(&mut self, entry: &'a AuditEntry) {
        self.audit.push((count(self.jobs.len()), entry));
    }

    /// Appends in one statement, which is one transaction. Returns the outcome of each
    /// job in the order in which the jobs were added: the order of their ids, so that
    /// two servers cannot deadlock.
    pub async fn execute(&self, connection: &AppendConnection) -> Result<Vec<AppendOutcome>> {
        connection.begin();
        let answer = match self.call(connection, false).await {
            Err(error) if violated(&error) == Some("events_job_id_id_key") => {
                self.call(connection, true).await?
            }
            answer => answer?,
        };
        connection.committed()?;
        self.outcomes(answer)
    }

    /// Appends in a transaction that is open already, and commits it; see
    /// [`LockedJob::append`](super::LockedJob::append).
    pub(super) async fn execute_and_commit(
        &self,
        connection: &AppendConnection,
    ) -> Result<Vec<AppendOutcome>> {
        connection.begin();
        let mut shared: &AsyncPgConnection = connection;
        let (answer, ended) = join(self.call(connection, true), shared.batch_execute("COMMIT")).await;
        ended?;
        connection.committed()?;
        self.outcomes(answer?)
    }

    fn outcomes(&self, (position, at, outcomes): Answer) -> Result<Vec<AppendOutcome>> {
        if outcomes.len() != self.jobs.len() {
            return Err(Error::internal("not as many outcomes as jobs"));
        }
        let (mut position, at) = (position.unwrap_or_default(), at.unwrap_or_default());
        let outcomes = outcomes.into_iter().zip(&self.jobs).map(|(outcome, job)| match outcome {
            0 => {
                let after_position = position;
                position += job.event_count();
                AppendOutcome::Committed { after_position, at }
            }
            1 => AppendOutcome::Moved,
            _ => AppendOutcome::Stored,
        });
        Ok(outcomes.collect())
    }

    /// With `check_ids` the function finds the jobs of which an event is stored already;
    /// without it, such an event violates a constraint.
    async fn call(&self, connection: &AppendConnection, check_ids: bool) -> QueryResult<Answer> {
        let mut connection: &AsyncPgConnection = connection;
        let (jobs, events) = (&self.jobs, &self.events);
        let append = sql::append_events(
            column(jobs, |job| job.id),
            column(jobs, |job| job.before.last_sequence),
            column(jobs, |job| job.before.last_event_id),
            column(jobs, |job| count(job.event_count())),
            column(jobs, |job| job.after.last_event_id),
            column(jobs, |job| job.after.status),
            column(jobs, |job| job.after.progress.points_done),
            column(jobs, |job| job.after.progress.percent),
            column(jobs, |job| job.after.steps.as_bytes()),
            column(jobs, |job| job.after.last_step_sequence),
            column(jobs, |job| job.after.closed),
            column(jobs, |job| job.status_changes()),
            column(jobs, |job| job.after.silent),
            column(jobs, |job| job.silence_changes()),
            column(jobs, |job| job.before.cancellation != job.after.cancellation),
            column(events, |(job, _)| *job),
            column(events, |(_, row)| row.id),
            column(events, |(_, row)| row.id_is_clients),
            column(events, |(_, row)| row.sequence),
            column(events, |(_, row)| row.kind),
            column(events, |(_, row)| row.name),
            column(events, |(_, row)| row.step_configuration_id),
            column(events, |(_, row)| row.step_percent),
            column(events, |(_, row)| row.event_metadata),
            column(events, |(_, row)| row.occurred_at),
            column(events, |(_, row)| row.status),
            column(events, |(_, row)| row.points_done),
            column(events, |(_, row)| row.percent),
            check_ids,
        );
        if self.audit.is_empty() {
            return whole(diesel::select(append).load(&mut connection).await?);
        }
        let audit = &self.audit;
        let audited = diesel::select(sql::audit_appends(
            append,
            column(audit, |(job, _)| *job),
            column(audit, |(_, entry)| entry.id),
            column(audit, |(_, entry)| entry.act),
            column(audit, |(_, entry)| entry.job_id),
            column(audit, |(_, entry)| entry.origin.actor),
            column(audit, |(_, entry)| entry.origin.actor_user_id),
            column(audit, |(_, entry)| entry.origin.actor_credential_id),
            column(audit, |(_, entry)| entry.origin.client_address),
            column(audit, |(_, entry)| entry.origin.request_id),
        ));
        whole(audited.load(&mut connection).await?)
    }
}

/// The SQL functions take the rows column by column.
fn column<R, T>(rows: &[R], value: impl Fn(&R) -> T) -> Vec<T> {
    rows.iter().map(value).collect()
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
