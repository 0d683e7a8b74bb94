//! etcd with a data directory of its own.

use std::net::SocketAddr;

use tokio::process::{Child, Command};

use crate::{TemporaryDir, own_address};

/// Starts an etcd of one member at this address by the command of its program. Its data are
/// in `DIR/name`, and its log is in `DIR/name.log`.
pub fn start_etcd(mut command: Command, dir: &TemporaryDir, name: &str, address: SocketAddr) -> Child {
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
    command.args(arguments.as_flattened());
    dir.run(command, &format!("{name}.log"))
}
