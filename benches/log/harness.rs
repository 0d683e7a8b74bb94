//! Starts and stops the processes of the rows, all on loopback: a durable Postgres and
//! servers. The peers are started in [`crate::peers`].

use std::{cell::Cell, env, net::SocketAddr, process::Stdio, time::Duration};

use milepost::db::embedded::{Embedded, EmbeddedSettings};
use milepost_testing::{ServerProcess, TIMEOUT, TemporaryDir, connect, own_address, processes, until};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
};

use crate::{Options, Result};

/// The Postgres of all rows and the directory of all peers. Processes that still run
/// when it is dropped are ended.
pub(crate) struct Harness {
    pub(crate) options: Options,
    admin: tokio_postgres::Client,
    embedded: Embedded,
    /// The process of Postgres whose children are all others of it.
    postmaster: u32,
    pub(crate) dir: TemporaryDir,
    next_number: Cell<u32>,
}

/// The server of an empty method. Its process is killed when dropped.
pub(crate) struct Empty {
    _child: Child,
    pub(crate) address: SocketAddr,
}

impl Harness {
    pub(crate) async fn start(options: Options) -> Result<Self> {
        let dir = TemporaryDir::new();
        let settings =
            EmbeddedSettings { data_dir: dir.path().join("postgres"), extra_options: options.set.clone() };
        let embedded = Embedded::start(settings).await?;
        let admin = connect(&embedded.url("postgres")).await?;
        let backend: i32 = admin.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
        let postmaster =
            processes::parent(u32::try_from(backend)?).ok_or("a backend without a postmaster")?;
        Ok(Self { options, admin, embedded, postmaster, dir, next_number: Cell::new(0) })
    }

    /// Shuts Postgres down. Servers and peers have ended with their rows.
    pub(crate) async fn stop(self) -> Result<()> {
        Ok(self.embedded.stop().await?)
    }

    /// The `server_version` of Postgres.
    pub(crate) async fn postgres_version(&self) -> Result<String> {
        Ok(self.admin.query_one("SHOW server_version", &[]).await?.get(0))
    }

    /// Creates an empty database and returns its URL.
    pub(crate) async fn database(&self) -> Result<String> {
        let name = format!("row_{}", self.number());
        self.admin.batch_execute(&format!("CREATE DATABASE {name}")).await?;
        Ok(self.embedded.url(&name))
    }

    /// Runs CHECKPOINT, so that pages changed by earlier rounds are not written during
    /// the next.
    pub(crate) async fn checkpoint(&self) -> Result<()> {
        Ok(self.admin.batch_execute("CHECKPOINT").await?)
    }

    /// The processor time that Postgres has used so far, with all its processes.
    pub(crate) fn postgres_processor_time(&self) -> Duration {
        processes::processor_time_with_children(self.postmaster)
    }

    /// The processor time that these servers and Postgres have used so far.
    pub(crate) fn milepost_processor_time(&self, servers: &[ServerProcess]) -> Duration {
        let servers: Duration = servers.iter().map(|server| server.processor_time()).sum();
        servers + self.postgres_processor_time()
    }

    /// Starts a tonic server of one empty method.
    pub(crate) async fn empty(&self) -> Result<Empty> {
        let address = own_address("127.0.0.1");
        let mut command = Command::new(env::current_exe()?);
        command.arg("--serve-empty").arg(address.to_string()).stdout(Stdio::null());
        let child = self.dir.spawn(command, "empty.log");
        until(TIMEOUT, "the empty method", async || TcpStream::connect(address).await.is_ok()).await;
        Ok(Empty { _child: child, address })
    }

    /// Writes a file in the temporary directory and returns its path.
    pub(crate) fn write_file(&self, name: &str, text: &str) -> Result<std::path::PathBuf> {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// Warns that a peer is missing, or fails with `--require-peers`.
    pub(crate) fn report_missing_peer(&self, peer: &str) -> Result<()> {
        if self.options.require_peers {
            return Err(format!("a peer is missing: {peer}").into());
        }
        eprintln!("\n!!! A PEER IS MISSING: {peer}. The next row lacks this comparison.\n");
        Ok(())
    }

    /// Counts up from 0, to name databases, logs and directories.
    pub(crate) fn number(&self) -> u32 {
        self.next_number.replace(self.next_number.get() + 1)
    }
}

/// Starts a server on this database.
pub(crate) async fn serve(database_url: &str) -> ServerProcess {
    serve_with(database_url, Vec::new()).await
}

/// Starts a server on this database; returns also the address of its metrics.
pub(crate) async fn serve_with_metrics(database_url: &str) -> (ServerProcess, SocketAddr) {
    let metrics = own_address("127.0.0.1");
    let settings = vec![("MILEPOST_METRICS_LISTEN", metrics.to_string())];
    (serve_with(database_url, settings).await, metrics)
}

async fn serve_with(database_url: &str, mut settings: Vec<(&'static str, String)>) -> ServerProcess {
    let common = [
        ("DATABASE_URL", database_url),
        ("MILEPOST_MIGRATE", "true"),
        ("MILEPOST_LOG_LEVEL", "warn"),
        // Some rows open 10,000 streams of one user, and some share a connection
        // between watches and appends.
        ("MILEPOST_STREAMS_PER_CONNECTION", "100000"),
        ("MILEPOST_STREAMS_PER_USER", "99999"),
        // A row is a user, of whose limits none is to show.
        ("MILEPOST_CALLS_PER_SECOND", "1000000000"),
        ("MILEPOST_CALLS_IN_FLIGHT", "1000000"),
        ("MILEPOST_EVENTS_PER_SECOND", "1000000000"),
        ("MILEPOST_BYTES_IN_FLIGHT_MIB", "4096"),
        ("MILEPOST_TOTAL_BYTES_IN_FLIGHT_MIB", "4096"),
    ];
    settings.extend(common.map(|(name, value)| (name, value.to_owned())));
    ServerProcess::start_with("127.0.0.1", settings).await
}

/// Sends SIGTERM and waits for the exit.
pub(crate) async fn stop(server: &mut ServerProcess) {
    server.terminate();
    server.exit().await;
}
