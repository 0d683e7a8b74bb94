//! Whether the database is there, as this process knows it.
//!
//! One task asks it over a connection of its own: a pool that is busy is no
//! database that is away. Where neither that connection nor a new one answers,
//! the database is away: every connection to it is cut, so that whoever waits
//! for an answer is refused now and not when the network gives up, and nobody
//! tries to connect until it is back.

use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use diesel::{ConnectionError, ConnectionResult};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    DatabaseSettings, connect,
    connect::{DialError, dial},
};

/// How often the database is asked whether it answers, and how long it has.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How soon it is asked again after it did not answer.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// How often a start tries again to connect, and how often it says so.
const START_RETRY: Duration = Duration::from_millis(500);
const START_LOG_EVERY: Duration = Duration::from_secs(5);

/// What is known.
#[derive(Debug)]
pub(super) struct Presence {
    answers: watch::Sender<Option<bool>>,
    /// Cancelled while the database is away; what hangs on it is cut.
    outage: Mutex<CancellationToken>,
}

impl Presence {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { answers: watch::Sender::new(None), outage: Mutex::default() })
    }

    /// Cancelled if the database is away, or when it next is.
    pub(super) fn outage(&self) -> CancellationToken {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it answers, and each change of that; nothing before it was asked.
    pub(super) fn answers(&self) -> watch::Receiver<Option<bool>> {
        self.answers.subscribe()
    }

    fn note(&self, asked: ConnectionResult<()>) {
        let answers = asked.is_ok();
        if *self.answers.borrow() == Some(answers) {
            return;
        }
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        match asked {
            Ok(()) => {
                tracing::info!(ready = true, "the database answers");
                // At the first answer there was none, and connections hang on it.
                if outage.is_cancelled() {
                    *outage = CancellationToken::new();
                }
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(ready = false, error, "the database does not answer");
                outage.cancel();
            }
        }
        drop(outage);
        self.answers.send_replace(Some(answers));
    }
}

/// Asks until nobody wants to know any more.
pub(super) async fn keep_asking(settings: DatabaseSettings, presence: Weak<Presence>) {
    let mut kept = None;
    loop {
        let asked = ask(&settings, &mut kept).await;
        let pause = if asked.is_ok() { ASK_EVERY } else { ASK_AGAIN };
        let Some(presence) = presence.upgrade() else { return };
        presence.note(asked);
        drop(presence);
        sleep(pause).await;
    }
}

/// Over the connection there is and, where that does not answer, over a new
/// one: one that broke is not the database's end.
async fn ask(settings: &DatabaseSettings, kept: &mut Option<AsyncPgConnection>) -> ConnectionResult<()> {
    if let Some(connection) = kept.take() {
        *kept = in_time(ping(connection)).await.ok();
    }
    if kept.is_none() {
        *kept = Some(in_time(async { ping(connect(settings, None).await?).await }).await?);
    }
    Ok(())
}

async fn ping(mut connection: AsyncPgConnection) -> ConnectionResult<AsyncPgConnection> {
    connection.batch_execute("SELECT 1").await.map_err(ConnectionError::CouldntSetupConfiguration)?;
    Ok(connection)
}

async fn in_time<T>(work: impl Future<Output = ConnectionResult<T>>) -> ConnectionResult<T> {
    let silence = |_| Err(ConnectionError::BadConnection("it is silent".to_owned()));
    timeout(ASK_EVERY, work).await.unwrap_or_else(silence)
}

/// Why a start does not go on; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Nothing that waiting would cure.
    #[error("cannot connect to the database: {0}")]
    Refused(#[source] DialError),
    /// Not within the time that a start waits.
    #[error("the database did not answer for {waited_s} s: {last}")]
    Away {
        /// How long was waited, in seconds.
        waited_s: u64,
        /// What was said last.
        last: String,
    },
}

/// Returns once the database takes a connection, which it may still be on its
/// way to; at most after `patience`. What waiting does not cure, such as a wrong
/// password, is an error at once.
pub async fn wait_until_it_answers(
    settings: &DatabaseSettings,
    patience: Duration,
) -> Result<(), StartError> {
    let started = Instant::now();
    let mut told: Option<Instant> = None;
    loop {
        let last = match timeout(settings.connect_timeout, dial(&settings.url, settings.ca.as_deref())).await
        {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) if error.is_final() => return Err(StartError::Refused(error)),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it is silent".to_owned(),
        };
        if started.elapsed() + START_RETRY > patience {
            return Err(StartError::Away { waited_s: started.elapsed().as_secs(), last });
        }
        if told.is_none_or(|told| told.elapsed() >= START_LOG_EVERY) {
            tracing::warn!(cause = last, "waiting for the database");
            told = Some(Instant::now());
        }
        sleep(START_RETRY).await;
    }
}
