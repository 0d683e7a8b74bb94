//! A Postgres of our own: for a newcomer's first run, for small installations
//! and for tests. Durable, its data in one folder, reachable by socket only.

mod binaries;
mod data_dir;

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use diesel_async::SimpleAsyncConnection as _;

pub(super) use self::binaries::OLDEST_MAJOR;
pub use self::data_dir::Served;
use self::{
    binaries::{Binaries, Owner, complaint},
    data_dir::{DataDir, Lock, private_dir},
};
use super::connect::establish;

/// The role and the database that milepost uses there.
const NAME: &str = "milepost";
/// Longest that Postgres may take to start; it may have a crash to recover
/// from.
const START_TIMEOUT_S: u64 = 300;
/// Longest that Postgres may take to stop.
const STOP_TIMEOUT_S: u64 = 60;
/// A log that is larger than this at a start is put aside.
const LOG_BYTES: u64 = 10 * 1024 * 1024;
/// How often [`Embedded::keep_running`] looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Why there is no embedded Postgres; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// No binaries.
    #[error(
        "no Postgres {} or later is installed on this machine: install one (Debian, Ubuntu: apt-get install \
         postgresql; macOS: brew install postgresql) or set DATABASE_URL",
        OLDEST_MAJOR
    )]
    NotInstalled,
    /// Binaries, but not of the version that made the data.
    #[error("the data dir was made by Postgres {0}, which is not installed on this machine")]
    OtherVersion(u32),
    /// Another process has the folder.
    #[error("another milepost serves the data dir {}{}", .dir.display(),
        .address.map(|address| format!(", on {address}")).unwrap_or_default())]
    Served {
        /// Which folder.
        dir: PathBuf,
        /// Where that one listens, if it says so.
        address: Option<SocketAddr>,
    },
    /// Root has nobody to run Postgres as.
    #[error("Postgres does not run as root, and there is no user postgres or nobody to run it as")]
    NoUser,
    /// A folder on the way to the data keeps out whom root runs Postgres as.
    #[error(
        "user {uid}, whom Postgres runs as, may not enter {}: permit it (chmod o+x) or say where else the \
         data go with --data-dir", .dir.display()
    )]
    ShutOut {
        /// Which folder.
        dir: PathBuf,
        /// Whom it keeps out.
        uid: u32,
    },
    /// Nowhere to put the data by default.
    #[error("there is no HOME to keep the data in: say where with --data-dir")]
    NoHome,
    /// A folder is not what it has to be.
    #[error("{} must be a dir of the user that Postgres runs as, with access for nobody else", .0.display())]
    NotPrivate(PathBuf),
    /// A command of Postgres's failed.
    #[error("{command} failed: {said}")]
    Command {
        /// Which.
        command: &'static str,
        /// Its words, on one line.
        said: String,
    },
    /// It runs and does not answer.
    #[error("the embedded Postgres does not answer: {0}")]
    Silent(String),
    /// The file system.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What came of it.
        source: io::Error,
    },
}

fn io_error(what: String, source: io::Error) -> EmbeddedError {
    EmbeddedError::Io { what, source }
}

/// What an embedded Postgres is started with.
#[derive(Clone, Debug)]
pub struct EmbeddedSettings {
    /// Everything is in there. As root, the user that Postgres runs as must be
    /// able to reach it.
    pub data_dir: PathBuf,
    /// Settings of Postgres beyond ours, which they override; not looked at
    /// where one runs already.
    pub extra_options: Vec<(String, String)>,
}

impl EmbeddedSettings {
    /// Without extra options.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self { data_dir: data_dir.into(), extra_options: Vec::new() }
    }
}

/// `/var/lib/milepost` for root, for others `milepost` in `$XDG_DATA_HOME` or
/// `~/.local/share`. An error for somebody who has no home.
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

/// A running Postgres, and the sole right to its folder. Dropping it leaves
/// Postgres running, for the next one to take over.
#[derive(Debug)]
pub struct Embedded {
    dir: DataDir,
    lock: Lock,
    binaries: Binaries,
    owner: Option<Owner>,
    socket_dir: PathBuf,
    options: Vec<(String, String)>,
}

/// What the file `postmaster.pid` tells.
enum Postmaster {
    /// Nothing runs that a start would collide with.
    Absent,
    /// Its process is gone and the number is another's now.
    Reused,
    /// It runs, with its socket in this folder.
    Runs(PathBuf),
}

