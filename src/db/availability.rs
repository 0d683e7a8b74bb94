//! Whether the database is available, as this process knows it.
//!
//! One task queries the database over a connection of its own, since a pool without a
//! free connection does not mean that the database is unavailable. If neither that
//! connection nor a new one answers, the database is unavailable: every connection to it
//! is cut, so that callers are refused now and not when TCP gives up, and no caller tries
//! to connect until it answers again.
//!
//! A database that waits for a synchronous standby answers queries and commits nothing. Then
//! reads go on, callers that wait for a commit are refused, and the server is not ready.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use diesel::{ConnectionError, ConnectionResult, QueryableByName, sql_query, sql_types::Bool};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use futures_util::{
    StreamExt as _,
    future::{BoxFuture, FutureExt as _},
    stream::FuturesUnordered,
};
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Target, connect,
    connect::{DialError, dial},
    pooler::refuse_pooler,
};
use crate::config::{DatabaseSettings, DatabaseUrl};

/// How often the database is queried, and how long the answer may take.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// More than the round trips of a new connection (TCP, TLS, a password, settings). To a
/// distant database they take longer than an answer may.
const CONNECT_ROUND_TRIPS: u32 = 16;
/// How soon the database is queried again after it did not answer.
const CHECK_AGAIN: Duration = Duration::from_millis(250);
/// How often a starting server tries to connect, and how often it logs that it waits.
const START_RETRY: Duration = Duration::from_millis(500);
const START_LOG_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Availability {
    available: watch::Sender<Option<bool>>,
    /// Cancelled while the database is unavailable; its child tokens cut connections.
    outage: Mutex<CancellationToken>,
    /// Cancelled while commits hang, or the database is unavailable.
    hang: Mutex<CancellationToken>,
}

/// What a database does that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Commits {
    Come,
    /// A commit has waited for a synchronous standby for a second.
    Hang,
}

impl Availability {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            available: watch::Sender::new(None),
            outage: Mutex::default(),
            hang: Mutex::default(),
        })
    }

    /// Cancelled if the database is unavailable, or when it next becomes so.
    pub(super) fn outage(&self) -> CancellationToken {
        self.outage.lock().clone()
    }

    /// Cancelled if no commit comes, or when that is next so.
    pub(super) fn hang(&self) -> CancellationToken {
        self.hang.lock().clone()
    }

    /// Whether the database answers and commits come; none before the first check.
    pub(super) fn subscribe(&self) -> watch::Receiver<Option<bool>> {
        self.available.subscribe()
    }

    fn note(&self, checked: ConnectionResult<Commits>) {
        let (mut outage, mut hang) = (self.outage.lock(), self.hang.lock());
        // Before the first answer there was no outage, and connections may have been made with
        // this token.
        if checked.is_ok() && outage.is_cancelled() {
            *outage = CancellationToken::new();
        }
        match &checked {
            Ok(Commits::Come) if hang.is_cancelled() => *hang = CancellationToken::new(),
            Ok(Commits::Come) => {}
            Ok(Commits::Hang) => hang.cancel(),
            Err(_) => {
                outage.cancel();
                hang.cancel();
            }
        }
        drop((outage, hang));
        let available = Some(matches!(checked, Ok(Commits::Come)));
        // Subscribers hear of changes alone.
        if !self.available.send_if_modified(|before| std::mem::replace(before, available) != available) {
            return;
        }
        match checked {
            Ok(Commits::Come) => tracing::info!(ready = true, "the database answers"),
            Ok(Commits::Hang) => {
                tracing::warn!(ready = false, "commits wait for a synchronous standby that does not answer");
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(ready = false, error, "the database does not answer");
            }
        }
    }
}

/// Checks until the last clone of the pool is dropped.
pub(super) async fn watch(target: Arc<Target>, availability: Weak<Availability>) {
    let attempts = FuturesUnordered::new();
    // Before the first answer the database may be a distant one.
    let connect_limit = target.settings.connect_timeout;
    let mut probe = Probe { target, kept: None, attempts, last: Duration::MAX, connect_limit };
    loop {
        let checked = probe.check().await;
        let pause = if checked.is_ok() { CHECK_EVERY } else { CHECK_AGAIN };
        let Some(availability) = availability.upgrade() else { return };
        availability.note(checked);
        drop(availability);
        sleep(pause).await;
    }
}

struct Probe {
    target: Arc<Target>,
    kept: Option<AsyncPgConnection>,
    /// Attempts to connect since their start, each for the connect timeout at most.
    attempts: FuturesUnordered<BoxFuture<'static, (Instant, ConnectionResult<Answered>)>>,
    /// How long the last answer took.
    last: Duration,
    /// How long a new connection may take before the database counts as unavailable, or while
    /// it does, before another one is tried.
    connect_limit: Duration,
}

