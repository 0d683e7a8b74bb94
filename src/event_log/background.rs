//! What the tasks have in common that work on the log by themselves.

use std::{error::Error as StdError, time::Duration};

use crate::error::Result;

/// Takes steps, with the pause after each that it says, until one says that there is no other.
/// After a step that failed it pauses for `retry`; only the first failure in a row is logged.
pub(super) async fn take_steps(
    failure: &'static str,
    retry: Duration,
    mut step: impl AsyncFnMut() -> Result<Option<Duration>>,
) {
    let mut failing = false;
    loop {
        let taken = step().await;
        if let Err(error) = &taken
            && !failing
        {
            tracing::warn!(error = error as &dyn StdError, "{failure}");
        }
        failing = taken.is_err();
        match taken {
            Ok(Some(pause)) => tokio::time::sleep(pause).await,
            Ok(None) => return,
            Err(_) => tokio::time::sleep(retry).await,
        }
    }
}
