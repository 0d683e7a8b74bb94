//! A future that is polled only when it was woken.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{
            AtomicBool,
            Ordering::{AcqRel, Release},
        },
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// Waits beside other work for what thousands of tasks wait for. Each poll of such a future locks
/// the list of those that wait, and each one that is dropped leaves the list. So this future is kept,
/// and is polled at first and when it was woken, however often its task wakes for other reasons.
pub(super) struct Woken<T> {
    future: Pin<Box<dyn Future<Output = T> + Send + Sync>>,
    signal: Arc<Signal>,
}

struct Signal {
    woken: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Release);
        self.task.wake();
    }
}

impl<T> Woken<T> {
    pub(super) fn new(future: impl Future<Output = T> + Send + Sync + 'static) -> Self {
        let signal = Signal { woken: AtomicBool::new(true), task: AtomicWaker::new() };
        Self { future: Box::pin(future), signal: Arc::new(signal) }
    }
}

impl<T> Future for Woken<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // Before the look at `woken`, so that no wake falls between.
        self.signal.task.register(cx.waker());
        if !self.signal.woken.swap(false, AcqRel) {
            return Poll::Pending;
        }
        let waker = Waker::from(Arc::clone(&self.signal));
        self.future.as_mut().poll(&mut Context::from_waker(&waker))
    }
}

impl<T> fmt::Debug for Woken<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Woken").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::atomic::{AtomicUsize, Ordering::Relaxed},
    };

    use futures_util::FutureExt as _;
    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn the_future_is_polled_when_it_was_woken_and_by_the_task_that_polled_last() {
        let (notify, polls) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let (notified, counted) = (Arc::clone(&notify), Arc::clone(&polls));
        let mut woken = Woken::new(async move {
            let mut notified = std::pin::pin!(notified.notified());
            poll_fn(|cx| {
                counted.fetch_add(1, Relaxed);
                notified.as_mut().poll(cx)
            })
            .await;
        });
        for _ in 0..3 {
            assert!((&mut woken).now_or_never().is_none());
        }
        assert_eq!(polls.load(Relaxed), 1);
        let waiting = tokio::spawn(woken);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        notify.notify_waiters();
        tokio::time::timeout(std::time::Duration::from_secs(20), waiting)
            .await
            .expect("the task was woken")
            .expect("no panic");
        assert_eq!(polls.load(Relaxed), 2);
    }
}
