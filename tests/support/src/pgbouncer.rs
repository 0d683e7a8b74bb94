//! pgbouncer between a server and Postgres.

use std::{fs, path::Path};

use tokio::{net::UnixStream, process::Child};
use tokio_postgres::config::Host;

use crate::{
    TIMEOUT, TemporaryDir,
    installed::{give_to_postgres, is_installed, postgres_command, require},
    until, url,
};

/// A pgbouncer that runs until it is dropped, or until the test process ends.
#[derive(Debug)]
pub struct PgBouncer {
    /// The database's URL through this pgbouncer.
    pub url: String,
    /// The directory of the socket of Postgres.
    postgres: String,
    child: Child,
    dir: TemporaryDir,
}

impl PgBouncer {
    pub fn is_installed() -> bool {
        is_installed("pgbouncer")
    }

    /// Starts a pgbouncer for the database of this URL, whose host is a Unix socket, with
    /// these settings, such as `pool_mode=session`.
    pub async fn start(database: &str, settings: &[&str]) -> Self {
        require("pgbouncer", "pgbouncer");
        let config: tokio_postgres::Config = database.parse().unwrap();
        let [Host::Unix(postgres)] = config.get_hosts() else { panic!("{:?}", config.get_hosts()) };
        let (postgres, dir) = (postgres.display().to_string(), TemporaryDir::new());
        // pgbouncer refuses to run as root, as Postgres does. Postgres lets this user connect.
        give_to_postgres(dir.path());
        let child = run(&dir, &postgres, settings).await;
        Self { url: url(&[dir.path()], config.get_dbname().unwrap()), postgres, child, dir }
    }

    /// Ends this pgbouncer, and starts one with other settings in its place.
    pub async fn replace(&mut self, settings: &[&str]) {
        self.child.kill().await.unwrap();
        self.child = run(&self.dir, &self.postgres, settings).await;
    }

    /// The directory of its socket.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

async fn run(dir: &TemporaryDir, postgres: &str, settings: &[&str]) -> Child {
    let ini = format!(
        "[databases]\n* = host={postgres} user=milepost\n\n[pgbouncer]\nlisten_port = 5432\n\
         unix_socket_dir = {}\nauth_type = any\n{}\n",
        dir.path().display(),
        settings.join("\n"),
    );
    fs::write(dir.path().join("pgbouncer.ini"), ini).unwrap();
    // One that was killed leaves its socket behind.
    let socket = dir.path().join(".s.PGSQL.5432");
    let _ = fs::remove_file(&socket);
    let mut command = postgres_command("pgbouncer");
    command.arg("pgbouncer.ini");
    let child = dir.run(command, "pgbouncer.log");
    let listens = async || UnixStream::connect(&socket).await.is_ok();
    until(TIMEOUT, "pgbouncer to listen", listens).await;
    child
}