impl Embedded {
    /// Takes over the Postgres that runs in the folder, or starts it, having
    /// made its data where there are none; and its database.
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
            embedded.make_data().await?;
        }
        if let Postmaster::Runs(socket_dir) = embedded.postmaster().await? {
            tracing::info!(dir = %embedded.dir.path.display(), "taking over the Postgres that runs");
            embedded.socket_dir = socket_dir;
        } else {
            embedded.start_postgres().await?;
        }
        embedded.make_database().await?;
        Ok(embedded)
    }

    /// Where one of its databases is.
    pub fn url(&self, database: &str) -> String {
        socket_url(&self.socket_dir, database)
    }

    /// Where milepost's database is.
    pub fn database_url(&self) -> String {
        self.url(NAME)
    }

    /// Where the database is that another process serves from that folder.
    pub fn url_of_served(data_dir: &Path) -> Result<String, EmbeddedError> {
        let dir = DataDir::open(data_dir)?;
        let pid_file = dir.data().join("postmaster.pid");
        let text = fs::read_to_string(&pid_file)
            .map_err(|source| io_error(format!("cannot read {}", pid_file.display()), source))?;
        let (_, socket_dir) = parse_pid_file(&text)
            .ok_or_else(|| EmbeddedError::Silent("it is only just starting".to_owned()))?;
        Ok(socket_url(&socket_dir, NAME))
    }

    /// Tells those who look at the folder where its server listens.
    pub fn announce(&self, address: SocketAddr) -> Result<(), EmbeddedError> {
        self.lock.announce(address)
    }

    /// Starts Postgres again whenever it has died; never returns.
    pub async fn keep_running(&self) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let again = match self.postmaster().await {
                Ok(Postmaster::Runs(_)) => continue,
                Ok(Postmaster::Absent | Postmaster::Reused) => self.start_postgres().await,
                Err(error) => Err(error),
            };
            match again {
                Ok(()) => tracing::warn!("the embedded Postgres had died and was started again"),
                Err(error) => tracing::error!(%error, "the embedded Postgres has died and does not start"),
            }
        }
    }

    /// Stops Postgres: what is under way is rolled back, what is committed is
    /// on disk.
    pub async fn stop(&self) -> Result<(), EmbeddedError> {
        let data = self.dir.data();
        let timeout = STOP_TIMEOUT_S.to_string();
        let arguments = [
            "stop".as_ref(),
            "-D".as_ref(),
            data.as_os_str(),
            "-m".as_ref(),
            "fast".as_ref(),
            "-w".as_ref(),
            "-t".as_ref(),
            timeout.as_ref(),
        ];
        let output = self.run("pg_ctl", arguments).await?;
        if output.status.success() { Ok(()) } else { Err(complaint("pg_ctl stop", &output)) }
    }

    async fn run<I, A>(&self, name: &'static str, arguments: I) -> Result<std::process::Output, EmbeddedError>
    where
        I: IntoIterator<Item = A>,
        A: AsRef<std::ffi::OsStr>,
    {
        self.binaries.run(name, self.owner, &self.dir.cluster(), arguments).await
    }

    /// Makes the data beside their place and then moves them there, so that
    /// what was interrupted is never taken for whole.
    async fn make_data(&self) -> Result<(), EmbeddedError> {
        let (unfinished, data) = (self.dir.unfinished_data(), self.dir.data());
        let at = |source| io_error(format!("cannot make {}", data.display()), source);
        let mut said = None;
        // Not every system has the first locale; the second knows the case of
        // ASCII letters only.
        for locale in ["C.UTF-8", "C"] {
            if unfinished.exists() {
                fs::remove_dir_all(&unfinished).map_err(at)?;
            }
            let mut arguments = vec![
                "--pgdata=data.new".to_owned(),
                format!("--username={NAME}"),
                "--auth-local=trust".to_owned(),
                "--auth-host=reject".to_owned(),
                "--encoding=UTF8".to_owned(),
                format!("--locale={locale}"),
                "--data-checksums".to_owned(),
            ];
            if self.options.iter().any(|(name, value)| name == "fsync" && value == "off") {
                arguments.push("--no-sync".to_owned());
            }
            let output = self.run("initdb", arguments).await?;
            if output.status.success() {
                fs::rename(&unfinished, &data).map_err(at)?;
                return fs::File::open(self.dir.cluster()).and_then(|dir| dir.sync_all()).map_err(at);
            }
            said = Some(complaint("initdb", &output));
        }
        Err(said.unwrap_or(EmbeddedError::NotInstalled))
    }

    async fn start_postgres(&self) -> Result<(), EmbeddedError> {
        private_dir(&self.socket_dir, self.owner)?;
        if let Postmaster::Reused = self.postmaster().await? {
            // Postgres would take that process for itself.
            let pid_file = self.dir.data().join("postmaster.pid");
            fs::remove_file(&pid_file)
                .map_err(|source| io_error(format!("cannot remove {}", pid_file.display()), source))?;
        }
        let log = self.dir.log();
        if fs::metadata(&log).is_ok_and(|metadata| metadata.len() > LOG_BYTES) {
            fs::rename(&log, log.with_extension("log.1"))
                .map_err(|source| io_error(format!("cannot move {}", log.display()), source))?;
        }
        let data = self.dir.data();
        let (timeout, options) = (START_TIMEOUT_S.to_string(), self.server_options());
        let arguments = [
            "start".as_ref(),
            "-D".as_ref(),
            data.as_os_str(),
            "-l".as_ref(),
            log.as_os_str(),
            "-w".as_ref(),
            "-s".as_ref(),
            "-t".as_ref(),
            timeout.as_ref(),
            "-o".as_ref(),
            options.as_ref(),
        ];
        let give_up_at = Instant::now() + Duration::from_secs(10);
        loop {
            let output = self.run("pg_ctl", arguments).await?;
            if output.status.success() {
                return Ok(());
            }
            if let Postmaster::Runs(_) = self.postmaster().await? {
                return Ok(());
            }
            // Children of a Postgres that was killed hold on to its memory for
            // a moment.
            if Instant::now() > give_up_at {
                return Err(last_line(&log).map_or_else(
                    || complaint("pg_ctl start", &output),
                    |said| EmbeddedError::Command { command: "pg_ctl start", said },
                ));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// The `-c` options of the server, as the shell reads them.
    fn server_options(&self) -> String {
        // A list, in which quotes keep a comma from dividing.
        let socket_dir = format!("\"{}\"", self.socket_dir.display().to_string().replace('"', "\"\""));
        let ours = [
            ("listen_addresses", ""),
            ("port", "5432"),
            ("unix_socket_directories", socket_dir.as_str()),
            ("unix_socket_permissions", "0700"),
            ("fsync", "on"),
            ("full_page_writes", "on"),
            ("synchronous_commit", "on"),
            // A refused duplicate is an answer, not trouble.
            ("log_min_messages", "log"),
        ];
        let extra = self.options.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let options: Vec<String> = ours
            .into_iter()
            .chain(extra)
            .map(|(name, value)| format!("-c {}", shell_quoted(&format!("{name}={value}"))))
            .collect();
        options.join(" ")
    }

    async fn postmaster(&self) -> Result<Postmaster, EmbeddedError> {
        let data = self.dir.data();
        let Ok(text) = fs::read_to_string(data.join("postmaster.pid")) else { return Ok(Postmaster::Absent) };
        let Some((pid, socket_dir)) = parse_pid_file(&text) else { return Ok(Postmaster::Absent) };
        if Path::new("/proc/self/cmdline").exists() {
            // Readable for other users' processes too, unlike their folders.
            let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { return Ok(Postmaster::Absent) };
            let wanted = data.as_os_str().as_encoded_bytes();
            let runs = command.split(|byte| *byte == 0).any(|argument| argument == wanted);
            return Ok(if runs { Postmaster::Runs(socket_dir) } else { Postmaster::Reused });
        }
        let status = self.run("pg_ctl", ["status".as_ref(), "-D".as_ref(), data.as_os_str()]).await?;
        Ok(if status.status.success() { Postmaster::Runs(socket_dir) } else { Postmaster::Absent })
    }

    /// Waits until Postgres answers, and makes milepost's database.
    async fn make_database(&self) -> Result<(), EmbeddedError> {
        let give_up_at = Instant::now() + Duration::from_secs(START_TIMEOUT_S);
        let mut connection = loop {
            match establish(&self.url("postgres"), None).await {
                Ok(connection) => break connection,
                Err(error) if Instant::now() > give_up_at => {
                    return Err(EmbeddedError::Silent(error.to_string()));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        match connection.batch_execute(&format!("CREATE DATABASE {NAME}")).await {
            Ok(()) => Ok(()),
            Err(error) if error.to_string().contains("already exists") => Ok(()),
            Err(error) => Err(EmbeddedError::Silent(error.to_string())),
        }
    }
}

/// Process id and socket folder; lines 1 and 5 of what Postgres writes there.
fn parse_pid_file(text: &str) -> Option<(u32, PathBuf)> {
    let mut lines = text.lines();
    let pid = lines.next()?.trim().parse().ok()?;
    let socket_dir = lines.nth(3)?.trim();
    Some((pid, PathBuf::from(socket_dir)))
}

fn socket_url(socket_dir: &Path, database: &str) -> String {
    format!("postgresql://{NAME}@{}/{database}", percent_encoded(socket_dir.as_os_str().as_encoded_bytes()))
}

fn percent_encoded(bytes: &[u8]) -> String {
    let unreserved = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
    bytes
        .iter()
        .map(|byte| if unreserved(byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The last line of a log, which may be long.
fn last_line(path: &Path) -> Option<String> {
    let text = fs::read(path).ok()?;
    let tail = text.get(text.len().saturating_sub(4096)..)?;
    String::from_utf8_lossy(tail).lines().last().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pid_file_tells_process_and_socket() {
        let text = "4242\n/d/cluster/data\n1763900000\n5432\n/d/cluster/run\n\n  19 0\nready\n";
        assert_eq!(parse_pid_file(text), Some((4242, PathBuf::from("/d/cluster/run"))));
        assert_eq!(parse_pid_file("4242\n/d/cluster/data\n"), None);
        assert_eq!(parse_pid_file(""), None);
    }

    #[test]
    fn urls_and_options_survive_odd_folders() {
        assert_eq!(
            socket_url(Path::new("/tmp/a b/ü"), "x"),
            "postgresql://milepost@%2Ftmp%2Fa%20b%2F%C3%BC/x"
        );
        assert_eq!(shell_quoted("a'b c"), r"'a'\''b c'");
    }
}
