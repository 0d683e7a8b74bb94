//! A batch on its way through the task that appends, and what it takes of a round.

use std::{
    collections::HashMap,
    ops::{AddAssign, SubAssign},
    sync::Arc,
    time::Instant,
};

use tokio::sync::oneshot;
use uuid::Uuid;

use super::{
    Held, StreamOrder,
    batch::{Appended, Batch},
};
use crate::{
    auth::Credential,
    error::{Error, Result},
    models::event::Event,
    telemetry::traces::AppendSpan,
};

/// Where the answer to a request goes, and since when its caller waits.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) to: oneshot::Sender<Result<Appended>>,
    pub(super) since: Instant,
}

/// What is known of a job's state when a request is planned, and what a request needs
/// to be known. See the diagram in the parent module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Knowledge {
    /// The state that the last round of this process led to.
    Remembered,
    /// The state was read from the database while no round of the job was planned or under
    /// way, and after it the stored ids of the requests that need this.
    Read,
    /// The same, and the job's row of `job_states` is locked until the round is committed.
    Locked,
}

/// How much batches take of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    pub(super) events: usize,
    pub(super) bytes: usize,
}

impl Cost {
    pub(super) fn of(batch: &Batch) -> Self {
        let events = &batch.events;
        Self { events: events.len(), bytes: events.iter().map(super::NewEvent::bytes).sum() }
    }

    /// Whether this is within a limit.
    pub(super) fn is_within(self, limit: Self) -> bool {
        self.events <= limit.events && self.bytes <= limit.bytes
    }

    pub(super) fn plus(mut self, other: Self) -> Self {
        self += other;
        self
    }

    pub(super) const fn times(self, factor: usize) -> Self {
        Self { events: self.events * factor, bytes: self.bytes * factor }
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.events += other.events;
        self.bytes += other.bytes;
    }
}

impl SubAssign for Cost {
    fn sub_assign(&mut self, other: Self) {
        self.events -= other.events;
        self.bytes -= other.bytes;
    }
}

/// The costs of some requests, by the provider of their jobs.
#[derive(Debug, Default)]
pub(super) struct Costs {
    total: Cost,
    by_provider: HashMap<Uuid, Cost>,
}

impl Costs {
    pub(super) fn add(&mut self, request: &Request) {
        self.total += request.cost;
        *self.by_provider.entry(request.provider_id()).or_default() += request.cost;
    }

    pub(super) fn remove(&mut self, request: &Request) {
        self.total -= request.cost;
        if let Some(cost) = self.by_provider.get_mut(&request.provider_id()) {
            *cost -= request.cost;
            // A batch has at least one event.
            if cost.events == 0 {
                self.by_provider.remove(&request.provider_id());
            }
        }
    }

    pub(super) fn of(&self, provider_id: Uuid) -> Cost {
        self.by_provider.get(&provider_id).copied().unwrap_or_default()
    }

    /// Whether there is room for a request. In their turns, providers fill what `limit` has.
    /// The first request of a provider may pass `limit` up to three times, so that no
    /// provider has to wait because another one has filled it.
    pub(super) fn has_room(&self, provider_id: Uuid, cost: Cost, limit: Cost) -> bool {
        let first = !self.by_provider.contains_key(&provider_id);
        let limit = if first { limit.times(3) } else { limit };
        self.total == Cost::default() || self.total.plus(cost).is_within(limit)
    }
}

#[derive(Debug)]
pub(super) struct Request {
    /// None: the server itself submitted the batch.
    pub(super) credential: Option<Arc<Credential>>,
    pub(super) batch: Batch,
    pub(super) cost: Cost,
    pub(super) stream_order: StreamOrder,
    /// Events of the batch that were found stored.
    pub(super) stored: HashMap<Uuid, Event>,
    pub(super) needs: Knowledge,
    pub(super) reply: Reply,
    pub(super) span: Option<Box<AppendSpan>>,
    pub(super) _held: Box<dyn Held>,
}

impl Request {
    pub(super) fn job_id(&self) -> Uuid {
        self.batch.job.id
    }

    pub(super) fn provider_id(&self) -> Uuid {
        self.batch.job.provider_id
    }

    pub(super) fn answer(self, answer: Result<Appended>) {
        // A caller that left needs no answer.
        let _ = self.reply.to.send(answer);
    }

    /// Fails the request and all later ones of its publish stream.
    pub(super) fn fail(self, source: &Arc<Error>) {
        self.stream_order.fail();
        let source = Arc::clone(source);
        let internal = matches!(*source, Error::Internal(_));
        self.answer(Err(if internal { Error::internal(source) } else { Error::unavailable(source) }));
    }

    /// Why the batch must not be appended: its credential has ended, an earlier batch of the
    /// publish stream failed, or the caller has left.
    pub(super) fn refusal(&self) -> Option<Error> {
        if let Some(Err(error)) = self.credential.as_ref().map(|credential| credential.check_valid()) {
            return Some(error);
        }
        if self.stream_order.has_failed() {
            return Some(Error::unavailable("a batch before this one failed"));
        }
        self.reply.to.is_closed().then(|| Error::unavailable("the caller has left"))
    }

    /// `None` if the batch must not be appended any more. Then no later batch of the publish
    /// stream is appended either.
    pub(super) fn still_wanted(self) -> Option<Self> {
        let Some(error) = self.refusal() else { return Some(self) };
        self.stream_order.fail();
        self.answer(Err(error));
        None
    }
}
