//! The database: pool, connections, whether it is there, migrations, the
//! embedded server and the notifier between replicas.

mod availability;
mod connect;
pub mod embedded;
pub mod migrations;
pub mod notifier;
mod pool;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use deadpool::{Runtime, Status, managed::Timeouts};
use diesel::{ConnectionError, ConnectionResult};
use diesel_async::{
    AsyncPgConnection, SimpleAsyncConnection as _, pooled_connection::PoolableConnection as _,
};

use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use self::{
    availability::Availability,
    connect::{dial, establish},
    pool::{Manager, Pool, watch_holds},
};
pub use self::{
    availability::{StartError, wait_until_it_answers},
    connect::DialError,
    pool::Connection,
};
use crate::error::{BoxError, Error, Result};

/// How soon the database finds that nobody is there any more, and lets go what was
/// locked.
const KEEPALIVES: &str =
    "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3";

/// How connections are made and how long anything may take on them.
#[derive(Clone)]
pub struct DatabaseSettings {
    /// `postgresql://…`; may hold a password, so it is never logged.
    pub url: String,
    /// Authorities of the database, as a PEM file, instead of this system's; the
    /// connection must then be encrypted.
    pub ca: Option<PathBuf>,
    /// Most connections at once.
    pub connections: usize,
    /// Longest that one statement may run.
    pub statement_timeout: Duration,
    /// Longest wait for a connection to be free or to be made.
    pub connect_timeout: Duration,
    /// Value of `synchronous_commit` on every connection: `on`,
    /// `remote_write` or `remote_apply`.
    pub synchronous_commit: String,
}

impl DatabaseSettings {
    /// How long a use of a connection may take that no more than a statement is
    /// waited for in: past this the connection, not the statement, is at fault.
    pub(crate) fn longest_use(&self) -> Duration {
        self.statement_timeout + Duration::from_secs(1)
    }
}

impl fmt::Debug for DatabaseSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseSettings").field("connections", &self.connections).finish_non_exhaustive()
    }
}

/// Who wants a connection. Of whom nobody knows yet who they are there may be any
/// number: each kind of them has a quarter of the pool, so that neither the other nor
/// anybody else waits behind all of them.
#[derive(Clone, Copy, Debug)]
pub enum Asker {
    /// Somebody whose credential is known, or ourselves.
    Known,
    /// Whose secret is to be looked up.
    WithSecret,
    /// Who logs in or signs up.
    WithPassword,
}

/// The pool of connections.
#[derive(Clone)]
pub struct Database {
    pool: Pool,
    /// Turns of those with a secret, and of those with a password.
    strangers: [Arc<Semaphore>; 2],
    settings: DatabaseSettings,
    availability: Arc<Availability>,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").field("status", &self.pool.status()).finish_non_exhaustive()
    }
}

