//! Removes the events that retention does not keep, in small steps. Every replica
//! tries; one at a time succeeds. Which events a step removes is decided by the SQL
//! function `remove_expired_events`, in migrations/2026-11-26-000006_retention/up.sql.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;

use super::{background::take_steps, tail::Tail};
use crate::{
    db::{Database, Unconditional},
    error::Result,
    models::retention::remove_step,
    telemetry::metrics::Metrics,
};

/// Shortest pause between two steps.
const PAUSE: Duration = Duration::from_millis(50);
/// How many times as long as the step before it a pause is, so that removals take
/// little from appends.
const PAUSE_FACTOR: u32 = 4;
/// Longest pause while there is nothing to remove.
const IDLE: Duration = Duration::from_secs(60);

/// Removes the events of jobs that closed longer ago than `age`, for as long as the
/// tail is used.
pub(super) fn start(database: &Database, age: Duration, tail: Weak<Tail>, metrics: Arc<Metrics>) {
    let of_task = database.clone();
    let idle = (age / 10).clamp(PAUSE, IDLE);
    database.spawn(take_steps("cannot remove expired events", idle, async move || {
        if tail.strong_count() == 0 {
            return Ok(None);
        }
        let started = Instant::now();
        let more = step(&of_task, age, &metrics).await?;
        Ok(Some(if more { PAUSE.max(started.elapsed() * PAUSE_FACTOR) } else { idle }))
    }));
}

/// Removes some events. Returns whether there may be more to remove.
async fn step(database: &Database, age: Duration, metrics: &Metrics) -> Result<bool> {
    let step = database.write(Unconditional, move |tx| async move { remove_step(tx, age).await }.boxed());
    let (jobs, events) = step.await?;
    metrics.removals.jobs.inc_by(jobs);
    metrics.removals.events.inc_by(events);
    Ok(jobs > 0 || events > 0)
}
