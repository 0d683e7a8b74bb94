//! The settings of a publisher.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{Publisher, Refusal, Spool, engine::Engine, recent::RecentJobs};
use crate::{
    CallError, Client,
    pb::{AppendedEvent, append_events_request::Job},
};

const MAX_EVENTS: usize = 10_000;
const MAX_BYTES: u32 = 16 * 1024 * 1024;
const MAX_REQUESTS: usize = 16;
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// How many jobs `on_cancellation_requested` was told of are remembered.
const TOLD_JOBS: usize = 10_000;

type OnStored = dyn FnMut(&Job, &AppendedEvent) + Send;
type OnRefused = dyn FnMut(&Refusal) + Send;
type OnInterruption = dyn FnMut(&CallError, Duration) + Send;
type OnCancellationRequested = dyn FnMut(&Job, SystemTime) + Send;

/// The settings of a [`Publisher`]. See [`Client::publisher`].
///
/// Callbacks are called one at a time. They must not block, since events are sent meanwhile.
#[derive(Debug)]
#[must_use]
pub struct PublisherBuilder {
    pub(super) client: Client,
    pub(super) max_events: usize,
    pub(super) max_bytes: u32,
    pub(super) max_requests: usize,
    pub(super) attempt_timeout: Duration,
    pub(super) callbacks: Callbacks,
    pub(super) spool: Option<Spool>,
}

#[derive(Default)]
pub(super) struct Callbacks {
    pub(super) on_stored: Option<Box<OnStored>>,
    pub(super) on_refused: Option<Box<OnRefused>>,
    pub(super) on_interruption: Option<Box<OnInterruption>>,
    pub(super) on_cancellation_requested: Option<Box<OnCancellationRequested>>,
}

impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callbacks").finish_non_exhaustive()
    }
}

impl PublisherBuilder {
    pub(crate) fn new(client: &Client) -> Self {
        Self {
            client: client.clone(),
            max_events: MAX_EVENTS,
            max_bytes: MAX_BYTES,
            max_requests: MAX_REQUESTS,
            attempt_timeout: ATTEMPT_TIMEOUT,
            callbacks: Callbacks::default(),
            spool: None,
        }
    }

    /// The most events that the publisher holds in memory, at least 1: 10,000 by default.
    pub fn max_events(mut self, events: usize) -> Self {
        self.max_events = events.max(1);
        self
    }

    /// The most bytes of events that the publisher holds in memory: 16 MiB by default. An event
    /// that is larger is held alone.
    pub fn max_bytes(mut self, bytes: u32) -> Self {
        self.max_bytes = bytes.max(1);
        self
    }

    /// The most requests in flight, at least 1: 16 by default. Requests that wait to be sent
    /// again count.
    pub fn max_requests(mut self, requests: usize) -> Self {
        self.max_requests = requests.max(1);
        self
    }

    /// How long a request waits for its answer before it is sent again: 10 s by default.
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = timeout;
        self
    }

    /// Called for each event that is stored, in the order of its job.
    pub fn on_stored(mut self, callback: impl FnMut(&Job, &AppendedEvent) + Send + 'static) -> Self {
        self.callbacks.on_stored = Some(Box::new(callback));
        self
    }

    /// Called for what the server refuses for its content. What comes later is sent on. With a
    /// spool, it can be called twice for the same content, if the process ends meanwhile.
    pub fn on_refused(mut self, callback: impl FnMut(&Refusal) + Send + 'static) -> Self {
        self.callbacks.on_refused = Some(Box::new(callback));
        self
    }

    /// Called when a request fails and will be sent again, with the cause and with the pause
    /// before.
    pub fn on_interruption(mut self, callback: impl FnMut(&CallError, Duration) + Send + 'static) -> Self {
        self.callbacks.on_interruption = Some(Box::new(callback));
        self
    }

    /// Called with a job, as it was given, and with the time when its customer asked to stop it,
    /// after the first answer that says so.
    ///
    /// A publisher calls it once for a job. It can call it again if answers said so of 10,000
    /// other jobs since the job's last answer. The next publisher calls it again, also with the
    /// same spool.
    pub fn on_cancellation_requested(
        mut self,
        mut callback: impl FnMut(&Job, SystemTime) + Send + 'static,
    ) -> Self {
        let mut told = RecentJobs::new(TOLD_JOBS);
        self.callbacks.on_cancellation_requested = Some(Box::new(move |job: &Job, at: SystemTime| {
            if told.add(job) {
                callback(job, at);
            }
        }));
        self
    }

    /// Sends what this spool has, and appends to it.
    pub fn spool(mut self, spool: Spool) -> Self {
        self.spool = Some(spool);
        self
    }

    /// Starts the publisher.
    ///
    /// # Panics
    ///
    /// Outside of a runtime of tokio.
    #[must_use]
    pub fn start(self) -> Publisher {
        let engine = Arc::new(Engine::new(self));
        engine.start();
        Publisher { engine, closed: false }
    }
}
