//! The `milepost` binary in a process of its own, with a durable embedded
//! database unless the test gives it another.

use std::{
    fs::{self, File},
    net::SocketAddr,
    ops::Deref,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
};

use milepost::{db::embedded::Embedded, pb::LogInRequest};
use tonic::Code;
use tonic_types::StatusExt as _;

use super::{Clients, PASSWORD, TestDatabase, own_address, temporary::TemporaryDir, within_timeout};

/// The drain deadline of every server process.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(6);

/// A server process that a test can kill. The process and its embedded database
/// end when this value is dropped and when the test process exits.
#[derive(Debug)]
pub struct ServerProcess {
    pub address: SocketAddr,
    clients: Clients,
    // Before `dir`, so that the process ends before its directory is removed.
    child: Child,
    dir: TemporaryDir,
    settings: Vec<(&'static str, String)>,
}

impl Deref for ServerProcess {
    type Target = Clients;

    fn deref(&self) -> &Clients {
        &self.clients
    }
}

impl ServerProcess {
    /// Starts a server on a new embedded database; returns once it listens.
    pub async fn start() -> Self {
        Self::start_with("127.0.0.1", Vec::new()).await
    }

    /// Starts a replica on a database of the tests' shared Postgres.
    pub async fn on(database: &TestDatabase) -> Self {
        // The shared Postgres runs with fsync off, which a server refuses without
        // MILEPOST_UNSAFE_DATABASE.
        let settings = [("DATABASE_URL", database.url.as_str()), ("MILEPOST_UNSAFE_DATABASE", "true")];
        Self::start_with("127.0.0.1", settings.map(|(name, value)| (name, value.to_owned())).to_vec()).await
    }

    /// Starts a server on this local address, with more environment variables.
    pub async fn start_with(host: &str, settings: Vec<(&'static str, String)>) -> Self {
        let address = own_address(host);
        let mut dir = TemporaryDir::new();
        let child = serve(address, &mut dir, &settings).await;
        Self { address, clients: Clients::of(address), child, dir, settings }
    }

    /// Starts the server again with the same directory, address and settings.
    pub async fn restart(&mut self) {
        self.child = serve(self.address, &mut self.dir, &self.settings).await;
    }

    /// The server's log, over all restarts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("server.log")).unwrap()
    }

    pub fn data_dir(&self) -> std::path::PathBuf {
        self.dir.path().to_owned()
    }

    /// The embedded database that this server runs.
    pub fn database(&self) -> TestDatabase {
        TestDatabase::served(Embedded::url_of_served(self.dir.path()).unwrap())
    }

    /// Sends SIGKILL: the server closes and flushes nothing.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Sends SIGKILL to the embedded Postgres. Returns once its child
    /// processes have exited too: they outlive it by a moment and still answer.
    pub async fn kill_postgres(&self) {
        let file = self.dir.path().join("cluster/data/postmaster.pid");
        let text = fs::read_to_string(file).unwrap();
        let pid = text.lines().next().unwrap();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        signal("KILL", pid).await;
        within_timeout("the end of Postgres", async {
            while children.split_whitespace().any(runs) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Waits until the server answers a call that needs its database. Repeats the
    /// call after the delay that RetryInfo gives.
    pub async fn ready(&self) {
        let request = LogInRequest { email: "nobody@example.com".to_owned(), password: PASSWORD.to_owned() };
        within_timeout("the database to be available", async {
            loop {
                match self.anonymous().auth.log_in(request.clone()).await {
                    Err(status) if status.code() == Code::Unavailable => {
                        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
                        tokio::time::sleep(retry.unwrap_or_default()).await;
                    }
                    _ => break,
                }
            }
        })
        .await;
    }

    /// The standard error of a `milepost serve` that refuses this database.
    pub async fn refused_on(database_url: &str) -> String {
        Self::refused_with(database_url, &[]).await
    }

    /// The same with more flags.
    pub async fn refused_with(database_url: &str, flags: &[&str]) -> String {
        let serving = Command::new(env!("CARGO_BIN_EXE_milepost"))
            .arg("serve")
            .args(flags)
            .env("DATABASE_URL", database_url)
            .env("MILEPOST_LISTEN", "127.0.0.1:0")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = within_timeout("a refusal", serving).await.unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    }

    /// Sends SIGTERM without waiting for the exit.
    pub async fn terminate(&self) {
        signal("TERM", &self.child.id().expect("the server is running").to_string()).await;
    }

    /// Sends SIGHUP.
    pub async fn hang_up(&self) {
        signal("HUP", &self.child.id().expect("the server is running").to_string()).await;
    }

    /// Waits until the log contains `words` at least `times` times.
    pub async fn logged(&self, words: &str, times: usize) {
        let log = self.dir.path().join("server.log");
        within_timeout(format!("{words:?} in the log"), async {
            while fs::read_to_string(&log).unwrap().matches(words).count() < times {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Waits for the exit.
    pub async fn exit(&mut self) -> ExitStatus {
        within_timeout("the server's exit", self.child.wait()).await.unwrap()
    }
}

/// Runs `milepost user …` on this database, with `password` on its standard
/// input; returns its standard output.
pub async fn operate(database: &TestDatabase, arguments: &[&str], password: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
    command.arg("user").args(arguments).env("DATABASE_URL", &database.url).env("MILEPOST_BCRYPT_COST", "4");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    // Not every command reads the password, so the pipe may be closed.
    let _ = child.stdin.take().unwrap().write_all(password.as_bytes()).await;
    let output = within_timeout("the operator's command", child.wait_with_output()).await.unwrap();
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether the process runs; a zombie does not.
fn runs(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

async fn signal(name: &str, pid: &str) {
    let status = Command::new("kill").args(["-s", name, pid]).status().await.unwrap();
    assert!(status.success(), "kill -s {name} {pid}");
}

/// Starts the binary and waits until it prints the address on which it listens.
async fn serve(address: SocketAddr, dir: &mut TemporaryDir, settings: &[(&'static str, String)]) -> Child {
    let log = dir.path().join("server.log");
    let mut child = Command::new(env!("CARGO_BIN_EXE_milepost"))
        .arg("serve")
        .env_remove("DATABASE_URL")
        .env("MILEPOST_DRAIN_DEADLINE_S", DRAIN_DEADLINE.as_secs().to_string())
        .env("MILEPOST_LISTEN", address.to_string())
        .env("MILEPOST_DATA_DIR", dir.path())
        .env("MILEPOST_BCRYPT_COST", "4")
        .env("MILEPOST_LOG_LEVEL", "info,milepost=trace")
        .envs(settings.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::options().create(true).append(true).open(&log).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    dir.guard(child.id().expect("the server is running"));
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = within_timeout("the server to listen", lines.next_line()).await.unwrap();
    let log = || fs::read_to_string(&log).unwrap();
    assert!(
        line.is_some_and(|line| line.contains(&address.to_string())),
        "the server did not listen on {address}:\n{}",
        log()
    );
    child
}
