//! Queries whose plan does not depend on the statistics of the tables.

use diesel::{
    dsl::AsSelect,
    expression::Expression,
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, BigInt, Uuid as SqlUuid},
};
use uuid::Uuid;

use super::Event;
use crate::models::caller::Visibility;

pub(super) struct EventQuery<'a> {
    columns: AsSelect<Event, Pg>,
    rows: Rows<'a>,
}

#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    /// The stored events of a job that have one of these ids, by one index look-up an id.
    ///
    /// For `id = ANY (…)` with many ids, Postgres reads all events of the job if jobs have
    /// few events on average, however many this one has. `OFFSET 0` prevents that plan.
    ByIds { job_id: Uuid, ids: &'a [Uuid] },
    /// Events of the log after a position and up to another, of visible jobs whose logs are
    /// not being removed, ascending.
    ///
    /// Each event's job is looked up, in the order of the log, until there are enough
    /// events. Postgres would plan a plain join by statistics: with those of tables that
    /// have grown since the last ANALYZE, it gathers and sorts the events of every visible
    /// job for each page. `OFFSET 0` keeps Postgres from turning the look-up into a join.
    /// `(SELECT …)` hides the range from the planner, which would take it for so short
    /// that all of it may be gathered and sorted.
    Visible { visibility: Visibility, after: i64, through: i64, limit: i64 },
    /// Events of jobs, of each after one sequence and up to another, job by job; none of jobs
    /// whose logs are being removed. The arrays have an element for each job.
    ///
    /// Each job is a look-up, and a range of one index. `OFFSET 0` keeps Postgres from other
    /// joins.
    Ranges { jobs: &'a [Uuid], after: &'a [i64], through: &'a [i64] },
}

impl<'a> EventQuery<'a> {
    pub(super) fn new(rows: Rows<'a>) -> Self {
        Self { columns: Event::as_select(), rows }
    }
}

impl QueryFragment<Pg> for EventQuery<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("SELECT ");
        self.columns.walk_ast(out.reborrow())?;
        match &self.rows {
            Rows::ByIds { job_id, ids } => {
                out.push_sql(" FROM unnest(");
                out.push_bind_param::<Array<SqlUuid>, _>(ids)?;
                out.push_sql(
                    ") AS given (id) CROSS JOIN LATERAL (SELECT * FROM events \
                     WHERE events.id = given.id AND events.job_id = ",
                );
                out.push_bind_param::<SqlUuid, _>(job_id)?;
                out.push_sql(" OFFSET 0) AS events");
            }
            Rows::Visible { visibility, after, through, limit } => {
                let (column, id) = match visibility {
                    Visibility::Provider(id) => ("provider_id", id),
                    Visibility::Customer(id) => ("customer_id", id),
                    Visibility::Job(id) => ("id", id),
                };
                out.push_sql(
                    " FROM events CROSS JOIN LATERAL (SELECT FROM jobs \
                     WHERE jobs.id = events.job_id AND NOT jobs.events_removed AND jobs.",
                );
                out.push_sql(column);
                out.push_sql(" = ");
                out.push_bind_param::<SqlUuid, _>(id)?;
                out.push_sql(" OFFSET 0) AS visible WHERE events.position > (SELECT ");
                out.push_bind_param::<BigInt, _>(after)?;
                out.push_sql(") AND events.position <= (SELECT ");
                out.push_bind_param::<BigInt, _>(through)?;
                out.push_sql(") ORDER BY events.position LIMIT (SELECT ");
                out.push_bind_param::<BigInt, _>(limit)?;
                out.push_sql(")");
            }
            Rows::Ranges { jobs, after, through } => {
                out.push_sql(" FROM unnest(");
                out.push_bind_param::<Array<SqlUuid>, _>(jobs)?;
                out.push_sql(", ");
                out.push_bind_param::<Array<BigInt>, _>(after)?;
                out.push_sql(", ");
                out.push_bind_param::<Array<BigInt>, _>(through)?;
                out.push_sql(
                    ") WITH ORDINALITY AS given (job_id, after, through, ordinal) \
                     CROSS JOIN LATERAL (SELECT FROM jobs WHERE jobs.id = given.job_id \
                     AND NOT jobs.events_removed OFFSET 0) AS kept \
                     CROSS JOIN LATERAL (SELECT * FROM events WHERE events.job_id = given.job_id \
                     AND events.sequence > given.after AND events.sequence <= given.through \
                     ORDER BY events.sequence OFFSET 0) AS events \
                     ORDER BY given.ordinal, events.sequence",
                );
            }
        }
        Ok(())
    }
}

impl Query for EventQuery<'_> {
    type SqlType = <AsSelect<Event, Pg> as Expression>::SqlType;
}

// The text depends on the rows, so that statements are told apart by their text.
impl QueryId for EventQuery<'_> {
    type QueryId = ();

    const HAS_STATIC_QUERY_ID: bool = false;
}
