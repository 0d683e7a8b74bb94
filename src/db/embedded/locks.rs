//! The locks by which one milepost and one Postgres work on a data directory.
//!
//! `lock` is held by the milepost that serves the directory, `postgres.lock` by every process
//! of its Postgres. Postgres itself has lock files, `postmaster.pid` in the cluster and
//! another beside the socket, which name the process that made them. Postgres replaces such
//! a file only if no process of its user has the id in the file. A zombie still has it, and
//! another process may have got it: after the crash of Postgres, or in a restarted
//! container, where the same ids are given again. What follows from the locks at a start is
//! in the head of `embedded/mod.rs`.

use std::{
    ffi::OsStr,
    fs::{self, File, TryLockError},
    io::{self, Read as _},
    net::SocketAddr,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    EmbeddedError,
    binaries::{Owner, command},
    data_dir::DataDir,
    io_error,
};

/// Longest wait for the child processes of a killed Postgres.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// How often that wait tries the lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

impl DataDir {
    /// Marks the directory as served by this process, until the file is dropped. An error if
    /// another process serves it.
    pub(super) async fn lock(&self) -> Result<File, EmbeddedError> {
        let path = self.lock_path();
        let failed = io_error("cannot lock", &path);
        let mut options = File::options();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        // `Served::of` in another process takes the lock for an instant.
        for _ in 0..3 {
            match file.try_lock() {
                Ok(()) => {
                    file.set_len(0).map_err(failed)?;
                    return Ok(file);
                }
                Err(TryLockError::WouldBlock) => tokio::time::sleep(Duration::from_millis(100)).await,
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
        Err(EmbeddedError::Served { dir: self.path.clone(), address: read_address(&mut file) })
    }

    /// The lock that a Postgres and its child processes inherit as their standard input.
    /// It is free only when all of them have ended, and unlike process ids it is the same
    /// in every container. Waits for the child processes of a killed Postgres.
    pub(super) async fn lock_postgres(&self) -> Result<File, EmbeddedError> {
        let path = self.path.join("postgres.lock");
        let failed = io_error("cannot lock", &path);
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        let give_up_at = Instant::now() + LOCK_TIMEOUT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() > give_up_at => {
                    return Err(EmbeddedError::InUse(self.path.clone()));
                }
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_INTERVAL).await,
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
    }
}

/// Whether a milepost process serves a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// No process serves it.
    No,
    /// A process serves it and has not announced an address.
    Starting,
    /// A process serves it and listens on this address.
    At(SocketAddr),
}

impl Served {
    /// The present state of the directory's lock.
    pub fn of(data_dir: &Path) -> Self {
        let Ok(mut file) = File::open(data_dir.join("lock")) else { return Self::No };
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => read_address(&mut file).map_or(Self::Starting, Self::At),
            Ok(()) | Err(TryLockError::Error(_)) => Self::No,
        }
    }
}

fn read_address(file: &mut File) -> Option<SocketAddr> {
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// The content of a lock file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LockFile {
    /// The process that made the file.
    pub(super) pid: u32,
    /// The cluster that this process works on.
    pub(super) data: PathBuf,
    /// The directory of its socket; none while Postgres starts.
    pub(super) socket_dir: Option<PathBuf>,
    /// Whether Postgres accepts connections.
    pub(super) ready: bool,
}

impl LockFile {
    /// None for a file that Postgres did not finish.
    pub(super) fn parse(content: &[u8]) -> Option<Self> {
        let mut lines = content.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let path = |line: &[u8]| (!line.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(line)));
        // Of a Postgres without a postmaster (single-user mode) the number is negative.
        let pid: i32 = std::str::from_utf8(lines.next()?).ok()?.parse().ok()?;
        let data = path(lines.next()?)?;
        let socket_dir = lines.nth(2).and_then(path);
        let ready = lines.nth(2).is_some_and(|status| status == b"ready");
        Some(Self { pid: pid.unsigned_abs(), data, socket_dir, ready })
    }
}

/// The content of a lock file; none if there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, EmbeddedError> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("cannot read", path)(error)),
    }
}

/// What the process is whose id a lock file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// A Postgres that works on the cluster.
    Postgres,
    /// A zombie, or a process that does not work on the cluster.
    Other,
    /// There is no such process, or it cannot be told what it is.
    Unknown,
}

/// Whether `/proc` shows the processes by the ids that they have for this process, which
/// `/proc` of another PID namespace does not.
pub(super) fn can_see_processes() -> bool {
    fs::read_link("/proc/self").is_ok_and(|own| own == Path::new(&std::process::id().to_string()))
}

