//! pgbouncer between a server and the tests' Postgres.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
};

use tokio_postgres::config::Host;

use super::{is_root, own_address, temporary::TemporaryDir, within_timeout};

/// A pgbouncer that runs until it is dropped, or until the test process ends.
#[derive(Debug)]
pub struct PgBouncer {
    /// The database's URL through this pgbouncer.
    pub url: String,
    address: SocketAddr,
    socket_dir: String,
    child: Child,
    dir: TemporaryDir,
}

impl PgBouncer {
    /// Starts a pgbouncer for the database of this URL, whose host is a Unix socket, with
    /// these settings, such as `pool_mode=session`.
    pub async fn start(url: &str, settings: &[&str]) -> Self {
        let config: tokio_postgres::Config = url.parse().unwrap();
        let [Host::Unix(socket_dir)] = config.get_hosts() else { panic!("{:?}", config.get_hosts()) };
        let socket_dir = socket_dir.to_str().unwrap().to_owned();
        let (address, dir) = (own_address("127.0.0.1"), TemporaryDir::new());
        let url = format!("postgresql://milepost@{address}/{}", config.get_dbname().unwrap());
        let child = run(address, &socket_dir, dir.path(), settings).await;
        Self { url, address, socket_dir, child, dir }
    }

    /// Ends this pgbouncer, and starts one with other settings in its place.
    pub async fn replace(&mut self, settings: &[&str]) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = run(self.address, &self.socket_dir, self.dir.path(), settings).await;
    }
}

async fn run(address: SocketAddr, socket_dir: &str, dir: &Path, settings: &[&str]) -> Child {
    let file = dir.join("pgbouncer.ini");
    let ini = format!(
        "[databases]\n* = host={socket_dir} user=milepost\n\n[pgbouncer]\nlisten_addr = {}\nlisten_port = {}\n\
         unix_socket_dir =\nauth_type = any\n{}\n",
        address.ip(),
        address.port(),
        settings.join("\n"),
    );
    fs::write(&file, ini).unwrap();
    let log = File::create(dir.join("pgbouncer.log")).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    // pgbouncer refuses to run as root, as Postgres does. Postgres lets this user connect.
    if is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
    }
    // Debian has it in a directory for administrators.
    let path = format!("{}:/usr/sbin", std::env::var("PATH").unwrap());
    command.arg("pgbouncer").arg(&file).env("PATH", path);
    let child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("setpriv is installed");
    within_timeout("pgbouncer (apt-get install pgbouncer)", async {
        while TcpStream::connect(address).is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    child
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
