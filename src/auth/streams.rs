//! Counts the open streams of each user, and can reset each of them alone.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::future::{AbortHandle, Abortable};
use parking_lot::Mutex;
use uuid::Uuid;

use super::Credential;
use crate::{
    error::{Error, Result},
    models::caller::Subject,
};

/// When a user with too many streams should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Resets one stream and nothing else of its connection, on which a proxy may carry the
/// streams of many users.
#[derive(Clone, Debug)]
pub struct StreamReset(AbortHandle);

impl StreamReset {
    /// The future of a stream, which is dropped when the stream is reset, and its reset.
    pub(crate) fn of<F: Future>(stream: F) -> (Abortable<F>, Self) {
        let (handle, registration) = AbortHandle::new_pair();
        (Abortable::new(stream, registration), Self(handle))
    }

    pub(super) fn reset(&self) {
        self.0.abort();
    }
}

/// The reset of no stream, for a request that did not come over a connection.
impl Default for StreamReset {
    fn default() -> Self {
        Self(AbortHandle::new_pair().0)
    }
}

/// The numbers of open streams on this replica: by user, and by job for watch tokens.
#[derive(Clone, Debug)]
pub(super) struct Streams {
    limit: usize,
    open: Arc<Mutex<HashMap<Uuid, usize>>>,
}

/// A stream that is counted until this is dropped.
#[derive(Debug)]
pub struct OpenStream {
    streams: Streams,
    subject_id: Uuid,
    credential: Arc<Credential>,
    number: u64,
}

impl Streams {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, open: Arc::default() }
    }

    /// Counts one more stream under this credential. The stream is reset if it is still
    /// open some time after the credential's end. [`Error::Overloaded`] at the limit.
    pub(super) fn open(&self, credential: Arc<Credential>, reset: StreamReset) -> Result<OpenStream> {
        let subject_id = match credential.caller().subject() {
            Subject::User { id, .. } | Subject::Job(id) => id,
        };
        let mut open = self.open.lock();
        let count = open.entry(subject_id).or_default();
        if *count >= self.limit {
            return Err(Error::Overloaded { what: "streams of one user", retry_after: RETRY_AFTER });
        }
        *count += 1;
        drop(open);
        let number = credential.opened(reset);
        Ok(OpenStream { streams: self.clone(), subject_id, credential, number })
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.credential.closed(self.number);
        let mut open = self.streams.open.lock();
        if let Some(count) = open.get_mut(&self.subject_id) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.subject_id);
            }
        }
    }
}
