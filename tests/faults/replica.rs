//! A replica: a server process with a clock that the fault injector can move.

use std::{ops::Deref, process::ExitStatus};

use milepost_testing::{Clock, ServerProcess, processes::Signal};

use crate::memory;

/// How many lines of its log a failure message quotes.
const LOG_TAIL_LINES: usize = 10;

pub struct Replica {
    process: ServerProcess,
    clock: Option<Clock>,
    /// The most memory of each process that has ended, in bytes.
    ended_peaks: Vec<usize>,
}

impl Deref for Replica {
    type Target = ServerProcess;

    fn deref(&self) -> &ServerProcess {
        &self.process
    }
}

impl Replica {
    pub async fn start(database_url: String, clock: Option<Clock>) -> Self {
        let mut settings = vec![
            ("DATABASE_URL", database_url),
            ("MILEPOST_LOG_LEVEL", "info".to_owned()),
            ("MILEPOST_DRAIN_DEADLINE_S", "10".to_owned()),
            // Few, so that a slow database uses the server's whole pool up.
            ("MILEPOST_DATABASE_CONNECTIONS", "4".to_owned()),
        ];
        settings.extend(memory::settings().map(|(name, value)| (name, value.to_string())));
        let clock_settings = clock.iter().flat_map(Clock::variables);
        settings.extend(clock_settings.map(|(name, value)| (name, value.to_owned())));
        let process = ServerProcess::start_with("127.0.0.1", settings).await;
        Self { process, clock, ended_peaks: Vec::new() }
    }

    /// Starts a new process at the same address.
    pub async fn start_again(&mut self) {
        self.process.restart().await;
    }

    /// Sends SIGKILL and waits for the exit.
    pub async fn kill(&mut self) {
        self.ended_peaks.push(self.memory_peak_bytes());
        self.process.kill().await;
    }

    /// Sends SIGTERM and waits for the exit.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.ended_peaks.push(self.memory_peak_bytes());
        self.signal(Signal::TERM);
        self.process.exit().await
    }

    /// The most memory of each process so far, in bytes.
    pub fn memory_peaks(&self) -> Vec<usize> {
        [&self.ended_peaks[..], &[self.memory_peak_bytes()]].concat()
    }

    /// The last warnings and errors of the server's log.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let is_info = |line: &&str| line.contains(r#""level":"INFO""#);
        let lines: Vec<&str> = log.lines().filter(|line| !is_info(line)).collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }

    /// The errors in the server's log, which tell of a fault of milepost or of lost commits.
    pub fn logged_errors(&self) -> Vec<String> {
        let log = self.log();
        log.lines().filter(|line| line.contains(r#""level":"ERROR""#)).map(str::to_owned).collect()
    }

    /// Sets by how many seconds this server's clock is ahead of the real one.
    pub fn move_clock(&self, seconds: i64) {
        self.clock.as_ref().expect("this replica has a clock of its own").set(seconds);
    }
}
