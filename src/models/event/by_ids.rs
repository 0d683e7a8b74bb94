//! Events of a job by their ids, by one index look-up an id.

use diesel::{
    dsl::AsSelect,
    expression::Expression,
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, Uuid},
};
use uuid::Uuid as Id;

use super::Event;

/// The stored events of a job that have one of these ids.
///
/// For `id = ANY (…)` with many ids, Postgres reads all events of the job if jobs have
/// few events on average, however many this one has. `OFFSET 0` prevents that plan.
pub(super) struct EventsByIds<'a> {
    columns: AsSelect<Event, Pg>,
    job_id: Id,
    ids: &'a [Id],
}

impl<'a> EventsByIds<'a> {
    pub(super) fn new(job_id: Id, ids: &'a [Id]) -> Self {
        Self { columns: Event::as_select(), job_id, ids }
    }
}

impl QueryFragment<Pg> for EventsByIds<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("SELECT ");
        self.columns.walk_ast(out.reborrow())?;
        out.push_sql(" FROM unnest(");
        out.push_bind_param::<Array<Uuid>, _>(&self.ids)?;
        out.push_sql(
            ") AS given (id) CROSS JOIN LATERAL (SELECT * FROM events \
             WHERE events.id = given.id AND events.job_id = ",
        );
        out.push_bind_param::<Uuid, _>(&self.job_id)?;
        out.push_sql(" OFFSET 0) AS events");
        Ok(())
    }
}

impl Query for EventsByIds<'_> {
    type SqlType = <AsSelect<Event, Pg> as Expression>::SqlType;
}

impl QueryId for EventsByIds<'_> {
    type QueryId = EventsByIds<'static>;
}
