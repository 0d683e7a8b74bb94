//! Shared by all tests: a Postgres, servers, a proxy, clients, and assertions
//! about answers.

mod certificates;
mod clients;
mod clock;
mod cluster;
mod events;
pub mod installed;
mod pgbouncer;
mod port;
mod process;
mod proxy;
pub mod raw;
mod refused;
pub mod replication;
mod server;
mod temporary;
mod watch;

pub use certificates::{Authority, TlsFiles, TlsIdentity};
pub use clients::{Caller, Clients, PASSWORD, User, registration};
pub use clock::Clock;
pub use cluster::{TestDatabase, database};
pub use events::{complete, error, info, metadata, named, step, with_metadata};
pub use installed::is_root;
pub use pgbouncer::PgBouncer;
pub use port::own_address;
pub use process::{DRAIN_DEADLINE, ServerProcess, operate, parent, runs, zombies_of};
pub use proxy::{Mode, Proxy};
pub use refused::{assert_refused, assert_violations};
pub use replication::Replication;
pub use server::{
    CONNECTIONS, QUOTAS, SIGN_UPS_PER_HOUR, STREAMS_PER_CONNECTION, STREAMS_PER_USER, TOKEN_STREAMS_PER_USER,
    TRUSTED_PROXY, TestServer,
};
pub use temporary::TemporaryDir;
pub use watch::Watch;

use std::{fmt::Display, time::Duration};

/// Longest that a test waits for one thing. Only a failing test waits that long.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// The result of `work`, or a panic that names `awaited` after [`TIMEOUT`].
pub async fn within_timeout<T>(awaited: impl Display, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(TIMEOUT, work).await {
        Ok(result) => result,
        Err(_) => panic!("timed out after {TIMEOUT:?} waiting for {awaited}"),
    }
}
