//! The database: pool, connections, migrations, the embedded server and the
//! doorbell between replicas.

pub mod doorbell;
pub mod embedded;
pub mod migrations;

use std::{fmt, time::Duration};

use deadpool::{Runtime, Status, managed::Timeouts};
use diesel::{ConnectionError, ConnectionResult};
use diesel_async::{
    AsyncConnection as _, AsyncPgConnection, SimpleAsyncConnection as _,
    pooled_connection::{
        AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod,
        deadpool::{Object, Pool},
    },
};

use crate::error::{Error, Result};

/// A connection out of the pool.
pub type Connection = Object<AsyncPgConnection>;

/// How connections are made and how long anything may take on them.
#[derive(Clone)]
pub struct DatabaseSettings {
    /// `postgresql://…`; may hold a password, so it is never logged.
    pub url: String,
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

impl fmt::Debug for DatabaseSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseSettings").field("connections", &self.connections).finish_non_exhaustive()
    }
}

/// The pool of connections.
#[derive(Clone)]
pub struct Database {
    pool: Pool<AsyncPgConnection>,
    settings: DatabaseSettings,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").field("status", &self.pool.status()).finish_non_exhaustive()
    }
}

impl Database {
    /// A pool that connects when it is first used.
    pub fn new(settings: DatabaseSettings) -> Result<Self> {
        let mut config = ManagerConfig::<AsyncPgConnection>::default();
        // Whether the connection is whole is known without asking the server.
        config.recycling_method = RecyclingMethod::Fast;
        let hook = settings.clone();
        config.custom_setup = Box::new(move |_| {
            let settings = hook.clone();
            Box::pin(async move { connect(&settings).await })
        });
        let manager = AsyncDieselConnectionManager::new_with_config(settings.url.clone(), config);
        let wait = Some(settings.connect_timeout);
        let pool = Pool::builder(manager)
            .max_size(settings.connections)
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts { wait, create: wait, recycle: wait })
            .build()
            .map_err(Error::internal)?;
        Ok(Self { pool, settings })
    }

    /// A connection, within the connect time-out.
    pub async fn get(&self) -> Result<Connection> {
        self.pool.get().await.map_err(Error::unavailable)
    }

    /// A connection of one's own, outside the pool: for LISTEN, whose
    /// notifications must reach one reader, and for advisory locks.
    pub async fn connect(&self) -> Result<AsyncPgConnection> {
        connect(&self.settings).await.map_err(Error::unavailable)
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

/// Connects and sets what every connection of ours has set.
async fn connect(settings: &DatabaseSettings) -> ConnectionResult<AsyncPgConnection> {
    let establish = async {
        let mut connection = AsyncPgConnection::establish(&settings.url).await?;
        connection
            .batch_execute(&format!(
                "SET application_name = 'milepost'; SET timezone = 'UTC'; SET jit = off; \
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
    tokio::time::timeout(settings.connect_timeout, establish)
        .await
        .unwrap_or_else(|_| Err(ConnectionError::BadConnection("timed out".to_owned())))
}
