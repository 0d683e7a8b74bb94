//! The requests that wait to be planned: a queue for each provider, served in turns.
//!
//! The order is deficit round robin with priority for providers that send little (the
//! scheduler of FQ-CoDel, RFC 8290, 4.2): whoever asks after a while without requests has a
//! turn before those who have requests all the time. A turn is so many bytes; a provider
//! that takes more in one turn waits for as many turns as it took.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;
use tokio::sync::Notify;
use uuid::Uuid;

use super::request::{Cost, Request};

/// Bytes of one turn.
const TURN_BYTES: i64 = 64 * 1024;

/// What the queue has to know of an item.
pub(super) trait Item {
    fn provider_id(&self) -> Uuid;
    fn cost(&self) -> Cost;
}

impl Item for Request {
    fn provider_id(&self) -> Uuid {
        Self::provider_id(self)
    }

    fn cost(&self) -> Cost {
        self.cost
    }
}

/// Requests of many providers; those of one provider stay in their order.
#[derive(Debug)]
pub(super) struct Queue<T = Request> {
    state: Mutex<State<T>>,
    filled: Notify,
}

#[derive(Debug)]
struct State<T> {
    providers: HashMap<Uuid, OfProvider<T>>,
    /// Providers that had no requests before; they come first.
    arrived: VecDeque<Uuid>,
    /// All others, in their turns.
    turns: VecDeque<Uuid>,
    closed: bool,
}

#[derive(Debug)]
struct OfProvider<T> {
    requests: VecDeque<T>,
    /// Bytes that are left of the provider's turn; negative if it took more.
    left_bytes: i64,
}

/// What [`Queue::filled`] waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    Requests,
    /// The queue is empty, and no request comes any more.
    Closed,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let state = State {
            providers: HashMap::new(),
            arrived: VecDeque::new(),
            turns: VecDeque::new(),
            closed: false,
        };
        Self { state: Mutex::new(state), filled: Notify::new() }
    }
}

impl<T: Item> Queue<T> {
    pub(super) fn push(&self, request: T) {
        let id = request.provider_id();
        let mut state = self.state.lock();
        let State { providers, arrived, .. } = &mut *state;
        let of_provider = providers.entry(id).or_insert_with(|| {
            arrived.push_back(id);
            OfProvider { requests: VecDeque::new(), left_bytes: TURN_BYTES }
        });
        of_provider.requests.push_back(request);
        drop(state);
        self.filled.notify_one();
    }

    /// The next request, by turns of the providers, for which there is room. A provider
    /// whose next request has no room is passed over.
    pub(super) fn take(&self, has_room: impl Fn(&T) -> bool) -> Option<T> {
        let mut state = self.state.lock();
        state.take(true, &has_room).or_else(|| state.take(false, &has_room))
    }

    /// Returns once there are requests, or none will come any more.
    pub(super) async fn filled(&self) -> Filled {
        loop {
            let filled = self.filled.notified();
            {
                let state = self.state.lock();
                if state.providers.values().any(|of_provider| !of_provider.requests.is_empty()) {
                    return Filled::Requests;
                }
                if state.closed {
                    return Filled::Closed;
                }
            }
            filled.await;
        }
    }

    /// No request will come any more.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.filled.notify_one();
    }
}

impl<T: Item> State<T> {
    fn take(&mut self, of_arrived: bool, has_room: impl Fn(&T) -> bool) -> Option<T> {
        let mut passed = 0;
        loop {
            let list = if of_arrived { &mut self.arrived } else { &mut self.turns };
            let id = *list.get(passed)?;
            let of_provider = self.providers.get_mut(&id)?;
            let Some(next) = of_provider.requests.front() else {
                list.remove(passed);
                if of_arrived {
                    // Forgotten only after all others had their turn: whoever asks again
                    // before has not arrived anew.
                    self.turns.push_back(id);
                } else {
                    self.providers.remove(&id);
                }
                continue;
            };
            if of_provider.left_bytes <= 0 {
                of_provider.left_bytes += TURN_BYTES;
                list.remove(passed);
                self.turns.push_back(id);
                continue;
            }
            if !has_room(next) {
                passed += 1;
                continue;
            }
            of_provider.left_bytes -= i64::try_from(next.cost().bytes).unwrap_or(i64::MAX);
            return of_provider.requests.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    struct Sized(Uuid, usize);

    impl Item for Sized {
        fn provider_id(&self) -> Uuid {
            self.0
        }

        fn cost(&self) -> Cost {
            Cost { events: 1, bytes: self.1 }
        }
    }

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);
    const C: Uuid = Uuid::from_u128(3);
    const MIB: usize = 1024 * 1024;

    fn queue(requests: &[(Uuid, usize)]) -> Queue<Sized> {
        let queue = Queue::default();
        requests.iter().for_each(|(id, bytes)| queue.push(Sized(*id, *bytes)));
        queue
    }

    /// The providers of the next requests.
    fn taken(queue: &Queue<Sized>, most: usize) -> Vec<Uuid> {
        (0..most).map_while(|_| queue.take(|_| true)).map(|Sized(id, _)| id).collect()
    }

    #[test]
    fn providers_have_equal_bytes_whatever_the_size_of_their_batches() {
        let queue = queue(&[(A, MIB); 3]);
        assert_eq!(taken(&queue, 1), [A]);
        (0..32).for_each(|_| queue.push(Sized(B, 64 * 1024)));
        // A megabyte is sixteen turns of the other provider.
        let order = taken(&queue, 34);
        let second = order.iter().position(|id| *id == A).expect("A's second batch");
        assert!((15..=17).contains(&second), "{order:?}");
    }

    #[test]
    fn whoever_arrives_comes_before_those_who_send_all_the_time() {
        let queue = queue(&[(A, 1000); 200]);
        (0..200).for_each(|_| queue.push(Sized(B, 1000)));
        taken(&queue, 150);
        queue.push(Sized(C, 1000));
        assert_eq!(taken(&queue, 1), [C]);
        // C had nothing more to send when its turn went on: it is not new again at once.
        assert_ne!(taken(&queue, 1), [C]);
        queue.push(Sized(C, 1000));
        assert_ne!(taken(&queue, 1), [C]);
        assert!(taken(&queue, 200).contains(&C));
    }

    #[test]
    fn requests_of_one_provider_stay_in_order_and_pass_nobody_without_room() {
        let queue = queue(&[(A, 5), (A, 1), (B, 2), (B, 3)]);
        let small = |request: &Sized| request.1 < 5;
        assert_eq!(queue.take(small), Some(Sized(B, 2)));
        assert_eq!(queue.take(small), Some(Sized(B, 3)));
        assert_eq!(queue.take(small), None, "A's second request does not pass its first");
        assert_eq!(queue.take(|_| true), Some(Sized(A, 5)));
        assert_eq!(queue.take(small), Some(Sized(A, 1)));
        assert!(queue.take(|_| true).is_none());
        assert!(queue.state.lock().providers.is_empty(), "nothing is kept of providers without requests");
    }

    #[tokio::test]
    async fn a_closed_queue_is_emptied_first() {
        let queue = queue(&[(A, 1)]);
        queue.close();
        assert_eq!(queue.filled().await, Filled::Requests);
        taken(&queue, 1);
        assert_eq!(queue.filled().await, Filled::Closed);
    }
}
