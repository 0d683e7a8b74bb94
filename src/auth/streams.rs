//! Open streams: how many each user has, and how those are cut that do not take
//! their end.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Credential;
use crate::{
    error::{Error, Result},
    models::caller::Subject,
};

/// When somebody who had as many streams as may be should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Counts the streams of this replica by user, or by job for watch tokens.
#[derive(Clone, Debug)]
pub(super) struct Streams {
    limit: usize,
    open: Arc<Mutex<HashMap<Uuid, usize>>>,
}

/// A stream that counts, until this is dropped.
#[derive(Debug)]
pub struct OpenStream {
    streams: Streams,
    whose: Uuid,
    credential: Arc<Credential>,
    number: u64,
}

impl Streams {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, open: Arc::default() }
    }

    /// One more under this credential; `connection` is cancelled if it is still
    /// open a while after the credential's end. [`Error::Overloaded`] where the
    /// user has as many as may be.
    pub(super) fn open(
        &self,
        credential: Arc<Credential>,
        connection: CancellationToken,
    ) -> Result<OpenStream> {
        let whose = match credential.caller().subject() {
            Subject::User { id, .. } | Subject::Job(id) => id,
        };
        let mut open = self.lock();
        let count = open.entry(whose).or_default();
        if *count >= self.limit {
            return Err(Error::Overloaded { what: "streams of one user", retry_after: RETRY_AFTER });
        }
        *count += 1;
        drop(open);
        let number = credential.opened(connection);
        Ok(OpenStream { streams: self.clone(), whose, credential, number })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, usize>> {
        // Nothing that holds it can leave it half changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.credential.closed(self.number);
        let mut open = self.streams.lock();
        if let Some(count) = open.get_mut(&self.whose) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.whose);
            }
        }
    }
}
