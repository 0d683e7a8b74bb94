//! Counts the open streams of each user, and can reset each of them alone.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::future::{AbortHandle, Abortable};
use parking_lot::Mutex;
use uuid::Uuid;

use super::Credential;
use crate::{
    error::{Error, Result},
    models::caller::{Caller, Subject, Tenant},
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

/// The numbers of open streams on this server.
#[derive(Clone, Debug)]
pub(super) struct Streams {
    per_user: usize,
    tokens_per_user: usize,
    open: Arc<Mutex<HashMap<Counted, usize>>>,
}

/// Whose streams are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Counted {
    User(Uuid),
    /// The watch tokens of a job.
    TokensOfJob(Uuid),
    /// The watch tokens of all jobs of a provider, who can make any number of them.
    TokensOf(Tenant),
}

/// A stream that is counted until this is dropped.
#[derive(Debug)]
pub struct OpenStream {
    streams: Streams,
    credential: Arc<Credential>,
    number: u64,
}

impl Streams {
    pub(super) fn new(per_user: usize, tokens_per_user: usize) -> Self {
        Self { per_user, tokens_per_user, open: Arc::default() }
    }

    /// Counts one more stream under this credential. The stream is reset if it is still
    /// open some time after the credential's end. [`Error::Overloaded`] at the limit.
    pub(super) fn open(&self, credential: Arc<Credential>, reset: StreamReset) -> Result<OpenStream> {
        let mut open = self.open.lock();
        for counted in counted(credential.caller()) {
            let (limit, what) = match counted {
                Counted::User(_) => (self.per_user, "streams of one user"),
                Counted::TokensOfJob(_) => (self.per_user, "streams of one job's watch tokens"),
                Counted::TokensOf(_) => (self.tokens_per_user, "streams of one provider's watch tokens"),
            };
            if open.get(&counted).is_some_and(|count| *count >= limit) {
                return Err(Error::Overloaded { what, retry_after: RETRY_AFTER });
            }
        }
        counted(credential.caller()).for_each(|counted| *open.entry(counted).or_default() += 1);
        drop(open);
        let number = credential.opened(reset);
        Ok(OpenStream { streams: self.clone(), credential, number })
    }
}

fn counted(caller: &Caller) -> impl Iterator<Item = Counted> {
    let (own, tokens) = match caller.subject() {
        Subject::User { id, .. } => (Counted::User(id), None),
        Subject::Job(id) => (Counted::TokensOfJob(id), Some(Counted::TokensOf(caller.tenant()))),
    };
    [own].into_iter().chain(tokens)
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.credential.closed(self.number);
        let mut open = self.streams.open.lock();
        for counted in counted(self.credential.caller()) {
            if let Some(count) = open.get_mut(&counted) {
                *count -= 1;
                if *count == 0 {
                    open.remove(&counted);
                }
            }
        }
    }
}
