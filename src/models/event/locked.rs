//! A transaction that appends to one locked job.

use diesel::prelude::*;
use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _};
use uuid::Uuid;

use super::{AppendOutcome, AppendStatement, JobHead};
use crate::{db::OwnConnection, error::Result, schema::jobs};

/// A transaction that holds the lock of one job's row, from its BEGIN to its end. If it
/// is dropped before its end, its connection is closed and Postgres rolls it back.
#[derive(Debug)]
pub struct LockedJob {
    connection: OwnConnection,
    head: Option<JobHead>,
}

impl LockedJob {
    /// Begins the transaction, and locks and reads the job's row. Postgres ends a
    /// transaction that is idle for a second.
    pub async fn begin(mut connection: OwnConnection, id: Uuid) -> Result<Self> {
        connection.batch_execute("BEGIN; SET LOCAL idle_in_transaction_session_timeout = '1s'").await?;
        let job = jobs::table.filter(jobs::id.eq(id)).select(JobHead::as_select()).for_update();
        let head = job.first(&mut connection).await.optional()?;
        Ok(Self { connection, head })
    }

    /// The job; none if there is no such job.
    pub fn head(&self) -> Option<&JobHead> {
        self.head.as_ref()
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
    ) -> Result<(OwnConnection, Vec<AppendOutcome>)> {
        let outcomes = statement.execute_and_commit(&self.connection).await?;
        Ok((self.connection, outcomes))
    }

    /// Ends the transaction without a change.
    pub async fn roll_back(mut self) -> Result<OwnConnection> {
        self.connection.batch_execute("ROLLBACK").await?;
        Ok(self.connection)
    }
}
