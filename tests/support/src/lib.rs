//! What integration tests, the fault campaign, the tests with other programs and the
//! benchmark share: a Postgres, servers, a proxy, clients, and assertions about answers.
//!
//! Everything here panics where it fails.

#![allow(
    clippy::new_without_default,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    missing_debug_implementations,
    missing_docs,
    reason = "a test fails by a panic, and the other lints do not help in test code"
)]

mod certificates;
mod clients;
mod clock;
mod cluster;
pub mod connect_client;
mod documentation;
mod etcd;
mod events;
mod health;
mod http1;
pub mod installed;
mod machine;
mod node;
mod pgbouncer;
mod port;
mod process;
pub mod processes;
mod proxy;
pub mod raw;
mod refused;
mod replay;
mod replication;
mod server;
mod temporary;
mod watch;

pub use certificates::{Authority, TlsFiles, TlsIdentity};
pub use clients::{Caller, Clients, PASSWORD, User, registration, sign_up_request};
pub use clock::Clock;
pub use cluster::{TestDatabase, database};
pub use documentation::{blocks, page};
pub use etcd::start_etcd;
pub use events::{complete, error, info, metadata, named, progress, step, with_metadata};
pub use http1::http;
pub use installed::is_root;
pub use machine::machine;
pub use node::{Node, connect, set, texts, url};
pub use pgbouncer::PgBouncer;
pub use port::own_address;
pub use process::{DRAIN_DEADLINE, ServerProcess, operate};
pub use proxy::{Mode, Proxy};
pub use refused::{assert_refused, assert_violations};
pub use replay::Replay;
pub use replication::Replication;
pub use server::{
    ALLOWED_ORIGIN, CONNECTIONS, QUOTAS, SIGN_UPS_PER_HOUR, STREAMS_PER_CONNECTION, STREAMS_PER_USER,
    TOKEN_STREAMS_PER_USER, TRUSTED_PROXY, TestServer,
};
pub use temporary::TemporaryDir;
pub use watch::Watch;

use std::{
    env,
    fmt::Display,
    io::{self, Write as _},
    path::PathBuf,
    time::Duration,
};

/// Longest that a test waits for one thing. Only a failing test waits that long.
pub const TIMEOUT: Duration = Duration::from_secs(120);
/// A server that waits for anything, such as its database, waits longer than this.
pub const AT_ONCE: Duration = Duration::from_secs(10);

/// The result of `work`, or a panic that names `awaited` after [`TIMEOUT`].
pub async fn within_timeout<T>(awaited: impl Display, work: impl Future<Output = T>) -> T {
    within(TIMEOUT, awaited, work).await
}

/// The result of `work`, or a panic that names `awaited` once `limit` has passed.
pub async fn within<T>(limit: Duration, awaited: impl Display, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => panic!("timed out after {limit:?} waiting for {awaited}"),
    }
}

/// Waits until the condition holds, or panics with `awaited` once `limit` has passed.
pub async fn until(limit: Duration, awaited: impl Display, holds: impl AsyncFn() -> bool) {
    within(limit, awaited, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// The `milepost` binary: of this build, which Cargo names to the tests and benchmarks that
/// it runs, or for other programs the one that MILEPOST_BIN names. `/proc` has the same path of
/// the processes that run it.
pub fn binary() -> PathBuf {
    let binary = env::var_os("CARGO_BIN_EXE_milepost").or_else(|| env::var_os("MILEPOST_BIN"));
    let binary = binary.expect("`cargo test` or `cargo bench` runs this process, or MILEPOST_BIN is set");
    PathBuf::from(binary).canonicalize().expect("the binary was built")
}

/// Prints a line of a report. The test harness would capture `println!`.
pub fn print_line(line: impl AsRef<str>) {
    // A closed stdout does not fail the test.
    let _ = writeln!(io::stdout(), "{}", line.as_ref());
}