/// What the process `pid` is to the cluster `data`.
///
/// Its start time is not compared with that in the lock file: the one is counted from the
/// boot, the other was read from a clock that may have been set since.
pub(super) async fn holder(pid: u32, data: &Path, owner: Option<Owner>) -> Holder {
    let read = |name| fs::read(format!("/proc/{pid}/{name}"));
    let (Ok(stat), Ok(command_line)) = (read("stat"), read("cmdline")) else { return Holder::Unknown };
    if has_ended(&stat) || !may_be_postgres(&command_line) {
        return Holder::Other;
    }
    match (cwd(pid, owner).await, identity(data)) {
        (Some(cwd), Some(data)) if cwd != data => Holder::Other,
        (Some(_), Some(_)) if is_postgres(&command_line) => Holder::Postgres,
        _ => Holder::Unknown,
    }
}

/// Whether `/proc/PID/stat` is that of a zombie (Z) or of a process that is just being
/// removed (X). The state follows the name, which may itself contain parentheses.
fn has_ended(stat: &[u8]) -> bool {
    let state = stat.iter().rposition(|byte| *byte == b')').and_then(|end| stat.get(end + 2));
    matches!(state, Some(b'Z' | b'X' | b'x'))
}

/// Whether the command line contains the name of Postgres at all. While a process starts
/// another program its command line is empty.
fn may_be_postgres(command_line: &[u8]) -> bool {
    let contains = |name: &[u8]| command_line.windows(name.len()).any(|part| part == name);
    command_line.is_empty() || contains(b"postgres") || contains(b"postmaster")
}

/// Whether a command line is that of a postmaster. Behind an emulator the program is not
/// the first argument. Child processes of a postmaster have other command lines.
fn is_postgres(command_line: &[u8]) -> bool {
    let mut arguments = command_line.split(|byte| *byte == 0);
    arguments.any(|argument| {
        let name = argument.rsplit(|byte| *byte == b'/').next();
        matches!(name, Some(b"postgres" | b"postmaster"))
    })
}

/// Device and inode of a directory.
type Identity = (u64, u64);

fn identity(dir: &Path) -> Option<Identity> {
    fs::metadata(dir).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The working directory of a process. Postgres works in the directory of its data.
///
/// Root in a container may lack the capability (`CAP_SYS_PTRACE`) to look at processes of
/// other users. The owner may look at its own.
async fn cwd(pid: u32, owner: Option<Owner>) -> Option<Identity> {
    let link = format!("/proc/{pid}/cwd");
    if let Some(found) = identity(Path::new(&link)) {
        return Some(found);
    }
    let mut stat = command("stat", Some(owner?), Path::new("/"));
    let output = stat.args(["-L", "-c", "%d:%i", &link]).output().await.ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (device, inode) = text.trim().split_once(':')?;
    Some((device.parse().ok()?, inode.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_file_names_process_cluster_and_socket_directory() {
        let text = "4242\n/d/cluster/data\n1763900000\n5432\n/d/cluster/run\n\n  19 0\nready   \n";
        let lock = LockFile::parse(text.as_bytes()).expect("a finished file");
        assert_eq!((lock.pid, lock.data), (4242, PathBuf::from("/d/cluster/data")));
        assert_eq!((lock.socket_dir, lock.ready), (Some(PathBuf::from("/d/cluster/run")), true));

        let starting = LockFile::parse(b"-4242\n/d/cluster/data\n1763900000\n5432\n\n").expect("a file");
        assert_eq!((starting.pid, starting.socket_dir, starting.ready), (4242, None, false));
        for unfinished in ["", "4242", "4242\n", "x\n/d\n"] {
            assert_eq!(LockFile::parse(unfinished.as_bytes()), None, "{unfinished:?}");
        }
    }

    #[test]
    fn the_state_of_a_process_follows_its_name() {
        assert!(has_ended(b"7 (postgres) Z 1 7 7 0"));
        assert!(!has_ended(b"7 (a) Z (b) S 1 7 7 0"));
        assert!(!has_ended(b""));
    }

    #[test]
    fn a_postmaster_is_known_by_its_program() {
        for (command_line, may_be, is) in [
            ("/usr/lib/postgresql/15/bin/postgres\0-D\0/d\0", true, true),
            ("/usr/bin/qemu-x86_64\0/bin/postmaster\0", true, true),
            ("postgres: checkpointer \0", true, false),
            ("vim\0postgresql.conf\0", true, false),
            ("sleep\0infinity\0", false, false),
            ("", true, false),
        ] {
            assert_eq!(may_be_postgres(command_line.as_bytes()), may_be, "{command_line:?}");
            assert_eq!(is_postgres(command_line.as_bytes()), is, "{command_line:?}");
        }
    }

    #[tokio::test]
    async fn another_process_is_not_taken_for_postgres() {
        assert_eq!(holder(std::process::id(), Path::new("/"), None).await, Holder::Other);
        assert_eq!(holder(u32::MAX, Path::new("/"), None).await, Holder::Unknown);
    }
}
