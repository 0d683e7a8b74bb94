//! The events that wait for each watcher.
//!
//! A mailbox is bounded: when its watcher does not keep up, the mailbox drops all
//! that waits and tells the watcher to read the log.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;
use uuid::Uuid;

use super::{
    event::LogEvent,
    position::Run,
    scope::{Filter, Scope},
};

/// Most events, and most bytes of them, that wait in one mailbox.
const EVENTS: usize = 256;
const BYTES: usize = 256 * 1024;

/// The mailboxes of all watchers of this process.
#[derive(Debug, Default)]
pub(crate) struct Mailboxes {
    /// By topic (the id of a job, a provider or a customer), then by number.
    by_topic: Mutex<BTreeMap<(Uuid, u64), Arc<Mailbox>>>,
    next_number: AtomicU64,
}

impl Mailboxes {
    /// A mailbox that receives each event of the filter's topic that is delivered
    /// from now on.
    pub(crate) fn subscribe(self: &Arc<Self>, filter: Arc<Filter>) -> Subscription {
        let key = (filter.scope.topic(), self.next_number.fetch_add(1, Relaxed));
        let mailbox = Arc::new(Mailbox { filter, queue: Mutex::default(), filled: Notify::new() });
        self.by_topic.lock().insert(key, Arc::clone(&mailbox));
        Subscription { mailboxes: Arc::clone(self), key, mailbox }
    }

    /// Puts an event of this run into the mailboxes of these topics. The event is made only if
    /// there is such a mailbox.
    pub(crate) fn deliver(&self, topics: [Uuid; 3], run: Run, make: impl Fn() -> LogEvent) {
        let by_topic = self.by_topic.lock();
        let mut event = None;
        for topic in topics {
            for (_, mailbox) in by_topic.range((topic, 0)..=(topic, u64::MAX)) {
                mailbox.put(run, event.get_or_insert_with(|| Arc::new(make())));
            }
        }
    }

    /// Has each watcher of this topic read the log whose scope is concerned.
    pub(crate) fn overflow(&self, topic: Uuid, concerned: impl Fn(&Scope) -> bool) {
        let by_topic = self.by_topic.lock();
        let of_topic = by_topic.range((topic, 0)..=(topic, u64::MAX)).map(|(_, mailbox)| mailbox);
        of_topic.filter(|mailbox| concerned(&mailbox.filter.scope)).for_each(|mailbox| mailbox.overflow());
    }

    /// Has every watcher read the log.
    pub(crate) fn overflow_all(&self) {
        self.by_topic.lock().values().for_each(|mailbox| mailbox.overflow());
    }

    /// Age of the oldest event that waits for a watcher which had caught up.
    pub(crate) fn lag(&self) -> Duration {
        let mailboxes: Vec<_> = self.by_topic.lock().values().cloned().collect();
        let oldest = mailboxes.iter().filter_map(|mailbox| mailbox.queue.lock().waits_since()).min();
        oldest.map(|since| since.elapsed()).unwrap_or_default()
    }
}

#[derive(Debug)]
struct Mailbox {
    filter: Arc<Filter>,
    queue: Mutex<Queue>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    /// The run of all these events; none without events.
    run: Option<Run>,
    events: VecDeque<Delivered>,
    bytes: usize,
    overflowed: bool,
    watcher: Watcher,
}

/// An event that waits. Of adjacent events that the filter does not match, the
/// queue keeps the last alone, which tells how far the log is.
#[derive(Debug)]
pub(crate) struct Delivered {
    pub(crate) event: Arc<LogEvent>,
    /// The sequence of the first of those adjacent events.
    pub(crate) first_sequence: i64,
    matched: bool,
}

/// How far a watcher has come, which says whether an event in its mailbox is late.
#[derive(Clone, Copy, Debug, Default)]
enum Watcher {
    /// The watcher reads the past that its client asked for.
    #[default]
    ReadsPast,
    /// The watcher follows the tail.
    Follows,
    /// The watcher followed the tail and has been missing events since this time.
    Missing(Instant),
}

impl Queue {
    /// When the oldest event came that waits for a watcher which had caught up.
    fn waits_since(&self) -> Option<Instant> {
        match self.watcher {
            Watcher::ReadsPast => None,
            Watcher::Follows => {
                self.events.iter().find(|waits| waits.matched)?.event.received.map(|received| received.at)
            }
            Watcher::Missing(at) => Some(at),
        }
    }
}

impl Mailbox {
    fn put(&self, run: Run, event: &Arc<LogEvent>) {
        let mut queue = self.queue.lock();
        if queue.overflowed {
            return;
        }
        if queue.run.replace(run).is_some_and(|former| former.identity != run.identity) {
            drop(queue);
            return self.overflow();
        }
        let (matched, mut first_sequence) = (self.filter.matches(event.kind, &event.job), event.sequence);
        if !matched && let Some(last) = queue.events.pop_back_if(|last| !last.matched) {
            queue.bytes -= last.event.encoded.len();
            first_sequence = last.first_sequence;
        }
        if queue.events.len() >= EVENTS || queue.bytes + event.encoded.len() > BYTES {
            drop(queue);
            return self.overflow();
        }
        queue.bytes += event.encoded.len();
        queue.events.push_back(Delivered { event: Arc::clone(event), first_sequence, matched });
        drop(queue);
        self.filled.notify_one();
    }

    fn overflow(&self) {
        let mut queue = self.queue.lock();
        let watcher = match (queue.watcher, queue.waits_since()) {
            (Watcher::Follows, Some(at)) => Watcher::Missing(at),
            (watcher, _) => watcher,
        };
        *queue = Queue { overflowed: true, watcher, ..Queue::default() };
        drop(queue);
        self.filled.notify_one();
    }
}

/// A watcher's side of its mailbox, which is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Subscription {
    mailboxes: Arc<Mailboxes>,
    key: (Uuid, u64),
    mailbox: Arc<Mailbox>,
}

/// What a watcher takes out of its mailbox.
#[derive(Debug)]
pub(crate) enum Delivery {
    /// Events of a run, in the order of the log; never empty.
    Events(Run, VecDeque<Delivered>),
    /// More events came than the mailbox holds. The missing ones are in the log;
    /// the mailbox receives again from now on.
    Overflowed,
}

impl Subscription {
    pub(crate) fn take(&self) -> Option<Delivery> {
        let mut queue = self.mailbox.queue.lock();
        let watcher = queue.watcher;
        let taken = std::mem::replace(&mut *queue, Queue { watcher, ..Queue::default() });
        drop(queue);
        if taken.overflowed {
            return Some(Delivery::Overflowed);
        }
        taken.run.map(|run| Delivery::Events(run, taken.events))
    }

    /// Notes that the watcher has been sent every event before those that wait.
    pub(crate) fn follow(&self) {
        self.mailbox.queue.lock().watcher = Watcher::Follows;
    }

    /// Waits for the next delivery. Cancel-safe: nothing is taken before it is
    /// returned.
    pub(crate) async fn next(&self) -> Delivery {
        loop {
            if let Some(delivery) = self.take() {
                return delivery;
            }
            self.mailbox.filled.notified().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.mailboxes.by_topic.lock().remove(&self.key);
    }
}
