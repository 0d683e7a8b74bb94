//! Notifications between replicas: NOTIFY on the channel `milepost`, after a commit. A
//! transaction that contains NOTIFY holds a lock of the whole cluster until its commit
//! is flushed, so appends never contain it.
//!
//! A notification may be lost: whoever listens also reads from time to time without one.
//!
//! A replica that is the only one announces no events: beside a single append, a notification
//! costs a fifth of all processor time. Therefore replicas tell each other that they listen.
//! Whoever hears of another one for the first time notifies it at once, since it may have missed
//! events.

use std::{
    convert::Infallible,
    error::Error as StdError,
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use diesel_async::{RunQueryDsl, SimpleAsyncConnection as _};
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::{sync::Notify, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use super::{Database, DialError, Payer};
use crate::error::{Error, Result, causes};

/// Pause before the connection that listens is made again.
const RECONNECT: Duration = Duration::from_millis(250);
/// How often a replica tells the others that it listens.
const PRESENCE: Duration = Duration::from_secs(2);
/// Time after which a replica that was not heard of is taken to be gone.
const GONE: Duration = Duration::from_secs(7);
/// The kind of notification that says that a replica listens.
const PRESENT: &str = "present";

/// What a notification is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notification {
    /// Events were committed.
    Log,
    /// A credential was ended.
    Credentials,
}

impl Notification {
    fn label(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Credentials => "credentials",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Notifier {
    database: Database,
    /// Tells the notifications of this process from those of others.
    replica: Arc<str>,
    log: Arc<Notify>,
    credentials: Arc<Notify>,
    present: Arc<Notify>,
    heard: Arc<Mutex<Heard>>,
    ended: CancellationToken,
    _end: Arc<DropGuard>,
}

impl Notifier {
    /// Starts the tasks that send; they end when the last clone is dropped.
    pub fn start(database: Database) -> Self {
        let ended = CancellationToken::new();
        let notifier = Self {
            database,
            replica: Uuid::now_v7().simple().to_string().into(),
            log: Arc::default(),
            credentials: Arc::default(),
            present: Arc::default(),
            heard: Arc::default(),
            _end: Arc::new(ended.clone().drop_guard()),
            ended,
        };
        for notification in [Notification::Log, Notification::Credentials] {
            notifier.start_sending(notification.label(), notifier.due(notification), None);
        }
        notifier
    }

    /// Starts to send notifications of this kind when one is due, and as often as `every`.
    fn start_sending(&self, kind: &str, due: &Arc<Notify>, every: Option<Duration>) {
        let payload = format!("{kind} {}", self.replica);
        let sending = send(self.database.clone(), Arc::clone(due), every, payload);
        tokio::spawn(self.ended.clone().run_until_cancelled_owned(sending));
    }

    /// Sends a notification soon. Those that come while one is on its way become one. Events
    /// are announced only while another replica may listen.
    pub fn notify(&self, notification: Notification) {
        if notification == Notification::Log && self.heard.lock().is_alone(Instant::now()) {
            return;
        }
        self.due(notification).notify_one();
    }

    /// Starts to listen: `received` is called for each notification of another replica,
    /// and for both kinds whenever listening begins, since some may have been missed.
    pub fn listen(&self, received: impl Fn(Notification) + Send + Sync + 'static) {
        self.start_sending(PRESENT, &self.present, Some(PRESENCE));
        let mut listener = Listener {
            database: self.database.clone(),
            replica: Arc::clone(&self.replica),
            heard: Arc::clone(&self.heard),
            log: Arc::clone(&self.log),
            present: Arc::clone(&self.present),
            received,
            logged: Logged::default(),
        };
        let ended = self.ended.clone();
        let listening = async move {
            loop {
                let database = listener.database.clone();
                let Err(error) = database.unless_unavailable(listener.listen()).await;
                *listener.heard.lock() = Heard::default();
                listener.logged.log(&error);
                tokio::time::sleep(RECONNECT).await;
            }
        };
        self.database.spawn(async move {
            let _ended = ended.run_until_cancelled_owned(listening).await;
        });
    }

    fn due(&self, notification: Notification) -> &Arc<Notify> {
        match notification {
            Notification::Log => &self.log,
            Notification::Credentials => &self.credentials,
        }
    }
}

/// What was logged since the last success: each cause once, not at every attempt.
#[derive(Default)]
struct Logged {
    outage: bool,
    pooler: bool,
}

impl Logged {
    fn log(&mut self, error: &(dyn StdError + 'static)) {
        let pooler = causes(error).find(|cause| matches!(cause.downcast_ref(), Some(DialError::Pooler(_))));
        match pooler {
            Some(error) if !mem::replace(&mut self.pooler, true) => {
                tracing::error!(error, "cannot listen to other replicas");
            }
            None if !mem::replace(&mut self.outage, true) => {
                tracing::warn!(error, "cannot listen to other replicas");
            }
            _ => {}
        }
    }
}

/// Sends one notification at a time; the next one stands for all that came meanwhile.
async fn send(database: Database, due: Arc<Notify>, every: Option<Duration>, payload: String) {
    diesel::define_sql_function! {
        fn pg_notify(channel: diesel::sql_types::Text, payload: diesel::sql_types::Text);
    }
    loop {
        match every {
            Some(every) => {
                let _elapsed = timeout(every, due.notified()).await;
            }
            None => due.notified().await,
        }
        let notify = async {
            let mut connection = database.get(Payer::Server).await?;
            diesel::select(pg_notify("milepost", &payload)).execute(&mut connection).await?;
            Ok::<_, Error>(())
        };
        if let Err(error) = notify.await {
            // The others read without a notification within a second.
            tracing::debug!(error = &error as &dyn StdError, "cannot notify other replicas");
        }
    }
}

/// What listens for the notifications of other replicas.
struct Listener<F> {
    database: Database,
    replica: Arc<str>,
    heard: Arc<Mutex<Heard>>,
    /// What to send: that events were committed, and that this replica listens.
    log: Arc<Notify>,
    present: Arc<Notify>,
    received: F,
    logged: Logged,
}

impl<F: Fn(Notification)> Listener<F> {
    /// Returns only when the connection cannot be made or breaks.
    async fn listen(&mut self) -> Result<Infallible> {
        let (mut connection, superseded) = self.database.connect_to_listen().await?;
        connection.batch_execute("LISTEN milepost").await?;
        self.logged = Logged::default();
        self.present.notify_one();
        (self.received)(Notification::Log);
        (self.received)(Notification::Credentials);
        let mut notifications = std::pin::pin!(connection.notifications_stream());
        while let Some(notification) = superseded.run_until_cancelled(notifications.next()).await.flatten() {
            self.hear(&notification?.payload);
        }
        Err(Error::unavailable("the connection was closed"))
    }

    fn hear(&self, payload: &str) {
        let Some((kind, from)) = payload.split_once(' ') else { return };
        let own = from == &*self.replica;
        if self.heard.lock().note(own, Instant::now()) {
            self.log.notify_one();
        }
        match kind {
            _ if own => {}
            "log" => (self.received)(Notification::Log),
            "credentials" => (self.received)(Notification::Credentials),
            // That another replica listens, or a kind that only a newer one knows.
            _ => {}
        }
    }
}

/// When notifications were heard since listening began.
#[derive(Debug, Default)]
struct Heard {
    /// The first and the last one of this replica, which also come by way of the database.
    own: Option<(Instant, Instant)>,
    /// The last one of another replica.
    other: Option<Instant>,
}

impl Heard {
    /// Notes a notification. Returns whether it comes from another replica to which events were
    /// not announced.
    fn note(&mut self, own: bool, now: Instant) -> bool {
        let was_alone = self.is_alone(now);
        if own {
            self.own = Some((self.own.map_or(now, |(first, _)| first), now));
        } else {
            self.other = Some(now);
        }
        was_alone && !own
    }

    /// Whether no other replica listens: it would have been heard by now.
    fn is_alone(&self, now: Instant) -> bool {
        let is_gone = |heard: Instant| now.saturating_duration_since(heard) >= GONE;
        let hears = self.own.is_some_and(|(first, last)| is_gone(first) && !is_gone(last));
        hears && self.other.is_none_or(is_gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_alone_while_it_hears_itself_and_no_other() {
        let begin = Instant::now();
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let mut heard = Heard::default();
        assert!(!heard.is_alone(at(0)), "nothing was heard");
        for second in [0, 2, 4, 6] {
            assert!(!heard.note(true, at(second)), "own notifications are no other replica");
            assert!(!heard.is_alone(at(second)), "another one may not have said that it listens");
        }
        assert!(heard.is_alone(at(7)));
        assert!(heard.note(false, at(8)), "another one has missed what was not announced");
        assert!(!heard.note(false, at(9)), "events are announced to it");
        heard.note(true, at(14));
        assert!(!heard.is_alone(at(15)));
        assert!(heard.is_alone(at(16)), "the other one is gone");
        assert!(!heard.is_alone(at(21)), "own notifications do not come any more");
    }
}
