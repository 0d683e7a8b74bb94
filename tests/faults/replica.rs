//! A server: the binary in a process of its own, and the clock that it sees.

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
    port::own_address,
    temporary::TemporaryDir,
    world::{signal, within},
};

/// Few, so that they are used up when the database is slow.
const DATABASE_CONNECTIONS: &str = "4";
/// Lines of its log that are told of a server that does not recover.
const LAST_LINES: usize = 30;

pub struct Replica {
    pub address: SocketAddr,
    database_url: String,
    log: PathBuf,
    clock: Option<Clock>,
    child: Child,
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
        let mut replica = Self { address, database_url, log, clock, child };
        replica.listens().await;
        replica
    }

    /// Starts again where the last one ended; it may not listen yet.
    pub fn start_again(&mut self, dir: &mut TemporaryDir) {
        self.child = serve(self.address, &self.database_url, &self.log, self.clock.as_ref(), dir);
    }

    /// Waits until it says that it listens.
    pub async fn listens(&mut self) {
        let mut lines = BufReader::new(self.child.stdout.take().unwrap()).lines();
        let line = within(Duration::from_secs(30), "a server to listen", lines.next_line()).await.unwrap();
        assert!(line.is_some(), "it did not listen:\n{}", fs::read_to_string(&self.log).unwrap());
    }

    /// SIGKILL.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// SIGTERM, and how it ended.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM").await;
        within(Duration::from_secs(30), "a server's exit", self.child.wait()).await.unwrap()
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }

    /// STOP or CONT.
    pub async fn signal(&self, name: &str) {
        signal(name, &self.child.id().expect("it runs").to_string()).await;
    }

    /// Moves the clock that it sees away from everybody else's.
    pub fn move_clock(&self, seconds: i64) {
        self.clock.as_ref().expect("it has a clock of its own").set(seconds);
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
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::options().create(true).append(true).open(log).unwrap())
        .kill_on_drop(true);
    if let Some(clock) = clock {
        clock.apply(&mut command);
    }
    let child = command.spawn().unwrap();
    dir.guard(child.id().expect("it runs"));
    child
}

/// A clock that can be moved while a process looks at it.
pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    pub fn new(dir: &TemporaryDir) -> Self {
        let library = fs::read_dir("/usr/lib").unwrap().flatten();
        let library = library.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
        let library =
            library.chain(["/usr/lib/faketime/libfaketimeMT.so.1".into()]).find(|path| path.exists());
        let Some(library) = library else {
            panic!(
                "a server's clock cannot be moved: install libfaketime (Debian: apt-get install faketime)"
            );
        };
        let clock = Self { library, file: dir.path().join("clock") };
        clock.set(0);
        clock
    }

    fn set(&self, seconds: i64) {
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{seconds:+}\n")).unwrap();
        fs::rename(new, &self.file).unwrap();
    }

    fn apply(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env("FAKETIME_TIMESTAMP_FILE", &self.file)
            .env("FAKETIME_CACHE_DURATION", "1")
            // Time-outs go by the other clock, which nobody moves.
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }
}
