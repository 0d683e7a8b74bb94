//! Notifications between replicas: NOTIFY on the channel `milepost`, after a commit. A
//! transaction that contains NOTIFY holds a lock of the whole cluster until its commit
//! is flushed, so appends never contain it.
//!
//! A notification may be lost: whoever listens also reads from time to time without one.

use std::{convert::Infallible, error::Error as StdError, iter, mem, sync::Arc, time::Duration};

use diesel_async::{RunQueryDsl, SimpleAsyncConnection as _};
use futures_util::StreamExt as _;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use super::{Database, DialError, Payer};
use crate::error::{Error, Result};

/// Pause before the connection that listens is made again.
const RECONNECT: Duration = Duration::from_millis(250);

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
            _end: Arc::new(ended.clone().drop_guard()),
            ended,
        };
        for notification in [Notification::Log, Notification::Credentials] {
            let payload = format!("{} {}", notification.label(), notifier.replica);
            let due = Arc::clone(notifier.due(notification));
            let sending = send(notifier.database.clone(), due, payload);
            tokio::spawn(notifier.ended.clone().run_until_cancelled_owned(sending));
        }
        notifier
    }

    /// Sends a notification soon. Those that come while one is on its way become one.
    pub fn notify(&self, notification: Notification) {
        self.due(notification).notify_one();
    }

    /// Starts to listen: `received` is called for each notification of another replica,
    /// and for both kinds whenever listening begins, since some may have been missed.
    pub fn listen(&self, received: impl Fn(Notification) + Send + Sync + 'static) {
        let (database, replica) = (self.database.clone(), Arc::clone(&self.replica));
        let ended = self.ended.clone();
        let listening = async move {
            let mut logged = Logged::default();
            loop {
                let listening = listen(&database, &replica, &received, &mut logged);
                let Err(error) = database.unless_unavailable(listening).await;
                logged.log(&error);
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
        let pooler = iter::successors(Some(error), |&error| error.source())
            .find(|cause| matches!(cause.downcast_ref(), Some(DialError::Pooler(_))));
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
async fn send(database: Database, due: Arc<Notify>, payload: String) {
    diesel::define_sql_function! {
        fn pg_notify(channel: diesel::sql_types::Text, payload: diesel::sql_types::Text);
    }
    loop {
        due.notified().await;
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

/// Returns only when the connection cannot be made or breaks.
async fn listen(
    database: &Database,
    replica: &str,
    received: &impl Fn(Notification),
    logged: &mut Logged,
) -> Result<Infallible> {
    let (mut connection, superseded) = database.connect_to_listen().await?;
    connection.batch_execute("LISTEN milepost").await?;
    *logged = Logged::default();
    received(Notification::Log);
    received(Notification::Credentials);
    let mut notifications = std::pin::pin!(connection.notifications_stream());
    while let Some(notification) = superseded.run_until_cancelled(notifications.next()).await.flatten() {
        let payload = notification?.payload;
        match payload.split_once(' ') {
            Some((_, from)) if from == replica => {}
            Some(("log", _)) => received(Notification::Log),
            Some(("credentials", _)) => received(Notification::Credentials),
            // A kind that only a newer replica knows.
            _ => {}
        }
    }
    Err(Error::unavailable("the connection was closed"))
}
