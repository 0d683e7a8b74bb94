//! What retention removes, and what a watch of all jobs can know of it.

use std::time::Duration;

use diesel::{
    dsl::exists,
    prelude::*,
    sql_types::{Integer, Interval},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};

use super::caller::Visibility;
use crate::{
    error::Result,
    models::interval,
    schema::{event_log, removed_logs, retention},
};

/// Most jobs of one step, and about the most events.
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

/// One small step towards the removal of all events of jobs that closed longer
/// ago than `age`. Whether it did anything: then there may be more to do.
pub async fn remove_step(connection: &mut AsyncPgConnection, age: Duration) -> Result<bool> {
    let step = remove_expired_events(interval(age), STEP_JOBS, STEP_EVENTS);
    let (marked, deleted): (i64, i64) = diesel::select(step).get_result(connection).await?;
    if marked > 0 || deleted > 0 {
        tracing::debug!(jobs = marked, events = deleted, "removed what has expired");
    }
    Ok(marked > 0 || deleted > 0)
}

/// Where the log of all jobs ends, and how many logs had been removed then:
/// whoever reads after this sees every event up to the one and every removal
/// up to the other.
pub async fn log_end(connection: &mut AsyncPgConnection) -> Result<(i64, i64)> {
    let removals = retention::table.select(retention::removals).single_value().assume_not_null();
    Ok(event_log::table.select((event_log::position, removals)).first(connection).await?)
}

/// Which removed logs matter to a watch of all jobs.
#[derive(Clone, Copy, Debug)]
pub struct Removed<'a> {
    /// Of jobs in sight.
    pub visibility: Visibility,
    /// Of this configuration tag; empty: of all.
    pub configuration_tag: &'a str,
    /// With this user on the other side.
    pub counterpart_id: Option<uuid::Uuid>,
    /// That had an event after this position.
    pub after_position: i64,
    /// Removed after this many others.
    pub since: i64,
    /// But those that lay between two positions, whole: after the first, and up
    /// to the second.
    pub except_between: Option<(i64, i64)>,
}

impl Removed<'_> {
    /// How many logs have been removed by now, all in all, and whether any of
    /// them is one of these.
    pub async fn look(self, connection: &mut AsyncPgConnection) -> Result<(i64, bool)> {
        let mut these = removed_logs::table
            .filter(removed_logs::number.gt(self.since))
            .filter(removed_logs::position.gt(self.after_position))
            .into_boxed();
        if let Some((after, through)) = self.except_between {
            let touches = removed_logs::first_position.le(after).or(removed_logs::position.gt(through));
            these = these.filter(touches);
        }
        if !self.configuration_tag.is_empty() {
            these = these.filter(removed_logs::configuration_tag.eq(self.configuration_tag));
        }
        these = match (self.visibility, self.counterpart_id) {
            (Visibility::Provider(id), None) => these.filter(removed_logs::provider_id.eq(id)),
            (Visibility::Customer(id), None) => these.filter(removed_logs::customer_id.eq(id)),
            (Visibility::Provider(provider), Some(customer))
            | (Visibility::Customer(customer), Some(provider)) => these
                .filter(removed_logs::provider_id.eq(provider))
                .filter(removed_logs::customer_id.eq(customer)),
            (Visibility::Job(id), _) => these.filter(removed_logs::job_id.eq(id)),
        };
        Ok(retention::table.select((retention::removals, exists(these))).first(connection).await?)
    }
}
