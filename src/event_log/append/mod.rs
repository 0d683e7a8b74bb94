//! Appends: many callers, few transactions.
//!
//! One task appends for the whole process. While one round (a transaction) is on its
//! way to disk, requests queue up; the next round takes as many of them as it has room
//! for, in turns of the jobs' providers. So batches form by back-pressure alone, an idle
//! server adds no delay, and no provider waits behind all that another one sends: its
//! first request is in the next round.
//!
//! A round computes what each request does to its job from what is known of the job's
//! state, and one SQL function appends to those jobs that are still in that state. The
//! next round is planned while the round before it is under way, on the states that
//! the latter is expected to lead to, so that the database never waits for a plan.
//! Where the job has to be read first, that happens over a connection of its own, a
//! bounded piece at a time, and no round waits for it.
//!
//! ```text
//!                  state in memory
//!  submitted ──▶ planned as Remembered ──▶ round sent ──committed──▶ answered
//!      │                │                      │
//!      │ no state       │ would be refused     │ job moved, or an id is stored
//!      ▼                ▼                      ▼
//!   waiting ──state and then stored ids read──▶ planned as Read ──▶ round sent ──▶ …
//!      ▲                                           │                   │
//!      │   refused or stored already: answered ◀───┘                   │ job moved again
//!      └── row locked, planned as Locked, appended by itself ◀─────────┘
//! ```
//!
//! Nothing is refused from memory: the job's state is read first and the stored ids of
//! the request after it, so that a batch that is stored is never refused for what was
//! appended after it. A job to which another replica appends all the time has moved
//! before a round that was planned on its read state is sent: its row is locked while a
//! round of it alone is planned and sent, beside the rounds of all other jobs.

mod batch;
mod look;
mod queue;
mod request;
mod round;
mod task;
mod waiting;

use std::{
    collections::HashMap,
    fmt::Debug,
    io,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use tokio::sync::oneshot;

pub(crate) use self::batch::{Appended, Batch, NewEvent, Step};
use self::{
    queue::Queue,
    request::{Cost, Knowledge, Reply, Request},
    task::Task,
};
use super::{abort::abort_on_panic, tail::Tail};
use crate::{
    auth::Credential,
    db::{Database, notifier::Notifier},
    error::{Error, Result},
    telemetry::{Telemetry, traces::Traces},
    usage::EventUsage,
};

/// What the batches of one round come to, except for the first batch of each provider,
/// which may pass it: see `Costs::has_room`. By this every round is short.
const ROUND: Cost = Cost { events: 2_000, bytes: 1024 * 1024 };

/// Submits batches to the task that appends.
#[derive(Clone, Debug)]
pub(crate) struct Appender {
    database: Database,
    queue: Arc<Submitting>,
    traces: Traces,
}

/// The submitters' end of the queue, which is closed when this is dropped.
#[derive(Debug)]
struct Submitting(Arc<Queue>);

impl Drop for Submitting {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// What a caller holds for its batch, such as a part of the bytes that it may have in
/// flight, and what is given back once the log no longer has the batch.
pub(crate) trait Held: Debug + Send + Sync {}

impl<T: Debug + Send + Sync> Held for T {}

/// Keeps the order of one publish stream: once a batch has failed, no later batch of
/// the stream is appended.
#[derive(Clone, Debug, Default)]
pub(crate) struct StreamOrder(Arc<AtomicBool>);

impl StreamOrder {
    fn fail(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Tells the streams of a round apart.
    fn number(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    fn has_failed(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The answer to a submitted batch, still to come.
#[derive(Debug)]
pub(crate) struct PendingAnswer {
    database: Database,
    answer: oneshot::Receiver<Result<Appended>>,
}

impl PendingAnswer {
    /// Returns once the batch is durable or refused, or commits hang.
    pub(crate) async fn wait(self) -> Result<Appended> {
        let answer = async { self.answer.await.map_err(Error::unavailable)? };
        self.database.unless_commits_hang(answer).await
    }
}

/// An [`Appender`] that does not keep the task from ending.
#[derive(Debug)]
pub(super) struct WeakAppender {
    database: Database,
    queue: Weak<Submitting>,
    traces: Traces,
}

impl WeakAppender {
    /// None once the task ends.
    pub(super) fn upgrade(&self) -> Option<Appender> {
        let (database, traces) = (self.database.clone(), self.traces.clone());
        Some(Appender { database, queue: self.queue.upgrade()?, traces })
    }
}

impl Appender {
    pub(super) fn downgrade(&self) -> WeakAppender {
        let (database, traces) = (self.database.clone(), self.traces.clone());
        WeakAppender { database, queue: Arc::downgrade(&self.queue), traces }
    }

    /// Starts the task; it ends when the last clone of this is dropped.
    ///
    /// The task has a thread of its own: each of its steps keeps all callers waiting
    /// and must not queue behind the work of some of them.
    pub(crate) fn start(
        database: Database,
        tail: Arc<Tail>,
        notifier: Notifier,
        cache_bytes: u64,
        usage: EventUsage,
        telemetry: Telemetry,
    ) -> io::Result<Self> {
        let queue = Arc::<Queue>::default();
        let traces = telemetry.traces.clone();
        let task =
            Task::new(database.clone(), Arc::clone(&queue), tail, notifier, cache_bytes, usage, telemetry);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("append".to_owned()).spawn(move || {
            runtime.block_on(abort_on_panic(task.run()));
        })?;
        Ok(Self { database, queue: Arc::new(Submitting(queue)), traces })
    }

    /// Submits a batch. Batches for one job are appended in the order in which they
    /// were submitted. The credential is checked now, when the batch is planned, and once
    /// more when its round is sent. `held` is dropped when the log no longer has the batch.
    pub(crate) async fn submit(
        &self,
        credential: Arc<Credential>,
        batch: Batch,
        stream_order: StreamOrder,
        held: Box<dyn Held>,
    ) -> Result<PendingAnswer> {
        credential.check_valid()?;
        self.enqueue(Some(credential), batch, stream_order, held).await
    }

    /// As [`Self::submit`], for a batch of the server itself.
    pub(crate) async fn submit_own(&self, batch: Batch) -> Result<PendingAnswer> {
        self.enqueue(None, batch, StreamOrder::default(), Box::new(())).await
    }

    async fn enqueue(
        &self,
        credential: Option<Arc<Credential>>,
        batch: Batch,
        stream_order: StreamOrder,
        held: Box<dyn Held>,
    ) -> Result<PendingAnswer> {
        let (since, span) = (Instant::now(), self.traces.append());
        let (to, answer) = oneshot::channel();
        let request = Request {
            credential,
            cost: Cost::of(&batch),
            batch,
            stream_order,
            stored: HashMap::new(),
            needs: Knowledge::Remembered,
            reply: Reply { to, since },
            span,
            _held: held,
        };
        let queue = &self.queue.0;
        let queued = async move {
            queue.push(request);
            Ok(())
        };
        self.database.unless_commits_hang(queued).await?;
        Ok(PendingAnswer { database: self.database.clone(), answer })
    }
}
