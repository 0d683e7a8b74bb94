//! Appends events in the background, from memory or from a spool on disk.
//!
//! ```text
//! append -> queue of the job -> one request at a time -> on_stored, on_refused, on_cancellation_requested
//! append -> spool -> (while there is room) -> queue of the job -> …
//! ```

mod builder;
mod content;
mod delivery;
mod engine;
mod error;
mod recent;
mod spool;

use std::{panic, sync::Arc};

use tokio::task::spawn_blocking;
use uuid::Uuid;

pub use self::{
    builder::PublisherBuilder,
    content::{Refusal, Refused},
    error::PublishError,
    spool::{Spool, SpoolError, SpoolSettings},
};
use self::{content::Content, engine::Engine};
use crate::pb::{CreateJobRequest, NewEvent, append_events_request::Job};

/// Appends events to jobs in the background: each once, and those of a job in the order in
/// which they were given. Failures of the network and of servers are survived.
///
/// A job has at most one request in flight. What is appended meanwhile becomes the next batch.
/// Name a job always in the same way: by its id and by its `provider_job_id` it is two jobs
/// for the order.
///
/// Call [`Publisher::close`] at the end. A publisher that is dropped earlier stops; unless it
/// has a spool, it loses the events that are not stored yet, and says so on standard error.
#[derive(Debug)]
pub struct Publisher {
    engine: Arc<Engine>,
    closed: bool,
}

impl Publisher {
    /// Appends an event to a job. Gives it an id (UUID version 7) if it has none.
    ///
    /// Without a spool, it waits while the publisher holds as many events or bytes as it may,
    /// and does not wait for the server. A future that is dropped has appended nothing.
    ///
    /// With a spool, it returns when the event is in the spool, and never waits for the server.
    /// A future that is dropped may have appended the event.
    pub async fn append(&self, job: Job, mut event: NewEvent) -> Result<(), PublishError> {
        if event.id.is_empty() {
            event.id = Uuid::now_v7().to_string();
        }
        self.enqueue(job, Content::Event(event)).await
    }

    /// Creates a job in the background, in the same way. Events that are appended later under
    /// its `provider_job_id` are sent after it.
    pub async fn create_job(&self, request: CreateJobRequest) -> Result<(), PublishError> {
        let job = Job::ProviderJobId(request.provider_job_id.clone());
        self.enqueue(job, Content::Job(request)).await
    }

    async fn enqueue(&self, job: Job, content: Content) -> Result<(), PublishError> {
        self.engine.check()?;
        match self.engine.spool() {
            Some(spool) => {
                let (spool, record) = (spool.clone(), spool::encode(job, content));
                Ok(blocking(move || spool.append(&record)).await?)
            }
            None => {
                let room = self.engine.room(content.size()).await?;
                self.engine.enqueue(job, content, room, 1);
                Ok(())
            }
        }
    }

    /// Returns when everything that was appended before is stored or refused. Without
    /// `on_refused`, the first refusal since the last flush is the error.
    pub async fn flush(&self) -> Result<(), PublishError> {
        self.engine.flush().await
    }

    /// Flushes, and ends the publisher. With a spool, it need not be called: what is not
    /// stored yet is sent by the next publisher that has the spool.
    pub async fn close(mut self) -> Result<(), PublishError> {
        let flushed = self.flush().await;
        self.closed = true;
        flushed.and(self.engine.stop().await)
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        let pending = self.engine.abort();
        if !self.closed && pending > 0 && self.engine.spool().is_none() {
            eprintln!(
                "milepost-client: a publisher was dropped with {pending} events that may not be stored: call \
                 Publisher::close and wait for it"
            );
        }
    }
}

/// Runs work that blocks, such as access to files.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    spawn_blocking(work).await.unwrap_or_else(|error| panic::resume_unwind(error.into_panic()))
}
