//! The queues of the jobs, the room for what they hold, and what is done.

use std::{
    collections::{BTreeSet, HashMap, VecDeque, hash_map::Entry},
    fmt, mem,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};

use super::{
    PublishError, PublisherBuilder, Refusal, Spool,
    builder::Callbacks,
    content::Content,
    spool::{Follower, save_delivered},
};
use crate::{Client, pb::append_events_request::Job};

/// The most events and bytes of a batch. A request may have 500 events and 1 MiB.
const BATCH_EVENTS: usize = 500;
const BATCH_BYTES: usize = 900 * 1024;
/// The most bytes that an event needs in a batch beside its own.
const FIELD_BYTES: usize = 8;

/// Everything of a publisher but its handle.
pub(super) struct Engine {
    pub(super) client: Client,
    pub(super) attempt_timeout: Duration,
    /// Requests that may be in flight.
    pub(super) requests: Semaphore,
    event_room: Arc<Semaphore>,
    byte_room: Arc<Semaphore>,
    max_bytes: u32,
    callbacks: Mutex<Callbacks>,
    queues: Mutex<Queues>,
    done: watch::Sender<Done>,
    tasks: Mutex<JoinSet<()>>,
    spool: Option<Arc<Spool>>,
}

/// What is appended and not yet done. Each item has a position, which for a spool is its
/// offset there.
#[derive(Default)]
struct Queues {
    /// The jobs that have a task.
    jobs: HashMap<Job, VecDeque<Item>>,
    /// The positions of all items that are not done.
    pending: BTreeSet<u64>,
    /// The position of the next item.
    next: u64,
    /// The first since the last flush, without `on_refused`.
    refusal: Option<Refusal>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Done {
    /// All items before this position are stored or refused.
    pub(super) position: u64,
    failure: Option<PublishError>,
}

/// The right to hold one item in memory.
#[derive(Debug)]
pub(super) struct Room {
    _event: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// A part of a queue.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) position: u64,
    pub(super) content: Content,
    _room: Room,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("done", &self.done).field("spool", &self.spool).finish_non_exhaustive()
    }
}

impl Engine {
    pub(super) fn new(settings: PublisherBuilder) -> Self {
        let start = settings.spool.as_ref().map_or(0, Spool::delivered);
        Self {
            client: settings.client,
            attempt_timeout: settings.attempt_timeout,
            requests: Semaphore::new(settings.max_requests),
            event_room: Arc::new(Semaphore::new(settings.max_events)),
            byte_room: Arc::new(Semaphore::new(settings.max_bytes as usize)),
            max_bytes: settings.max_bytes,
            callbacks: Mutex::new(settings.callbacks),
            queues: Mutex::new(Queues { next: start, ..Queues::default() }),
            done: watch::Sender::new(Done { position: start, failure: None }),
            tasks: Mutex::default(),
            spool: settings.spool.map(Arc::new),
        }
    }

    pub(super) fn start(self: &Arc<Self>) {
        let Some(spool) = &self.spool else { return };
        let mut tasks = lock(&self.tasks);
        tasks.spawn(save_delivered(spool.clone(), self.done.subscribe()));
        tasks.spawn(Follower::new(self.clone(), spool.clone()).run());
    }

    pub(super) fn spool(&self) -> Option<&Arc<Spool>> {
        self.spool.as_ref()
    }

    /// Why the publisher has stopped, if it has.
    pub(super) fn check(&self) -> Result<(), PublishError> {
        self.done.borrow().failure.clone().map_or(Ok(()), Err)
    }

    pub(super) fn fail(&self, failure: PublishError) {
        self.done.send_modify(|done| {
            done.failure.get_or_insert(failure);
        });
        self.event_room.close();
        self.byte_room.close();
        self.requests.close();
    }

