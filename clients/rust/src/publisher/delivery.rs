//! Sends the queue of a job: one request at a time, again after failures, and in parts after
//! a refusal.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::{sleep, timeout};
use tonic::Status;

use super::{
    PublishError, Refusal,
    content::Content,
    engine::{Engine, Item},
};
use crate::{
    CallError,
    pb::{AppendEventsRequest, AppendEventsResponse, append_events_request::Job},
    retry::{LONGEST_PAUSE, pause},
};

/// The longest pause after an error that no retry cures by itself, such as an API key that has
/// ended.
const LONGEST_PAUSE_OF_SPOOL: Duration = Duration::from_secs(60);

impl Engine {
    /// Sends the queue of a job until it is empty.
    pub(super) async fn deliver_job(self: Arc<Self>, job: Job) {
        loop {
            // Closed once the publisher has stopped.
            let Ok(_request) = self.requests.acquire().await else { return };
            let batch = self.take(&job);
            self.deliver(&job, batch).await;
            if self.check().is_err() || self.is_idle(&job) {
                return;
            }
        }
    }

    /// Sends a batch. If the server refuses its content, sends both halves, so that in the end
    /// an item is refused alone.
    async fn deliver(&self, job: &Job, batch: Vec<Item>) {
        // The last part is sent first.
        let mut parts = vec![batch];
        while let Some(mut part) = parts.pop() {
            match self.send(job, &part).await {
                Ok(answer) => self.stored(job, &part, &answer),
                Err(error) if error.refuses_content() => {
                    let rest = part.split_off(part.len() / 2);
                    if part.is_empty() {
                        self.refused(job, rest, error).await;
                    } else {
                        parts.extend([rest, part]);
                    }
                }
                // The items still have their room, so that no append is let in before.
                Err(error) => return self.fail(PublishError::Stopped(error)),
            }
        }
    }

    /// Sends a request until it is answered or refused. With a spool, only a refusal of the
    /// content is an error.
    async fn send(&self, job: &Job, part: &[Item]) -> Result<AppendEventsResponse, CallError> {
        let mut failures: u32 = 0;
        loop {
            let late = |_| Err(Status::deadline_exceeded("no answer came in time"));
            let attempt = timeout(self.attempt_timeout, self.attempt(job, part)).await;
            let error = match attempt.unwrap_or_else(late) {
                Ok(answer) => return Ok(answer),
                Err(status) => CallError::from(status),
            };
            let longest = match (error.is_transient(), self.spool()) {
                (true, _) => LONGEST_PAUSE,
                (false, Some(_)) if !error.refuses_content() => LONGEST_PAUSE_OF_SPOOL,
                (false, _) => return Err(error),
            };
            if self.check().is_err() {
                return Err(error);
            }
            self.interrupted(&error, failures, longest).await;
            failures = failures.saturating_add(1);
        }
    }

    async fn attempt(&self, job: &Job, part: &[Item]) -> Result<AppendEventsResponse, Status> {
        let mut events = Vec::with_capacity(part.len());
        for item in part {
            match &item.content {
                Content::Event(event) => events.push(event.clone()),
                // A batch of its own.
                Content::Job(request) => {
                    let created = self.client.jobs().create_job(request.clone()).await?.into_inner();
                    let cancellation_requested_at = created.job.and_then(|job| job.cancellation_requested_at);
                    return Ok(AppendEventsResponse { events: Vec::new(), cancellation_requested_at });
                }
            }
        }
        let request = AppendEventsRequest { job: Some(job.clone()), events, expected_sequence: None };
        Ok(self.client.events().append_events(request).await?.into_inner())
    }

    fn stored(&self, job: &Job, part: &[Item], answer: &AppendEventsResponse) {
        let requested_at = answer.cancellation_requested_at.and_then(|at| SystemTime::try_from(at).ok());
        self.tell(|callbacks| {
            if let Some(on_stored) = &mut callbacks.on_stored {
                answer.events.iter().for_each(|event| on_stored(job, event));
            }
            if let (Some(callback), Some(at)) = (&mut callbacks.on_cancellation_requested, requested_at) {
                callback(job, at);
            }
        });
        self.finish(part.iter().map(|item| item.position));
    }

    /// Tells that the only item of a part is refused. With a spool, it is kept as a file.
    async fn refused(&self, job: &Job, part: Vec<Item>, error: CallError) {
        for item in part {
            let refused = item.content.refused(job);
            self.reject(item.position, Refusal { refused, error: error.clone() }).await;
            self.finish([item.position]);
        }
    }

    /// Keeps a refusal in the spool, if there is one, and tells it.
    pub(super) async fn reject(&self, position: u64, refusal: Refusal) {
        let mut failures: u32 = 0;
        while let Some(spool) = self.spool().cloned() {
            let kept = refusal.clone();
            let Err(error) = super::blocking(move || spool.reject(position, &kept)).await else { break };
            let error = CallError::from(Status::unavailable(error.to_string()));
            self.interrupted(&error, failures, LONGEST_PAUSE_OF_SPOOL).await;
            failures = failures.saturating_add(1);
        }
        self.tell_refused(refusal);
    }

    async fn interrupted(&self, error: &CallError, failures: u32, longest: Duration) {
        let pause = pause(failures, longest, error);
        self.tell(|callbacks| {
            if let Some(on_interruption) = &mut callbacks.on_interruption {
                on_interruption(error, pause);
            }
        });
        sleep(pause).await;
    }
}
