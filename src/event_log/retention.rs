//! Removes the events that retention does not keep, in small steps. Every replica
//! tries; one at a time succeeds. Which events a step removes is decided by the SQL
//! function `remove_expired_events`, in migrations/2026-11-26-000006_retention/up.sql.

use std::{
    error::Error as StdError,
    sync::Weak,
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;

use super::tail::Tail;
use crate::{
    db::{Database, Unconditional},
    error::Result,
    models::retention::remove_step,
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
pub(super) fn start(database: Database, age: Duration, tail: Weak<Tail>) {
    database.clone().spawn(async move {
        let idle = (age / 10).clamp(PAUSE, IDLE);
        let mut failing = false;
        while tail.strong_count() > 0 {
            let started = Instant::now();
            let stepped = step(&database, age).await;
            // Logged once an outage, not at every attempt.
            if let Err(error) = &stepped
                && !failing
            {
                tracing::warn!(error = error as &dyn StdError, "cannot remove expired events");
            }
            failing = stepped.is_err();
            let more = stepped.unwrap_or(false);
            let pause = if more { PAUSE.max(started.elapsed() * PAUSE_FACTOR) } else { idle };
            tokio::time::sleep(pause).await;
        }
    });
}

async fn step(database: &Database, age: Duration) -> Result<bool> {
    database.write(Unconditional, move |tx| async move { remove_step(tx, age).await }.boxed()).await
}
