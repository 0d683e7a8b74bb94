//! The pool: connections that are made when they are needed, and since when each is
//! checked out.
//!
//! A connection that does not answer, because the network drops its packets or its
//! backend hangs, looks like one that works: the caller that checked it out waits, and
//! when that caller leaves, the pool gives it to the next one. Therefore a connection
//! that is checked out for longer than any use takes is cut. So is every other one that
//! was checked out before the last check, since it may hang too.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{
        Arc, LazyLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use deadpool::managed::{self, Metrics, RecycleError, RecycleResult};
use diesel::{
    ConnectionError,
    connection::{Instrumentation, InstrumentationEvent},
};
use diesel_async::{
    AsyncConnection as _, AsyncPgConnection, SimpleAsyncConnection as _,
    pooled_connection::PoolableConnection as _,
};
use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{Database, Facts, Identified, Identity, Target, availability::Availability, connect};
use crate::{
    error::{BoxError, Error, Failure, Result},
    tenant::Tenant,
    turns::{Permits, Turns},
};

/// How often the pool checks for connections that are checked out for too long.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// How many times the statement timeout a connection may be checked out.
const LONGEST_STATEMENTS: u32 = 2;
/// The part of the pool that one payer may use at a time, as a divisor.
const PART_OF_PAYER: usize = 2;
/// When a caller whose payer used its part for too long should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

pub(super) type Pool = managed::Pool<Manager, Connection>;
pub(super) type WeakPool = managed::WeakPool<Manager>;

/// To whom a connection is counted. Each payer uses at most half of the pool, and when several
/// wait, connections are given to them in turns.
#[derive(Clone, Debug)]
pub enum Payer {
    /// The user on whose behalf a call is made.
    Tenant(Tenant),
    /// Callers of a kind, who may be any number and are not known yet.
    Share(Share),
    /// The server, or its operator, on its own account.
    Server,
}

impl From<Tenant> for Payer {
    fn from(tenant: Tenant) -> Self {
        Self::Tenant(tenant)
    }
}

/// What the connections of a payer are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum PayerKey {
    Tenant(Tenant),
    Share(&'static str),
    Server,
}

impl Payer {
    fn key(&self) -> PayerKey {
        match self {
            Self::Tenant(tenant) => PayerKey::Tenant(*tenant),
            Self::Share(share) => PayerKey::Share(share.callers),
            Self::Server => PayerKey::Server,
        }
    }

    /// Of what there are too many if no connection becomes free in time, as an error names it.
    fn overload(&self) -> &'static str {
        match self {
            Self::Tenant(_) => "calls of one user that wait for the database",
            Self::Share(share) => share.callers,
            Self::Server => "uses of the database by the server",
        }
    }
}

/// A part of the pool that is smaller than that of other payers, for a kind of callers that
/// may be any number.
#[derive(Clone, Debug)]
pub struct Share {
    permits: Arc<Semaphore>,
    /// The kind of callers, as an error names it.
    callers: &'static str,
}

impl Share {
    /// A share of this many connections.
    pub fn new(connections: usize, callers: &'static str) -> Self {
        Self { permits: Arc::new(Semaphore::new(connections)), callers }
    }
}

/// The turns in which a pool of this size gives its connections to payers.
pub(super) fn turns(connections: usize) -> Turns<PayerKey> {
    Turns::new(connections, (connections / PART_OF_PAYER).max(1))
}

/// What a connection that is checked out holds, beside itself.
#[derive(Debug)]
struct Held {
    _turn: Permits<PayerKey>,
    _share: Option<OwnedSemaphorePermit>,
}

impl Database {
    /// A connection to read with, within the connect timeout; refused at once while the
    /// database is known to be unavailable. [`Error::Overloaded`] if the payer's part of the
    /// pool has no connection left in time.
    pub async fn get(&self, payer: impl Into<Payer>) -> Result<Connection> {
        let payer = payer.into();
        let overloaded = |_| Error::Overloaded { what: payer.overload(), retry_after: RETRY_AFTER };
        let held = timeout(self.settings().connect_timeout, self.wait_for(&payer));
        // Boxed, as the connecting below: a call that finds all in memory has no room for them.
        let held = self.unless_unavailable(Box::pin(async { Ok::<_, BoxError>(held.await) })).await?;
        let held = held.map_err(overloaded)??;
        // As many turns as connections: this never waits for one that is in use.
        let mut connection: Connection = self.unless_unavailable(Box::pin(self.pool.get())).await?;
        connection.held = Some(held);
        Ok(connection)
    }

    async fn wait_for(&self, payer: &Payer) -> Result<Held> {
        let share = match payer {
            Payer::Share(share) => {
                Some(Arc::clone(&share.permits).acquire_owned().await.map_err(Error::internal)?)
            }
            Payer::Tenant(_) | Payer::Server => None,
        };
        Ok(Held { _turn: self.turns.acquire(payer.key()).await, _share: share })
    }
}

pub(super) struct Manager {
    target: Arc<Target>,
    availability: Arc<Availability>,
    checkouts: Mutex<Vec<Weak<Checkout>>>,
}

/// When a connection was checked out, and the token that cuts it.
struct Checkout {
    /// See [`now_ms`]; 0 while the connection is in the pool.
    since_ms: AtomicU64,
    cut: CancellationToken,
}

pub(super) struct Pooled {
    connection: AsyncPgConnection,
    facts: Facts,
    checkout: Arc<Checkout>,
    failed: Arc<Failed>,
}

/// Whether a query of a connection has failed for another reason than the query itself.
#[derive(Debug, Default)]
struct Failed {
    at_all: AtomicBool,
    /// For a reason that lies in the session.
    by_session: AtomicBool,
}