impl Database {
    /// A pool that connects when it is first used.
    pub fn new(settings: DatabaseSettings) -> Result<Self> {
        let availability = Availability::new();
        let manager = Manager::new(settings.clone(), Arc::clone(&availability));
        let wait = Some(settings.connect_timeout);
        let pool = Pool::builder(manager)
            .max_size(settings.connections)
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts { wait, create: wait, recycle: wait })
            .build()
            .map_err(Error::internal)?;
        let strangers = [(); 2].map(|()| Arc::new(Semaphore::new((settings.connections / 4).max(1))));
        Ok(Self { pool, strangers, settings, availability })
    }

    /// Starts to ask the database whether it answers, and cuts all connections
    /// when it does not, and single ones that do not; until the last clone of
    /// this is dropped.
    pub fn keep_asking(&self) {
        tokio::spawn(watch_holds(self.pool.weak(), self.settings.statement_timeout));
        let availability = Arc::downgrade(&self.availability);
        tokio::spawn(availability::keep_asking(self.settings.clone(), availability));
    }

    /// Whether it answers, and each change of that; nothing before it was asked.
    pub fn answers(&self) -> watch::Receiver<Option<bool>> {
        self.availability.answers()
    }

    /// A connection, within the connect time-out; refused at once while the
    /// database is known to be away.
    pub async fn get(&self) -> Result<Connection> {
        self.unless_away(self.pool.get()).await
    }

    /// The same for whoever it is. [`Error::Overloaded`] where strangers of that kind
    /// are too many.
    pub async fn get_for(&self, asker: Asker) -> Result<Connection> {
        let turns = match asker {
            Asker::Known => return self.get().await,
            Asker::WithSecret => &self.strangers[0],
            Asker::WithPassword => &self.strangers[1],
        };
        let turn = timeout(self.settings.connect_timeout, Arc::clone(turns).acquire_owned());
        let turn = self.unless_away(async { Ok::<_, BoxError>(turn.await) }).await?;
        let overloaded = Error::Overloaded { what: "strangers", retry_after: Duration::from_secs(1) };
        let turn = turn.map_err(|_| overloaded)?.map_err(Error::internal)?;
        Ok(self.get().await?.with_turn(turn))
    }

    /// A connection of one's own, outside the pool. Like those of the pool it is
    /// cut when the database is known to be away.
    pub async fn connect(&self) -> Result<AsyncPgConnection> {
        self.unless_away(Box::pin(connect(&self.settings, Some(self.availability.outage())))).await
    }

    /// A connection of one's own that is kept from one use to the next, or a new
    /// one: one that broke while it was idle had nothing to lose. It is given back
    /// after a use that went well.
    pub async fn kept_or_new(&self, kept: &mut Option<AsyncPgConnection>) -> Result<AsyncPgConnection> {
        match kept.take_if(|connection| !connection.is_broken()) {
            Some(connection) => Ok(connection),
            None => self.connect().await,
        }
    }

    /// A connection to LISTEN on; not cut, see [`Self::unless_away`].
    pub async fn connect_to_listen(&self) -> Result<AsyncPgConnection> {
        self.unless_away(connect(&self.settings, None)).await
    }

    /// What comes of `work`, or that the database is away as soon as that is
    /// known.
    pub async fn unless_away<T, E: Into<BoxError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T> {
        match self.availability.outage().run_until_cancelled(work).await {
            Some(result) => result.map_err(Error::unavailable),
            None => Err(Error::unavailable("the database is away")),
        }
    }

    /// Runs `work` to its end, even if the caller leaves meanwhile: a future
    /// that is dropped inside a transaction would leave it open, with its
    /// locks, until the connection's next use.
    pub async fn detached<T, W, F>(&self, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(Connection) -> F + Send + 'static,
        F: Future<Output = Result<T>> + Send,
    {
        let connection = self.get().await?;
        tokio::spawn(async move { work(connection).await }).await.map_err(Error::internal)?
    }

    /// How many connections the pool has, and how many wait for one.
    pub fn status(&self) -> Status {
        self.pool.status()
    }

    /// What the pool was made with.
    pub fn settings(&self) -> &DatabaseSettings {
        &self.settings
    }
}

/// Connects and sets what every connection of ours has set. The connection is
/// cut by an `outage`; it receives notifications only without one.
///
/// There is an index for everything that is asked. A plan is kept while the
/// tables grow, so even of a small one no plan is to read all.
async fn connect(
    settings: &DatabaseSettings,
    outage: Option<CancellationToken>,
) -> ConnectionResult<AsyncPgConnection> {
    let set_up = async {
        let mut connection = match outage {
            Some(outage) => {
                let (client, driver) = dial(&settings.url, settings.ca.as_deref()).await?;
                // Whoever waits for an answer is told that the connection is
                // closed; why it is, nobody asks.
                tokio::spawn(async move { outage.run_until_cancelled(driver).await.map(Result::ok) });
                AsyncPgConnection::try_from(client).await?
            }
            None => establish(&settings.url, settings.ca.as_deref()).await?,
        };
        connection
            .batch_execute(&format!(
                "SET application_name = 'milepost'; SET timezone = 'UTC'; SET jit = off; SET enable_seqscan = off; \
                 {KEEPALIVES}; \
                 SET synchronous_commit = '{}'; SET statement_timeout = {}; \
                 SET lock_timeout = {}; SET idle_in_transaction_session_timeout = {}",
                settings.synchronous_commit,
                settings.statement_timeout.as_millis(),
                settings.statement_timeout.as_millis(),
                settings.statement_timeout.as_millis(),
            ))
            .await
            .map_err(ConnectionError::CouldntSetupConfiguration)?;
        Ok(connection)
    };
    timeout(settings.connect_timeout, set_up)
        .await
        .unwrap_or_else(|_| Err(ConnectionError::BadConnection("timed out".to_owned())))
}
