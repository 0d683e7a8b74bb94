//! The database: the pool, the connections, their availability, migrations, the
//! embedded server, and notifications between replicas.

mod availability;
mod capacity;
mod connect;
pub mod embedded;
mod identity;
pub mod migrations;
pub mod notifier;
mod pool;
mod pooler;
mod url;
mod write;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use deadpool::{Runtime, Status, managed::Timeouts};
use diesel::{ConnectionError, ConnectionResult};
use diesel_async::{AsyncPgConnection, pooled_connection::PoolableConnection as _};
use futures_util::{StreamExt as _, stream};
use tokio::{sync::watch, time::timeout};
use tokio_postgres::{AsyncMessage, error::SqlState};
use tokio_util::sync::CancellationToken;

use self::{
    availability::Availability,
    connect::{Dialled, Driver, dial_to},
    identity::Present,
    pool::{Manager, PayerKey, Pool, cut_long_checkouts, turns},
    pooler::refuse_pooler,
};
pub use self::{
    availability::{StartError, wait_until_available},
    connect::DialError,
    identity::{Identified, Identity},
    pool::{Connection, Payer, Share},
    write::{Authority, OwnConnection, Transaction, Unconditional},
};
use crate::{
    config::{DatabaseSettings, DatabaseUrl},
    error::{BoxError, Error, Result},
    turns::Turns,
};

/// What every session sets, whatever the role or the database sets otherwise. By the TCP
/// settings Postgres notices soon that a client is gone, and releases its locks.
const SESSION: &str = "SET default_transaction_isolation = 'read committed'; \
    SET default_transaction_read_only = off; SET default_transaction_deferrable = off; \
    SET timezone = 'UTC'; SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 2; \
    SET tcp_keepalives_count = 3";

/// Reads with a connection of the pool that is counted to the payer, and once more with a new
/// one if the session of the first one is at fault.
macro_rules! read {
    ($database:expr, $payer:expr, |$connection:ident| $read:expr) => {{
        let mut again = false;
        loop {
            let mut connection = $database.get($payer).await?;
            let $connection = &mut connection;
            let result: $crate::error::Result<_> = $read.await;
            again = result.is_err() && !again && $database.read_again(connection);
            if !again {
                break result;
            }
        }
    }};
}
pub(crate) use read;

/// Where the database is, how connections to it are made, and which one they reached.
struct Target {
    url: DatabaseUrl,
    settings: DatabaseSettings,
    present: Present,
}

#[derive(Clone)]
pub struct Database {
    pool: Pool,
    /// The turns in which payers get the connections of the pool.
    turns: Turns<PayerKey>,
    target: Arc<Target>,
    availability: Arc<Availability>,
    /// See [`Database::stop_tasks`].
    stopped: CancellationToken,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").field("status", &self.pool.status()).finish_non_exhaustive()
    }
}

impl Database {
    /// A pool that connects when it is first used.
    pub fn new(url: DatabaseUrl, settings: DatabaseSettings) -> Result<Self> {
        let (wait, connections) = (Some(settings.connect_timeout), settings.connections);
        let target = Arc::new(Target { url, settings, present: Present::default() });
        let availability = Availability::new();
        let manager = Manager::new(Arc::clone(&target), Arc::clone(&availability));
        let pool = Pool::builder(manager)
            .max_size(connections)
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts { wait, create: wait, recycle: wait })
            .build()
            .map_err(Error::internal)?;
        Ok(Self { pool, turns: turns(connections), target, availability, stopped: CancellationToken::new() })
    }

    /// Starts to watch the availability of the database, until the last clone is
    /// dropped. All connections are cut when the database does not answer, and single
    /// ones that do not answer.
    pub fn watch_availability(&self) {
        self.spawn(cut_long_checkouts(self.pool.weak(), self.settings().statement_timeout));
        let availability = Arc::downgrade(&self.availability);
        self.spawn(availability::watch(Arc::clone(&self.target), availability));
    }

    /// Spawns a task that uses the database by itself, which [`Self::stop_tasks`] ends.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task = self.stopped.clone().run_until_cancelled_owned(task);
        tokio::spawn(async move {
            let _ended = task.await;
        });
    }

    /// Ends all tasks of [`Self::spawn`], since the database is stopped next: they would report
    /// an outage.
    pub fn stop_tasks(&self) {
        self.stopped.cancel();
    }

    /// Whether the database is available, and each change of that; none before the first
    /// check.
    pub fn available(&self) -> watch::Receiver<Option<bool>> {
        self.availability.subscribe()
    }

    /// Whether a read that failed may succeed over a new connection, since the session of its
    /// connection is at fault. Then the idle connections, which are as old, are closed.
    pub fn read_again(&self, connection: Connection) -> bool {
        let again = connection.session_failed();
        drop(connection);
        if again {
            self.pool.retain(|_, _| false);
        }
        again
    }

    /// The database that the newest connection has reached; none before the first one.
    pub fn identity(&self) -> Option<Identity> {
        self.target.present.identity()
    }

    /// A connection outside the pool. Like those of the pool it is cut when the database
    /// becomes unavailable.
    pub async fn connect(&self) -> Result<OwnConnection> {
        let connecting = Box::pin(connect(&self.target, self.availability.outage()));
        let (connection, facts) = self.unless_unavailable(connecting).await?;
        Ok(OwnConnection { connection, facts })
    }

    /// The server's own connection, kept from one use to the next, or a new one if it
    /// broke while it was idle. The caller puts it back after a use that succeeded.
    pub async fn kept_or_new(&self, kept: &mut Option<OwnConnection>) -> Result<OwnConnection> {
        match kept.take_if(|kept| !kept.connection.is_broken()) {
            Some(connection) => Ok(connection),
            None => self.connect().await,
        }
    }

    /// A connection to LISTEN on, and the token that says that another database has taken
    /// the place of the one that was reached; an error if a pooler would lose the LISTEN.
    /// Neither that nor an outage cuts the connection; see [`Self::unless_unavailable`].
    pub async fn connect_to_listen(&self) -> Result<(AsyncPgConnection, CancellationToken)> {
        let connecting = async {
            let (Dialled { client, driver, .. }, superseded) = self.target.dial().await?;
            let connection = AsyncPgConnection::try_from_client_and_connection(client, driver).await?;
            Ok((connection, superseded))
        };
        let connecting = async {
            refuse_pooler(self.target.url.reveal(), self.settings()).await?;
            within(self.settings().connect_timeout, connecting).await.map_err(BoxError::from)
        };
        self.unless_unavailable(Box::pin(connecting)).await
    }

    /// The result of `work`, or [`Error::Unavailable`] as soon as the database is known
    /// to be unavailable.
    pub async fn unless_unavailable<T, E: Into<BoxError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T> {
        match self.availability.outage().run_until_cancelled(work).await {
            Some(result) => result.map_err(Error::unavailable),
            None => Err(Error::unavailable("the database is unavailable")),
        }
    }

    /// The result of `commit`, or [`Error::Unavailable`] as soon as commits are known to wait
    /// for a standby that does not answer. Whether this one takes effect is not known then.
    pub async fn unless_commits_hang<T>(&self, commit: impl Future<Output = Result<T>>) -> Result<T> {
        match self.availability.hang().run_until_cancelled(commit).await {
            Some(result) => result,
            None => Err(Error::unavailable("commits do not come")),
        }
    }

    /// How many connections the pool has, and how many callers wait for one.
    pub fn status(&self) -> Status {
        Status { waiting: self.turns.waiting(), ..self.pool.status() }
    }

    /// What the pool was made with.
    pub fn settings(&self) -> &DatabaseSettings {
        &self.target.settings
    }

    /// The result of a use of a connection that waits for a few statements. After the time of
    /// one statement the connection is at fault: [`Error::Unavailable`] says what took too long.
    pub(crate) async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T>>,
        too_long: &'static str,
    ) -> Result<T> {
        let limit = self.settings().statement_timeout + Duration::from_secs(1);
        timeout(limit, work).await.unwrap_or_else(|_| Err(Error::unavailable(too_long)))
    }
}