impl Probe {
    /// Queries over the kept connection and, if that does not answer, over a new one,
    /// since a broken connection does not mean that the database is unavailable.
    async fn check(&mut self) -> ConnectionResult<Commits> {
        let answered = match self.kept.take() {
            Some(connection) => in_time(CHECK_EVERY, ping(connection)).await.ok(),
            None => None,
        };
        let Answered { connection, took, commits } = match answered {
            Some(answered) => answered,
            None => self.connect().await?,
        };
        self.kept = Some(connection);
        // One late answer does not mean that the database is farther away.
        let round_trip = std::mem::replace(&mut self.last, took).min(took);
        self.connect_limit = CHECK_EVERY.max(round_trip * CONNECT_ROUND_TRIPS);
        Ok(commits)
    }

    /// Another attempt, beside earlier ones that are still under way: the database may be
    /// distant, or an earlier attempt may never get an answer.
    async fn connect(&mut self) -> ConnectionResult<Answered> {
        let (target, begun) = (Arc::clone(&self.target), Instant::now());
        let limit = target.settings.connect_timeout;
        // An outage does not cut this connection, which is to tell when the outage ends.
        let attempt = async move { ping(connect(&target, CancellationToken::new()).await?.0).await };
        self.attempts.push(in_time(limit, attempt).map(move |made| (begun, made)).boxed());
        let attempts = &mut self.attempts;
        let first = async {
            while let Some((since, made)) = attempts.next().await {
                // An earlier attempt matters only if it succeeds.
                if made.is_ok() || since == begun {
                    return made;
                }
            }
            no_answer()
        };
        let answered = in_time(self.connect_limit.min(limit), first).await;
        match answered {
            Ok(_) => self.attempts.clear(),
            // This attempt may wait for a host that is silent, and have asked the others before
            // one of them was promoted: the next one is made beside it soon.
            Err(_) => self.connect_limit = CHECK_AGAIN,
        }
        answered
    }
}

/// A connection that answered.
struct Answered {
    connection: AsyncPgConnection,
    /// How long it took.
    took: Duration,
    commits: Commits,
}

#[derive(QueryableByName)]
struct Status {
    #[diesel(sql_type = Bool)]
    read_only: bool,
    #[diesel(sql_type = Bool)]
    commits_hang: bool,
}

/// Asks whether the database can be written, and whether a commit of milepost's role waits for
/// a standby.
async fn ping(mut connection: AsyncPgConnection) -> ConnectionResult<Answered> {
    let sent_at = Instant::now();
    let query = sql_query(
        "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean AS read_only, \
         EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' \
         AND clock_timestamp() - state_change > interval '1 second') AS commits_hang",
    );
    let status: Status =
        query.get_result(&mut connection).await.map_err(ConnectionError::CouldntSetupConfiguration)?;
    if status.read_only {
        return Err(ConnectionError::BadConnection("it is read-only".to_owned()));
    }
    let commits = if status.commits_hang { Commits::Hang } else { Commits::Come };
    Ok(Answered { connection, took: sent_at.elapsed(), commits })
}

async fn in_time<T>(limit: Duration, work: impl Future<Output = ConnectionResult<T>>) -> ConnectionResult<T> {
    timeout(limit, work).await.unwrap_or_else(|_| no_answer())
}

fn no_answer<T>() -> ConnectionResult<T> {
    Err(ConnectionError::BadConnection("it does not answer".to_owned()))
}

/// Why a server does not start; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An error that waiting does not cure, such as a wrong password.
    #[error("cannot connect to the database: {0}")]
    Refused(#[source] DialError),
    /// The database did not answer within the time that a start waits.
    #[error("the database did not answer for {waited_s} s: {last}")]
    Unavailable {
        /// How long the start waited, in seconds.
        waited_s: u64,
        last: String,
    },
}

/// Returns once the database accepts connections that have sessions of their own; waits at
/// most for `limit`. An error that waiting does not cure, such as a wrong password or a
/// pooler in transaction mode, is returned at once.
pub async fn wait_until_available(
    url: &DatabaseUrl,
    settings: &DatabaseSettings,
    limit: Duration,
) -> Result<(), StartError> {
    let started = Instant::now();
    let mut logged: Option<Instant> = None;
    loop {
        let dialled = timeout(settings.connect_timeout, dial(url.reveal(), settings.ca.as_deref(), "")).await;
        let answered = match dialled.unwrap_or(Err(DialError::Silent)) {
            Ok(_) => refuse_pooler(url.reveal(), settings).await,
            Err(error) => Err(error),
        };
        let last = match answered {
            Ok(()) => return Ok(()),
            Err(error) if error.is_final() => return Err(StartError::Refused(error)),
            Err(error) => error.to_string(),
        };
        if started.elapsed() + START_RETRY > limit {
            return Err(StartError::Unavailable { waited_s: started.elapsed().as_secs(), last });
        }
        if logged.is_none_or(|logged| logged.elapsed() >= START_LOG_EVERY) {
            tracing::warn!(cause = last, "waiting for the database");
            logged = Some(Instant::now());
        }
        sleep(START_RETRY).await;
    }
}
