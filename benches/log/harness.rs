//! Starts and stops the processes of the rows: a durable Postgres, servers and peers,
//! all on loopback.

use std::{
    cell::{Cell, RefCell},
    env,
    fs::{self, File},
    net::{SocketAddr, TcpListener},
    process::Stdio,
    time::Duration,
};

use milepost::db::embedded::{Embedded, EmbeddedSettings};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    time::{Instant, sleep, timeout},
};
use tokio_postgres::NoTls;

use crate::{Options, Result, etcd, temporary_dir::TemporaryDir};

/// Limit for each start and stop of a process.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The Postgres of all rows and the directory of all processes. Processes that still run
/// when it is dropped are ended.
pub(crate) struct Harness {
    pub(crate) options: Options,
    admin: tokio_postgres::Client,
    embedded: Embedded,
    dir: RefCell<TemporaryDir>,
    next_number: Cell<u32>,
}

/// A server or a peer. Its process is killed when dropped.
pub(crate) struct Process {
    child: Child,
    pub(crate) address: SocketAddr,
    // Kept open, so that the process can write to its stdout.
    _stdout: Option<ChildStdout>,
}

impl Harness {
    pub(crate) async fn start(options: Options) -> Result<Self> {
        let dir = TemporaryDir::new()?;
        let settings =
            EmbeddedSettings { data_dir: dir.path().join("postgres"), extra_options: options.set.clone() };
        let embedded = Embedded::start(settings).await?;
        let admin = connect(&embedded.url("postgres")).await?;
        Ok(Self { options, admin, embedded, dir: RefCell::new(dir), next_number: Cell::new(0) })
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

    /// Starts a server on this database, at a free address.
    pub(crate) async fn server(&self, database_url: &str) -> Result<Process> {
        self.server_at(database_url, free_address()?).await
    }

    pub(crate) async fn server_at(&self, database_url: &str, address: SocketAddr) -> Result<Process> {
        self.start_server(database_url, address, None).await
    }

    /// Starts a server on this database; returns also the address of its metrics.
    pub(crate) async fn server_with_metrics(&self, database_url: &str) -> Result<(Process, SocketAddr)> {
        let metrics = free_address()?;
        Ok((self.start_server(database_url, free_address()?, Some(metrics)).await?, metrics))
    }

    async fn start_server(
        &self,
        database_url: &str,
        address: SocketAddr,
        metrics: Option<SocketAddr>,
    ) -> Result<Process> {
        let log = self.dir.borrow().path().join(format!("server-{}.log", self.number()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
        command
            .arg("serve")
            .env("DATABASE_URL", database_url)
            .env("MILEPOST_MIGRATE", "true")
            .env("MILEPOST_LISTEN", address.to_string())
            .env("MILEPOST_LOG_LEVEL", "warn")
            .env("MILEPOST_BCRYPT_COST", "4")
            // Some rows open 10,000 streams of one user, and some share a connection
            // between watches and appends.
            .env("MILEPOST_STREAMS_PER_CONNECTION", "100000")
            .env("MILEPOST_STREAMS_PER_USER", "99999")
            // A row is a user, of whose limits none is to show.
            .env("MILEPOST_CALLS_PER_SECOND", "1000000000")
            .env("MILEPOST_CALLS_IN_FLIGHT", "1000000")
            .env("MILEPOST_EVENTS_PER_SECOND", "1000000000")
            .env("MILEPOST_BYTES_IN_FLIGHT_MIB", "4096")
            .env("MILEPOST_TOTAL_BYTES_IN_FLIGHT_MIB", "4096")
            .envs(metrics.map(|metrics| ("MILEPOST_METRICS_LISTEN", metrics.to_string())))
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?);
        let mut process = self.spawn(command, address)?;
        let mut stdout = BufReader::new(process.child.stdout.take().ok_or("stdout is piped")?);
        let mut line = String::new();
        timeout(TIMEOUT, stdout.read_line(&mut line)).await??;
        if !line.contains("listens on") {
            return Err(format!(
                "the server did not start to listen; its log:\n{}",
                fs::read_to_string(log)?
            )
            .into());
        }
        process._stdout = Some(stdout.into_inner());
        Ok(process)
    }

    /// Starts an etcd with a new data directory, or returns none if etcd is not
    /// installed.
    pub(crate) async fn etcd(&self) -> Result<Option<Process>> {
        if etcd::version().is_none() {
            return self.report_missing_peer("etcd (Debian: etcd-server)").map(|()| None);
        }
        let (address, peer) = (free_address()?, free_address()?);
        let (client, peer) = (format!("http://{address}"), format!("http://{peer}"));
        let dir = self.dir.borrow().path().join(format!("etcd-{}", self.number()));
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(&dir).args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster",
            &format!("default={peer}"),
            // The default of 2 GB is reached in a long run.
            "--quota-backend-bytes",
            "8589934592",
            "--log-level",
            "error",
        ]);
        command.stdout(Stdio::null()).stderr(File::create(dir.with_extension("log"))?);
        let process = self.spawn(command, address)?;
        let give_up_at = Instant::now() + TIMEOUT;
        while let Err(error) = etcd::probe(address).await {
            if Instant::now() > give_up_at {
                return Err(error);
            }
            sleep(Duration::from_millis(100)).await;
        }
        Ok(Some(process))
    }