    /// Waits for room for an item of this size.
    pub(super) async fn room(&self, bytes: usize) -> Result<Room, PublishError> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.max_bytes);
        let event = self.event_room.clone().acquire_owned().await;
        let bytes = self.byte_room.clone().acquire_many_owned(bytes).await;
        match (event, bytes) {
            (Ok(event), Ok(bytes)) => Ok(Room { _event: event, _bytes: bytes }),
            // Closed.
            _ => Err(self.check().err().unwrap_or(PublishError::Callback)),
        }
    }

    /// Appends an item to the queue of its job. The next position is `length` later.
    pub(super) fn enqueue(self: &Arc<Self>, job: Job, content: Content, room: Room, length: u64) {
        let mut queues = lock(&self.queues);
        let position = queues.next;
        queues.next += length;
        queues.pending.insert(position);
        let item = Item { position, content, _room: room };
        match queues.jobs.entry(job) {
            Entry::Occupied(mut queue) => queue.get_mut().push_back(item),
            Entry::Vacant(vacant) => {
                let job = vacant.key().clone();
                vacant.insert(VecDeque::from([item]));
                let mut tasks = lock(&self.tasks);
                while tasks.try_join_next().is_some() {}
                tasks.spawn(self.clone().deliver_job(job));
            }
        }
    }

    /// Counts a part of the spool that no job has as done.
    pub(super) fn skip(&self, length: u64) {
        let mut queues = lock(&self.queues);
        queues.next += length;
        self.publish_done(&queues);
    }

    /// The next batch of a job: one job to create, or events.
    pub(super) fn take(&self, job: &Job) -> Vec<Item> {
        let mut queues = lock(&self.queues);
        let Some(queue) = queues.jobs.get_mut(job) else { return Vec::new() };
        let mut bytes = 0;
        let fits = |item: &&Item| {
            bytes += item.content.size() + FIELD_BYTES;
            matches!(item.content, Content::Event(_)) && bytes <= BATCH_BYTES
        };
        let count = queue.iter().take(BATCH_EVENTS).take_while(fits).count();
        queue.drain(..count.max(1)).collect()
    }

    /// Forgets the queue of a job if it is empty.
    pub(super) fn is_idle(&self, job: &Job) -> bool {
        let mut queues = lock(&self.queues);
        let is_empty = queues.jobs.get(job).is_none_or(VecDeque::is_empty);
        if is_empty {
            queues.jobs.remove(job);
        }
        is_empty
    }

    /// Counts items as stored or refused.
    pub(super) fn finish(&self, positions: impl IntoIterator<Item = u64>) {
        let mut queues = lock(&self.queues);
        for position in positions {
            queues.pending.remove(&position);
        }
        self.publish_done(&queues);
    }

    fn publish_done(&self, queues: &Queues) {
        let position = queues.pending.first().copied().unwrap_or(queues.next);
        self.done.send_modify(|done| done.position = position);
    }

    /// Calls a callback. A panic there stops the publisher.
    pub(super) fn tell(&self, call: impl FnOnce(&mut Callbacks)) {
        let mut callbacks = lock(&self.callbacks);
        if catch_unwind(AssertUnwindSafe(|| call(&mut callbacks))).is_err() {
            self.fail(PublishError::Callback);
        }
    }

    /// Tells `on_refused`, or keeps the refusal for the next flush.
    pub(super) fn tell_refused(&self, refusal: Refusal) {
        self.tell(|callbacks| match &mut callbacks.on_refused {
            Some(on_refused) => on_refused(&refusal),
            None => {
                lock(&self.queues).refusal.get_or_insert(refusal);
            }
        });
    }

    pub(super) async fn flush(&self) -> Result<(), PublishError> {
        let end = self.spool.as_ref().map_or_else(|| lock(&self.queues).next, |spool| spool.written());
        let mut done = self.done.subscribe();
        let reached = |done: &Done| done.position >= end || done.failure.is_some();
        // The sender is in `self`.
        let _done = done.wait_for(reached).await;
        self.check()?;
        let refusal = lock(&self.queues).refusal.take();
        refusal.map_or(Ok(()), |refusal| Err(PublishError::Refused(Box::new(refusal))))
    }

    /// Ends all tasks and gives the spool back.
    pub(super) async fn stop(&self) -> Result<(), PublishError> {
        let mut tasks = mem::take(&mut *lock(&self.tasks));
        tasks.shutdown().await;
        let Some(spool) = self.spool.clone() else { return Ok(()) };
        let delivered = self.done.borrow().position;
        Ok(super::blocking(move || spool.close(delivered)).await?)
    }

    /// Ends all tasks. Returns how many items are not done.
    pub(super) fn abort(&self) -> usize {
        lock(&self.tasks).abort_all();
        if let Some(spool) = &self.spool {
            // After an error, the next publisher sends more than it must, by the same ids.
            let _unsaved = spool.close(self.done.borrow().position);
        }
        lock(&self.queues).pending.len()
    }
}

/// No code panics while it has a lock, except for callbacks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
