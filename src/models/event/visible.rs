//! Events of the log that belong to visible jobs, by a plan that does not depend on
//! the statistics of the tables.

use diesel::{
    dsl::AsSelect,
    expression::Expression,
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{BigInt, Uuid},
};

use super::Event;
use crate::models::caller::Visibility;

/// Events of the log after a position and up to another, of visible jobs whose logs are
/// not being removed, ascending.
///
/// Each event's job is looked up, in the order of the log, until there are enough
/// events. Postgres would plan a plain join by statistics: with those of tables that
/// have grown since the last ANALYZE, it gathers and sorts the events of every visible
/// job for each page. `OFFSET 0` keeps Postgres from turning the look-up into a join.
/// `(SELECT …)` hides the range from the planner, which would take it for so short
/// that all of it may be gathered and sorted.
pub(super) struct VisibleEvents {
    columns: AsSelect<Event, Pg>,
    visibility: Visibility,
    after: i64,
    through: i64,
    limit: i64,
}

impl VisibleEvents {
    pub(super) fn new(visibility: Visibility, after: i64, through: i64, limit: i64) -> Self {
        Self { columns: Event::as_select(), visibility, after, through, limit }
    }
}

impl QueryFragment<Pg> for VisibleEvents {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let (column, id) = match &self.visibility {
            Visibility::Provider(id) => ("provider_id", id),
            Visibility::Customer(id) => ("customer_id", id),
            Visibility::Job(id) => ("id", id),
        };
        out.push_sql("SELECT ");
        self.columns.walk_ast(out.reborrow())?;
        out.push_sql(
            " FROM events CROSS JOIN LATERAL (SELECT FROM jobs \
             WHERE jobs.id = events.job_id AND NOT jobs.events_removed AND jobs.",
        );
        out.push_sql(column);
        out.push_sql(" = ");
        out.push_bind_param::<Uuid, _>(id)?;
        out.push_sql(" OFFSET 0) AS visible WHERE events.position > (SELECT ");
        out.push_bind_param::<BigInt, _>(&self.after)?;
        out.push_sql(") AND events.position <= (SELECT ");
        out.push_bind_param::<BigInt, _>(&self.through)?;
        out.push_sql(") ORDER BY events.position LIMIT (SELECT ");
        out.push_bind_param::<BigInt, _>(&self.limit)?;
        out.push_sql(")");
        Ok(())
    }
}

impl Query for VisibleEvents {
    type SqlType = <AsSelect<Event, Pg> as Expression>::SqlType;
}

// The text depends on the visibility, so that statements are told apart by their text.
impl QueryId for VisibleEvents {
    type QueryId = ();

    const HAS_STATIC_QUERY_ID: bool = false;
}
