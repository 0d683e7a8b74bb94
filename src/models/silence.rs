//! Jobs whose providers have been silent for too long.

use diesel::{
    prelude::*,
    sql_types::{Integer, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{error::Result, progress::JobStatus, schema::jobs};

diesel::define_sql_function! {
    /// See migrations/2026-11-26-000012_silence/up.sql.
    fn find_silent_jobs(most: Integer) -> Record<(Integer, Array<SqlUuid>, Array<BigInt>)>;
}

/// A job that is to have a `silent` event, unless it has gone on behind this sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SilentJob {
    pub id: Uuid,
    pub last_sequence: i64,
}

/// Says that this server is there, and looks at up to `most` jobs whose time to look has come.
/// Returns those that are silent for too long, and whether there may be more to look at.
///
/// A statement by itself: appends that end a silence wait for what it has locked.
pub async fn find(connection: &mut AsyncPgConnection, most: i32) -> Result<(Vec<SilentJob>, bool)> {
    let found = diesel::select(find_silent_jobs(most));
    let (looked_at, ids, sequences): (i32, Vec<Uuid>, Vec<i64>) = found.get_result(connection).await?;
    let jobs = ids.into_iter().zip(sequences).map(|(id, last_sequence)| SilentJob { id, last_sequence });
    Ok((jobs.collect(), looked_at >= most))
}

/// How many jobs are stalled.
pub async fn count_stalled(connection: &mut AsyncPgConnection) -> Result<i64> {
    Ok(jobs::table.filter(jobs::status.eq(JobStatus::Stalled)).count().get_result(connection).await?)
}
