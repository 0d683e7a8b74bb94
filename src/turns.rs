//! A semaphore that is shared fairly: one key holds at most a part of its permits, and when
//! several keys wait, what becomes free goes to the keys in turns, within a key to whoever
//! came first.
//!
//! A semaphore with one queue for all would have everybody wait behind a caller that asks a
//! thousand times at once.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    hash::Hash,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// What permits are counted by, such as a user.
pub trait Key: Copy + Eq + Hash {}

impl<K: Copy + Eq + Hash> Key for K {}

/// Permits that are given to keys in turns. Clones share the permits.
#[derive(Clone)]
pub struct Turns<K: Key>(Arc<Shared<K>>);

/// Permits of one key, which are given back when this is dropped.
#[must_use = "the permits are given back when this is dropped"]
pub struct Permits<K: Key> {
    shared: Arc<Shared<K>>,
    key: K,
    count: usize,
}

/// The wait for permits. Whenever it is dropped, nothing is lost.
#[must_use = "permits are given to whoever awaits this"]
pub struct Acquire<K: Key>(Acquiring<K>);

enum Acquiring<K: Key> {
    Given(Option<Permits<K>>),
    Waiting { shared: Arc<Shared<K>>, key: K, number: u64, given: oneshot::Receiver<Permits<K>> },
}

struct Shared<K: Key> {
    most_of_key: usize,
    state: Mutex<State<K>>,
}

struct State<K: Key> {
    free: usize,
    /// The keys that hold permits or wait for some.
    keys: HashMap<K, OfKey<K>>,
    /// The keys of which one waits for permits that the key may hold. If there are any, the
    /// free permits do not suffice for the first of them.
    order: VecDeque<K>,
    next_number: u64,
}

struct OfKey<K: Key> {
    held: usize,
    /// Those who wait, by the number of their arrival.
    waiting: BTreeMap<u64, Waiting<K>>,
    /// Whether the key is in [`State::order`].
    in_order: bool,
}

struct Waiting<K: Key> {
    count: usize,
    give: oneshot::Sender<Permits<K>>,
}

impl<K: Key> Turns<K> {
    /// `permits` in all, of which one key holds at most `most_of_key`.
    pub fn new(permits: usize, most_of_key: usize) -> Self {
        let state = State { free: permits, keys: HashMap::new(), order: VecDeque::new(), next_number: 0 };
        Self(Arc::new(Shared { most_of_key: most_of_key.min(permits), state: Mutex::new(state) }))
    }

    /// How many permits one key may hold.
    pub fn most_of_key(&self) -> usize {
        self.0.most_of_key
    }

    /// How many waits there are, of all keys.
    pub fn waiting(&self) -> usize {
        self.0.state.lock().keys.values().map(|of_key| of_key.waiting.len()).sum()
    }

    /// One permit, when it is the key's turn. Its place in the queue is taken by this call.
    pub fn acquire(&self, key: K) -> Acquire<K> {
        self.acquire_many(key, 1)
    }

    /// As [`Self::acquire`], for `count` permits together; of a larger number than a key may
    /// hold, as many as it may.
    pub fn acquire_many(&self, key: K, count: usize) -> Acquire<K> {
        let Self(shared) = self;
        let count = count.min(shared.most_of_key);
        let mut state = shared.state.lock();
        if state.take_now(shared.most_of_key, key, count) {
            return Acquire(Acquiring::Given(Some(Permits { shared: Arc::clone(shared), key, count })));
        }
        let (give, given) = oneshot::channel();
        let number = state.next_number;
        state.next_number += 1;
        state.keys.entry(key).or_default().waiting.insert(number, Waiting { count, give });
        state.queue(shared.most_of_key, key);
        drop(state);
        Acquire(Acquiring::Waiting { shared: Arc::clone(shared), key, number, given })
    }

    /// `count` permits, unless somebody would have to wait for them or waits already.
    pub fn try_acquire_many(&self, key: K, count: usize) -> Option<Permits<K>> {
        let Self(shared) = self;
        let taken =
            count <= shared.most_of_key && shared.state.lock().take_now(shared.most_of_key, key, count);
        taken.then(|| Permits { shared: Arc::clone(shared), key, count })
    }
}

impl<K: Key> Permits<K> {
    /// Adds permits of the same key and the same [`Turns`] to these.
    pub fn merge(&mut self, mut other: Self) {
        debug_assert!(Arc::ptr_eq(&self.shared, &other.shared) && self.key == other.key);
        self.count += std::mem::take(&mut other.count);
    }
}

impl<K: Key> State<K> {
    /// Takes permits if nobody waits who comes before.
    fn take_now(&mut self, most: usize, key: K, count: usize) -> bool {
        if count > self.free || !self.order.is_empty() {
            return false;
        }
        let of_key = self.keys.entry(key).or_default();
        let taken = of_key.waiting.is_empty() && of_key.held + count <= most;
        if taken {
            of_key.held += count;
            self.free -= count;
        }
        taken
    }

