//! A replica: the milepost binary in a process of its own, with a clock that the fault
//! injector can move.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::{
    clock::Clock,
    context::{send_signal, within},
    memory,
    port::own_address,
    temporary::TemporaryDir,
};

/// Few, so that a slow database uses the server's whole pool up.
const DATABASE_CONNECTIONS: &str = "4";
/// How many lines of its log a failure message quotes.
const LOG_TAIL_LINES: usize = 10;

pub struct Replica {
    pub address: SocketAddr,
    database_url: String,
    log: PathBuf,
    clock: Option<Clock>,
    child: Child,
    /// The most memory of each process that has ended, in bytes.
    ended_peaks: Vec<u64>,
}

impl Replica {
    pub async fn start(
        name: &str,
        database_url: String,
        dir: &mut TemporaryDir,
        clock: Option<Clock>,
    ) -> Self {
        let address = own_address("127.0.0.1");
        let log = dir.path().join(format!("{name}.log"));
        let child = serve(address, &database_url, &log, clock.as_ref(), dir);
        let mut replica = Self { address, database_url, log, clock, child, ended_peaks: Vec::new() };
        replica.wait_until_listening().await;
        replica
    }

    /// Starts a new process at the same address. Does not wait until it listens.
    pub fn start_again(&mut self, dir: &mut TemporaryDir) {
        self.child = serve(self.address, &self.database_url, &self.log, self.clock.as_ref(), dir);
    }

    /// Waits for the server's first line on stdout, which says that it listens.
    pub async fn wait_until_listening(&mut self) {
        let mut lines = BufReader::new(self.child.stdout.take().unwrap()).lines();
        let line = within(Duration::from_secs(120), "a server to listen", lines.next_line()).await.unwrap();
        let log = || fs::read_to_string(&self.log).unwrap();
        assert!(
            line.is_some(),
            "the server at {} ended before it listened; its log:\n{}",
            self.address,
            log()
        );
    }

    /// Sends SIGKILL and waits for the exit.
    pub async fn kill(&mut self) {
        self.ended_peaks.push(self.memory_peak());
        self.child.kill().await.unwrap();
    }

    /// Sends SIGTERM and waits for the exit.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.ended_peaks.push(self.memory_peak());
        self.send_signal("TERM").await;
        within(Duration::from_secs(120), "a server to exit after SIGTERM", self.child.wait()).await.unwrap()
    }

    /// The most memory of each process so far, in bytes.
    pub fn memory_peaks(&self) -> Vec<u64> {
        let mut peaks = self.ended_peaks.clone();
        peaks.push(self.memory_peak());
        peaks
    }

    fn memory_peak(&self) -> u64 {
        memory::peak_bytes(self.child.id().expect("the server runs"))
    }

    /// The last warnings and errors of the server's log.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap();
        let is_info = |line: &&str| line.contains(r#""level":"INFO""#);
        let lines: Vec<&str> = log.lines().filter(|line| !is_info(line)).collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }

    /// The errors in the server's log, which tell of a fault of milepost or of lost commits.
    pub fn logged_errors(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap();
        log.lines().filter(|line| line.contains(r#""level":"ERROR""#)).map(str::to_owned).collect()
    }

    /// Sends STOP or CONT.
    pub async fn send_signal(&self, name: &str) {
        send_signal(name, &self.child.id().expect("the server runs").to_string()).await;
    }

    /// Sets by how many seconds this server's clock is ahead of the real one.
    pub fn move_clock(&self, seconds: i64) {
        self.clock.as_ref().expect("this replica has a clock of its own").set(seconds);
    }
}

fn serve(
    address: SocketAddr,
    database_url: &str,
    log: &Path,
    clock: Option<&Clock>,
    dir: &mut TemporaryDir,
) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
    command
        .arg("serve")
        .env("DATABASE_URL", database_url)
        .env("MILEPOST_LISTEN", address.to_string())
        .env("MILEPOST_BCRYPT_COST", "4")
        .env("MILEPOST_DATABASE_CONNECTIONS", DATABASE_CONNECTIONS)
        .envs(memory::settings().map(|(name, value)| (name, value.to_string())))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::options().create(true).append(true).open(log).unwrap())
        .kill_on_drop(true);
    if let Some(clock) = clock {
        // It reads the offset again once a second.
        command.envs(clock.variables()).env("FAKETIME_CACHE_DURATION", "1");
    }
    let child = command.spawn().unwrap();
    dir.guard(child.id().expect("the server runs"));
    child
}
