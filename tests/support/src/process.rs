//! The `milepost` binary in a process of its own, with a durable embedded
//! database unless the test gives it another.

use std::{
    fs::{self, File},
    net::SocketAddr,
    ops::Deref,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
};

use milepost::db::embedded::Embedded;
use milepost_client::pb::LogInRequest;
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
    wrapper: Vec<String>,
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
        Self::start_by(&[], host, settings).await
    }

    /// Starts a server on a new embedded database by a command such as `unshare`, which
    /// runs the command line that follows its own arguments.
    pub async fn start_in(wrapper: &[&str]) -> Self {
        Self::start_by(wrapper, "127.0.0.1", Vec::new()).await
    }

    async fn start_by(wrapper: &[&str], host: &str, settings: Vec<(&'static str, String)>) -> Self {
        let address = own_address(host);
        let mut dir = TemporaryDir::new();
        let wrapper: Vec<String> = wrapper.iter().map(|&argument| argument.to_owned()).collect();
        let child = serve(&wrapper, address, &mut dir, &settings).await;
        Self { address, clients: Clients::of(address), child, dir, wrapper, settings }
    }

    /// Starts the server again with the same directory, address, wrapper and settings.
    pub async fn restart(&mut self) {
        self.child = serve(&self.wrapper, self.address, &mut self.dir, &self.settings).await;
    }

    /// Starts the server again by another wrapper.
    pub async fn restart_in(&mut self, wrapper: &[&str]) {
        self.wrapper = wrapper.iter().map(|&argument| argument.to_owned()).collect();
        self.restart().await;
    }

    /// The process ids of the server: one, or as PID 1 of a namespace two, parent first.
    pub fn pids(&self) -> Vec<u32> {
        servers(self.dir.path())
    }

    /// The embedded Postgres of this server: each process that works on the cluster and
    /// is not the child of another one.
    pub fn postmasters(&self) -> Vec<u32> {
        let data = self.dir.path().join("cluster/data");
        let works = |pid: u32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data);
        processes().filter(|pid| works(*pid) && !parent(*pid).is_some_and(works)).collect()
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
        let postmasters = self.postmasters();
        let [pid] = postmasters[..] else { panic!("one Postgres runs, not {postmasters:?}") };
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        signal("KILL", &pid.to_string()).await;
        within_timeout("the end of Postgres", async {
            while runs(pid) || children.split_whitespace().any(|child| runs(child.parse().unwrap())) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Sends a signal to every process of the embedded Postgres: STOP makes it silent, with all
    /// its connections open.
    pub async fn signal_postgres(&self, name: &str) {
        let data = self.dir.path().join("cluster/data");
        let works = |pid: &u32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data);
        for pid in processes().filter(works) {
            signal(name, &pid.to_string()).await;
        }
    }

    /// The most memory that the server had so far, in bytes.
    pub fn memory_peak_bytes(&self) -> usize {
        let peak = status(self.pids()[0], "VmHWM").expect("a running server");
        peak.trim_end_matches(" kB").parse::<usize>().expect("kilobytes") * 1024
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
        signal("TERM", &self.pids()[0].to_string()).await;
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
pub fn runs(pid: u32) -> bool {
    status(pid, "State").is_some_and(|state| !state.starts_with('Z'))
}

/// Those children of the process that have ended and that it has not waited for.
pub fn zombies_of(pid: u32) -> Vec<u32> {
    processes().filter(|child| parent(*child) == Some(pid) && !runs(*child)).collect()
}

pub fn parent(pid: u32) -> Option<u32> {
    status(pid, "PPid")?.parse().ok()
}

/// A line of `/proc/PID/status`.
fn status(pid: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(found, _)| *found == name).map(|(_, value)| value.trim().to_owned())
}

fn processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
}

/// The servers whose data directory this is. A parent has a lower id than its child.
fn servers(data_dir: &Path) -> Vec<u32> {
    let variable = format!("MILEPOST_DATA_DIR={}", data_dir.display());
    let mut servers: Vec<u32> = processes()
        .filter(|pid| {
            let binary = Path::new(env!("CARGO_BIN_EXE_milepost"));
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == binary)
                && environment.split(|byte| *byte == 0).any(|found| found == variable.as_bytes())
        })
        .collect();
    servers.sort_unstable();
    servers
}

async fn signal(name: &str, pid: &str) {
    let status = Command::new("kill").args(["-s", name, pid]).status().await.unwrap();
    assert!(status.success(), "kill -s {name} {pid}");
}

/// Starts the binary and waits until it prints the address on which it listens.
async fn serve(
    wrapper: &[String],
    address: SocketAddr,
    dir: &mut TemporaryDir,
    settings: &[(&'static str, String)],
) -> Child {
    let log = dir.path().join("server.log");
    let binary = env!("CARGO_BIN_EXE_milepost").to_owned();
    let mut command_line = wrapper.iter().chain([&binary]);
    let mut child = Command::new(command_line.next().unwrap())
        .args(command_line)
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
    for server in servers(dir.path()) {
        dir.guard(server);
    }
    child
}