    /// Puts a key last in the order, if one of it waits for what the key may hold.
    fn queue(&mut self, most: usize, key: K) {
        let Some(of_key) = self.keys.get_mut(&key) else { return };
        let waits = of_key.waiting.first_key_value();
        if !of_key.in_order && waits.is_some_and(|(_, waiting)| of_key.held + waiting.count <= most) {
            of_key.in_order = true;
            self.order.push_back(key);
        }
    }

    fn give_back(&mut self, most: usize, key: K, count: usize) {
        self.free += count;
        if let Some(of_key) = self.keys.get_mut(&key) {
            of_key.held -= count;
        }
        self.queue(most, key);
        self.forget(key);
    }

    /// Forgets a key that neither holds nor waits.
    fn forget(&mut self, key: K) {
        let idle = |of_key: &OfKey<K>| of_key.held == 0 && of_key.waiting.is_empty() && !of_key.in_order;
        if self.keys.get(&key).is_some_and(idle) {
            self.keys.remove(&key);
        }
    }

    /// The next that gets permits, if there are enough for it.
    fn next(&mut self, most: usize) -> Option<(K, Waiting<K>)> {
        while let Some(key) = self.order.front().copied() {
            let of_key = self.keys.get_mut(&key)?;
            let first = of_key.waiting.first_entry();
            if first.as_ref().is_some_and(|first| first.get().count > self.free) {
                return None;
            }
            self.order.pop_front();
            of_key.in_order = false;
            // Whoever waited may have left, and the one behind may ask for more.
            let next = first.filter(|first| of_key.held + first.get().count <= most);
            let next = next.map(|first| first.remove());
            if let Some(waiting) = &next {
                of_key.held += waiting.count;
                self.free -= waiting.count;
            }
            self.queue(most, key);
            self.forget(key);
            if let Some(waiting) = next {
                return Some((key, waiting));
            }
        }
        None
    }
}

impl<K: Key> Shared<K> {
    /// Changes the state, and gives what is free to those whose turn it is.
    fn settle(self: &Arc<Self>, change: impl FnOnce(&mut State<K>)) {
        let most = self.most_of_key;
        let mut state = self.state.lock();
        change(&mut state);
        while let Some((key, Waiting { count, give })) = state.next(most) {
            let permits = Permits { shared: Arc::clone(self), key, count };
            // Whoever waited has left in this moment. Permits must not be dropped under the lock.
            if let Err(mut permits) = give.send(permits) {
                permits.count = 0;
                state.give_back(most, key, count);
            }
        }
    }
}

impl<K: Key> Drop for Permits<K> {
    fn drop(&mut self) {
        if self.count > 0 {
            self.shared.settle(|state| state.give_back(self.shared.most_of_key, self.key, self.count));
        }
    }
}

impl<K: Key> Unpin for Acquire<K> {}

impl<K: Key> Future for Acquire<K> {
    type Output = Permits<K>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Permits<K>> {
        let permits = match &mut self.0 {
            Acquiring::Given(permits) => permits.take(),
            Acquiring::Waiting { given, .. } => {
                // The sender is kept until it gives: `shared` is kept by this future.
                let permits = ready!(Pin::new(given).poll(cx)).ok();
                self.0 = Acquiring::Given(None);
                permits
            }
        };
        permits.map_or(Poll::Pending, Poll::Ready)
    }
}

impl<K: Key> Drop for Acquire<K> {
    fn drop(&mut self) {
        if let Acquiring::Waiting { shared, key, number, .. } = &self.0 {
            // Without this one, the one behind it may get what is free. What was given to this
            // one meanwhile is dropped with the receiver.
            shared.settle(|state| {
                if let Some(of_key) = state.keys.get_mut(key) {
                    of_key.waiting.remove(number);
                }
                state.queue(shared.most_of_key, *key);
                state.forget(*key);
            });
        }
    }
}

impl<K: Key> Default for OfKey<K> {
    fn default() -> Self {
        Self { held: 0, waiting: BTreeMap::new(), in_order: false }
    }
}

impl<K: Key> fmt::Debug for Turns<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turns").field("free", &self.0.state.lock().free).finish_non_exhaustive()
    }
}

impl<K: Key> fmt::Debug for Permits<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permits").field("count", &self.count).finish_non_exhaustive()
    }
}

