//! etcd with a new data directory.

use std::net::SocketAddr;

use tokio::process::Child;

use crate::{
    TemporaryDir,
    installed::{make_postgres_dir, postgres_command},
    own_address,
};

/// Starts an etcd of one member at this address, as the user of Postgres. Its data are in
/// `DIR/name`, and its log is in `DIR/name.log`.
pub fn start_etcd(dir: &TemporaryDir, name: &str, address: SocketAddr) -> Child {
    make_postgres_dir(&dir.path().join(name));
    let (clients, peers) = (format!("http://{address}"), format!("http://{}", own_address("127.0.0.1")));
    let cluster = format!("default={peers}");
    let arguments = [
        ["--data-dir", name],
        ["--listen-client-urls", &clients],
        ["--advertise-client-urls", &clients],
        ["--listen-peer-urls", &peers],
        ["--initial-advertise-peer-urls", &peers],
        ["--initial-cluster", &cluster],
        // A long run reaches the default of 2 GB.
        ["--quota-backend-bytes", "8589934592"],
        ["--log-level", "error"],
    ];
    let mut command = postgres_command("etcd");
    command.args(arguments.as_flattened());
    dir.run(command, &format!("{name}.log"))
}
