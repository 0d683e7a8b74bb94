//! The pool: connections that are made as they are needed, and who holds one
//! since when.
//!
//! A connection on which nobody answers, be the way cut or the backend stuck,
//! is not known from one that works: whoever holds it waits, and if they leave,
//! the pool hands it to the next. So one that is held for longer than any use of
//! it takes is cut, and with it those that may be no better: all but what is in
//! use since just now.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use deadpool::managed::{self, Metrics, RecycleError, RecycleResult};
use diesel::ConnectionError;
use diesel_async::{
    AsyncPgConnection, SimpleAsyncConnection as _, pooled_connection::PoolableConnection as _,
};
use tokio::{runtime::Handle, sync::OwnedSemaphorePermit};
use tokio_util::sync::CancellationToken;

use super::{DatabaseSettings, availability::Availability, connect};

/// How often it is looked who holds a connection for too long.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// For how many of the longest statements one may be held.
const LONGEST_STATEMENTS: u32 = 2;

pub(super) type Pool = managed::Pool<Manager, Connection>;
pub(super) type WeakPool = managed::WeakPool<Manager>;

/// Makes connections.
pub(super) struct Manager {
    settings: DatabaseSettings,
    availability: Arc<Availability>,
    holds: Mutex<Vec<Weak<Hold>>>,
}

struct Hold {
    /// See [`now_ms`]; 0 while nobody holds it.
    since_ms: AtomicU64,
    cut: CancellationToken,
}

/// What the pool keeps.
pub(super) struct Pooled {
    connection: AsyncPgConnection,
    hold: Arc<Hold>,
}

/// A connection out of the pool, for one use: it is cut if that takes longer
/// than two statements may. A use that took long is over once the connection has
/// answered: whoever had it may have left without waiting for that, and so may
/// the next.
pub struct Connection {
    pooled: Option<managed::Object<Manager>>,
    /// Of those who may not have all of the pool.
    turn: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// Keeps the turn until the connection is back in the pool.
    pub(super) fn with_turn(mut self, turn: OwnedSemaphorePermit) -> Self {
        self.turn = Some(turn);
        self
    }
}

impl Manager {
    pub(super) fn new(settings: DatabaseSettings, availability: Arc<Availability>) -> Self {
        Self { settings, availability, holds: Mutex::default() }
    }

    fn holds(&self) -> MutexGuard<'_, Vec<Weak<Hold>>> {
        // Nothing that holds it can leave it half changed.
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a connection was held for longer than this. If so, it is cut, and so
    /// are those that are held since before the last look.
    fn cut_after(&self, limit: Duration) -> bool {
        let mut holds = self.holds();
        holds.retain(|hold| hold.strong_count() > 0);
        let held: Vec<(Duration, Arc<Hold>)> =
            holds.iter().filter_map(Weak::upgrade).filter_map(|hold| Some((hold.lasts()?, hold))).collect();
        if !held.iter().any(|(lasts, _)| *lasts > limit) {
            return false;
        }
        let suspects = held.iter().filter(|(lasts, _)| *lasts > LOOK_EVERY);
        tracing::warn!(suspects = suspects.clone().count(), "a connection to the database does not answer");
        suspects.for_each(|(_, hold)| hold.cut.cancel());
        true
    }
}

impl managed::Manager for Manager {
    type Type = Pooled;
    type Error = ConnectionError;

    async fn create(&self) -> Result<Pooled, ConnectionError> {
        let cut = self.availability.outage().child_token();
        // Boxed: whoever might have to connect would have room for all that it takes.
        let connection = Box::pin(connect(&self.settings, Some(cut.clone()))).await?;
        let hold = Arc::new(Hold { since_ms: AtomicU64::new(0), cut });
        self.holds().push(Arc::downgrade(&hold));
        Ok(Pooled { connection, hold })
    }

    /// Whether it is whole is known without asking the server.
    async fn recycle(&self, pooled: &mut Pooled, _: &Metrics) -> RecycleResult<ConnectionError> {
        if pooled.connection.is_broken() { Err(RecycleError::message("broken")) } else { Ok(()) }
    }
}

/// Looks who holds a connection for too long, as long as the pool is there.
pub(super) async fn watch_holds(pool: WeakPool, statement_timeout: Duration) {
    while let Some(pool) = pool.upgrade() {
        if pool.manager().cut_after(statement_timeout * LONGEST_STATEMENTS) {
            pool.retain(|_, _| false);
        }
        drop(pool);
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

impl Hold {
    /// How long somebody has had it, if anybody.
    fn lasts(&self) -> Option<Duration> {
        let since_ms = self.since_ms.load(Relaxed);
        (since_ms > 0).then(|| Duration::from_millis(now_ms().saturating_sub(since_ms)))
    }
}

/// Of this process's clock; never 0.
fn now_ms() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
}

impl From<managed::Object<Manager>> for Connection {
    fn from(object: managed::Object<Manager>) -> Self {
        object.hold.since_ms.store(now_ms(), Relaxed);
        Self { pooled: Some(object), turn: None }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let turn = self.turn.take();
        let Some(mut pooled) = self.pooled.take() else { return };
        let took_long = pooled.hold.lasts().is_some_and(|lasts| lasts > LOOK_EVERY);
        match Handle::try_current() {
            Ok(runtime) if took_long => drop(runtime.spawn(async move {
                // If it fails, the connection is broken, which is seen when it
                // is taken.
                let _ = pooled.connection.batch_execute("SELECT 1").await;
                pooled.hold.since_ms.store(0, Relaxed);
                drop((pooled, turn));
            })),
            _ => pooled.hold.since_ms.store(0, Relaxed),
        }
    }
}

impl Deref for Connection {
    type Target = AsyncPgConnection;

    fn deref(&self) -> &AsyncPgConnection {
        &self.pooled.as_ref().expect("it is gone when dropped").connection
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut AsyncPgConnection {
        &mut self.pooled.as_mut().expect("it is gone when dropped").connection
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}