impl<K: Key> fmt::Debug for Acquire<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquire").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering::SeqCst},
        time::Duration,
    };

    use futures_util::{FutureExt as _, future::join_all};
    use tokio::time::timeout;

    use super::*;

    fn now<K: Key>(acquire: &mut Acquire<K>) -> Option<Permits<K>> {
        acquire.now_or_never()
    }

    /// Nobody holds permits or waits, and nothing is remembered.
    fn assert_idle<K: Key>(turns: &Turns<K>, permits: usize) {
        let state = turns.0.state.lock();
        assert_eq!((state.free, state.keys.len(), state.order.len()), (permits, 0, 0));
    }

    #[test]
    fn a_key_holds_at_most_its_part() {
        let turns = Turns::new(4, 2);
        let held: Vec<_> = (0..2).map(|_| now(&mut turns.acquire('a')).expect("a free permit")).collect();
        let mut third = turns.acquire('a');
        assert!(now(&mut third).is_none(), "a has its part");
        assert!(turns.try_acquire_many('a', 1).is_none());
        let other = now(&mut turns.acquire('b')).expect("a's wait keeps nobody else waiting");
        drop(held);
        let third = now(&mut third).expect("a has given permits back");
        drop((other, third));
        assert_idle(&turns, 4);
    }

    #[test]
    fn keys_that_wait_are_served_in_turns_and_each_in_the_order_of_arrival() {
        let turns = Turns::new(1, 1);
        let mut held = turns.try_acquire_many('x', 1);
        let mut waiting: Vec<_> = ["a1", "a2", "a3", "b1", "b2", "c1"]
            .map(|name| (name, turns.acquire(name.chars().next().expect("a key"))))
            .into();
        let mut order = Vec::new();
        while !waiting.is_empty() {
            held = None;
            for (name, acquire) in &mut waiting {
                if let Some(permit) = now(acquire) {
                    order.push(*name);
                    held = Some(permit);
                }
            }
            waiting.retain(|(name, _)| !order.contains(name));
            assert!(held.is_some(), "the permit is given to one of those who wait");
        }
        drop(held);
        assert_eq!(order, ["a1", "b1", "c1", "a2", "b2", "a3"]);
        assert_idle(&turns, 1);
    }

    #[test]
    fn whoever_waits_for_many_permits_is_not_overtaken() {
        let turns = Turns::new(10, 6);
        let held = turns.try_acquire_many('a', 6).expect("free permits");
        let mut large = turns.acquire_many('b', 99);
        assert!(now(&mut large).is_none(), "6 permits, which is b's part, are not free");
        assert!(turns.try_acquire_many('c', 1).is_none(), "b waits for them");
        let mut small = turns.acquire_many('c', 4);
        assert!(now(&mut small).is_none());
        drop(held);
        let (large, small) = (now(&mut large).expect("b's turn"), now(&mut small).expect("enough for c"));
        assert_eq!((large.count, small.count), (6, 4));
        drop((large, small));
        assert_idle(&turns, 10);
    }

    #[test]
    fn a_wait_that_is_dropped_loses_nothing() {
        let turns = Turns::new(2, 2);
        let held = turns.try_acquire_many('a', 2);
        let (first, mut second) = (turns.acquire_many('b', 2), turns.acquire_many('c', 1));
        drop(first);
        assert!(now(&mut second).is_none());
        // Given, but never taken.
        let third = turns.acquire('b');
        drop(held);
        let second = now(&mut second).expect("a permit");
        drop(third);
        let mut fourth = turns.acquire('d');
        assert!(now(&mut fourth).is_some());
        drop(second);
        assert_idle(&turns, 2);

        // The one behind asks for less than the one that leaves.
        let held = turns.try_acquire_many('a', 1);
        let (large, mut small) = (turns.acquire_many('b', 2), turns.acquire_many('b', 1));
        assert!(now(&mut small).is_none(), "it came later");
        drop(large);
        assert!(now(&mut small).is_some());
        drop(held);
        assert_idle(&turns, 2);
    }

    #[test]
    fn merged_permits_are_given_back_together() {
        let turns = Turns::new(4, 4);
        let mut permits = turns.try_acquire_many('a', 1).expect("a permit");
        permits.merge(turns.try_acquire_many('a', 2).expect("permits"));
        assert_eq!(turns.0.state.lock().free, 1);
        drop(permits);
        assert_idle(&turns, 4);
    }

    /// Many tasks take permits and leave at any moment. Each that stays gets its permits, and
    /// no bound is ever passed.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_wake_up_is_lost_when_many_take_give_back_and_leave_at_once() {
        const PERMITS: usize = 6;
        const OF_KEY: usize = 4;
        let turns = Turns::new(PERMITS, OF_KEY);
        let held: Arc<[AtomicUsize; 3]> = Arc::default();
        let tasks = (0..64_usize).map(|task| {
            let (turns, held) = (turns.clone(), Arc::clone(&held));
            tokio::spawn(async move {
                for round in 0..200 {
                    let (key, count) = ((task + round) % 3, 1 + (task * 7 + round) % 3);
                    let acquire = turns.acquire_many(key, count);
                    let permits = if (task + round) % 4 == 0 {
                        // Leaves before, while or just after it is given permits.
                        let patience = Duration::from_micros(u64::try_from(round).expect("small"));
                        match timeout(patience, acquire).await {
                            Ok(permits) => permits,
                            Err(_) => continue,
                        }
                    } else {
                        acquire.await
                    };
                    assert!(held[key].fetch_add(count, SeqCst) + count <= OF_KEY);
                    assert!(held.iter().map(|held| held.load(SeqCst)).sum::<usize>() <= PERMITS);
                    tokio::task::yield_now().await;
                    held[key].fetch_sub(count, SeqCst);
                    drop(permits);
                }
            })
        });
        let ended = timeout(Duration::from_secs(60), join_all(tasks)).await.expect("nobody waits for good");
        ended.into_iter().for_each(|task| task.expect("no bound is passed"));
        assert_idle(&turns, PERMITS);
    }
}
