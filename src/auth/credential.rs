//! One credential: its caller, when it was confirmed, and whether it has ended.

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use super::StreamReset;
use crate::{
    db::{Authority, Payer},
    error::{Error, Result},
    limits::CREDENTIAL_CONFIRMED_WITHIN,
    models::caller::Caller,
};

/// Longest single sleep: timers have a bound.
const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a client may take to read the end of its stream.
const END_GRACE: Duration = Duration::from_secs(2);

/// The moment at which this process starts, in milliseconds, so that 0 is long before.
const PROCESS_START: u64 = 60 * 60 * 1_000;

/// A moment by the clock of this process, in milliseconds, which fits into an atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(pub(super) u64);

impl Moment {
    const PAST: Self = Self(0);
    const NEVER: Self = Self(u64::MAX);

    pub(super) fn now() -> Self {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        Self(PROCESS_START).plus(START.elapsed())
    }

    pub(super) fn elapsed(self) -> Duration {
        Self::now().since(self)
    }

    fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    pub(super) fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }
}

/// A credential that was valid when it was last confirmed.
#[derive(Debug)]
pub struct Credential {
    caller: Caller,
    /// When the credential ends: the lifetime that was left by the database's clock, on the
    /// clock of this process. It is only moved to an earlier time; a revoked credential has
    /// [`Moment::PAST`].
    ends_at: AtomicU64,
    /// Wakes those that wait for the end when it is moved.
    moved: Notify,
    /// When the database was asked that last answered that the credential is valid.
    confirmed_at: AtomicU64,
    /// Wakes those that wait for the next confirmation.
    confirmations: Notify,
    used_at: AtomicU64,
    /// When the use was last written to the database.
    recorded_at: AtomicU64,
    /// The resets of the streams that are open under it, by number.
    streams: Mutex<HashMap<u64, StreamReset>>,
    next_stream: AtomicU64,
}

impl Credential {
    /// A credential that the database, asked at `asked_at`, had as valid.
    pub(super) fn new(caller: Caller, lifetime: Option<Duration>, asked_at: Moment) -> Self {
        Self {
            caller,
            ends_at: AtomicU64::new(lifetime.map_or(Moment::NEVER, |lifetime| asked_at.plus(lifetime)).0),
            moved: Notify::new(),
            confirmed_at: AtomicU64::new(asked_at.0),
            confirmations: Notify::new(),
            used_at: AtomicU64::new(Moment::now().0),
            recorded_at: AtomicU64::new(0),
            streams: Mutex::default(),
            next_stream: AtomicU64::new(0),
        }
    }

    /// The caller that authenticated with this credential.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Returns once the credential has expired or was revoked.
    pub async fn ended(&self) {
        loop {
            // Before the end is read, so that no move falls between.
            let mut moved = pin!(self.moved.notified());
            let ends_at = self.ends_at();
            let left = ends_at.since(Moment::now());
            if left.is_zero() {
                return;
            }
            if ends_at == Moment::NEVER {
                moved.as_mut().await;
            } else {
                // In a box, so that watches under a credential that never expires need no memory for
                // a timer. The end is read again, whether it was moved or has come.
                let _ = Box::pin(timeout(left.min(LONGEST_SLEEP), moved.as_mut())).await;
            }
        }
    }

    /// Returns at once if the credential was confirmed within
    /// [`CREDENTIAL_CONFIRMED_WITHIN`], otherwise as soon as it is again;
    /// [`Error::CredentialInvalid`] if it has ended.
    pub async fn confirmed(&self) -> Result<()> {
        if self.check_valid().is_ok() {
            return Ok(());
        }
        // In a box, so that thousands of watches need no memory for a wait that is rare.
        Box::pin(self.confirmed_again()).await
    }

    async fn confirmed_again(&self) -> Result<()> {
        while self.is_valid() {
            // Before the time is read, so that no confirmation falls between.
            let confirmation = self.confirmations.notified();
            if self.is_confirmed() {
                return Ok(());
            }
            tokio::select! {
                () = confirmation => {}
                () = self.ended() => {}
            }
        }
        Err(Error::CredentialInvalid)
    }

