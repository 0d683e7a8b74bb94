//! What the tests stand on: a Postgres, servers, people who call them, and
//! ways to look at what they answer.

mod certificates;
mod clients;
mod cluster;
mod events;
mod port;
mod process;
mod proxy;
pub mod raw;
mod refused;
mod server;
mod temporary;
mod watch;

pub use certificates::{Authority, Files, Pair};
pub use clients::{Caller, Clients, PASSWORD, User, registration};
pub use cluster::TestDatabase;
pub use events::{complete, error, info, metadata, named, noted, step};
pub use port::own_address;
pub use process::{DRAIN_DEADLINE, ServerProcess, operate};
pub use proxy::{Mode, Proxy};
pub use refused::{assert_refused, assert_violations};
pub use server::{CONNECTIONS, STREAMS_PER_CONNECTION, STREAMS_PER_USER, TRUSTED_PROXY, TestServer};
pub use temporary::TemporaryDir;
pub use watch::Watch;

use std::{fmt::Display, time::Duration};

/// Longest that anything that is waited for may take; only a failing test ever
/// waits that long.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// `work`'s result, or a panic that names what was waited for in vain.
pub async fn within_timeout<T>(what: impl Display, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(TIMEOUT, work).await {
        Ok(result) => result,
        Err(_) => panic!("waited {TIMEOUT:?} in vain for {what}"),
    }
}