/// A connection of the pool, for one use. It is cut if the use takes longer than two
/// statements may.
///
/// After a long use the connection goes back to the pool only when it has answered
/// again: the caller may have left while a statement was running, and the next caller
/// would wait for that statement.
pub struct Connection {
    pooled: Option<managed::Object<Manager>>,
    /// Given back after the connection.
    held: Option<Held>,
}

impl Connection {
    /// Whether a query failed for a reason that lies in the session.
    pub(super) fn session_failed(&self) -> bool {
        self.pooled().failed.by_session.load(Relaxed)
    }

    /// The connection, and what is known of it.
    pub(super) fn parts(&mut self) -> (&mut AsyncPgConnection, &Facts) {
        let pooled = &mut **self.pooled.as_mut().expect("only Drop takes the connection");
        (&mut pooled.connection, &pooled.facts)
    }

    fn pooled(&self) -> &managed::Object<Manager> {
        self.pooled.as_ref().expect("only Drop takes the connection")
    }
}

impl Manager {
    pub(super) fn new(target: Arc<Target>, availability: Arc<Availability>) -> Self {
        Self { target, availability, checkouts: Mutex::default() }
    }

    /// Whether a connection was checked out for longer than `limit`. If so, that
    /// connection is cut, and so are those checked out before the last check.
    fn cut_after(&self, limit: Duration) -> bool {
        let mut checkouts = self.checkouts.lock();
        checkouts.retain(|checkout| checkout.strong_count() > 0);
        let current: Vec<(Duration, Arc<Checkout>)> = checkouts
            .iter()
            .filter_map(Weak::upgrade)
            .filter_map(|checkout| Some((checkout.lasts()?, checkout)))
            .collect();
        if !current.iter().any(|(lasts, _)| *lasts > limit) {
            return false;
        }
        let suspects = current.iter().filter(|(lasts, _)| *lasts > CHECK_EVERY);
        tracing::warn!(
            connections = suspects.clone().count(),
            "a connection to the database does not answer"
        );
        suspects.for_each(|(_, checkout)| checkout.cut.cancel());
        true
    }
}

impl managed::Manager for Manager {
    type Type = Pooled;
    type Error = ConnectionError;

    async fn create(&self) -> Result<Pooled, ConnectionError> {
        let cut = self.availability.outage().child_token();
        // Boxed, so that a caller that needs no new connection has no room for making one.
        let (mut connection, facts) = Box::pin(connect(&self.target, cut.clone())).await?;
        let failed = Arc::<Failed>::default();
        connection.set_instrumentation(note_failures(Arc::clone(&failed)));
        let checkout = Arc::new(Checkout { since_ms: AtomicU64::new(0), cut });
        self.checkouts.lock().push(Arc::downgrade(&checkout));
        Ok(Pooled { connection, facts, checkout, failed })
    }

    /// The client knows whether a connection is whole, without a query.
    async fn recycle(&self, pooled: &mut Pooled, _: &Metrics) -> RecycleResult<ConnectionError> {
        if pooled.connection.is_broken() || pooled.failed.at_all.load(Relaxed) {
            return Err(RecycleError::message("the connection is broken or has failed"));
        }
        Ok(())
    }
}

/// Notes that the database failed a query for another reason than the query itself: the next
/// session may do better, so the pool drops this one.
fn note_failures(failed: Arc<Failed>) -> impl Instrumentation {
    move |event: InstrumentationEvent<'_>| {
        if let InstrumentationEvent::FinishQuery { error: Some(error), .. } = event {
            let failure = Failure::of(error);
            failed.at_all.fetch_or(failure != Failure::Fault, Relaxed);
            failed.by_session.fetch_or(failure == Failure::Session, Relaxed);
        }
    }
}

/// Cuts connections that are checked out for too long, for as long as the pool exists.
pub(super) async fn cut_long_checkouts(pool: WeakPool, statement_timeout: Duration) {
    while let Some(pool) = pool.upgrade() {
        if pool.manager().cut_after(statement_timeout * LONGEST_STATEMENTS) {
            pool.retain(|_, _| false);
        }
        drop(pool);
        tokio::time::sleep(CHECK_EVERY).await;
    }
}

impl Checkout {
    /// For how long the connection has been checked out, if it is.
    fn lasts(&self) -> Option<Duration> {
        let since_ms = self.since_ms.load(Relaxed);
        (since_ms > 0).then(|| Duration::from_millis(now_ms().saturating_sub(since_ms)))
    }
}

/// Milliseconds by the clock of this process; never 0.
fn now_ms() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
}

impl From<managed::Object<Manager>> for Connection {
    fn from(object: managed::Object<Manager>) -> Self {
        object.checkout.since_ms.store(now_ms(), Relaxed);
        Self { pooled: Some(object), held: None }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let held = self.held.take();
        let Some(mut pooled) = self.pooled.take() else { return };
        let took_long = pooled.checkout.lasts().is_some_and(|lasts| lasts > CHECK_EVERY);
        match Handle::try_current() {
            Ok(runtime) if took_long => drop(runtime.spawn(async move {
                // If the query fails, the connection is broken, and the pool drops it at the
                // next checkout.
                let _ = pooled.connection.batch_execute("SELECT 1").await;
                pooled.checkout.since_ms.store(0, Relaxed);
                drop((pooled, held));
            })),
            _ => {
                pooled.checkout.since_ms.store(0, Relaxed);
                drop((pooled, held));
            }
        }
    }
}

impl Deref for Connection {
    type Target = AsyncPgConnection;

    fn deref(&self) -> &AsyncPgConnection {
        &self.pooled().connection
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut AsyncPgConnection {
        self.parts().0
    }
}

impl Identified for Connection {
    fn identity(&self) -> Identity {
        self.pooled().facts.identity
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}
