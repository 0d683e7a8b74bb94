//! Removal of the events of closed jobs, and the check whether a removal affects
//! a watch of all jobs.

use std::time::Duration;

use diesel::{
    dsl::exists,
    prelude::*,
    sql_types::{Integer, Interval},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};

use super::caller::Visibility;
use crate::{
    db::Transaction,
    error::Result,
    models::{history, interval},
    schema::{removed_logs, retention},
};

/// Most jobs that one step marks for removal, and about the most events that it
/// deletes.
const STEP_JOBS: i32 = 100;
const STEP_EVENTS: i32 = 1_000;

diesel::define_sql_function! {
    /// See migrations/2026-11-26-000006_retention/up.sql.
    fn remove_expired_events(
        age: Interval,
        most_jobs: Integer,
        most_events: Integer,
    ) -> Record<(BigInt, BigInt)>;
}

/// Runs one bounded step of the removal of all events of jobs that closed longer ago than
/// `age`. Returns true if it changed anything; there may be more to remove then.
pub async fn remove_step(tx: &mut Transaction<'_>, age: Duration) -> Result<bool> {
    history::enter(tx).await?;
    let step = remove_expired_events(interval(age), STEP_JOBS, STEP_EVENTS);
    let (marked, deleted): (i64, i64) = diesel::select(step).get_result(tx).await?;
    if marked > 0 || deleted > 0 {
        tracing::debug!(jobs = marked, events = deleted, "removed expired events");
    }
    Ok(marked > 0 || deleted > 0)
}

/// Selects the removed job logs that affect a watch of all jobs.
#[derive(Clone, Copy, Debug)]
pub struct Removed<'a> {
    /// Only logs of jobs that the viewer sees.
    pub visibility: Visibility,
    /// Only logs of jobs of this configuration tag; empty: of any tag.
    pub configuration_tag: &'a str,
    /// Only logs of jobs whose other party is this user.
    pub counterpart_id: Option<uuid::Uuid>,
    /// Only logs with an event after this position.
    pub after_position: i64,
    /// Only removals with a number greater than this one.
    pub since: i64,
    /// Leaves out logs all of whose events lay after the first of these positions
    /// and not after the second.
    pub except_between: Option<(i64, i64)>,
}

impl Removed<'_> {
    /// Returns the number of all logs removed so far, and whether the selection
    /// contains any of them.
    pub async fn check(self, connection: &mut AsyncPgConnection) -> Result<(i64, bool)> {
        let mut selected = removed_logs::table
            .filter(removed_logs::number.gt(self.since))
            .filter(removed_logs::position.gt(self.after_position))
            .into_boxed();
        if let Some((after, through)) = self.except_between {
            let touches = removed_logs::first_position.le(after).or(removed_logs::position.gt(through));
            selected = selected.filter(touches);
        }
        if !self.configuration_tag.is_empty() {
            selected = selected.filter(removed_logs::configuration_tag.eq(self.configuration_tag));
        }
        selected = match (self.visibility, self.counterpart_id) {
            (Visibility::Provider(id), None) => selected.filter(removed_logs::provider_id.eq(id)),
            (Visibility::Customer(id), None) => selected.filter(removed_logs::customer_id.eq(id)),
            (Visibility::Provider(provider), Some(customer))
            | (Visibility::Customer(customer), Some(provider)) => selected
                .filter(removed_logs::provider_id.eq(provider))
                .filter(removed_logs::customer_id.eq(customer)),
            (Visibility::Job(id), _) => selected.filter(removed_logs::job_id.eq(id)),
        };
        Ok(retention::table.select((retention::removals, exists(selected))).first(connection).await?)
    }
}
