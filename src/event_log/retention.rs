//! Removes what retention does not keep, in small steps: any replica may, one
//! at a time does.

use std::{
    error::Error as StdError,
    sync::Weak,
    time::{Duration, Instant},
};

use super::tail::Tail;
use crate::{db::Database, error::Result, models::retention::remove_step};

/// Shortest pause between two steps.
const PAUSE: Duration = Duration::from_millis(50);
/// How much longer a pause is than the step before it, so that appends hardly
/// notice.
const PAUSE_FACTOR: u32 = 4;
/// Longest pause where there is nothing to do.
const IDLE: Duration = Duration::from_secs(60);

/// Removes the events of jobs that closed longer ago than `age`, as long as the
/// log is used.
pub(super) fn start(database: Database, age: Duration, log: Weak<Tail>) {
    tokio::spawn(async move {
        let idle = (age / 10).clamp(PAUSE, IDLE);
        let mut works = true;
        while log.strong_count() > 0 {
            let started = Instant::now();
            let stepped = step(&database, age).await;
            // Told once, not at every attempt.
            if let Err(error) = &stepped
                && works
            {
                tracing::warn!(error = error as &dyn StdError, "cannot remove expired events");
            }
            works = stepped.is_ok();
            let more = stepped.unwrap_or(false);
            let pause = if more { PAUSE.max(started.elapsed() * PAUSE_FACTOR) } else { idle };
            tokio::time::sleep(pause).await;
        }
    });
}

async fn step(database: &Database, age: Duration) -> Result<bool> {
    remove_step(&mut *database.get().await?, age).await
}