impl Target {
    /// Connects, sets what every connection of the server needs, and notes which database was
    /// reached. Returns the token that says that another one has taken its place.
    ///
    /// There is an index for every query, and a plan is kept while the tables grow:
    /// `enable_seqscan = off` keeps Postgres from a plan that reads a table that is still
    /// small whole.
    async fn dial(&self) -> Result<(Dialled, CancellationToken), DialError> {
        let Self { url, settings, present } = self;
        let statement_ms = settings.statement_timeout.as_millis();
        let session = format!(
            "{SESSION}; SET application_name = 'milepost'; SET jit = off; SET enable_seqscan = off; \
             SET synchronous_commit = '{}'; SET statement_timeout = {statement_ms}; \
             SET lock_timeout = {statement_ms}; SET idle_in_transaction_session_timeout = {statement_ms}",
            settings.synchronous_commit.name(),
        );
        dial_to(url.reveal(), settings.ca.as_deref(), &session, |identity| present.enter(identity)).await
    }
}

/// Connects within the connect timeout. An `outage` cuts the connection, and so does the
/// arrival at another database. The connection receives no notifications.
async fn connect(target: &Target, outage: CancellationToken) -> ConnectionResult<(AsyncPgConnection, Facts)> {
    let connecting = async {
        let (Dialled { client, driver, identity, .. }, superseded) = target.dial().await?;
        let facts = Facts { identity, warned: Arc::default() };
        let driving = superseded.run_until_cancelled_owned(drive(driver, Arc::clone(&facts.warned)));
        tokio::spawn(async move { outage.run_until_cancelled(driving).await });
        Ok((AsyncPgConnection::try_from(client).await?, facts))
    };
    within(target.settings.connect_timeout, connecting).await
}

/// Performs the input and output of a connection to its end, and notes the warnings of the
/// class 01000. A caller that waits for an answer gets the error that the connection is closed,
/// so that the end needs no report.
async fn drive(mut driver: Driver, warned: Arc<AtomicBool>) {
    let mut messages = stream::poll_fn(|context| driver.poll_message(context));
    while let Some(Ok(message)) = messages.next().await {
        if let AsyncMessage::Notice(notice) = message
            && *notice.code() == SqlState::WARNING
        {
            tracing::warn!(warning = notice.message(), "a warning of the database");
            warned.store(true, Relaxed);
        }
    }
}

/// What is known of a connection beside the connection itself.
#[derive(Debug)]
struct Facts {
    identity: Identity,
    warned: Arc<AtomicBool>,
}

impl Facts {
    /// To be called before a transaction whose commit is to be checked.
    fn begin(&self) {
        self.warned.store(false, Relaxed);
    }

    /// [`Error::Unavailable`] if the commit was not acknowledged by the synchronous standby.
    /// When the wait for the standby is cancelled, as by `pg_cancel_backend`, Postgres answers
    /// success, and says in a warning that the commit may exist on the primary alone. The
    /// warning comes before the answer.
    fn committed(&self) -> Result<()> {
        if self.warned.load(Relaxed) {
            return Err(Error::unavailable("the commit may exist on the primary alone"));
        }
        Ok(())
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = ConnectionResult<T>>) -> ConnectionResult<T> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(ConnectionError::BadConnection("timed out".to_owned())))
}
