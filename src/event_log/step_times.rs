//! Keeps the step times of completed jobs, on which estimates rest. Every server tries; each
//! job is taken by one of them. Retention waits for it.

use std::{sync::Weak, time::Duration};

use futures_util::FutureExt as _;

use super::{background::take_steps, tail::Tail};
use crate::{
    db::{Database, Unconditional},
    models::step_times,
};

/// Pause between two steps while there is more to keep.
const PAUSE: Duration = Duration::from_millis(50);
/// Pause while there is nothing to keep.
const IDLE: Duration = Duration::from_secs(1);

/// Keeps step times for as long as the tail is used.
pub(super) fn start(database: &Database, tail: Weak<Tail>) {
    let of_task = database.clone();
    database.spawn(take_steps("cannot keep the step times of completed jobs", IDLE, async move || {
        if tail.strong_count() == 0 {
            return Ok(None);
        }
        let more =
            of_task.write(Unconditional, |tx| async move { step_times::keep(tx).await }.boxed()).await?;
        Ok(Some(if more { PAUSE } else { IDLE }))
    }));
}
