//! Histories of the event log. Where commits were lost, the log has other events at the
//! positions that it had before; a position therefore counts only in its history. See
//! migrations/2026-11-26-000010_histories/up.sql.

use diesel::{
    define_sql_function,
    dsl::min,
    prelude::*,
    sql_types::{BigInt, Text, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    db::Identified,
    error::{Error, Result},
    schema::{event_log, histories, retention},
};

define_sql_function! {
    fn enter_history(identity: Text) -> SqlUuid;
}
define_sql_function! {
    fn kept_removals(history: SqlUuid, read_to: BigInt) -> Nullable<BigInt>;
}

/// The end of the log of all jobs.
#[derive(Clone, Copy, Debug, Queryable)]
pub struct LogEnd {
    /// The last position.
    pub position: i64,
    /// How many job logs retention has removed.
    pub removals: i64,
    /// The history of the last position.
    pub history: Uuid,
}

impl LogEnd {
    /// A query that starts after this one sees every event up to that position and every
    /// removal up to that number.
    pub async fn read(connection: &mut AsyncPgConnection) -> Result<Self> {
        let removals = retention::table.select(retention::removals).single_value().assume_not_null();
        let newest = histories::table.select(histories::id).order(histories::number.desc()).limit(1);
        let newest = newest.single_value().assume_not_null();
        Ok(event_log::table.select((event_log::position, removals, newest)).first(connection).await?)
    }

    /// Whether the log still has what a reader has read who came to `position` in `history`:
    /// none if a part of that is lost, or else the number up to which the removals that the
    /// reader knows are those of the log. To be called on the connection that read the end.
    pub async fn kept(
        self,
        connection: &mut AsyncPgConnection,
        history: Uuid,
        position: i64,
    ) -> Result<Option<i64>> {
        if position > self.position {
            return Ok(None);
        }
        if history == self.history {
            return Ok(Some(i64::MAX));
        }
        Ok(diesel::select(kept_removals(history, position)).get_result(connection).await?)
    }

    /// Up to which position the log still has what it had in `history`, of which something is
    /// kept. To be called on the connection that read the end.
    pub async fn kept_through(self, connection: &mut AsyncPgConnection, history: Uuid) -> Result<i64> {
        if history == self.history {
            return Ok(self.position);
        }
        diesel::alias!(histories as own: OwnHistory);
        let number = own.filter(own.field(histories::id).eq(history)).select(own.field(histories::number));
        let later = histories::table.filter(histories::number.nullable().gt(number.single_value()));
        let kept: Option<i64> = later.select(min(histories::after_position)).first(connection).await?;
        kept.ok_or(Error::LogSetBack)
    }
}

/// Returns the id of the history of the connection's database, and begins it if need be.
/// To be called before the first append to that database, and in each removal.
pub async fn enter(connection: &mut impl Identified) -> Result<Uuid> {
    let identity = connection.identity().to_string();
    Ok(diesel::select(enter_history(identity)).get_result(&mut **connection).await?)
}
