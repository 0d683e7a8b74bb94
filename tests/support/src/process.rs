//! The `milepost` binary in a process of its own, with a durable embedded
//! database unless the test gives it another.

use std::{
    fs,
    net::SocketAddr,
    ops::Deref,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use milepost::db::embedded::Embedded;
use milepost_client::pb::LogInRequest;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStdout, Command},
};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::{
    Clients, PASSWORD, TIMEOUT, TemporaryDir, TestDatabase, binary, own_address,
    processes::{self, Signal, parent, runs, signal, signal_those_that_run},
    until, within_timeout,
};

const LOG: &str = "server.log";
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
    /// Kept open, so that the process can write to it.
    _stdout: ChildStdout,
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
        Self::on_with(database, &[]).await
    }

    /// The same with more environment variables.
    pub async fn on_with(database: &TestDatabase, more: &[(&'static str, &str)]) -> Self {
        Self::on_at(database, "127.0.0.1", more).await
    }

    /// The same on this local address.
    pub async fn on_at(database: &TestDatabase, host: &str, more: &[(&'static str, &str)]) -> Self {
        // The shared Postgres runs with fsync off, which a server refuses without
        // MILEPOST_UNSAFE_DATABASE.
        let settings = [("DATABASE_URL", database.url.as_str()), ("MILEPOST_UNSAFE_DATABASE", "true")];
        let settings = settings.iter().chain(more).map(|(name, value)| (*name, (*value).to_owned()));
        Self::start_with(host, settings.collect()).await
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
        let dir = TemporaryDir::new();
        let wrapper: Vec<String> = wrapper.iter().map(|&argument| argument.to_owned()).collect();
        let (child, stdout) = serve(&wrapper, address, &dir, &settings).await;
        Self { address, clients: Clients::of(address), child, _stdout: stdout, dir, wrapper, settings }
    }

    /// Starts the server again with the same directory, address, wrapper and settings.
    pub async fn restart(&mut self) {
        (self.child, self._stdout) = serve(&self.wrapper, self.address, &self.dir, &self.settings).await;
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
        self.postgres_processes()
            .filter(|pid| !parent(*pid).is_some_and(|pid| self.is_postgres(pid)))
            .collect()
    }

    fn postgres_processes(&self) -> impl Iterator<Item = u32> {
        processes::all().filter(|pid| self.is_postgres(*pid))
    }

    fn is_postgres(&self, pid: u32) -> bool {
        let data = self.dir.path().join("cluster/data");
        fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data)
    }

    /// The server's log, over all restarts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join(LOG)).unwrap()
    }

    pub fn data_dir(&self) -> PathBuf {
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
        let children = processes::children(pid);
        signal(pid, Signal::KILL);
        until(TIMEOUT, "the end of Postgres", async || {
            !runs(pid) && !children.iter().any(|child| runs(*child))
        })
        .await;
    }

    /// Sends a signal to every process of the embedded Postgres: STOP makes it silent, with all
    /// its connections open.
    pub fn signal_postgres(&self, signal: Signal) {
        signal_those_that_run(&self.postgres_processes().collect::<Vec<_>>(), signal);
    }

    /// Sends a signal to the process itself.
    pub fn signal(&self, signal: Signal) {
        processes::signal(self.pids()[0], signal);
    }

    /// The memory that the server has now, in bytes.
    pub fn resident_bytes(&self) -> usize {
        processes::resident_bytes(self.pids()[0])
    }

    /// The processor time that the server has used.
    pub fn processor_time(&self) -> Duration {
        processes::processor_time(self.pids()[0])
    }

    /// The most memory that the server had so far, in bytes.
    pub fn memory_peak_bytes(&self) -> usize {
        processes::peak_bytes(self.pids()[0])
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
        let serving = Command::new(binary())
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
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Sends SIGHUP.
    pub fn hang_up(&self) {
        self.signal(Signal::HUP);
    }

    /// Waits until the log contains `words` at least `times` times.
    pub async fn logged(&self, words: &str, times: usize) {
        let count = || self.log().matches(words).count();
        until(TIMEOUT, format!("{words:?} in the log"), async || count() >= times).await;
    }

    /// Waits for the exit.
    pub async fn exit(&mut self) -> ExitStatus {
        within_timeout("the server's exit", self.child.wait()).await.unwrap()
    }
}

/// Runs `milepost user …` on this database, with `password` on its standard
/// input; returns its standard output.
pub async fn operate(database: &TestDatabase, arguments: &[&str], password: &str) -> String {
    let mut command = Command::new(binary());
    command.arg("user").args(arguments).env("DATABASE_URL", &database.url).env("MILEPOST_BCRYPT_COST", "4");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    // Not every command reads the password, so the pipe may be closed.
    let _ = child.stdin.take().unwrap().write_all(password.as_bytes()).await;
    let output = within_timeout("the operator's command", child.wait_with_output()).await.unwrap();
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The servers whose data directory this is. A parent has a lower id than its child.
fn servers(data_dir: &Path) -> Vec<u32> {
    let variable = format!("MILEPOST_DATA_DIR={}", data_dir.display());
    let binary = binary();
    let mut servers: Vec<u32> = processes::all()
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == binary)
                && environment.split(|byte| *byte == 0).any(|found| found == variable.as_bytes())
        })
        .collect();
    servers.sort_unstable();
    servers
}

/// Starts the binary and waits until it prints the address on which it listens.
async fn serve(
    wrapper: &[String],
    address: SocketAddr,
    dir: &TemporaryDir,
    settings: &[(&'static str, String)],
) -> (Child, ChildStdout) {
    let binary = binary().display().to_string();
    let mut command_line = wrapper.iter().chain([&binary]);
    let mut command = Command::new(command_line.next().unwrap());
    command
        .args(command_line)
        .arg("serve")
        .env_remove("DATABASE_URL")
        .env("MILEPOST_DRAIN_DEADLINE_S", DRAIN_DEADLINE.as_secs().to_string())
        .env("MILEPOST_LISTEN", address.to_string())
        .env("MILEPOST_DATA_DIR", dir.path())
        .env("MILEPOST_BCRYPT_COST", "4")
        .env("MILEPOST_LOG_LEVEL", "info,milepost=trace")
        .envs(settings.iter().cloned())
        .stdout(Stdio::piped());
    let mut child = dir.spawn(command, LOG);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    within_timeout("the server to listen", stdout.read_line(&mut line)).await.unwrap();
    assert!(
        line.contains(&address.to_string()),
        "the server did not listen on {address}:\n{}",
        fs::read_to_string(dir.path().join(LOG)).unwrap()
    );
    for server in servers(dir.path()) {
        dir.guard(server);
    }
    (child, stdout.into_inner())
}
