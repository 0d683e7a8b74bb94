//! The tasks of a publisher with a spool: one reads the spool into the queues of the jobs, and
//! one keeps how far everything is delivered.

use std::sync::Arc;

use tokio::sync::watch;
use tonic::Status;

use super::{
    Spool,
    record::{Found, find},
};
use crate::publisher::{
    PublishError, Refusal, Refused, blocking,
    engine::{Done, Engine},
};

/// Follows the spool to its end, as far as there is room in memory.
pub(in crate::publisher) struct Follower {
    engine: Arc<Engine>,
    spool: Arc<Spool>,
    /// The offset up to which the spool is read.
    offset: u64,
}

impl Follower {
    pub(in crate::publisher) fn new(engine: Arc<Engine>, spool: Arc<Spool>) -> Self {
        let offset = spool.delivered();
        Self { engine, spool, offset }
    }

    /// Runs until the publisher stops.
    pub(in crate::publisher) async fn run(mut self) {
        let mut written = self.spool.written.subscribe();
        while written.wait_for(|end| *end > self.offset).await.is_ok() {
            if let Err(error) = self.read_segment().await {
                self.engine.fail(error);
                return;
            }
        }
    }

    /// Reads to the end of a segment.
    async fn read_segment(&mut self) -> Result<(), PublishError> {
        let (spool, offset) = (self.spool.clone(), self.offset);
        let (bytes, end) = blocking(move || spool.read(offset)).await?;
        let mut start = 0;
        while start < bytes.len() {
            start = match find(&bytes, start) {
                Found::Record { end, job, content } => {
                    let room = self.engine.room(content.size()).await?;
                    let length = (end - start) as u64;
                    self.engine.enqueue(job, *content, room, length);
                    self.offset += length;
                    end
                }
                Found::Damaged { end } => self.reject(&bytes, start, end).await,
                Found::Torn => self.reject(&bytes, start, bytes.len()).await,
            }
        }
        if self.offset < end {
            self.skip(Vec::new(), end - self.offset).await;
        }
        Ok(())
    }

    async fn reject(&mut self, bytes: &[u8], start: usize, end: usize) -> usize {
        self.skip(bytes[start..end].to_vec(), (end - start) as u64).await;
        end
    }

    /// Tells that a part of the spool cannot be sent. No bytes: the part is missing.
    async fn skip(&mut self, bytes: Vec<u8>, length: u64) {
        let (start, end) = (self.offset, self.offset + length);
        let what = if bytes.is_empty() { "missing" } else { "damaged" };
        let error = Status::data_loss(format!("the bytes {start} to {end} of the spool are {what}"));
        let refusal = Refusal { refused: Refused::Damaged(bytes), error: error.into() };
        self.engine.reject(start, refusal).await;
        self.engine.skip(length);
        self.offset = end;
    }
}

/// Keeps how far everything is delivered, until the publisher stops.
pub(in crate::publisher) async fn save_delivered(spool: Arc<Spool>, mut done: watch::Receiver<Done>) {
    while done.changed().await.is_ok() {
        let (spool, delivered) = (spool.clone(), done.borrow_and_update().position);
        // The next change tries again, and so does the end of the publisher, which reports it.
        // Until then a restart sends more than it must, by the same ids.
        let _unsaved = blocking(move || spool.save_delivered(delivered)).await;
    }
}
