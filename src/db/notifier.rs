//! The bell between replicas: NOTIFY after a commit, never within one, since a
//! notifying transaction holds a lock of the whole cluster while it flushes.
//!
//! A bell may be lost; whoever listens also looks by itself, now and then.

use std::{convert::Infallible, sync::Arc, time::Duration};

use diesel_async::{RunQueryDsl, SimpleAsyncConnection as _};
use futures_util::StreamExt as _;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use super::Database;
use crate::error::{Error, Result};

/// Pause before the connection that listens is made anew.
const RECONNECT: Duration = Duration::from_millis(250);

/// What rings.
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

/// Rings the other replicas.
#[derive(Clone, Debug)]
pub struct Notifier {
    log: Arc<Notify>,
    credentials: Arc<Notify>,
    _alive: Arc<DropGuard>,
}

impl Notifier {
    /// Starts to ring for this process and to listen to the others; `heard` is
    /// called for each bell of theirs, and for all of them once listening has
    /// begun anew, since some may have been missed.
    pub fn start(database: Database, heard: impl Fn(Notification) + Send + Sync + 'static) -> Self {
        let replica = Uuid::now_v7().simple().to_string();
        let ended = CancellationToken::new();
        let notifier = Self {
            log: Arc::default(),
            credentials: Arc::default(),
            _alive: Arc::new(ended.clone().drop_guard()),
        };
        for (bell, due) in
            [(Notification::Log, &notifier.log), (Notification::Credentials, &notifier.credentials)]
        {
            let sending = send(database.clone(), Arc::clone(due), format!("{} {replica}", bell.label()));
            tokio::spawn(ended.clone().run_until_cancelled_owned(sending));
        }
        tokio::spawn(ended.run_until_cancelled_owned(async move {
            let mut hears = true;
            loop {
                // Told once, not at every attempt.
                let listening = listen(&database, &replica, &heard, &mut hears);
                if let Err(error) = database.unless_away(listening).await
                    && std::mem::take(&mut hears)
                {
                    tracing::warn!(error = &error as &dyn std::error::Error, "cannot hear other replicas");
                }
                tokio::time::sleep(RECONNECT).await;
            }
        }));
        notifier
    }

    /// Rings soon. Bells that fall due while one is on its way become one.
    pub fn notify(&self, bell: Notification) {
        match bell {
            Notification::Log => self.log.notify_one(),
            Notification::Credentials => self.credentials.notify_one(),
        }
    }
}

/// One notification at a time, the next carrying what has fallen due meanwhile.
async fn send(database: Database, due: Arc<Notify>, payload: String) {
    diesel::define_sql_function! {
        fn pg_notify(channel: diesel::sql_types::Text, payload: diesel::sql_types::Text);
    }
    loop {
        due.notified().await;
        let notify = async {
            let mut connection = database.get().await?;
            diesel::select(pg_notify("milepost", &payload)).execute(&mut connection).await?;
            Ok::<_, Error>(())
        };
        if let Err(error) = notify.await {
            // Whoever listens looks by itself within a second.
            tracing::debug!(error = &error as &dyn std::error::Error, "cannot ring other replicas");
        }
    }
}

/// Never returns but with why the connection could not be made, or broke.
async fn listen(
    database: &Database,
    replica: &str,
    heard: &impl Fn(Notification),
    hears: &mut bool,
) -> Result<Infallible> {
    let mut connection = database.connect_to_listen().await?;
    connection.batch_execute("LISTEN milepost").await?;
    *hears = true;
    heard(Notification::Log);
    heard(Notification::Credentials);
    let mut notifications = std::pin::pin!(connection.notifications_stream());
    while let Some(notification) = notifications.next().await {
        let payload = notification?.payload;
        match payload.split_once(' ') {
            Some((_, from)) if from == replica => {}
            Some(("log", _)) => heard(Notification::Log),
            Some(("credentials", _)) => heard(Notification::Credentials),
            // A newer replica's bell.
            _ => {}
        }
    }
    Err(Error::unavailable("the connection was closed"))
}
