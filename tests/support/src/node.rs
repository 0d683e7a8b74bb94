//! One server of Postgres, with durable settings and a clock that the fault injector can
//! move.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::process::{Child, Command};
use tokio_postgres::{Client, NoTls};

use crate::{
    clock::Clock,
    context::{is_running, send_signal, within},
    installed::{give_to_postgres, make_postgres_dir, newest_postgres, postgres_command},
};

const TIMEOUT: Duration = Duration::from_secs(120);
/// Few, so that the fault injector can use them up.
pub const MAX_CONNECTIONS: usize = 40;
const SETTINGS: [(&str, &str); 8] = [
    ("listen_addresses", ""),
    // The checker reads what survives a crash, so commits must be durable.
    ("fsync", "on"),
    ("full_page_writes", "on"),
    // Each server sets it to `on` for its own sessions.
    ("synchronous_commit", "off"),
    ("max_wal_size", "64MB"),
    ("min_wal_size", "32MB"),
    // A standby starts to stream some seconds after the copy that it begins with.
    ("wal_keep_size", "256MB"),
    ("checkpoint_timeout", "30s"),
];

/// A data directory, and the Postgres that runs on it or does not.
pub struct Node {
    /// Has the data and, while it runs, the socket.
    dir: PathBuf,
    clock: Clock,
    child: Option<Child>,
}

impl Node {
    pub fn new(dir: PathBuf, clock: Clock) -> Self {
        Self { dir, clock, child: None }
    }

    /// Empties the directory.
    fn clear(&self) {
        let _ = fs::remove_dir_all(&self.dir);
        make_postgres_dir(&self.dir);
    }

    /// Makes an empty cluster.
    pub async fn create(&self) {
        self.clear();
        let data = self.data();
        let arguments = ["--auth=trust", "--username=milepost", "--encoding=UTF8", "--locale=C.UTF-8", "-D"];
        self.run("initdb", &[&arguments[..], &[&data]].concat()).await;
    }

    /// Copies the data of a primary, to be its standby.
    pub async fn copy(&self, primary: &Self) {
        self.clear();
        let (host, data) = (primary.dir.display().to_string(), self.data());
        let arguments = ["--write-recovery-conf", "--checkpoint=fast", "-U", "milepost", "-h", &host, "-D"];
        self.run("pg_basebackup", &[&arguments[..], &[&data]].concat()).await;
    }

    /// Has this node, whose data is that of a former primary, start as a standby.
    pub fn follow(&self, primary: &Self) {
        let data = PathBuf::from(self.data());
        let conninfo = format!("primary_conninfo = 'host={} user=milepost'\n", primary.dir.display());
        let settings = data.join("postgresql.auto.conf");
        let former = fs::read_to_string(&settings).unwrap();
        fs::write(settings, former + &conninfo).unwrap();
        let signal = data.join("standby.signal");
        fs::write(&signal, "").unwrap();
        give_to_postgres(&signal);
    }

    /// Starts Postgres; does not wait until it accepts connections.
    pub fn start(&mut self) {
        let dir = self.dir.display().to_string();
        self.start_with_socket_in(&dir);
    }

    /// Starts Postgres where no server of the campaign finds it.
    pub fn start_hidden(&mut self) {
        let dir = self.dir.join("hidden");
        let _ = fs::create_dir(&dir);
        give_to_postgres(&dir);
        self.start_with_socket_in(&dir.display().to_string());
    }

    fn start_with_socket_in(&mut self, socket_dir: &str) {
        let log = File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut command = postgres_command(Path::new("env"));
        command.args(self.clock.variables().map(|(name, value)| format!("{name}={value}")));
        // libfaketime reads the offset again once a second.
        command.arg("FAKETIME_CACHE_DURATION=1").arg(newest_postgres().join("postgres"));
        command.args(["-D", &self.data(), "-k", socket_dir]);
        let connections = MAX_CONNECTIONS.to_string();
        for (name, value) in SETTINGS.into_iter().chain([("max_connections", connections.as_str())]) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let (out, err) = (log.try_clone().unwrap(), log);
        command.current_dir(&self.dir).stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        self.child = Some(command.spawn().unwrap());
    }

    /// Stops Postgres by a fast shutdown: a standby has all commits then.
    pub async fn stop(&mut self) {
        send_signal("INT", &self.postmaster()).await;
        self.reap().await;
    }

    /// Sends SIGKILL to the postmaster and its children; returns once none of them runs.
    pub async fn kill(&mut self) {
        let (pid, children) = (self.postmaster(), self.children());
        send_signal("KILL", &pid).await;
        signal_those_that_run("KILL", &children).await;
        self.reap().await;
        within(TIMEOUT, "the killed Postgres to exit", async {
            while children.iter().any(|child| is_running(child)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Stops the postmaster and its children from running until [`Self::wake`].
    pub async fn freeze(&self) {
        // First the postmaster, which then starts no further process.
        send_signal("STOP", &self.postmaster()).await;
        signal_those_that_run("STOP", &self.children()).await;
    }

    pub async fn wake(&self) {
        signal_those_that_run("CONT", &self.children()).await;
        send_signal("CONT", &self.postmaster()).await;
    }

    async fn reap(&mut self) {
        let mut child = self.child.take().expect("Postgres was started");
        within(TIMEOUT, "Postgres to exit", child.wait()).await.unwrap();
    }

    /// Whether the postmaster runs.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    fn postmaster(&self) -> String {
        self.child.as_ref().and_then(Child::id).expect("Postgres runs").to_string()
    }

    fn children(&self) -> Vec<String> {
        let pid = self.postmaster();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        children.split_whitespace().map(str::to_owned).collect()
    }

    /// Connects directly, not through a proxy.
    pub async fn try_connect(&self) -> Result<Client, tokio_postgres::Error> {
        connect(&self.url("milepost")).await
    }

    pub async fn connect(&self) -> Client {
        self.try_connect().await.unwrap()
    }

    /// Connects to the database that initdb makes.
    pub async fn connect_to_postgres(&self) -> Client {
        connect(&self.url("postgres")).await.unwrap()
    }

    /// Connects to a node that was started hidden.
    pub async fn try_connect_hidden(&self) -> Result<Client, tokio_postgres::Error> {
        connect(&self.hidden_url()).await
    }

    pub fn hidden_url(&self) -> String {
        url(&[&self.dir.join("hidden")], "milepost")
    }

    pub fn url(&self, database: &str) -> String {
        url(&[&self.dir], database)
    }

    /// The directory of the socket.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn data(&self) -> String {
        self.dir.join("data").display().to_string()
    }

    /// Runs a program of Postgres to its end.
    async fn run(&self, program: &str, arguments: &[&str]) {
        let output = postgres_command(&newest_postgres().join(program))
            .args(arguments)
            .current_dir(&self.dir)
            .output()
            .await;
        let output = output.unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The URL of a database by the directories of sockets.
pub fn url(socket_dirs: &[&Path], database: &str) -> String {
    let hosts =
        socket_dirs.iter().map(|dir| format!("{}:5432", dir.display().to_string().replace('/', "%2F")));
    format!("postgresql://milepost@{}/{database}", hosts.collect::<Vec<_>>().join(","))
}

async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    // Calls of the client report the connection's error.
    tokio::spawn(connection);
    Ok(client)
}

/// Sends a signal to those of the processes that run.
async fn signal_those_that_run(name: &str, pids: &[String]) {
    // A process that has exited already makes `kill` fail, after it has signalled the others.
    let _ = Command::new("kill").args(["-s", name]).args(pids).output().await;
}
