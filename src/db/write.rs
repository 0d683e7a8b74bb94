//! The only way to write, but for appends.
//!
//! Model functions that write take a [`Transaction`]. A handler gets one from
//! [`Database::write`], which checks the caller's credential once more when the connection
//! is there; so a handler cannot write over a connection that it got in another way, and
//! cannot forget the check. [`OwnConnection::write`] is for the server's own writes, which
//! have no credential. Appends check theirs in `event_log::append`.

use std::{
    fmt,
    ops::{Deref, DerefMut},
};

use diesel_async::{AsyncConnection, AsyncPgConnection, TransactionManager as _};
use futures_util::future::BoxFuture;
use tracing::Instrument as _;

use super::{Database, Facts, Identified, Identity, Payer};
use crate::error::{Error, Result};

type Manager = <AsyncPgConnection as AsyncConnection>::TransactionManager;

/// Who may write. It is asked when the connection is there, since a credential may end
/// while its call waits.
pub trait Authority: Send + 'static {
    /// An error if nothing may be written any more.
    fn check(&self) -> Result<()>;

    /// To whom the connection is counted.
    fn payer(&self) -> Payer;
}

/// The authority of the operator, and of the server on its own account: there is nothing
/// to check.
#[derive(Clone, Copy, Debug)]
pub struct Unconditional;

impl Authority for Unconditional {
    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn payer(&self) -> Payer {
        Payer::Server
    }
}

pub struct Transaction<'a> {
    connection: &'a mut AsyncPgConnection,
    facts: &'a Facts,
    after_commit: Vec<Box<dyn FnOnce() + Send>>,
}

impl Transaction<'_> {
    /// Runs `work` once the transaction is committed, also if the caller has left.
    pub fn after_commit(&mut self, work: impl FnOnce() + Send + 'static) {
        self.after_commit.push(Box::new(work));
    }
}

impl Database {
    /// Runs `work` in a transaction, within the span of the caller. The transaction is
    /// committed if `work` succeeds and rolled back if it fails.
    ///
    /// The transaction runs to its end even if the caller leaves or commits hang: a future
    /// that is dropped inside a transaction would leave it open, with its locks, until the
    /// next use of the connection.
    pub async fn write<T, W>(&self, authority: impl Authority, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: for<'a> FnOnce(&'a mut Transaction<'_>) -> BoxFuture<'a, Result<T>> + Send + 'static,
    {
        let mut connection = self.get(authority.payer()).await?;
        let transaction = async move {
            authority.check()?;
            let (connection, facts) = connection.parts();
            run(connection, facts, work).await
        };
        let transaction = tokio::spawn(transaction.in_current_span());
        self.unless_commits_hang(async { transaction.await.map_err(Error::internal)? }).await
    }
}

/// A connection outside the pool that the server keeps for itself, so that what all
/// callers wait for does not wait for a connection behind calls.
pub struct OwnConnection {
    pub(super) connection: AsyncPgConnection,
    pub(super) facts: Facts,
}

impl OwnConnection {
    /// As [`Database::write`], for the server's own writes. The caller must not drop the
    /// future, but with the connection.
    pub async fn write<T, W>(&mut self, work: W) -> Result<T>
    where
        W: for<'a> FnOnce(&'a mut Transaction<'_>) -> BoxFuture<'a, Result<T>>,
    {
        run(&mut self.connection, &self.facts, work).await
    }

    /// To be called before an append.
    pub fn begin(&self) {
        self.facts.begin();
    }

    /// [`Error::Unavailable`] if the commit since [`Self::begin`] may exist on the primary
    /// alone, although the database demands a standby.
    pub fn committed(&self) -> Result<()> {
        self.facts.committed()
    }
}

impl Identified for OwnConnection {
    fn identity(&self) -> Identity {
        self.facts.identity
    }
}

async fn run<T, W>(connection: &mut AsyncPgConnection, facts: &Facts, work: W) -> Result<T>
where
    W: for<'a> FnOnce(&'a mut Transaction<'_>) -> BoxFuture<'a, Result<T>>,
{
    facts.begin();
    Manager::begin_transaction(connection).await?;
    let mut transaction = Transaction { connection, facts, after_commit: Vec::new() };
    match work(&mut transaction).await {
        Ok(value) => {
            Manager::commit_transaction(transaction.connection).await?;
            transaction.after_commit.into_iter().for_each(|work| work());
            facts.committed()?;
            Ok(value)
        }
        Err(error) => {
            // A connection that cannot roll back is broken, and the pool drops it.
            let _ = Manager::rollback_transaction(transaction.connection).await;
            Err(error)
        }
    }
}

impl Deref for Transaction<'_> {
    type Target = AsyncPgConnection;

    fn deref(&self) -> &AsyncPgConnection {
        self.connection
    }
}

impl DerefMut for Transaction<'_> {
    fn deref_mut(&mut self) -> &mut AsyncPgConnection {
        self.connection
    }
}

impl Identified for Transaction<'_> {
    fn identity(&self) -> Identity {
        self.facts.identity
    }
}

impl fmt::Debug for Transaction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction").finish_non_exhaustive()
    }
}

impl Deref for OwnConnection {
    type Target = AsyncPgConnection;

    fn deref(&self) -> &AsyncPgConnection {
        &self.connection
    }
}

impl DerefMut for OwnConnection {
    fn deref_mut(&mut self) -> &mut AsyncPgConnection {
        &mut self.connection
    }
}

impl fmt::Debug for OwnConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnConnection").finish_non_exhaustive()
    }
}
