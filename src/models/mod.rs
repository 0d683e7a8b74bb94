//! Rows, their queries, and the authorization to read and write them, without
//! tonic and protobuf. A function on a tenant's data takes one of the proof
//! types of [`caller`].

use std::time::Duration;

use diesel::data_types::PgInterval;

/// Implements `still_valid` and `note_use` for the row of a credential. Its table
/// has `id`, `expires_at`, `last_used_at` and a user; a disabled user's
/// credentials are invalid.
macro_rules! confirmable {
    ($row:ty, $table:ident) => {
        impl $row {
            /// Returns those of `ids` that are not expired and whose user is not
            /// disabled.
            pub async fn still_valid(
                conn: &mut diesel_async::AsyncPgConnection,
                ids: &[uuid::Uuid],
            ) -> $crate::error::Result<Vec<uuid::Uuid>> {
                use diesel::dsl::now;
                Ok($table::table
                    .inner_join(users::table)
                    .filter($table::id.eq_any(ids))
                    .filter($table::expires_at.is_null().or($table::expires_at.gt(now)))
                    .filter(users::disabled_at.is_null())
                    .select($table::id)
                    .load(conn)
                    .await?)
            }

            /// Sets `last_used_at` to now, unless it is less than a minute old.
            pub async fn note_use(
                conn: &mut diesel_async::AsyncPgConnection,
                ids: &[uuid::Uuid],
            ) -> $crate::error::Result<()> {
                use diesel::{
                    dsl::{IntervalDsl as _, not, now},
                    sql_types::Timestamptz,
                };
                let recent =
                    $table::last_used_at.gt((now.into_sql::<Timestamptz>() - 1_i32.minute()).nullable());
                diesel::update($table::table)
                    .filter($table::id.eq_any(ids))
                    .filter($table::last_used_at.is_null().or(not(recent)))
                    .set($table::last_used_at.eq(now))
                    .execute(conn)
                    .await?;
                Ok(())
            }
        }
    };
}

pub mod api_key;
pub mod audit_entry;
pub mod caller;
pub mod event;
pub mod job;
pub mod job_configuration;
pub(crate) mod job_identity;
pub mod log_in_attempt;
mod pg_enum;
pub mod retention;
pub mod session;
pub mod user;
pub mod version;
pub mod watch_token;

/// Converts to a Postgres interval, which counts microseconds.
fn interval(duration: Duration) -> PgInterval {
    PgInterval::from_microseconds(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX))
}
