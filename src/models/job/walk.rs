//! The jobs of a scope in the order of their creation, each with the part of its events that
//! lies in a range of the log.

use chrono::DateTime;
use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, BigInt, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    error::Result,
    models::{CreationCursor, caller::Visibility, labels::Labels, visible_jobs},
    schema::jobs,
};

/// The jobs that a watch of all jobs covers.
#[derive(Clone, Copy, Debug)]
pub struct JobScope<'a> {
    pub visibility: Visibility,
    /// Only jobs of this configuration tag; empty: of any tag.
    pub configuration_tag: &'a str,
    /// Only jobs whose other party is this user.
    pub counterpart_id: Option<Uuid>,
    /// Only jobs with all of these labels.
    pub labels: &'a Labels,
}

/// How far the jobs of a scope were walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkPoint {
    /// The jobs before this one are done.
    pub job: CreationCursor,
    /// This job is done up to here.
    pub sequence: i64,
}

impl WalkPoint {
    /// Before every job.
    pub const START: Self =
        Self { job: CreationCursor { created_at: DateTime::UNIX_EPOCH, id: Uuid::nil() }, sequence: 0 };
}

/// A job, and its events in a range of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Queryable)]
pub struct WalkedJob {
    pub job: CreationCursor,
    /// The sequence before the first of these events.
    pub after: i64,
    /// The sequence of the last of them. There are none if it is not beyond `after`, if the
    /// job is not of the scope, or if retention removes its events.
    pub through: i64,
}

/// The events after one position of the log and up to another.
#[derive(Clone, Copy, Debug)]
pub struct JobWalk<'a> {
    pub scope: JobScope<'a>,
    pub after: i64,
    pub through: i64,
}

impl<'a> JobScope<'a> {
    /// Whether the scope has more jobs than this. It looks at no more of them. With both a
    /// counterpart and a tag, jobs of other tags count too, and always those of other labels,
    /// since a walk looks at them.
    pub async fn has_more_than(self, connection: &mut AsyncPgConnection, jobs: i64) -> Result<bool> {
        let mut query = jobs::table.select(jobs::id).order((jobs::created_at, jobs::id)).into_boxed();
        query = visible_jobs!(query, self.visibility);
        query = match (self.counterpart_id, self.visibility, self.indexed_tag()) {
            (Some(id), Visibility::Provider(_), _) => query.filter(jobs::customer_id.eq(id)),
            (Some(id), Visibility::Customer(_) | Visibility::Job(_), _) => {
                query.filter(jobs::provider_id.eq(id))
            }
            (None, _, Some(tag)) => query.filter(jobs::configuration_tag.eq(tag)),
            (None, _, None) => query,
        };
        Ok(query.offset(jobs).first::<Uuid>(connection).await.optional()?.is_some())
    }

    /// The tag, if the scope is a range of the index by tags. The jobs of a counterpart are one
    /// of another index.
    fn indexed_tag(self) -> Option<&'a str> {
        Some(self.configuration_tag).filter(|tag| !tag.is_empty() && self.counterpart_id.is_none())
    }
}

impl JobWalk<'_> {
    /// At most `limit` jobs from this one on, in the order of their creation. Among them may be
    /// jobs that are not of the scope.
    pub async fn list(
        self,
        connection: &mut AsyncPgConnection,
        from: CreationCursor,
        limit: i64,
    ) -> Result<Vec<WalkedJob>> {
        Ok(WalkQuery { walk: self, from, limit }.load(connection).await?)
    }
}

struct WalkQuery<'a> {
    walk: JobWalk<'a>,
    from: CreationCursor,
    limit: i64,
}

/// The jobs are a range of an index, in its order. What is looked up for each of them stands
/// outside, so that it is looked up for no more than `limit` jobs. `OFFSET 0` keeps Postgres
/// from another join than one look-up a job.
impl QueryFragment<Pg> for WalkQuery<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let Self { walk: JobWalk { scope, after, through }, from, limit } = self;
        out.push_sql("SELECT created_at, id");
        for position in [after, through] {
            out.push_sql(", CASE WHEN wanted THEN sequence_at(id, last_sequence, ");
            out.push_bind_param::<BigInt, _>(position)?;
            out.push_sql(") ELSE 0 END");
        }
        out.push_sql(" FROM (SELECT created_at, id, NOT events_removed AND ");
        out.push_bind_param::<Text, _>(&scope.configuration_tag)?;
        out.push_sql(" IN ('', configuration_tag) AND has_labels(labels, ");
        out.push_bind_param::<Array<Nullable<Text>>, _>(scope.labels)?;
        out.push_sql(") AS wanted FROM jobs WHERE ");
        let (own, other) = match &scope.visibility {
            Visibility::Provider(id) => (("provider_id = ", id), "customer_id = "),
            Visibility::Customer(id) => (("customer_id = ", id), "provider_id = "),
            Visibility::Job(id) => (("id = ", id), "provider_id = "),
        };
        out.push_sql(own.0);
        out.push_bind_param::<SqlUuid, _>(own.1)?;
        if let Some(id) = &scope.counterpart_id {
            out.push_sql(" AND ");
            out.push_sql(other);
            out.push_bind_param::<SqlUuid, _>(id)?;
        } else if !scope.configuration_tag.is_empty() {
            out.push_sql(" AND configuration_tag = ");
            out.push_bind_param::<Text, _>(&scope.configuration_tag)?;
        }
        out.push_sql(" AND (created_at, id) >= (");
        out.push_bind_param::<Timestamptz, _>(&from.created_at)?;
        out.push_sql(", ");
        out.push_bind_param::<SqlUuid, _>(&from.id)?;
        out.push_sql(") ORDER BY created_at, id LIMIT ");
        out.push_bind_param::<BigInt, _>(limit)?;
        out.push_sql(
            ") AS walked CROSS JOIN LATERAL (SELECT last_sequence FROM job_states \
             WHERE job_states.job_id = walked.id OFFSET 0) AS state ORDER BY created_at, id",
        );
        Ok(())
    }
}

impl Query for WalkQuery<'_> {
    type SqlType = ((Timestamptz, SqlUuid), BigInt, BigInt);
}

// The text depends on the scope, so that statements are told apart by their text.
impl QueryId for WalkQuery<'_> {
    type QueryId = ();

    const HAS_STATIC_QUERY_ID: bool = false;
}
