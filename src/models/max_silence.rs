//! How long the provider of a job may send no event.

use std::time::Duration;

use diesel::{
    deserialize::{self, FromSql, FromSqlRow},
    expression::AsExpression,
    pg::{Pg, PgValue},
    serialize::{self, Output, ToSql},
    sql_types::BigInt,
};

use crate::limits::MAX_SILENCE;

/// In whole microseconds, between the limits of [`MAX_SILENCE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsExpression, FromSqlRow)]
#[diesel(sql_type = BigInt)]
pub struct MaxSilence(i64);

impl MaxSilence {
    /// None beyond the limits. What is less than a microsecond is cut.
    pub fn new(length: Duration) -> Option<Self> {
        let (shortest, longest) = MAX_SILENCE;
        let within = (shortest..=longest).contains(&length);
        i64::try_from(length.as_micros()).ok().filter(|_| within).map(Self)
    }

    pub fn length(self) -> Duration {
        Duration::from_micros(self.0.unsigned_abs())
    }
}

/// What an error says of a stored value that differs from the given one.
pub fn is_stored_as(stored: Option<MaxSilence>) -> String {
    stored.map_or_else(
        || "is stored without one".to_owned(),
        |stored| format!("is stored as {:?}", stored.length()),
    )
}

impl ToSql<BigInt, Pg> for MaxSilence {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        ToSql::<BigInt, Pg>::to_sql(&self.0, out)
    }
}

impl FromSql<BigInt, Pg> for MaxSilence {
    fn from_sql(bytes: PgValue<'_>) -> deserialize::Result<Self> {
        FromSql::<BigInt, Pg>::from_sql(bytes).map(Self)
    }
}
