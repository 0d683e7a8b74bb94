//! Removal of the events of closed jobs, and the check whether a removal affects
//! a watch of all jobs.

use std::time::Duration;

use diesel::{
    dsl::exists,
    prelude::*,
    sql_types::{Bool, Integer, Interval},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use super::caller::Visibility;
use crate::{
    db::Transaction,
    error::Result,
    models::{
        CreationCursor, history, interval,
        job::{JobScope, WalkPoint},
        labels::has_labels,
    },
    schema::{job_states, jobs, removed_logs, retention},
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
/// `age`. Returns how many jobs it marked and how many events it deleted; there may be more to
/// remove unless both are 0.
pub async fn remove_step(tx: &mut Transaction<'_>, age: Duration) -> Result<(u64, u64)> {
    history::enter(tx).await?;
    let step = remove_expired_events(interval(age), STEP_JOBS, STEP_EVENTS);
    let (marked, deleted): (i64, i64) = diesel::select(step).get_result(tx).await?;
    if marked > 0 || deleted > 0 {
        tracing::debug!(jobs = marked, events = deleted, "removed expired events");
    }
    Ok((marked.unsigned_abs(), deleted.unsigned_abs()))
}

/// Whether one of these jobs had an event up to a position of the log, and was removed after the
/// removal with a number.
pub async fn removed_since(
    connection: &mut AsyncPgConnection,
    jobs: &[Uuid],
    number: i64,
    position: i64,
) -> Result<bool> {
    let removed = removed_logs::table
        .filter(removed_logs::job_id.eq_any(jobs))
        .filter(removed_logs::number.gt(number))
        .filter(removed_logs::first_position.le(position));
    Ok(diesel::select(exists(removed)).get_result(connection).await?)
}

/// Selects the removed job logs that affect a watch of all jobs.
#[derive(Clone, Copy, Debug)]
pub struct Removed<'a> {
    /// Only logs of these jobs.
    pub scope: JobScope<'a>,
    /// Only logs with an event after this position.
    pub after_position: i64,
    /// Only removals with a number greater than this one.
    pub since: i64,
    pub unread: Unread,
}

/// What a watch has not read of the logs that have an event after a position.
#[derive(Clone, Copy, Debug)]
pub enum Unread {
    /// Events of all these logs. Left out are logs all of whose events lay after the first of
    /// these positions and not after the second.
    InLog { except_between: Option<(i64, i64)> },
    /// In a walk: events of the logs that go on behind its end, and of those that it has not
    /// come to, or not to their ends.
    InWalk {
        end: i64,
        /// How far the walk had come before the last page, and with it.
        points: [WalkPoint; 2],
        /// Leaves out the logs of which the walk has read no event.
        except_unbegun: bool,
    },
}

impl Removed<'_> {
    /// Returns the number of all logs removed so far, and whether the selection
    /// contains any of them.
    pub async fn check(self, connection: &mut AsyncPgConnection) -> Result<(i64, bool)> {
        let mut selected = removed_logs::table
            .filter(removed_logs::number.gt(self.since))
            .filter(removed_logs::position.gt(self.after_position))
            .into_boxed();
        match self.unread {
            Unread::InLog { except_between: None } => {}
            Unread::InLog { except_between: Some((after, through)) } => {
                let touches = removed_logs::first_position.le(after).or(removed_logs::position.gt(through));
                selected = selected.filter(touches);
            }
            Unread::InWalk { end, points: [before, with], except_unbegun } => {
                let begun = |point: WalkPoint| {
                    let counts = point.sequence > 0 || !except_unbegun;
                    let unread = job_states::table.find(point.job.id);
                    let unread = exists(unread.filter(job_states::last_sequence.gt(point.sequence)));
                    jobs::id.eq(point.job.id).and(unread).and(counts.into_sql::<Bool>())
                };
                let CreationCursor { created_at, id } = before.job;
                let later = jobs::created_at.eq(created_at).and(jobs::id.gt(id));
                let later = jobs::created_at.gt(created_at).or(later);
                let unread = later.and((!except_unbegun).into_sql::<Bool>());
                let unread = unread.or(begun(before)).or(begun(with));
                let unread = jobs::table.filter(jobs::id.eq(removed_logs::job_id).and(unread));
                selected = selected.filter(removed_logs::position.gt(end).or(exists(unread)));
            }
        }
        let JobScope { visibility, configuration_tag, counterpart_id, labels } = self.scope;
        if !labels.is_empty() {
            let labelled = jobs::table.filter(jobs::id.eq(removed_logs::job_id));
            selected = selected.filter(exists(labelled.filter(has_labels(jobs::labels, labels))));
        }
        if !configuration_tag.is_empty() {
            selected = selected.filter(removed_logs::configuration_tag.eq(configuration_tag));
        }
        selected = match (visibility, counterpart_id) {
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
