//! The embedded Postgres: for a first try, for small installations and for tests. It
//! is durable, keeps its data in one directory and listens on a Unix socket only.
//!
//! # One Postgres on a cluster
//!
//! The process that serves the data directory holds its lock, and is the parent of its
//! Postgres: it learns of the end of Postgres by waiting for it. A Postgres that an ended
//! milepost left behind is stopped at the next start, never used. Postgres inherits the
//! lock `postgres.lock`, and so do its child processes, so that this lock is free only if
//! no process of that Postgres is left. Before a start, while milepost holds it:
//!
//! | the lock file of Postgres names | then |
//! |---|---|
//! | a Postgres that works on this cluster | it is stopped; the lock file stays |
//! | no process, or one that milepost cannot tell | Postgres decides |
//! | a zombie or another process | the lock file is removed |
//!
//! # Who may connect
//!
//! Postgres asks the kernel for the user at the other end of the socket (`peer`). Those
//! who may be milepost's role are root, the user that milepost runs as, and the user that
//! Postgres runs as, unless it is `nobody`.

mod binaries;
mod data_dir;
mod locks;

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Seek as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Output},
    time::{Duration, Instant},
};

use diesel_async::SimpleAsyncConnection as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{process::Child, sync::Mutex, time::timeout};

pub(super) use self::binaries::OLDEST_MAJOR;
pub use self::locks::Served;
use self::{
    binaries::{Binaries, Owner, command, command_error, command_failed},
    data_dir::{DataDir, private_dir},
    locks::{Holder, LockFile},
};
use super::connect::establish;

/// Name of milepost's role and of its database.
const NAME: &str = "milepost";
/// Longest that Postgres may take to start, which includes crash recovery.
const START_TIMEOUT_S: u64 = 300;
/// Longest that Postgres may take to stop.
const STOP_TIMEOUT_S: u64 = 60;
/// Size of the log, in bytes, from which a start renames it and begins a new one.
const LOG_BYTES: u64 = 10 * 1024 * 1024;
/// How often a start checks whether Postgres is ready.
const READY_INTERVAL: Duration = Duration::from_millis(50);
/// Pause before a failed start is repeated, and longer than Postgres takes to write a
/// lock file that it has created.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Why the embedded Postgres cannot be used; the text is for the operator.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// No supported Postgres is installed.
    #[error(
        "no Postgres {} or later is installed on this machine: install one (Debian, Ubuntu: apt-get install \
         postgresql; macOS: brew install postgresql) or set DATABASE_URL",
        OLDEST_MAJOR
    )]
    NotInstalled,
    /// The data needs a major version that is not installed.
    #[error(
        "the data directory was created by Postgres {0}, which is not installed on this machine: install it"
    )]
    OtherVersion(u32),
    /// Another process serves the data directory.
    #[error("another milepost serves the data directory {}{}", .dir.display(),
        .address.map(|address| format!(", on {address}")).unwrap_or_default())]
    Served {
        dir: PathBuf,
        /// The address of that server, if it has announced one.
        address: Option<SocketAddr>,
    },
    /// The data is in use although no Postgres is seen that could be stopped.
    #[error(
        "processes of an ended Postgres, or a Postgres in another container, still use {}: end them", .0.display()
    )]
    InUse(PathBuf),
    /// There is no unprivileged user to run Postgres as.
    #[error(
        "Postgres refuses to run as root, and this machine has neither a user postgres nor a user nobody: \
         create one of them"
    )]
    NoUser,
    /// The user that Postgres runs as may not enter an ancestor of the data.
    #[error(
        "user {uid}, which Postgres runs as, may not enter {}: allow it (chmod o+x) or choose another data \
         directory with --data-dir", .dir.display()
    )]
    Inaccessible {
        /// The topmost directory that the user may not enter.
        dir: PathBuf,
        uid: u32,
    },
    /// There is no default data directory.
    #[error("HOME is not set, so there is no default data directory: set one with --data-dir")]
    NoHome,
    /// A directory has another owner, or is accessible to other users.
    #[error(
        "{} must be a directory of the user that Postgres runs as, without access for others: correct its \
         owner and mode (0700), or choose another data directory with --data-dir", .0.display()
    )]
    NotPrivate(PathBuf),
    /// A command of Postgres failed.
    #[error("{command} failed: {message}")]
    Command {
        command: &'static str,
        /// Its stderr on one line, or its exit status.
        message: String,
    },
    /// Postgres runs and does not accept a connection or a command.
    #[error("the embedded Postgres does not answer: {0}")]
    NoAnswer(String),
    /// An operation of the file system failed.
    #[error("{failure}: {source}")]
    Io {
        /// The operation and its path.
        failure: String,
        source: io::Error,
    },
}

