//! Removes credentials that ended 30 days ago, in small steps. Every replica tries; one at a
//! time succeeds. Which ones a step removes is decided by the SQL function
//! `remove_ended_credentials`, in migrations/2026-11-26-000011_ended_credentials/up.sql.

use std::{error::Error as StdError, sync::Weak, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::sleep;

use super::Inner;
use crate::{db::Unconditional, models::credential};

/// Pause between two steps while there is more to remove.
const PAUSE: Duration = Duration::from_millis(250);
/// Pause while there is nothing to remove. The SQL function takes a step that comes much
/// later for a sign of a clock that was set ahead.
const IDLE: Duration = Duration::from_secs(60);

pub(super) async fn remove_ended(auth: Weak<Inner>) {
    let mut failing = false;
    while let Some(auth) = auth.upgrade() {
        let step = auth
            .database
            .write(Unconditional, |tx| async move { credential::remove_ended(tx).await }.boxed())
            .await;
        drop(auth);
        // Logged once an outage, not at every attempt.
        if let Err(error) = &step
            && !failing
        {
            tracing::warn!(error = error as &dyn StdError, "cannot remove ended credentials");
        }
        failing = step.is_err();
        sleep(if step.unwrap_or(false) { PAUSE } else { IDLE }).await;
    }
}
