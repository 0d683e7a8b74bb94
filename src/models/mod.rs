//! Rows, their queries, and the authorization to read and write them, without
//! tonic and protobuf. A function on a tenant's data takes one of the proof
//! types of [`caller`].

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    Queryable,
    data_types::PgInterval,
    sql_types::{Nullable, Timestamptz},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::error::Result;

pub mod api_key;
pub mod audit_entry;
pub mod caller;
pub mod credential;
pub mod customer_code;
pub mod email;
pub mod event;
pub mod history;
pub mod job;
pub mod job_configuration;
pub(crate) mod job_identity;
pub mod labels;
pub mod log_in_throttle;
pub mod max_silence;
mod pg_enum;
pub mod retention;
pub mod session;
pub mod silence;
pub mod step_times;
pub mod usage;
pub mod user;
pub mod version_order;
pub mod watch_token;

diesel::define_sql_function! {
    fn clock_timestamp() -> Timestamptz;
}
diesel::define_sql_function! {
    /// Whether a credential with these times is valid at present.
    fn is_valid(revoked_at: Nullable<Timestamptz>, expires_at: Nullable<Timestamptz>) -> Bool;
}

/// The time by the database's clock.
pub(crate) async fn now(connection: &mut AsyncPgConnection) -> Result<DateTime<Utc>> {
    Ok(diesel::select(clock_timestamp()).get_result(connection).await?)
}

/// A Postgres interval counts microseconds.
fn interval(duration: Duration) -> PgInterval {
    PgInterval::from_microseconds(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX))
}

/// Converts an interval that is shorter than a month; none is negative.
fn duration(interval: PgInterval) -> Duration {
    const DAY_US: i64 = 24 * 60 * 60 * 1_000_000;
    Duration::from_micros(
        u64::try_from(interval.microseconds + i64::from(interval.days) * DAY_US).unwrap_or_default(),
    )
}

/// Where a row stands in a list by creation: a later row has a greater cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Queryable)]
pub struct CreationCursor {
    pub created_at: DateTime<Utc>,
    /// The row's id, which orders rows of one creation time.
    pub id: Uuid,
}

/// Orders a query by creation, oldest first, and cuts it to `limit` rows after a
/// [`CreationCursor`].
macro_rules! oldest_first {
    ($table:ident, $query:expr, $after:expr, $limit:expr) => {{
        use $table::{created_at, id};
        let query = $query.order((created_at, id)).limit($limit).into_boxed();
        match $after {
            Some($crate::models::CreationCursor { created_at: at, id: last }) => {
                query.filter(created_at.gt(at).or(created_at.eq(at).and(id.gt(last))))
            }
            None => query,
        }
    }};
}
use oldest_first;

/// Cuts a boxed query on `jobs` to the rows of a [`caller::Visibility`], so that a job of
/// somebody else is found in as many steps as one that does not exist.
macro_rules! visible_jobs {
    ($query:expr, $visibility:expr) => {{
        use $crate::{models::caller::Visibility, schema::jobs};
        match $visibility {
            Visibility::Provider(id) => $query.filter(jobs::provider_id.eq(id)),
            Visibility::Customer(id) => $query.filter(jobs::customer_id.eq(id)),
            Visibility::Job(id) => $query.filter(jobs::id.eq(id)),
        }
    }};
}
use visible_jobs;
