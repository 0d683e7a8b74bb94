//! What the rows stand on: a durable Postgres, servers and peers, each a
//! process of its own on loopback.

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

use crate::{Options, Result, data_dir::Dir, etcd};

/// Longest that anything may take to start or stop.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Everything that the rows need; what runs ends with it.
pub(crate) struct Bed {
    pub(crate) options: Options,
    admin: tokio_postgres::Client,
    embedded: Embedded,
    dir: RefCell<Dir>,
    started: Cell<u32>,
}

/// A process that was started for the rows. It is killed when dropped.
pub(crate) struct Process {
    child: Child,
    pub(crate) address: SocketAddr,
    // Whoever writes there must find it open.
    _stdout: Option<ChildStdout>,
}

impl Bed {
    pub(crate) async fn start(options: Options) -> Result<Self> {
        let dir = Dir::new()?;
        let settings =
            EmbeddedSettings { data_dir: dir.path().join("postgres"), extra_options: options.set.clone() };
        let embedded = Embedded::start(settings).await?;
        let admin = connect(&embedded.url("postgres")).await?;
        Ok(Self { options, admin, embedded, dir: RefCell::new(dir), started: Cell::new(0) })
    }

    /// Stops Postgres in order; servers and peers have ended with their rows.
    pub(crate) async fn stop(self) -> Result<()> {
        Ok(self.embedded.stop().await?)
    }

    /// The version that Postgres tells of itself.
    pub(crate) async fn postgres_version(&self) -> Result<String> {
        Ok(self.admin.query_one("SHOW server_version", &[]).await?.get(0))
    }

    /// A new, empty database, and its URL.
    pub(crate) async fn database(&self) -> Result<String> {
        let name = format!("row_{}", self.number());
        self.admin.batch_execute(&format!("CREATE DATABASE {name}")).await?;
        Ok(self.embedded.url(&name))
    }

    /// Writes out what earlier rounds left to be written, so that it burdens
    /// none of the next.
    pub(crate) async fn checkpoint(&self) -> Result<()> {
        Ok(self.admin.batch_execute("CHECKPOINT").await?)
    }

    /// A server of the release build on this database.
    pub(crate) async fn server(&self, database_url: &str) -> Result<Process> {
        self.server_at(database_url, free_address()?).await
    }

    pub(crate) async fn server_at(&self, database_url: &str, address: SocketAddr) -> Result<Process> {
        let log = self.dir.borrow().path().join(format!("server-{}.log", self.number()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
        command
            .arg("serve")
            .env("DATABASE_URL", database_url)
            .env("MILEPOST_MIGRATE", "true")
            .env("MILEPOST_LISTEN", address.to_string())
            .env("MILEPOST_LOG_LEVEL", "warn")
            .env("MILEPOST_BCRYPT_COST", "4")
            // A watch and a load share a connection in some rows.
            .env("MILEPOST_STREAMS_PER_CONNECTION", "100000")
            .env("MILEPOST_STREAMS_PER_USER", "99999")
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?);
        let mut process = self.spawn(command, address)?;
        let mut stdout = BufReader::new(process.child.stdout.take().ok_or("stdout is piped")?);
        let mut line = String::new();
        timeout(TIMEOUT, stdout.read_line(&mut line)).await??;
        if !line.contains("listens on") {
            return Err(format!("the server did not listen:\n{}", fs::read_to_string(log)?).into());
        }
        process._stdout = Some(stdout.into_inner());
        Ok(process)
    }

    /// A new etcd, or none where it is not installed.
    pub(crate) async fn etcd(&self) -> Result<Option<Process>> {
        if etcd::version().is_none() {
            return self.missing("etcd (Debian: etcd-server)").map(|()| None);
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
            // Its 2 GB would end a long run.
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

    /// A tonic server of one method that does nothing.
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

    /// Runs a command to its end; what it wrote to stdout.
    pub(crate) async fn run(&self, mut command: Command) -> Result<String> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let child = command.spawn()?;
        self.guard(&child)?;
        let output = child.wait_with_output().await?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{:?}: {}: {said}", command.as_std().get_program(), output.status).into());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Where files may go.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<std::path::PathBuf> {
        let path = self.dir.borrow().path().join(name);
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Says so, or fails where peers are required.
    pub(crate) fn missing(&self, peer: &str) -> Result<()> {
        if self.options.require_peers {
            return Err(format!("a peer is missing: {peer}").into());
        }
        eprintln!("\n!!! A PEER IS MISSING: {peer}. What follows has nothing to be compared with.\n");
        Ok(())
    }

    fn spawn(&self, mut command: Command, address: SocketAddr) -> Result<Process> {
        let child = command.stdin(Stdio::null()).kill_on_drop(true).spawn()?;
        self.guard(&child)?;
        Ok(Process { child, address, _stdout: None })
    }

    fn guard(&self, child: &Child) -> Result<()> {
        self.dir.borrow_mut().guard(child.id().ok_or("it has ended already")?)
    }

    fn number(&self) -> u32 {
        self.started.replace(self.started.get() + 1)
    }
}

impl Process {
    /// What it occupies of the machine's memory, in bytes.
    pub(crate) fn resident_bytes(&self) -> Result<u64> {
        let pid = self.child.id().ok_or("it has ended")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    }

    /// SIGTERM, and waits for the end.
    pub(crate) async fn stop(mut self) -> Result<()> {
        let pid = self.child.id().ok_or("it has ended")?;
        Command::new("kill").arg(pid.to_string()).status().await?;
        timeout(TIMEOUT, self.child.wait()).await??;
        Ok(())
    }
}

/// A connection to Postgres of the benchmark's own.
pub(crate) async fn connect(url: &str) -> Result<tokio_postgres::Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Free now, and most likely still so a moment later.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
