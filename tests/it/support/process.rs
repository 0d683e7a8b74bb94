//! The real binary, in a process of its own: with a durable database of its own
//! unless it is given one.

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

/// Longest that a server process takes to drain.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(6);

/// A server that can be killed. It is gone, and its database with it, when it
/// is dropped and when this process dies.
#[derive(Debug)]
pub struct ServerProcess {
    pub address: SocketAddr,
    clients: Clients,
    // Before the folder: its process ends first.
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
    /// On a new embedded database, serving.
    pub async fn start() -> Self {
        Self::start_with("127.0.0.1", Vec::new()).await
    }

    /// A replica on a database of the tests' cluster, serving.
    pub async fn on(database: &TestDatabase) -> Self {
        // That cluster does not wait for its disk.
        let settings = [("DATABASE_URL", database.url.as_str()), ("MILEPOST_UNSAFE_DATABASE", "true")];
        Self::start_with("127.0.0.1", settings.map(|(name, value)| (name, value.to_owned())).to_vec()).await
    }

    /// The same, on any address of this machine's and with more settings.
    pub async fn start_with(host: &str, settings: Vec<(&'static str, String)>) -> Self {
        let address = own_address(host);
        let mut dir = TemporaryDir::new();
        let child = serve(address, &mut dir, &settings).await;
        Self { address, clients: Clients::of(address), child, dir, settings }
    }

    /// Starts again where the last one ended, on the same folder and address.
    pub async fn restart(&mut self) {
        self.child = serve(self.address, &mut self.dir, &self.settings).await;
    }

    /// What it has logged, over all its restarts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("server.log")).unwrap()
    }

    /// Where its data are.
    pub fn data_dir(&self) -> std::path::PathBuf {
        self.dir.path().to_owned()
    }

    /// The database that it serves.
    pub fn database(&self) -> TestDatabase {
        TestDatabase::served(Embedded::url_of_served(self.dir.path()).unwrap())
    }

    /// SIGKILL: nothing is closed, flushed or told.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// SIGKILL to its Postgres. Returns when nothing of it can answer any more:
    /// its children outlive it by a moment.
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

    /// Waits until it answers calls that need its database, asking again when it
    /// says so.
    pub async fn ready(&self) {
        let nobody = LogInRequest { email: "nobody@example.com".to_owned(), password: PASSWORD.to_owned() };
        within_timeout("the database to be back", async {
            loop {
                match self.anonymous().auth.log_in(nobody.clone()).await {
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

    /// What the binary says that refuses to serve this database.
    pub async fn refused_on(database_url: &str) -> String {
        Self::refused_with(database_url, &[]).await
    }

    /// The same with further flags.
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

    /// SIGTERM, without waiting for what follows.
    pub async fn terminate(&self) {
        signal("TERM", &self.child.id().expect("it runs").to_string()).await;
    }

    /// SIGHUP.
    pub async fn hang_up(&self) {
        signal("HUP", &self.child.id().expect("it runs").to_string()).await;
    }

    /// Waits until its log says so as often.
    pub async fn logged(&self, words: &str, times: usize) {
        let log = self.dir.path().join("server.log");
        within_timeout(format!("{words:?} in the log"), async {
            while fs::read_to_string(&log).unwrap().matches(words).count() < times {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// How it ended.
    pub async fn exit(&mut self) -> ExitStatus {
        within_timeout("the server's exit", self.child.wait()).await.unwrap()
    }
}

/// `milepost user …` on that database: what it says.
pub async fn operate(database: &TestDatabase, arguments: &[&str], password: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
    command.arg("user").args(arguments).env("DATABASE_URL", &database.url).env("MILEPOST_BCRYPT_COST", "4");
    let mut operating =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    // Not every command reads it.
    let _ = operating.stdin.take().unwrap().write_all(password.as_bytes()).await;
    let output = within_timeout("the operator's command", operating.wait_with_output()).await.unwrap();
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether a process is there and is no mere zombie.
fn runs(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

async fn signal(name: &str, pid: &str) {
    let status = Command::new("kill").args(["-s", name, pid]).status().await.unwrap();
    assert!(status.success(), "kill -s {name} {pid}");
}

/// Starts the binary and waits until it says where it listens.
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
    dir.guard(child.id().expect("it runs"));
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = within_timeout("the server to listen", lines.next_line()).await.unwrap();
    let log = || fs::read_to_string(&log).unwrap();
    assert!(line.is_some_and(|line| line.contains(&address.to_string())), "it did not listen:\n{}", log());
    child
}
