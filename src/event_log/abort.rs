//! Tasks that the process cannot do without.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;

/// Ends the process if `work` panics. A server that seems well but appends nothing,
/// or sends nothing to watchers, is worse than none; to go on, it would have to guess
/// what became of the work that it had begun.
pub(super) async fn abort_on_panic(work: impl Future<Output = ()>) {
    if AssertUnwindSafe(work).catch_unwind().await.is_err() {
        tracing::error!("the event log cannot go on: the process ends");
        std::process::abort();
    }
}
