//! One server of Postgres in a process of its own, which can be killed, frozen, and
//! copied to a standby.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::process::Child;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::{
    TIMEOUT,
    installed::{give_to_postgres, make_postgres_dir, newest_postgres, postgres_command, succeed},
    processes::{self, Signal, signal, signal_those_that_run},
    until, within_timeout,
};

/// A data directory, and the Postgres that runs on it or does not.
pub struct Node {
    /// Has the data and, while it runs, the socket.
    dir: PathBuf,
    settings: Vec<(&'static str, String)>,
    environment: Vec<(&'static str, String)>,
    child: Option<Child>,
}

impl Node {
    /// A node that will run with these settings and environment variables, in a directory
    /// that a watchdog guards.
    pub fn new(
        dir: PathBuf,
        settings: Vec<(&'static str, String)>,
        environment: Vec<(&'static str, String)>,
    ) -> Self {
        Self { dir, settings, environment, child: None }
    }

    /// Empties the directory.
    fn clear(&self) {
        let _ = fs::remove_dir_all(&self.dir);
        make_postgres_dir(&self.dir);
    }

    /// Makes an empty cluster.
    pub async fn create(&self) {
        self.clear();
        let arguments = ["--auth=trust", "--username=milepost", "--encoding=UTF8", "--locale=C.UTF-8"];
        self.make_data("initdb", &arguments).await;
    }

    /// Copies the data of a primary, to be its standby.
    pub async fn copy(&self, primary: &Self) {
        self.clear();
        let host = primary.dir.display().to_string();
        let arguments = ["--write-recovery-conf", "--checkpoint=fast", "-U", "milepost", "-h", &host];
        self.make_data("pg_basebackup", &arguments).await;
    }

    /// Runs a program of Postgres that makes the data directory.
    async fn make_data(&self, program: &str, arguments: &[&str]) {
        let mut command = postgres_command(newest_postgres().join(program));
        command.args(arguments).args(["--no-sync", "-D"]).arg(self.data()).current_dir(&self.dir);
        succeed(&mut command).await;
    }

    /// Has this node, whose data is that of a former primary, start as a standby.
    pub fn follow(&self, primary: &Self) {
        let data = self.data();
        let settings = data.join("postgresql.auto.conf");
        let former = fs::read_to_string(&settings).unwrap();
        fs::write(settings, format!("{former}primary_conninfo = '{}'\n", primary.conninfo())).unwrap();
        let signal = data.join("standby.signal");
        fs::write(&signal, "").unwrap();
        give_to_postgres(&signal);
    }

    /// What a standby of this node connects by.
    pub fn conninfo(&self) -> String {
        format!("host={} user=milepost", self.dir.display())
    }

    /// Starts Postgres; does not wait until it accepts connections.
    pub fn start(&mut self) {
        self.start_with_socket_in(&self.dir.clone());
    }

    /// Starts Postgres with its socket where nobody looks for it.
    pub fn start_hidden(&mut self) {
        let dir = self.hidden_dir();
        let _ = fs::create_dir(&dir);
        give_to_postgres(&dir);
        self.start_with_socket_in(&dir);
    }

    fn start_with_socket_in(&mut self, socket_dir: &Path) {
        let log = File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        // The program that changes to the user of Postgres must not have the variables.
        let mut command = postgres_command("env");
        command.args(self.environment.iter().map(|(name, value)| format!("{name}={value}")));
        command.arg(newest_postgres().join("postgres")).arg("-D").arg(self.data()).arg("-k").arg(socket_dir);
        for (name, value) in &self.settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.current_dir(&self.dir).process_group(0);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    /// Returns once Postgres executes a query.
    pub async fn wait_until_ready(&self) {
        let url = self.url("postgres");
        let is_ready = async || match connect(&url).await {
            Ok(client) => client.simple_query("SELECT 1").await.is_ok(),
            Err(_) => false,
        };
        until(TIMEOUT, "Postgres to execute a query", is_ready).await;
    }

    /// Stops Postgres by a fast shutdown: a standby has all commits then.
    pub async fn stop(&mut self) {
        signal(self.postmaster(), Signal::INT);
        self.reap().await;
    }

    /// Sends SIGKILL to the postmaster and its children; returns once none of them runs.
    pub async fn kill(&mut self) {
        let (postmaster, children) = (self.postmaster(), self.children());
        signal(postmaster, Signal::KILL);
        signal_those_that_run(&children, Signal::KILL);
        self.reap().await;
        let ended = async || !children.iter().any(|child| processes::runs(*child));
        until(TIMEOUT, "the killed Postgres to exit", ended).await;
    }

    /// Stops the postmaster and its children from running until [`Self::wake`].
    pub fn freeze(&self) {
        // First the postmaster, which then starts no further process.
        signal(self.postmaster(), Signal::STOP);
        signal_those_that_run(&self.children(), Signal::STOP);
    }

    pub fn wake(&self) {
        signal_those_that_run(&self.children(), Signal::CONT);
        signal(self.postmaster(), Signal::CONT);
    }

    async fn reap(&mut self) {
        let mut child = self.child.take().expect("Postgres was started");
        within_timeout("Postgres to exit", child.wait()).await.unwrap();
    }

    /// Whether the postmaster runs.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    fn postmaster(&self) -> u32 {
        self.child.as_ref().and_then(Child::id).expect("Postgres runs")
    }

    fn children(&self) -> Vec<u32> {
        processes::children(self.postmaster())
    }

    /// Connects directly, not through a proxy.
    pub async fn connect(&self) -> Client {
        connect(&self.url("milepost")).await.unwrap()
    }

    pub fn url(&self, database: &str) -> String {
        url(&[&self.dir], database)
    }

    /// The URL of a node that was started hidden.
    pub fn hidden_url(&self) -> String {
        url(&[&self.hidden_dir()], "milepost")
    }

    /// The directory of the socket.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn hidden_dir(&self) -> PathBuf {
        self.dir.join("hidden")
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }
}

/// The URL of a database by the directories of sockets.
pub fn url(socket_dirs: &[&Path], database: &str) -> String {
    let hosts =
        socket_dirs.iter().map(|dir| format!("{}:5432", dir.display().to_string().replace('/', "%2F")));
    format!("postgresql://milepost@{}/{database}", hosts.collect::<Vec<_>>().join(","))
}

pub async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    // Calls of the client report the connection's error.
    tokio::spawn(connection);
    Ok(client)
}

/// Changes a setting of a whole server.
pub async fn set(client: &Client, name: &str, value: &str) {
    client.batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'")).await.unwrap();
    client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
}

/// The first column of each row.
pub async fn texts(client: &Client, sql: &str) -> Vec<String> {
    first_column(client.simple_query(sql).await.unwrap())
}

/// As [`texts`]; nothing if the query fails.
pub(crate) async fn try_texts(client: &Client, sql: &str) -> Vec<String> {
    client.simple_query(sql).await.map(first_column).unwrap_or_default()
}

fn first_column(messages: Vec<SimpleQueryMessage>) -> Vec<String> {
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}
