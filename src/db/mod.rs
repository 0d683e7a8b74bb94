//! The database: the pool, the connections, their availability, migrations, the
//! embedded server, and notifications between replicas.

mod availability;
mod connect;
pub mod embedded;
pub mod migrations;
pub mod notifier;
mod pool;
mod pooler;
mod url;
mod write;

use std::{fmt, sync::Arc, time::Duration};

use deadpool::{Runtime, Status, managed::Timeouts};
use diesel::{ConnectionError, ConnectionResult};
use diesel_async::{AsyncPgConnection, pooled_connection::PoolableConnection as _};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use self::{
    availability::Availability,
    connect::{dial, establish},
    pool::{Manager, Pool, cut_long_checkouts},
    pooler::refuse_pooler,
};
pub use self::{
    availability::{StartError, wait_until_available},
    connect::DialError,
    pool::{Connection, Share},
    write::{Authority, OwnConnection, Transaction, Unconditional},
};
use crate::{
    config::{DatabaseSettings, DatabaseUrl},
    error::{BoxError, Error, Result},
};

/// What every session sets, whatever the role or the database sets otherwise. By the TCP
/// settings Postgres notices soon that a client is gone, and releases its locks.
const SESSION: &str = "SET default_transaction_isolation = 'read committed'; \
    SET default_transaction_read_only = off; SET default_transaction_deferrable = off; \
    SET timezone = 'UTC'; SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 2; \
    SET tcp_keepalives_count = 3";

/// Where the database is, and how connections to it are made.
struct Target {
    url: DatabaseUrl,
    settings: DatabaseSettings,
}

#[derive(Clone)]
pub struct Database {
    pool: Pool,
    target: Arc<Target>,
    availability: Arc<Availability>,
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
        let (target, availability) = (Arc::new(Target { url, settings }), Availability::new());
        let manager = Manager::new(Arc::clone(&target), Arc::clone(&availability));
        let pool = Pool::builder(manager)
            .max_size(connections)
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts { wait, create: wait, recycle: wait })
            .build()
            .map_err(Error::internal)?;
        Ok(Self { pool, target, availability })
    }

    /// Starts to watch the availability of the database, until the last clone is
    /// dropped. All connections are cut when the database does not answer, and single
    /// ones that do not answer.
    pub fn watch_availability(&self) {
        tokio::spawn(cut_long_checkouts(self.pool.weak(), self.settings().statement_timeout));
        let availability = Arc::downgrade(&self.availability);
        tokio::spawn(availability::watch(Arc::clone(&self.target), availability));
    }

    /// Whether the database is available, and each change of that; none before the first
    /// check.
    pub fn available(&self) -> watch::Receiver<Option<bool>> {
        self.availability.subscribe()
    }

    /// A connection to read with, within the connect timeout; refused at once while the
    /// database is known to be unavailable.
    pub async fn get(&self) -> Result<Connection> {
        self.unless_unavailable(self.pool.get()).await
    }

    /// As [`Self::get`], for callers that may use only a share of the pool.
    /// [`Error::Overloaded`] if the share has no connection left within the timeout.
    pub async fn get_share(&self, share: &Share) -> Result<Connection> {
        let permit = timeout(self.settings().connect_timeout, Arc::clone(&share.permits).acquire_owned());
        let permit = self.unless_unavailable(async { Ok::<_, BoxError>(permit.await) }).await?;
        let overloaded = Error::Overloaded { what: share.callers, retry_after: Duration::from_secs(1) };
        let permit = permit.map_err(|_| overloaded)?.map_err(Error::internal)?;
        Ok(self.get().await?.with_permit(permit))
    }

    /// A connection outside the pool. Like those of the pool it is cut when the database
    /// becomes unavailable.
    pub async fn connect(&self) -> Result<AsyncPgConnection> {
        let connecting = Box::pin(connect(&self.target, Some(self.availability.outage())));
        self.unless_unavailable(connecting).await
    }

    /// The server's own connection, kept from one use to the next, or a new one if it
    /// broke while it was idle. The caller puts it back after a use that succeeded.
    pub async fn kept_or_new(&self, kept: &mut Option<OwnConnection>) -> Result<OwnConnection> {
        match kept.take_if(|connection| !connection.0.is_broken()) {
            Some(connection) => Ok(connection),
            None => self.connect().await.map(OwnConnection),
        }
    }

    /// A connection to LISTEN on; an error if a pooler would lose the LISTEN. An outage
    /// does not cut it; see [`Self::unless_unavailable`].
    pub async fn connect_to_listen(&self) -> Result<AsyncPgConnection> {
        let connecting = async {
            refuse_pooler(self.target.url.reveal(), self.settings()).await?;
            connect(&self.target, None).await.map_err(BoxError::from)
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

    /// How many connections the pool has, and how many callers wait for one.
    pub fn status(&self) -> Status {
        self.pool.status()
    }

    /// What the pool was made with.
    pub fn settings(&self) -> &DatabaseSettings {
        &self.target.settings
    }

    /// How long a use of a connection may take that waits for one statement. After that
    /// the connection is at fault, not the statement.
    pub(crate) fn longest_use(&self) -> Duration {
        self.settings().statement_timeout + Duration::from_secs(1)
    }
}

/// Connects, and sets what every connection of the server needs. An `outage` cuts the
/// connection; only without one does it receive notifications.
///
/// There is an index for every query, and a plan is kept while the tables grow:
/// `enable_seqscan = off` keeps Postgres from a plan that reads a table that is still
/// small whole.
async fn connect(
    Target { url, settings }: &Target,
    outage: Option<CancellationToken>,
) -> ConnectionResult<AsyncPgConnection> {
    let statement_ms = settings.statement_timeout.as_millis();
    let session = format!(
        "{SESSION}; SET application_name = 'milepost'; SET jit = off; SET enable_seqscan = off; \
         SET synchronous_commit = '{}'; SET statement_timeout = {statement_ms}; \
         SET lock_timeout = {statement_ms}; SET idle_in_transaction_session_timeout = {statement_ms}",
        settings.synchronous_commit.name(),
    );
    let (url, ca) = (url.reveal(), settings.ca.as_deref());
    let connecting = async {
        let Some(outage) = outage else { return establish(url, ca, &session).await };
        let (client, driver) = dial(url, ca, &session).await?;
        // A caller that waits for an answer gets the error that the connection is closed; the
        // driver's own result is not needed.
        tokio::spawn(async move { outage.run_until_cancelled(driver).await.map(Result::ok) });
        AsyncPgConnection::try_from(client).await
    };
    timeout(settings.connect_timeout, connecting)
        .await
        .unwrap_or_else(|_| Err(ConnectionError::BadConnection("timed out".to_owned())))
}
