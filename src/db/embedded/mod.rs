//! The embedded Postgres: for a first try, for small installations and for tests. It
//! is durable, keeps its data in one directory and listens on a Unix socket only.

mod binaries;
mod data_dir;

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Seek as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use diesel_async::SimpleAsyncConnection as _;
use tokio::process::Command;

pub(super) use self::binaries::OLDEST_MAJOR;
pub use self::data_dir::Served;
use self::{
    binaries::{Binaries, Owner, command_error},
    data_dir::{DataDir, private_dir},
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
/// How often [`Embedded::keep_running`] checks the process.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

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
    /// Settings of Postgres, which override milepost's; ignored if this Postgres runs
    /// already.
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
/// Postgres running; the next start takes it over.
#[derive(Debug)]
pub struct Embedded {
    dir: DataDir,
    lock: File,
    binaries: Binaries,
    owner: Option<Owner>,
    socket_dir: PathBuf,
    options: Vec<(String, String)>,
}

/// An argument of a command: text or a path.
type Argument<'a> = &'a (dyn AsRef<OsStr> + Sync);

/// The process that the file `postmaster.pid` names.
enum Postmaster {
    /// Postgres does not run.
    Absent,
    /// Postgres does not run, and another process has its id now.
    Reused,
    /// Postgres runs, with its socket in this directory.
    Runs(PathBuf),
}

impl Embedded {
    /// Takes over the Postgres that runs in the data directory, or starts it; creates
    /// the cluster and milepost's database if they are missing.
    pub async fn start(settings: EmbeddedSettings) -> Result<Self, EmbeddedError> {
        let dir = DataDir::open(&settings.data_dir)?;
        let lock = dir.lock().await?;
        let binaries = Binaries::find(dir.data_version()).await?;
        let owner = binaries::owner(&dir.cluster()).await?;
        private_dir(&dir.cluster(), owner)?;
        let socket_dir = dir.socket_dir(owner.is_some());
        let options = settings.extra_options;
        let mut embedded = Self { dir, lock, binaries, owner, socket_dir, options };
        if embedded.dir.data_version().is_none() {
            embedded.create_cluster().await?;
        }
        if let Postmaster::Runs(socket_dir) = embedded.postmaster().await? {
            tracing::info!(dir = %embedded.dir.path.display(), "using the Postgres that already runs");
            embedded.socket_dir = socket_dir;
        } else {
            embedded.start_postgres().await?;
        }
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
        let dir = DataDir::open(data_dir)?;
        let pid_file = dir.data().join("postmaster.pid");
        let text = fs::read_to_string(&pid_file).map_err(io_error("cannot read", &pid_file))?;
        let (_, socket_dir) = parse_pid_file(&text)
            .ok_or_else(|| EmbeddedError::NoAnswer("it is starting: try again".to_owned()))?;
        Ok(socket_url(&socket_dir, NAME))
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
            tokio::time::sleep(CHECK_INTERVAL).await;
            let restarted = match self.postmaster().await {
                Ok(Postmaster::Runs(_)) => continue,
                Ok(Postmaster::Absent | Postmaster::Reused) => self.start_postgres().await,
                Err(error) => Err(error),
            };
            match restarted {
                Ok(()) => tracing::warn!("the embedded Postgres had ended and was restarted"),
                Err(error) => {
                    tracing::error!(%error, "the embedded Postgres has ended and cannot be restarted")
                }
            }
        }
    }

    /// Stops Postgres in fast mode: open transactions are rolled back, committed ones
    /// are on disk.
    pub async fn stop(&self) -> Result<(), EmbeddedError> {
        let (data, timeout) = (self.dir.data(), STOP_TIMEOUT_S.to_string());
        let output =
            self.run("pg_ctl", &[&"stop", &"-D", &data, &"-m", &"fast", &"-w", &"-t", &timeout]).await?;
        if output.status.success() { Ok(()) } else { Err(command_error("pg_ctl stop", &output)) }
    }

    /// Runs a binary to its end, as the owner of the cluster and in its directory. The
    /// environment is cleared, so that variables such as PGDATA cannot change what the
    /// binary does.
    async fn run(&self, name: &str, arguments: &[Argument<'_>]) -> Result<Output, EmbeddedError> {
        let dir = self.dir.cluster();
        let mut command = Command::new(self.binaries.dir.join(name));
        command.args(arguments).current_dir(&dir).stdin(Stdio::null()).env_clear().env("LC_ALL", "C");
        for kept in ["PATH", "TZ", "LD_LIBRARY_PATH"] {
            if let Some(value) = std::env::var_os(kept) {
                command.env(kept, value);
            }
        }
        if let Some(Owner { uid, gid }) = self.owner {
            command.uid(uid).gid(gid);
        }
        command.output().await.map_err(|source| match self.owner.and_then(|owner| owner.inaccessible(&dir)) {
            Some(error) if source.kind() == io::ErrorKind::PermissionDenied => error,
            _ => EmbeddedError::Io { failure: format!("cannot run {name}"), source },
        })
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
                &"--auth-local=trust",
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
        if let Postmaster::Reused = self.postmaster().await? {
            // Postgres would take the process with this id for a running postmaster.
            let pid_file = self.dir.data().join("postmaster.pid");
            fs::remove_file(&pid_file).map_err(io_error("cannot remove", &pid_file))?;
        }
        let log = self.dir.log();
        if fs::metadata(&log).is_ok_and(|metadata| metadata.len() > LOG_BYTES) {
            fs::rename(&log, log.with_extension("log.1")).map_err(io_error("cannot move", &log))?;
        }
        let (data, timeout, options) = (self.dir.data(), START_TIMEOUT_S.to_string(), self.server_options());
        let give_up_at = Instant::now() + Duration::from_secs(10);
        loop {
            let output = self
                .run(
                    "pg_ctl",
                    &[&"start", &"-D", &data, &"-l", &log, &"-w", &"-s", &"-t", &timeout, &"-o", &options],
                )
                .await?;
            if output.status.success() || matches!(self.postmaster().await?, Postmaster::Runs(_)) {
                return Ok(());
            }
            // A start fails for a moment while children of a killed Postgres still use
            // its shared memory.
            if Instant::now() > give_up_at {
                return Err(last_line(&log).map_or_else(
                    || command_error("pg_ctl start", &output),
                    |message| EmbeddedError::Command { command: "pg_ctl start", message },
                ));
            }
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }

    /// The `-c` options of the server, quoted for the shell that pg_ctl runs.
    fn server_options(&self) -> String {
        // The setting is a list: quotes keep a comma in the path from separating items.
        let socket_dir = format!("\"{}\"", self.socket_dir.display().to_string().replace('"', "\"\""));
        let defaults = [
            ("listen_addresses", ""),
            ("port", "5432"),
            ("unix_socket_directories", socket_dir.as_str()),
            ("unix_socket_permissions", "0700"),
            ("fsync", "on"),
            ("full_page_writes", "on"),
            ("synchronous_commit", "on"),
            // Unique violations are expected and would fill the log as errors.
            ("log_min_messages", "log"),
        ];
        let extra = self.options.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let options = defaults.into_iter().chain(extra);
        let quoted = options.map(|(name, value)| format!("-c {}", shell_quoted(&format!("{name}={value}"))));
        quoted.collect::<Vec<_>>().join(" ")
    }

    async fn postmaster(&self) -> Result<Postmaster, EmbeddedError> {
        let data = self.dir.data();
        let Ok(text) = fs::read_to_string(data.join("postmaster.pid")) else { return Ok(Postmaster::Absent) };
        let Some((pid, socket_dir)) = parse_pid_file(&text) else { return Ok(Postmaster::Absent) };
        if Path::new("/proc/self/cmdline").exists() {
            // Unlike /proc/PID/cwd, cmdline is readable for processes of other users.
            let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { return Ok(Postmaster::Absent) };
            let data_path = data.as_os_str().as_encoded_bytes();
            let runs = command.split(|byte| *byte == 0).any(|argument| argument == data_path);
            return Ok(if runs { Postmaster::Runs(socket_dir) } else { Postmaster::Reused });
        }
        let output = self.run("pg_ctl", &[&"status", &"-D", &data]).await?;
        Ok(if output.status.success() { Postmaster::Runs(socket_dir) } else { Postmaster::Absent })
    }

    /// Waits until Postgres accepts a connection, then creates milepost's database if it
    /// is missing.
    async fn create_database(&self) -> Result<(), EmbeddedError> {
        let give_up_at = Instant::now() + Duration::from_secs(START_TIMEOUT_S);
        let mut connection = loop {
            match establish(&self.url("postgres"), None, "").await {
                Ok(connection) => break connection,
                Err(error) if Instant::now() > give_up_at => {
                    return Err(EmbeddedError::NoAnswer(error.to_string()));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        match connection.batch_execute(&format!("CREATE DATABASE {NAME}")).await {
            Ok(()) => Ok(()),
            Err(error) if error.to_string().contains("already exists") => Ok(()),
            Err(error) => Err(EmbeddedError::NoAnswer(error.to_string())),
        }
    }
}

/// The process id and the socket directory: lines 1 and 5 of `postmaster.pid`.
fn parse_pid_file(text: &str) -> Option<(u32, PathBuf)> {
    let mut lines = text.lines();
    let pid = lines.next()?.trim().parse().ok()?;
    let socket_dir = lines.nth(3)?.trim();
    Some((pid, PathBuf::from(socket_dir)))
}

fn socket_url(socket_dir: &Path, database: &str) -> String {
    let unreserved = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
    let path = socket_dir.as_os_str().as_encoded_bytes().iter();
    let encoded: String = path
        .map(|byte| if unreserved(byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") })
        .collect();
    format!("postgresql://{NAME}@{encoded}/{database}")
}

fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
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
    fn the_pid_file_names_the_process_and_the_socket_directory() {
        let text = "4242\n/d/cluster/data\n1763900000\n5432\n/d/cluster/run\n\n  19 0\nready\n";
        assert_eq!(parse_pid_file(text), Some((4242, PathBuf::from("/d/cluster/run"))));
        assert_eq!(parse_pid_file("4242\n/d/cluster/data\n"), None);
        assert_eq!(parse_pid_file(""), None);
    }

    #[test]
    fn urls_and_options_quote_special_characters_of_paths() {
        assert_eq!(
            socket_url(Path::new("/tmp/a b/ü"), "x"),
            "postgresql://milepost@%2Ftmp%2Fa%20b%2F%C3%BC/x"
        );
        assert_eq!(shell_quoted("a'b c"), r"'a'\''b c'");
    }
}