    /// [`Error::CredentialInvalid`] if the credential has ended, [`Error::Unavailable`] if it
    /// was not confirmed for longer than [`CREDENTIAL_CONFIRMED_WITHIN`].
    pub fn check_valid(&self) -> Result<()> {
        match (self.is_valid(), self.is_confirmed()) {
            (false, _) => Err(Error::CredentialInvalid),
            (true, false) => Err(Error::unavailable("the credential cannot be confirmed")),
            (true, true) => Ok(()),
        }
    }

    /// Does work that may have to wait. Each step of it is done only if the credential
    /// passes [`check_valid`](Self::check_valid) by then.
    pub async fn while_valid<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = pin!(work);
        poll_fn(|context| {
            self.check_valid()?;
            work.as_mut().poll(context)
        })
        .await
    }

    /// Neither revoked nor expired, as far as this process knows.
    pub(super) fn is_valid(&self) -> bool {
        Moment::now() < self.ends_at()
    }

    fn ends_at(&self) -> Moment {
        Moment(self.ends_at.load(Relaxed))
    }

    /// Has the credential end at this time, unless it ends before.
    pub(super) fn end_at(&self, at: Moment) {
        if at.0 < self.ends_at.fetch_min(at.0, Relaxed) {
            self.moved.notify_waiters();
        }
    }

    /// Whether the credential was confirmed within [`CREDENTIAL_CONFIRMED_WITHIN`].
    pub(super) fn is_confirmed(&self) -> bool {
        self.confirmed_at().elapsed() < CREDENTIAL_CONFIRMED_WITHIN
    }

    pub(super) fn confirmed_at(&self) -> Moment {
        Moment(self.confirmed_at.load(Relaxed))
    }

    pub(super) fn confirm(&self, asked_at: Moment) {
        self.confirmed_at.fetch_max(asked_at.0, Relaxed);
        self.confirmations.notify_waiters();
    }

    /// Ends the credential for good. Its streams send their `end`; those whose client does
    /// not read it are reset.
    pub(crate) fn end(self: &Arc<Self>) {
        self.end_at(Moment::PAST);
        if !self.streams.lock().is_empty() {
            self.reset_streams_after_grace();
        }
    }

    fn reset_streams_after_grace(self: &Arc<Self>) {
        let credential = Arc::clone(self);
        tokio::spawn(async move {
            sleep(END_GRACE).await;
            let unread: Vec<StreamReset> = credential.streams.lock().values().cloned().collect();
            if !unread.is_empty() {
                tracing::info!(
                    streams = unread.len(),
                    "resetting streams whose client does not read their end"
                );
            }
            unread.iter().for_each(StreamReset::reset);
        });
    }

    /// Notes a stream; returns its number.
    pub(super) fn opened(self: &Arc<Self>, reset: StreamReset) -> u64 {
        let number = self.next_stream.fetch_add(1, Relaxed);
        self.streams.lock().insert(number, reset);
        // An end a moment ago found no stream to reset.
        if self.ends_at() == Moment::PAST {
            self.reset_streams_after_grace();
        }
        number
    }

    pub(super) fn closed(&self, number: u64) {
        self.streams.lock().remove(&number);
    }

    pub(super) fn touch(&self) {
        self.used_at.store(Moment::now().0, Relaxed);
    }

    pub(super) fn used_at(&self) -> Moment {
        Moment(self.used_at.load(Relaxed))
    }

    pub(super) fn is_idle(&self, for_at_least: Duration) -> bool {
        self.used_at().elapsed() >= for_at_least
    }

    /// Whether the credential was used since its use was last recorded, which was at least
    /// `every` ago.
    pub(super) fn use_to_record(&self, every: Duration) -> bool {
        let recorded_at = Moment(self.recorded_at.load(Relaxed));
        self.used_at() > recorded_at && recorded_at.elapsed() >= every
    }

    pub(super) fn use_recorded(&self, at: Moment) {
        self.recorded_at.store(at.0, Relaxed);
    }
}

impl Authority for Arc<Credential> {
    fn check(&self) -> Result<()> {
        self.check_valid()
    }

