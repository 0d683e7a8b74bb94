//! The search for jobs by a text that their `provider_job_id` or their name contains, in any case.
//!
//! Texts are compared in lower case by Unicode's mapping of each character, whatever the locale of
//! the database is.

use diesel::{
    dsl::sql,
    sql_types::{BigInt, Bool, Nullable, Text, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{error::Result, models::caller::Visibility};

/// The text that jobs are searched by, in lower case; not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SearchText(String);

diesel::define_sql_function! {
    /// See migrations/2026-11-28-000014_search/up.sql.
    fn find_jobs_by_text(
        provider: Nullable<SqlUuid>,
        customer: Nullable<SqlUuid>,
        pattern: Text,
        most: BigInt,
    ) -> SqlUuid;
}

/// A text as it is compared.
pub(super) fn folded(text: &str) -> String {
    text.to_lowercase()
}

impl SearchText {
    pub fn new(text: &str) -> Self {
        Self(folded(text))
    }

    /// The pattern of LIKE for texts that contain this one.
    pub(super) fn pattern(&self) -> String {
        let mut pattern = String::from("%");
        for character in self.0.chars() {
            if matches!(character, '%' | '_' | '\\') {
                pattern.push('\\');
            }
            pattern.push(character);
        }
        pattern.push('%');
        pattern
    }

    /// At most `most` visible jobs that match. None if no trigram of letters and digits, as the
    /// locale of the database has them, is in the text: the index does not help then.
    pub(super) async fn find(
        &self,
        conn: &mut AsyncPgConnection,
        visibility: Visibility,
        most: i64,
    ) -> Result<Option<Vec<Uuid>>> {
        let (provider, customer) = match visibility {
            Visibility::Provider(id) => (Some(id), None),
            Visibility::Customer(id) => (None, Some(id)),
            Visibility::Job(_) => return Ok(None),
        };
        let has_trigram = sql::<Bool>("").bind::<Text, _>(&self.0).sql(" ~ '[[:alnum:]]{3}'");
        if !diesel::select(has_trigram).get_result::<bool>(conn).await? {
            return Ok(None);
        }
        let found = find_jobs_by_text(provider, customer, self.pattern(), most);
        Ok(Some(diesel::select(found).load(conn).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_its_text_alone() {
        for (text, pattern) in [
            ("Scan", "%scan%"),
            ("100%", "%100\\%%"),
            ("a_b", "%a\\_b%"),
            ("\\x\\", "%\\\\x\\\\%"),
            ("ÄÖ", "%äö%"),
        ] {
            assert_eq!(SearchText::new(text).pattern(), pattern);
        }
    }
}
