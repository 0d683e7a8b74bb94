//! Why a publisher does not do what was asked of it.

use super::{Refusal, SpoolError};
use crate::CallError;

/// An error of a [`Publisher`](super::Publisher).
#[derive(Clone, Debug, thiserror::Error)]
pub enum PublishError {
    /// The server refused something that was appended since the last flush, and there is no
    /// `on_refused`. This is the first of these refusals. The publisher goes on.
    #[error("the server refused what was published: {}", .0.error)]
    Refused(Box<Refusal>),
    /// An error that no retry cures, such as an API key that has ended. The publisher has
    /// stopped, and loses what is not stored yet. One with a spool does not stop.
    #[error("the publisher has stopped: {0}")]
    Stopped(#[source] CallError),
    /// The spool cannot be used. If it cannot be read, the publisher has stopped; what the spool
    /// has stays there.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// A callback panicked. The publisher has stopped.
    #[error("the publisher has stopped: a callback panicked")]
    Callback,
}
