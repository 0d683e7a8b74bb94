//! A transaction that appends to one locked job.

use diesel::prelude::*;
use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _};
use uuid::Uuid;

use super::{AppendConnection, AppendOutcome, AppendStatement, StoredState};
use crate::{error::Result, progress::JobState, schema::job_states};

/// A transaction that holds the lock of one job's state, from its BEGIN to its end. If it
/// is dropped before its end, its connection is closed and Postgres rolls it back.
#[derive(Debug)]
pub struct LockedJob {
    connection: AppendConnection,
    state: Option<JobState>,
}

impl LockedJob {
    /// Begins the transaction, and locks and reads the job's row of `job_states`, the first
    /// lock of every append. Postgres ends a transaction that is idle for a second.
    pub async fn begin(mut connection: AppendConnection, job_id: Uuid) -> Result<Self> {
        connection.batch_execute("BEGIN; SET LOCAL idle_in_transaction_session_timeout = '1s'").await?;
        let state = job_states::table.find(job_id).select(StoredState::as_select()).for_update();
        let state: Option<StoredState> = state.first(&mut **connection).await.optional()?;
        Ok(Self { connection, state: state.map(JobState::from) })
    }

    /// The job's state; none if there is no such job.
    pub fn state(&self) -> Option<JobState> {
        self.state.clone()
    }

    /// The connection, for reads within the transaction.
    pub fn connection(&self) -> &AsyncPgConnection {
        &self.connection
    }

    /// Appends and commits.
    ///
    /// COMMIT is sent behind the statement without waiting for the statement's answer,
    /// so that the row of the event log, which every append needs, is not locked for a
    /// round trip. The connection must have appended before. On one that has not, the
    /// statement has still to be prepared and COMMIT overtakes it: then the statement is a
    /// transaction of its own, and compares the job's state as any other append does.
    pub async fn append(
        self,
        statement: &AppendStatement<'_>,
    ) -> Result<(AppendConnection, Vec<AppendOutcome>)> {
        let outcomes = statement.execute_and_commit(&self.connection).await?;
        Ok((self.connection, outcomes))
    }

    /// Ends the transaction without a change.
    pub async fn roll_back(mut self) -> Result<AppendConnection> {
        self.connection.batch_execute("ROLLBACK").await?;
        Ok(self.connection)
    }
}