    /// Starts a tonic server of one empty method.
    pub(crate) async fn empty(&self) -> Result<Process> {
        let address = free_address()?;
        let mut command = Command::new(env::current_exe()?);
        command.arg("--serve-empty").arg(address.to_string()).stdout(Stdio::null());
        let process = self.spawn(command, address)?;
        let give_up_at = Instant::now() + TIMEOUT;
        while let Err(error) = tokio::net::TcpStream::connect(address).await {
            if Instant::now() > give_up_at {
                return Err(error.into());
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(process)
    }

    /// Runs a command to its end and returns its stdout.
    pub(crate) async fn run(&self, mut command: Command) -> Result<String> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let child = command.spawn()?;
        self.guard(&child)?;
        let output = child.wait_with_output().await?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{:?}: {}: {stderr}", command.as_std().get_program(), output.status).into());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Writes a file in the temporary directory and returns its path.
    pub(crate) fn write_file(&self, name: &str, text: &str) -> Result<std::path::PathBuf> {
        let path = self.dir.borrow().path().join(name);
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Warns that a peer is not installed, or fails with `--require-peers`.
    pub(crate) fn report_missing_peer(&self, peer: &str) -> Result<()> {
        if self.options.require_peers {
            return Err(format!("a peer is not installed: {peer}").into());
        }
        eprintln!("\n!!! A PEER IS NOT INSTALLED: {peer}. The next row lacks this comparison.\n");
        Ok(())
    }

    fn spawn(&self, mut command: Command, address: SocketAddr) -> Result<Process> {
        let child = command.stdin(Stdio::null()).kill_on_drop(true).spawn()?;
        self.guard(&child)?;
        Ok(Process { child, address, _stdout: None })
    }

    fn guard(&self, child: &Child) -> Result<()> {
        self.dir.borrow_mut().guard(child.id().ok_or("the process has already ended")?)
    }

    /// Counts up from 0, to name databases, logs and directories.
    fn number(&self) -> u32 {
        self.next_number.replace(self.next_number.get() + 1)
    }
}

impl Process {
    /// The resident memory of the process, in bytes.
    pub(crate) fn resident_bytes(&self) -> Result<u64> {
        let pid = self.child.id().ok_or("the process has already ended")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .ok_or("/proc/PID/status has no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    }

    /// Sends SIGTERM and waits for the exit.
    pub(crate) async fn stop(mut self) -> Result<()> {
        let pid = self.child.id().ok_or("the process has already ended")?;
        Command::new("kill").arg(pid.to_string()).status().await?;
        timeout(TIMEOUT, self.child.wait()).await??;
        Ok(())
    }
}

/// Opens a connection to Postgres for the benchmark itself.
pub(crate) async fn connect(url: &str) -> Result<tokio_postgres::Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// An address whose port is free now. Another process may take it before it is used.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
