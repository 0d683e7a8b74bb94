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
use futures_util::{
    StreamExt as _,
    future::{BoxFuture, FutureExt as _},
    stream::FuturesUnordered,
};
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
/// More than the ways there and back that a new connection takes (TCP, TLS, a
/// password, settings): to one far away it takes longer than an answer may.
const CONNECT_ROUND_TRIPS: u32 = 16;
/// How soon it is asked again after it did not answer.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// How often a start tries again to connect, and how often it says so.
const START_RETRY: Duration = Duration::from_millis(500);
const START_LOG_EVERY: Duration = Duration::from_secs(5);

/// What is known.
#[derive(Debug)]
pub(super) struct Availability {
    answers: watch::Sender<Option<bool>>,
    /// Cancelled while the database is away; what hangs on it is cut.
    outage: Mutex<CancellationToken>,
}

impl Availability {
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
pub(super) async fn keep_asking(settings: DatabaseSettings, availability: Weak<Availability>) {
    let attempts = FuturesUnordered::new();
    // Where nothing is known of the way, it may be a long one.
    let connect_limit = settings.connect_timeout;
    let mut probe = Probe { settings, kept: None, attempts, last: Duration::MAX, connect_limit };
    loop {
        let asked = probe.ask().await;
        let pause = if asked.is_ok() { ASK_EVERY } else { ASK_AGAIN };
        let Some(availability) = availability.upgrade() else { return };
        availability.note(asked);
        drop(availability);
        sleep(pause).await;
    }
}

/// Who asks.
struct Probe {
    settings: DatabaseSettings,
    kept: Option<AsyncPgConnection>,
    /// On their way to a new connection since then, each for the connect time-out
    /// at most.
    attempts: FuturesUnordered<BoxFuture<'static, (Instant, ConnectionResult<Answered>)>>,
    /// How long the last answer took, and how long a connection may take to make.
    last: Duration,
    connect_limit: Duration,
}

impl Probe {
    /// Over the connection there is and, where that does not answer, over a new
    /// one: one that broke is not the database's end.
    async fn ask(&mut self) -> ConnectionResult<()> {
        let answered = match self.kept.take() {
            Some(connection) => in_time(ASK_EVERY, ping(connection)).await.ok(),
            None => None,
        };
        let (connection, took) = match answered {
            Some(answered) => answered,
            None => self.connect().await?,
        };
        self.kept = Some(connection);
        // One answer that is late does not make the way longer.
        let round_trip = std::mem::replace(&mut self.last, took).min(took);
        self.connect_limit = ASK_EVERY.max(round_trip * CONNECT_ROUND_TRIPS);
        Ok(())
    }

    /// Another attempt beside those that had too little time: the database may
    /// be far away, or have come back to a connection that hears nothing of it.
    async fn connect(&mut self) -> ConnectionResult<Answered> {
        let (settings, begun) = (self.settings.clone(), Instant::now());
        let limit = settings.connect_timeout;
        let attempt = async move { ping(connect(&settings, None).await?).await };
        self.attempts.push(in_time(limit, attempt).map(move |made| (begun, made)).boxed());
        let attempts = &mut self.attempts;
        let first = async {
            while let Some((since, made)) = attempts.next().await {
                // What becomes of an earlier one only matters if it is good.
                if made.is_ok() || since == begun {
                    return made;
                }
            }
            silence()
        };
        let answered = in_time(self.connect_limit.min(limit), first).await?;
        self.attempts.clear();
        Ok(answered)
    }
}

/// A connection, and how long it took to answer.
type Answered = (AsyncPgConnection, Duration);

async fn ping(mut connection: AsyncPgConnection) -> ConnectionResult<Answered> {
    let asked = Instant::now();
    connection.batch_execute("SELECT 1").await.map_err(ConnectionError::CouldntSetupConfiguration)?;
    Ok((connection, asked.elapsed()))
}

async fn in_time<T>(limit: Duration, work: impl Future<Output = ConnectionResult<T>>) -> ConnectionResult<T> {
    timeout(limit, work).await.unwrap_or_else(|_| silence())
}

fn silence<T>() -> ConnectionResult<T> {
    Err(ConnectionError::BadConnection("it is silent".to_owned()))
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
    connect_limit: Duration,
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
        if started.elapsed() + START_RETRY > connect_limit {
            return Err(StartError::Away { waited_s: started.elapsed().as_secs(), last });
        }
        if told.is_none_or(|told| told.elapsed() >= START_LOG_EVERY) {
            tracing::warn!(cause = last, "waiting for the database");
            told = Some(Instant::now());
        }
        sleep(START_RETRY).await;
    }
}
