//! Recognises a pooler that does not give each connection a Postgres session of its own,
//! such as pgbouncer in transaction or statement mode. Behind one, `LISTEN` is lost, `SET`
//! reaches other sessions than it should, and prepared statements are missing or those of
//! another client; much of that without any error.
//!
//! Several connections ask which backend answers them, alone and while others hold a
//! transaction. A connection that two backends answered, or a backend that answered two
//! connections, is proof of a pooler; a late answer is none.
//!
//! A pooler hands a query to the backend that came back last (pgbouncer's default), to the
//! one that has been back for longest (`server_round_robin`), or, on a busy pool, to any.
//! In the first case the next connection gets the backend of the one before. In the second
//! a connection that asks twice gets two backends. A pool of fewer backends than there are
//! connections here gives one backend to two of them, so that no transaction of the probe
//! waits for another one. Transactions take backends away from the other connections, also
//! from a pooler that would give each connection the same backend again.

use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::time::timeout;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::connect::{DialError, Dialled, dial};
use crate::config::DatabaseSettings;

/// Behind a load balancer over fewer poolers, two of these connections have the same one.
pub(super) const CONNECTIONS: usize = 4;
/// How often transactions are begun: other clients of a busy pool may take the backend that
/// would have been proof.
const ROUNDS: usize = 2;
/// Process ids of two servers may be equal, the microseconds of their starts are not. The
/// simple query protocol needs no prepared statement.
const ASK: &str = "SELECT pg_backend_pid(), pg_postmaster_start_time()";

/// An error if the database is behind a pooler in transaction or statement mode, or if it
/// does not answer within the connect timeout.
pub(super) async fn refuse_pooler(url: &str, settings: &DatabaseSettings) -> Result<(), DialError> {
    Probe::connect(url, settings).await?.run().await
}

/// The process id of a backend, and when its server started.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Backend {
    pid: String,
    server_started: String,
}

struct Probe {
    clients: Vec<Client>,
    /// The backend of each client.
    backends: Vec<Option<Backend>>,
    /// Longest wait for an answer.
    limit: Duration,
}

impl Probe {
    async fn connect(url: &str, settings: &DatabaseSettings) -> Result<Self, DialError> {
        let limit = settings.connect_timeout;
        let dials = (0..CONNECTIONS).map(|_| dial(url, settings.ca.as_deref(), ""));
        let dialled = timeout(limit, try_join_all(dials)).await.unwrap_or(Err(DialError::Silent))?;
        // The driver ends with its client.
        let clients = dialled.into_iter().map(|Dialled { client, driver, .. }| {
            tokio::spawn(driver);
            client
        });
        Ok(Self { clients: clients.collect(), backends: vec![None; CONNECTIONS], limit })
    }

    async fn run(mut self) -> Result<(), DialError> {
        for client in 0..CONNECTIONS {
            self.ask(client, ASK).await?;
            self.ask(client, ASK).await?;
        }
        for client in 0..ROUNDS {
            let others = (0..CONNECTIONS).filter(|other| *other != client);
            self.ask(client, ASK).await?;
            for other in others.clone() {
                self.ask(other, &format!("BEGIN; {ASK}")).await?;
            }
            self.ask(client, ASK).await?;
            try_join_all(others.map(|other| self.query(other, "ROLLBACK"))).await?;
        }
        Ok(())
    }

    async fn query(&self, client: usize, sql: &str) -> Result<Vec<SimpleQueryMessage>, DialError> {
        let answer = timeout(self.limit, self.clients[client].simple_query(sql)).await;
        answer.map_err(|_| DialError::Silent)?.map_err(DialError::Postgres)
    }

    /// Sends one statement or several, of which the last asks for the backend.
    async fn ask(&mut self, client: usize, sql: &str) -> Result<(), DialError> {
        let answer = self.query(client, sql).await?;
        let row = answer
            .iter()
            .find_map(|message| if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None });
        let column = |index| row.and_then(|row| row.get(index)).unwrap_or_default().to_owned();
        self.note(client, Backend { pid: column(0), server_started: column(1) })
    }

    fn note(&mut self, client: usize, backend: Backend) -> Result<(), DialError> {
        let seen = match &self.backends[client] {
            Some(known) if *known == backend => return Ok(()),
            Some(known) => {
                let (before, after) = (&known.pid, &backend.pid);
                format!("the backends {before} and {after} answered on one connection")
            }
            None if self.backends.contains(&Some(backend.clone())) => {
                format!("the backend {} answered on two connections that were open", backend.pid)
            }
            None => {
                self.backends[client] = Some(backend);
                return Ok(());
            }
        };
        Err(DialError::Pooler(seen))
    }
}