    fn payer(&self) -> Payer {
        self.caller.tenant().into()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use uuid::Uuid;

    use super::*;
    use crate::models::caller::{CredentialId, tests::caller};

    fn credential(lifetime: Option<Duration>, asked_at: Moment) -> Credential {
        Credential::new(caller(Uuid::nil(), CredentialId::Session(Uuid::nil())), lifetime, asked_at)
    }

    #[tokio::test]
    async fn an_end_is_signalled_at_once_and_stays() {
        let credential = Arc::new(credential(Some(Duration::from_secs(3_600)), Moment::now()));
        assert!(credential.ended().now_or_never().is_none());
        assert!(matches!(credential.confirmed().now_or_never(), Some(Ok(()))));
        credential.end();
        credential.confirm(Moment::now());
        credential.ended().await;
        assert!(matches!(credential.confirmed().await, Err(Error::CredentialInvalid)));
    }

    #[tokio::test]
    async fn a_stream_is_reset_whether_it_was_opened_before_the_end_or_just_after_it() {
        let credential = Arc::new(credential(None, Moment::now()));
        let [(before, opened_before), (after, opened_after), (closed, opened_and_closed)] =
            [(); 3].map(|()| StreamReset::of(std::future::pending::<()>()));
        credential.opened(opened_before);
        credential.end();
        assert!(!before.is_aborted(), "the client has some time to read the end");
        assert!(before.await.is_err());

        let number = credential.opened(opened_and_closed);
        credential.opened(opened_after);
        credential.closed(number);
        let reset = tokio::time::timeout(2 * END_GRACE, after).await;
        assert!(reset.is_ok_and(|after| after.is_err()) && !closed.is_aborted());
    }

    #[tokio::test]
    async fn a_credential_ends_by_itself_when_it_expires() {
        let credential = credential(Some(Duration::from_millis(20)), Moment::now());
        assert!(credential.is_valid());
        credential.ended().await;
        assert!(!credential.is_valid());
        assert!(matches!(credential.confirmed().await, Err(Error::CredentialInvalid)));
    }

    #[tokio::test]
    async fn an_end_is_moved_to_an_earlier_time_only() {
        let lifetime = Some(Duration::from_secs(3_600));
        for credential in [credential(None, Moment::now()), credential(lifetime, Moment::now())] {
            let mut ended = std::pin::pin!(credential.ended());
            assert!((&mut ended).now_or_never().is_none());
            credential.end_at(Moment::now().plus(Duration::from_millis(20)));
            credential.end_at(Moment::now().plus(Duration::from_secs(60)));
            assert!(credential.is_valid());
            tokio::time::timeout(Duration::from_secs(20), ended).await.expect("its end");
            assert!(!credential.is_valid());
        }
    }

    #[tokio::test]
    async fn work_that_waited_is_not_done_under_a_credential_that_ended_meanwhile() {
        let stops: [fn(&Arc<Credential>); 2] = [
            |credential| credential.end(),
            |credential| credential.confirmed_at.store(Moment::PAST.0, Relaxed),
        ];
        for stop in stops {
            let credential = Arc::new(credential(None, Moment::now()));
            let (permit, waiting) = tokio::sync::oneshot::channel();
            let done = std::cell::Cell::new(false);
            let mut work = std::pin::pin!(credential.while_valid(async {
                waiting.await.map_err(Error::internal)?;
                done.set(true);
                Ok(())
            }));
            assert!((&mut work).now_or_never().is_none(), "the work waits");
            stop(&credential);
            permit.send(()).expect("the work waits");
            assert!(work.await.is_err(), "too late");
            assert!(!done.get());
        }
    }

    #[tokio::test]
    async fn an_unconfirmed_credential_waits_for_its_confirmation() {
        let credential = Arc::new(credential(None, Moment(0)));
        assert!(credential.confirmed().now_or_never().is_none());
        let waiting = tokio::spawn({
            let credential = credential.clone();
            async move { credential.confirmed().await }
        });
        tokio::task::yield_now().await;
        credential.confirm(Moment::now());
        assert!(waiting.await.expect("no panic").is_ok());
    }

    #[test]
    fn use_is_recorded_at_most_once_an_interval() {
        let credential = credential(None, Moment::now());
        let every = Duration::from_secs(60);
        assert!(credential.use_to_record(every), "never recorded");
        credential.use_recorded(Moment::now());
        credential.used_at.store(Moment::now().0 + 1, Relaxed);
        assert!(!credential.use_to_record(every), "just recorded");
        assert!(credential.use_to_record(Duration::ZERO));
    }
}