/// Maps errors of an operation on this path.
fn io_error(operation: &str, path: &Path) -> impl Fn(io::Error) -> EmbeddedError + Copy {
    move |source| EmbeddedError::Io { failure: format!("{operation} {}", path.display()), source }
}

/// Settings of an embedded Postgres.
#[derive(Clone, Debug)]
pub struct EmbeddedSettings {
    /// The directory of all its files. If this process is root, the user that Postgres
    /// runs as must be able to enter it.
    pub data_dir: PathBuf,
    /// Settings of Postgres, which override milepost's.
    pub extra_options: Vec<(String, String)>,
}

impl EmbeddedSettings {
    /// Settings without extra options.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self { data_dir: data_dir.into(), extra_options: Vec::new() }
    }
}

/// `/var/lib/milepost` for root, for others `milepost` in `$XDG_DATA_HOME` or
/// `~/.local/share`. An error if neither XDG_DATA_HOME nor HOME is set.
pub async fn default_data_dir() -> Result<PathBuf, EmbeddedError> {
    if binaries::is_root().await? {
        return Ok(PathBuf::from("/var/lib/milepost"));
    }
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("XDG_DATA_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".local/share")))
        .map(|share| share.join("milepost"))
        .ok_or(EmbeddedError::NoHome)
}

/// A running Postgres, and the lock of its data directory. Dropping it leaves
/// Postgres running; the next start stops that one first.
#[derive(Debug)]
pub struct Embedded {
    dir: DataDir,
    lock: File,
    binaries: Binaries,
    owner: Option<Owner>,
    socket_dir: PathBuf,
    options: Vec<(String, String)>,
    postmaster: Mutex<Option<Child>>,
}

/// An argument of a command: text or a path.
type Argument<'a> = &'a (dyn AsRef<OsStr> + Sync);

impl Embedded {
    /// Starts Postgres in the data directory; creates the cluster and milepost's database
    /// if they are missing.
    pub async fn start(settings: EmbeddedSettings) -> Result<Self, EmbeddedError> {
        let dir = DataDir::open(&settings.data_dir)?;
        let lock = dir.lock().await?;
        let binaries = Binaries::find(dir.data_version()).await?;
        let owner = binaries::owner(&dir.cluster()).await?;
        private_dir(&dir.cluster(), owner)?;
        let socket_dir = dir.socket_dir(owner.is_some());
        let (options, postmaster) = (settings.extra_options, Mutex::default());
        let embedded = Self { dir, lock, binaries, owner, socket_dir, options, postmaster };
        if embedded.dir.data_version().is_none() {
            embedded.create_cluster().await?;
        }
        embedded.stop_left_behind().await?;
        embedded.start_postgres().await?;
        embedded.create_database().await?;
        Ok(embedded)
    }

    /// The URL of a database of this Postgres.
    pub fn url(&self, database: &str) -> String {
        socket_url(&self.socket_dir, database)
    }

    /// The URL of milepost's database.
    pub fn database_url(&self) -> String {
        self.url(NAME)
    }

    /// The URL of milepost's database in a data directory that another process serves.
    /// An error if its Postgres does not run yet.
    pub fn url_of_served(data_dir: &Path) -> Result<String, EmbeddedError> {
        let content = locks::read(&DataDir::open(data_dir)?.pid_file())?;
        let socket_dir = content.and_then(|content| LockFile::parse(&content)?.socket_dir);
        let starting = || EmbeddedError::NoAnswer("it is starting: try again".to_owned());
        Ok(socket_url(&socket_dir.ok_or_else(starting)?, NAME))
    }

    /// Writes the server's address into the data directory, for [`Served::of`].
    pub fn announce(&self, address: SocketAddr) -> Result<(), EmbeddedError> {
        let mut lock = &self.lock;
        let mut write = || {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{address}")
        };
        write().map_err(io_error("cannot write", &self.dir.lock_path()))
    }

    /// Restarts Postgres whenever its process has ended; never returns.
    pub async fn keep_running(&self) {
        loop {
            let status = self.ended().await;
            match self.start_postgres().await {
                Ok(()) => {
                    let status = status.map(tracing::field::display);
                    tracing::warn!(status, "the embedded Postgres had ended and was restarted");
                }
                Err(error) => {
                    tracing::error!(%error, "the embedded Postgres has ended and cannot be restarted");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    /// Waits for the end of Postgres, which also frees its process id. Returns at once if
    /// it does not run.
    async fn ended(&self) -> Option<ExitStatus> {
        self.postmaster.lock().await.as_mut()?.wait().await.ok()
    }

    /// Stops Postgres in fast mode: open transactions are rolled back, committed ones
    /// are on disk. Not to be called while [`Self::keep_running`] runs,
    /// which would restart it.
    pub async fn stop(&self) -> Result<(), EmbeddedError> {
        let mut postmaster = self.postmaster.lock().await;
        let Some(child) = postmaster.as_mut() else { return Ok(()) };
        let failed = |source| EmbeddedError::Io { failure: "cannot stop Postgres".to_owned(), source };
        // A child has an id until its end was waited for, so that the id is still its own.
        let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
        let Some(pid) = pid else { return Ok(()) };
        kill_process(pid, Signal::INT).map_err(|error| failed(error.into()))?;
        match timeout(Duration::from_secs(STOP_TIMEOUT_S), child.wait()).await {
            Ok(ended) => ended.map(drop).map_err(failed),
            Err(_) => Err(EmbeddedError::Command {
                command: "postgres",
                message: format!("it did not stop within {STOP_TIMEOUT_S} s"),
            }),
        }
    }

    /// Stops the Postgres that an ended milepost left running, or that somebody else
    /// started on the cluster.
    async fn stop_left_behind(&self) -> Result<(), EmbeddedError> {
        if !self.is_left_behind().await? {
            return Ok(());
        }
        tracing::info!(dir = %self.dir.path.display(), "stopping the Postgres that still runs");
        let (data, timeout) = (self.dir.data(), STOP_TIMEOUT_S.to_string());
        let output =
            self.run("pg_ctl", &[&"stop", &"-D", &data, &"-m", &"fast", &"-w", &"-t", &timeout]).await?;
        if output.status.success() { Ok(()) } else { Err(command_error("pg_ctl stop", &output)) }
    }

    async fn is_left_behind(&self) -> Result<bool, EmbeddedError> {
        let data = self.dir.data();
        let Some(content) = locks::read(&self.dir.pid_file())? else { return Ok(false) };
        if locks::can_see_processes() {
            let Some(lock) = LockFile::parse(&content) else { return Ok(false) };
            return Ok(locks::holder(lock.pid, &data, self.owner).await == Holder::Postgres);
        }
        let output = self.run("pg_ctl", &[&"status", &"-D", &data]).await?;
        Ok(output.status.success())
    }

    /// Runs a binary to its end, as the owner of the cluster and in its directory.
    async fn run(&self, name: &str, arguments: &[Argument<'_>]) -> Result<Output, EmbeddedError> {
        let dir = self.dir.cluster();
        let output = command(self.binaries.dir.join(name), self.owner, &dir).args(arguments).output().await;
        output.map_err(|source| command_failed(name, self.owner, &dir, source))
    }

    /// Runs initdb in a temporary directory and renames the result, so that the result
    /// of an interrupted run is never used.
    async fn create_cluster(&self) -> Result<(), EmbeddedError> {
        let (unfinished, data) = (self.dir.unfinished_data(), self.dir.data());
        let failed = io_error("cannot create", &data);
        let mut last_error = None;
        // Some systems lack C.UTF-8; under C, only ASCII letters have upper and lower case.
        for locale in ["C.UTF-8", "C"] {
            if unfinished.exists() {
                fs::remove_dir_all(&unfinished).map_err(failed)?;
            }
            let (username, locale) = (format!("--username={NAME}"), format!("--locale={locale}"));
            let mut arguments: Vec<Argument> = vec![
                &"--pgdata=data.new",
                &username,
                &"--auth-local=reject",
                &"--auth-host=reject",
                &"--encoding=UTF8",
                &locale,
                &"--data-checksums",
            ];
            if self.options.iter().any(|(name, value)| name == "fsync" && value == "off") {
                arguments.push(&"--no-sync");
            }
            let output = self.run("initdb", &arguments).await?;
            if output.status.success() {
                fs::rename(&unfinished, &data).map_err(failed)?;
                return File::open(self.dir.cluster()).and_then(|dir| dir.sync_all()).map_err(failed);
            }
            last_error = Some(command_error("initdb", &output));
        }
        Err(last_error.unwrap_or(EmbeddedError::NotInstalled))
    }

    async fn start_postgres(&self) -> Result<(), EmbeddedError> {
        private_dir(&self.socket_dir, self.owner)?;
        let postgres_lock = self.dir.lock_postgres().await?;
        self.remove_stale_lock_files().await?;
        self.write_authentication().await?;
        self.rotate_log()?;
        let mut postmaster = self.postmaster.lock().await;
        let child = postmaster.insert(self.spawn(postgres_lock)?);
        self.wait_until_ready(child).await
    }

    /// Removes lock files that Postgres would respect although the process that made them
    /// has ended. Called with the lock that every Postgres of milepost inherits.
    async fn remove_stale_lock_files(&self) -> Result<(), EmbeddedError> {
        if !locks::can_see_processes() {
            return Ok(());
        }
        let (pid_file, socket_file) = (self.dir.pid_file(), self.socket_dir.join(".s.PGSQL.5432.lock"));
        for (path, cluster) in [(pid_file, Some(self.dir.data())), (socket_file, None)] {
            let Some(content) = locks::read(&path)? else { continue };
            let stale = match LockFile::parse(&content) {
                Some(LockFile { pid, data, .. }) => {
                    locks::holder(pid, &cluster.unwrap_or(data), self.owner).await == Holder::Other
                }
                // Left by a crash, or just being written.
                None => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                    locks::read(&path)?.as_ref() == Some(&content)
                }
            };
            if stale {
                tracing::warn!(file = %path.display(), "removing the lock file of a Postgres that has ended");
                fs::remove_file(&path).map_err(io_error("cannot remove", &path))?;
            }
        }
        Ok(())
    }

    /// Writes who may connect. Whatever is not allowed is refused.
    async fn write_authentication(&self) -> Result<(), EmbeddedError> {
        let head = "# milepost writes this file whenever it starts Postgres.\n";
        let rules = ["all", "replication"].map(|what| format!("local {what} {NAME} peer map={NAME}\n"));
        let users = binaries::users(self.owner).await?;
        let users: Vec<String> = users.iter().map(|user| format!("{NAME} \"{user}\" {NAME}\n")).collect();
        self.dir.write(&self.dir.hba(), &format!("{head}{}", rules.concat()))?;
        self.dir.write(&self.dir.ident(), &format!("{head}{}", users.concat()))
    }

    fn rotate_log(&self) -> Result<(), EmbeddedError> {
        let log = self.dir.log();
        if fs::metadata(&log).is_ok_and(|metadata| metadata.len() > LOG_BYTES) {
            fs::rename(&log, log.with_extension("log.1")).map_err(io_error("cannot move", &log))?;
        }
        Ok(())
    }

    fn spawn(&self, postgres_lock: File) -> Result<Child, EmbeddedError> {
        let dir = self.dir.cluster();
        let mut command = command("sh", self.owner, &dir);
        // The owner opens the log: root must not open a file in a directory of another user,
        // who could replace it by a link.
        command.args(["-c", r#"umask 077; exec "$@" >>"$0" 2>&1"#]).arg(self.dir.log());
        command.arg(self.binaries.dir.join("postgres")).arg("-D").arg(self.dir.data());
        for (name, value) in self.server_options() {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        // In a process group of its own, Postgres does not get the SIGINT of Ctrl-C.
        let spawned = command.stdin(postgres_lock).process_group(0).spawn();
        spawned.map_err(|source| command_failed("postgres", self.owner, &dir, source))
    }

    /// Waits until Postgres accepts connections. An error if it ends before.
    async fn wait_until_ready(&self, child: &mut Child) -> Result<(), EmbeddedError> {
        let give_up_at = Instant::now() + Duration::from_secs(START_TIMEOUT_S);
        let failed = |message| EmbeddedError::Command { command: "postgres", message };
        loop {
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => {
                    return Err(failed(last_line(&self.dir.log()).unwrap_or_else(|| status.to_string())));
                }
                Err(source) => {
                    let failure = "cannot wait for Postgres".to_owned();
                    return Err(EmbeddedError::Io { failure, source });
                }
            }
            let content = locks::read(&self.dir.pid_file())?;
            let lock = content.and_then(|content| LockFile::parse(&content));
            if lock.is_some_and(|lock| lock.ready && Some(lock.pid) == child.id()) {
                return Ok(());
            }
            if Instant::now() > give_up_at {
                return Err(failed(format!("it did not accept connections within {START_TIMEOUT_S} s")));
            }
            tokio::time::sleep(READY_INTERVAL).await;
        }
    }

    /// The settings of the server: milepost's, then those that override them.
    fn server_options(&self) -> Vec<(String, String)> {
        // The setting is a list: quotes keep a comma in the path from separating items.
        let socket_dir = format!("\"{}\"", self.socket_dir.display().to_string().replace('"', "\"\""));
        let defaults = [
            ("listen_addresses", String::new()),
            ("port", "5432".to_owned()),
            ("unix_socket_directories", socket_dir),
            ("unix_socket_permissions", "0700".to_owned()),
            ("hba_file", self.dir.hba().display().to_string()),
            ("ident_file", self.dir.ident().display().to_string()),
            ("fsync", "on".to_owned()),
            ("full_page_writes", "on".to_owned()),
            ("synchronous_commit", "on".to_owned()),
            // Unique violations are expected and would fill the log as errors.
            ("log_min_messages", "log".to_owned()),
        ];
        let defaults = defaults.map(|(name, value)| (name.to_owned(), value));
        defaults.into_iter().chain(self.options.iter().cloned()).collect()
    }

    /// Creates milepost's database if it is missing.
    async fn create_database(&self) -> Result<(), EmbeddedError> {
        let connecting = establish(&self.url("postgres"), None, "").await;
        let mut connection = connecting.map_err(|error| EmbeddedError::NoAnswer(error.to_string()))?;
        match connection.batch_execute(&format!("CREATE DATABASE {NAME}")).await {
            Ok(()) => Ok(()),
            Err(error) if error.to_string().contains("already exists") => Ok(()),
            Err(error) => Err(EmbeddedError::NoAnswer(error.to_string())),
        }
    }
}

fn socket_url(socket_dir: &Path, database: &str) -> String {
    let unreserved = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
    let path = socket_dir.as_os_str().as_encoded_bytes().iter();
    let encoded: String = path
        .map(|byte| if unreserved(byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") })
        .collect();
    format!("postgresql://{NAME}@{encoded}/{database}")
}

/// The last line of a log, looked for in its last 4 KiB.
fn last_line(path: &Path) -> Option<String> {
    let text = fs::read(path).ok()?;
    let tail = text.get(text.len().saturating_sub(4096)..)?;
    String::from_utf8_lossy(tail).lines().last().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_quote_special_characters_of_paths() {
        assert_eq!(
            socket_url(Path::new("/tmp/a b/ü"), "x"),
            "postgresql://milepost@%2Ftmp%2Fa%20b%2F%C3%BC/x"
        );
    }
}
