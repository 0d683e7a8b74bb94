//! Rows, their queries, and who may see them. Knows neither tonic nor
//! protobuf; a tenant's data is opened only by what [`caller`] hands out.

use std::time::Duration;

use diesel::data_types::PgInterval;

/// What keeps a kind of credential confirmed: `still_good` and `note_use` of a
/// row whose table has `id`, `expires_at`, `last_used_at` and the user whom it
/// stands and falls with.
macro_rules! confirmable {
    ($row:ty, $table:ident) => {
        impl $row {
            /// Those of these that are still good.
            pub async fn still_good(
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

            /// Notes that these were used, unless that was noted within a
            /// minute.
            pub async fn note_use(
                conn: &mut diesel_async::AsyncPgConnection,
                ids: &[uuid::Uuid],
            ) -> $crate::error::Result<()> {
                use diesel::{
                    dsl::{IntervalDsl as _, not, now},
                    sql_types::Timestamptz,
                };
                let known =
                    $table::last_used_at.gt((now.into_sql::<Timestamptz>() - 1_i32.minute()).nullable());
                diesel::update($table::table)
                    .filter($table::id.eq_any(ids))
                    .filter($table::last_used_at.is_null().or(not(known)))
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

/// As Postgres has it: in microseconds.
fn interval(duration: Duration) -> PgInterval {
    PgInterval::from_microseconds(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX))
}
