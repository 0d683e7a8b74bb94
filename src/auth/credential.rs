//! One credential: who, how fresh, and whether it has ended.

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Result},
    limits::CREDENTIAL_CONFIRMED_WITHIN,
    models::caller::Caller,
};

/// Longest single sleep; timers do not reach arbitrarily far.
const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a stream may take to take its end.
const END_GRACE: Duration = Duration::from_secs(2);

/// How long before the start of this process moments begin, in milliseconds: 0
/// is long ago.
const LONG_AGO: u64 = 60 * 60 * 1_000;

/// A moment of this process, in milliseconds; small enough to be atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(pub(super) u64);

impl Moment {
    /// Before all others.
    const PAST: Self = Self(0);
    /// Does not come.
    const NEVER: Self = Self(u64::MAX);

    pub(super) fn now() -> Self {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        Self(LONG_AGO).plus(START.elapsed())
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

/// A credential that was good when it was last confirmed.
#[derive(Debug)]
pub struct Credential {
    caller: Caller,
    /// When it ends, by the clock of this process, from what was left by the
    /// database's; it only ever comes sooner. The past: it was ended.
    ends_at: AtomicU64,
    /// Wakes those that wait for the end when that comes sooner.
    sooner: Notify,
    /// When the database was asked that last said it is good.
    confirmed_at: AtomicU64,
    /// Wakes those that wait for the next confirmation.
    confirmations: Notify,
    used_at: AtomicU64,
    /// When its use was last written to the database.
    noted_at: AtomicU64,
    /// The connections of the streams that are open under it, by number.
    streams: Mutex<HashMap<u64, CancellationToken>>,
    next_stream: AtomicU64,
}

impl Credential {
    /// Of what the database answered when it was asked at `asked_at`.
    pub(super) fn new(caller: Caller, lifetime: Option<Duration>, asked_at: Moment) -> Self {
        Self {
            caller,
            ends_at: AtomicU64::new(lifetime.map_or(Moment::NEVER, |lifetime| asked_at.plus(lifetime)).0),
            sooner: Notify::new(),
            confirmed_at: AtomicU64::new(asked_at.0),
            confirmations: Notify::new(),
            used_at: AtomicU64::new(Moment::now().0),
            noted_at: AtomicU64::new(0),
            streams: Mutex::default(),
            next_stream: AtomicU64::new(0),
        }
    }

    /// Who.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Returns once the credential has expired or was revoked.
    pub async fn ended(&self) {
        loop {
            // Listens first, so that nothing sooner falls between.
            let sooner = self.sooner.notified();
            let ends_at = self.ends_at();
            let left = ends_at.since(Moment::now());
            if left.is_zero() {
                return;
            }
            if ends_at == Moment::NEVER {
                sooner.await;
                continue;
            }
            tokio::select! {
                () = sooner => {}
                () = sleep(left.min(LONGEST_SLEEP)) => {}
            }
        }
    }

    /// Returns at once if the credential was confirmed within
    /// [`CREDENTIAL_CONFIRMED_WITHIN`], otherwise as soon as it is again;
    /// [`Error::CredentialInvalid`] if it has ended.
    pub async fn confirmed(&self) -> Result<()> {
        while self.is_good() {
            if self.is_confirmed() {
                return Ok(());
            }
            // Listens first, so that no confirmation falls between.
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

    /// [`Error::CredentialInvalid`] if it has ended, [`Error::Unavailable`] if that
    /// was not confirmed for too long.
    pub fn still_good(&self) -> Result<()> {
        match (self.is_good(), self.is_confirmed()) {
            (false, _) => Err(Error::CredentialInvalid),
            (true, false) => Err(Error::unavailable("the credential cannot be confirmed")),
            (true, true) => Ok(()),
        }
    }

    /// Does work that may have to wait for its turn, no step of it unless the
    /// credential is [`still_good`](Self::still_good) by then.
    pub async fn while_good<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = pin!(work);
        poll_fn(|context| {
            self.still_good()?;
            work.as_mut().poll(context)
        })
        .await
    }

    /// Neither revoked nor expired, as far as this process knows.
    pub(super) fn is_good(&self) -> bool {
        Moment::now() < self.ends_at()
    }

    fn ends_at(&self) -> Moment {
        Moment(self.ends_at.load(Relaxed))
    }

    /// It ends then, unless before.
    pub(super) fn end_at(&self, at: Moment) {
        if at.0 < self.ends_at.fetch_min(at.0, Relaxed) {
            self.sooner.notify_waiters();
        }
    }

    /// Whether what this process knows is fresh enough to act on.
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

    /// For good. Streams under it say so and end; those that cannot, since
    /// nobody reads them, are cut with their connections.
    pub(super) fn end(self: &Arc<Self>) {
        self.end_at(Moment::PAST);
        if !self.streams().is_empty() {
            self.cut_after_grace();
        }
    }

    fn cut_after_grace(self: &Arc<Self>) {
        let credential = Arc::clone(self);
        tokio::spawn(async move {
            sleep(END_GRACE).await;
            credential.streams().values().for_each(CancellationToken::cancel);
        });
    }

    /// A stream was opened on this connection; its number.
    pub(super) fn opened(self: &Arc<Self>, connection: CancellationToken) -> u64 {
        let number = self.next_stream.fetch_add(1, Relaxed);
        self.streams().insert(number, connection);
        // Whoever ended it a moment ago saw no stream to cut.
        if self.ends_at() == Moment::PAST {
            self.cut_after_grace();
        }
        number
    }

    /// The stream of this number was closed.
    pub(super) fn closed(&self, number: u64) {
        self.streams().remove(&number);
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<u64, CancellationToken>> {
        // Nothing that holds it can leave it half changed.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Whether it was used since its use was last noted, which was not just
    /// now.
    pub(super) fn use_to_note(&self, every: Duration) -> bool {
        let noted_at = Moment(self.noted_at.load(Relaxed));
        self.used_at() > noted_at && noted_at.elapsed() >= every
    }

    pub(super) fn noted(&self, at: Moment) {
        self.noted_at.store(at.0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use uuid::Uuid;

    use super::*;
    use crate::models::{caller::CredentialId, session::tests::caller};

    fn credential(lifetime: Option<Duration>, asked_at: Moment) -> Credential {
        Credential::new(caller(Uuid::nil(), CredentialId::Session(Uuid::nil())), lifetime, asked_at)
    }

    #[tokio::test]
    async fn an_end_is_told_at_once_and_stays() {
        let credential = Arc::new(credential(Some(Duration::from_secs(3_600)), Moment::now()));
        assert!(credential.ended().now_or_never().is_none());
        assert!(matches!(credential.confirmed().now_or_never(), Some(Ok(()))));
        credential.end();
        credential.confirm(Moment::now());
        credential.ended().await;
        assert!(matches!(credential.confirmed().await, Err(Error::CredentialInvalid)));
    }

    #[tokio::test]
    async fn a_stream_is_cut_whether_it_was_opened_before_the_end_or_just_after_it() {
        let credential = Arc::new(credential(None, Moment::now()));
        let [before, after, closed] = [(); 3].map(|()| CancellationToken::new());
        credential.opened(before.clone());
        credential.end();
        assert!(!before.is_cancelled(), "it has a moment to take its end");
        before.cancelled().await;

        let number = credential.opened(closed.clone());
        credential.opened(after.clone());
        credential.closed(number);
        let cut = tokio::time::timeout(2 * END_GRACE, after.cancelled()).await;
        assert!(cut.is_ok() && !closed.is_cancelled());
    }

    #[tokio::test]
    async fn expiry_needs_nobody_to_tell() {
        let credential = credential(Some(Duration::from_millis(20)), Moment::now());
        assert!(credential.is_good());
        credential.ended().await;
        assert!(!credential.is_good());
        assert!(matches!(credential.confirmed().await, Err(Error::CredentialInvalid)));
    }

    #[tokio::test]
    async fn an_end_may_come_sooner_but_not_later() {
        let lifetime = Some(Duration::from_secs(3_600));
        for credential in [credential(None, Moment::now()), credential(lifetime, Moment::now())] {
            let mut ended = std::pin::pin!(credential.ended());
            assert!((&mut ended).now_or_never().is_none());
            credential.end_at(Moment::now().plus(Duration::from_millis(20)));
            credential.end_at(Moment::now().plus(Duration::from_secs(60)));
            assert!(credential.is_good());
            tokio::time::timeout(Duration::from_secs(20), ended).await.expect("its end");
            assert!(!credential.is_good());
        }
    }

    #[tokio::test]
    async fn what_waited_for_its_turn_is_not_done_under_a_credential_that_is_not_good_by_then() {
        let stops: [fn(&Arc<Credential>); 2] = [
            |credential| credential.end(),
            |credential| credential.confirmed_at.store(Moment::PAST.0, Relaxed),
        ];
        for stop in stops {
            let credential = Arc::new(credential(None, Moment::now()));
            let (turn, comes) = tokio::sync::oneshot::channel();
            let done = std::cell::Cell::new(false);
            let mut work = std::pin::pin!(credential.while_good(async {
                comes.await.map_err(Error::internal)?;
                done.set(true);
                Ok(())
            }));
            assert!((&mut work).now_or_never().is_none(), "it is not its turn");
            stop(&credential);
            turn.send(()).expect("it waits");
            assert!(work.await.is_err(), "too late");
            assert!(!done.get());
        }
    }

    #[tokio::test]
    async fn what_is_long_unconfirmed_waits_for_confirmation() {
        let credential = std::sync::Arc::new(credential(None, Moment(0)));
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
    fn use_is_noted_once_in_a_while() {
        let credential = credential(None, Moment::now());
        let every = Duration::from_secs(60);
        assert!(credential.use_to_note(every), "never noted");
        credential.noted(Moment::now());
        credential.used_at.store(Moment::now().0 + 1, Relaxed);
        assert!(!credential.use_to_note(every), "just noted");
        assert!(credential.use_to_note(Duration::ZERO));
    }
}
