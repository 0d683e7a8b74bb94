//! Labels, under which a provider files jobs.

use std::collections::BTreeMap;

use diesel::{
    deserialize::{self, FromSql, FromSqlRow},
    expression::AsExpression,
    pg::{Pg, PgValue},
    serialize::{self, Output, ToSql},
    sql_types::{Array, Nullable, Text},
};

/// The labels of a job, or those that a filter wants: texts by their keys.
///
/// In the database they are an array of each key and its value, by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, AsExpression, FromSqlRow)]
#[diesel(sql_type = Array<Nullable<Text>>)]
pub struct Labels(pub BTreeMap<String, String>);

diesel::define_sql_function! {
    /// See migrations/2026-11-26-000004_jobs/up.sql.
    fn has_labels(labels: Array<Nullable<Text>>, wanted: Array<Nullable<Text>>) -> Bool;
}

impl Labels {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all of the wanted labels are among these.
    pub(crate) fn contain(&self, wanted: &Self) -> bool {
        wanted.0.iter().all(|(key, value)| self.0.get(key) == Some(value))
    }

    /// Bytes of the texts.
    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().map(|(key, value)| key.len() + value.len()).sum()
    }
}

impl ToSql<Array<Nullable<Text>>, Pg> for Labels {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        let texts: Vec<Option<&str>> =
            self.0.iter().flat_map(|(key, value)| [Some(&**key), Some(&**value)]).collect();
        ToSql::<Array<Nullable<Text>>, Pg>::to_sql(&texts, &mut out.reborrow())
    }
}

impl FromSql<Array<Nullable<Text>>, Pg> for Labels {
    fn from_sql(value: PgValue<'_>) -> deserialize::Result<Self> {
        let mut texts = <Vec<Option<String>> as FromSql<Array<Nullable<Text>>, Pg>>::from_sql(value)?
            .into_iter()
            .map(Option::unwrap_or_default);
        let mut labels = BTreeMap::new();
        while let (Some(key), Some(value)) = (texts.next(), texts.next()) {
            labels.insert(key, value);
        }
        Ok(Self(labels))
    }
}
