//! Appends: many callers, few transactions.
//!
//! One task appends for the whole process. While one round (a transaction) is on its
//! way to disk, requests queue up; the next round takes all of them. So batches form
//! by back-pressure alone, and an idle server adds no delay.
//!
//! A round computes what each request does to its job from what is known of the job's
//! state, and one SQL function appends to those jobs that are still in that state. The
//! next round is planned while the round before it is under way, on the states that
//! the latter is expected to lead to, so that the database never waits for a plan.
//!
//! ```text
//!                  state in memory
//!  submitted ──▶ planned as Remembered ──▶ round sent ──committed──▶ answered
//!      │                │                      │
//!      │ no state       │ would be refused     │ job moved, or an id is stored
//!      ▼                ▼                      ▼
//!   waiting ──state and then stored ids read──▶ planned as Read ──▶ round sent ──▶ …
//!      ▲                                           │                   │
//!      │            refused: answered ◀────────────┘                   │ job moved again
//!      └── next round but one: row locked, planned as Locked ◀─────────┘
//! ```
//!
//! Nothing is refused from memory: the job's state is read first and the stored ids of
//! the request after it, so that a batch that is stored is never refused for what was
//! appended after it. A job to which another replica appends all the time has moved
//! before a round that was planned on its read state is sent: its row is locked while a
//! round of it alone is planned.

mod batch;
mod round;
mod task;

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use tokio::sync::{Semaphore, mpsc, oneshot};

pub(crate) use self::batch::{AppendedEvent, Batch, NewEvent, Step};
use self::{
    round::{Knowledge, Reply, Request},
    task::Task,
};
use super::{abort::abort_on_panic, tail::Tail};
use crate::{
    auth::Credential,
    db::{Database, notifier::Notifier},
    error::{Error, Result},
    telemetry::{Telemetry, traces::Traces},
};

/// Most requests that wait to be planned; further ones wait to be queued.
const QUEUE: usize = 4_096;
/// Most bytes of events that wait or are on their way, in KiB.
const QUEUE_KIB: u32 = 64 * 1024;

/// Submits batches to the task that appends.
#[derive(Clone, Debug)]
pub(crate) struct Appender {
    database: Database,
    queue: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
    traces: Traces,
}

/// Keeps the order of one publish stream: once a batch has failed, no later batch of
/// the stream is appended.
#[derive(Clone, Debug, Default)]
pub(crate) struct StreamOrder(Arc<AtomicBool>);

impl StreamOrder {
    fn fail(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn has_failed(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The answer to a submitted batch, still to come.
#[derive(Debug)]
pub(crate) struct PendingAnswer {
    database: Database,
    answer: oneshot::Receiver<Result<Vec<AppendedEvent>>>,
}

impl PendingAnswer {
    /// Returns once the batch is durable or refused, or commits hang.
    pub(crate) async fn wait(self) -> Result<Vec<AppendedEvent>> {
        let answer = async { self.answer.await.map_err(Error::unavailable)? };
        self.database.unless_commits_hang(answer).await
    }
}

impl Appender {
    /// Starts the task; it ends when the last clone of this is dropped.
    ///
    /// The task has a thread of its own: each of its steps keeps all callers waiting
    /// and must not queue behind the work of some of them.
    pub(crate) fn start(
        database: Database,
        tail: Arc<Tail>,
        notifier: Notifier,
        cache_bytes: u64,
        telemetry: Telemetry,
    ) -> io::Result<Self> {
        let (queue, requests) = mpsc::channel(QUEUE);
        let traces = telemetry.traces.clone();
        let task = Task::new(database.clone(), tail, notifier, cache_bytes, telemetry);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("append".to_owned()).spawn(move || {
            runtime.block_on(abort_on_panic(task.run(requests)));
        })?;
        Ok(Self { database, queue, room: Arc::new(Semaphore::new(QUEUE_KIB as usize)), traces })
    }

    /// Submits a batch. Batches for one job are appended in the order in which they
    /// were submitted. The credential is checked while the batch waits for room, when it
    /// is planned, and once more when its round is sent.
    pub(crate) async fn submit(
        &self,
        credential: Arc<Credential>,
        batch: Batch,
        stream_order: StreamOrder,
    ) -> Result<PendingAnswer> {
        let (since, span) = (Instant::now(), self.traces.append());
        let bytes: usize =
            batch.events.iter().map(|event| 256 + event.name.len() + event.metadata.len()).sum();
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(QUEUE_KIB).min(QUEUE_KIB);
        let room = Arc::clone(&self.room).acquire_many_owned(kib);
        let room = self.database.unless_commits_hang(async { room.await.map_err(Error::internal) });
        let room = credential.while_valid(room).await?;
        let (to, answer) = oneshot::channel();
        let request = Request {
            credential: Arc::clone(&credential),
            batch,
            stream_order,
            stored: HashMap::new(),
            needs: Knowledge::Remembered,
            reply: Reply { to, since },
            span,
            _room: room,
        };
        let queued = async { self.queue.send(request).await.map_err(|_| Error::Draining) };
        credential.while_valid(self.database.unless_commits_hang(queued)).await?;
        Ok(PendingAnswer { database: self.database.clone(), answer })
    }
}
