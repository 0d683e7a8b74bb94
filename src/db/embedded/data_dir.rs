//! The data folder: what lies where in it, and who serves it.
//!
//! ```text
//! lock               held by the milepost that serves the folder; its address
//! cluster/           the user's that Postgres runs as, and nobody else's
//!     data/          what initdb makes
//!     data.new/      the same, unfinished
//!     run/           the socket
//!     postgres.log
//! ```

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest as _, Sha256};

use super::{EmbeddedError, binaries::Owner, io_error};

/// Longest folder whose socket `/.s.PGSQL.5432` fits into the 103 bytes that
/// every Unix allows a socket's path.
const SOCKET_DIR_BYTES: usize = 103 - "/.s.PGSQL.5432".len();

/// Where everything lies.
#[derive(Clone, Debug)]
pub(super) struct DataDir {
    /// With symbolic links resolved.
    pub(super) path: PathBuf,
}

impl DataDir {
    /// The folder, made where it is missing.
    pub(super) fn open(path: &Path) -> Result<Self, EmbeddedError> {
        let failed = |source| io_error(format!("cannot make the data dir {}", path.display()), source);
        if !path.exists() {
            fs::create_dir_all(path).map_err(failed)?;
            // Whatever the umask is, the user that Postgres runs as must get
            // through to what is theirs.
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(failed)?;
        }
        Ok(Self { path: fs::canonicalize(path).map_err(failed)? })
    }

    pub(super) fn cluster(&self) -> PathBuf {
        self.path.join("cluster")
    }

    pub(super) fn data(&self) -> PathBuf {
        self.cluster().join("data")
    }

    pub(super) fn unfinished_data(&self) -> PathBuf {
        self.cluster().join("data.new")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.cluster().join("postgres.log")
    }

    /// The major version of the Postgres that made the data, if there is any.
    pub(super) fn data_version(&self) -> Option<u32> {
        fs::read_to_string(self.data().join("PG_VERSION")).ok()?.trim().parse().ok()
    }

    /// Where the socket goes: inside, or where that is too long in a folder for
    /// things that run, under a name made from ours.
    pub(super) fn socket_dir(&self, root: bool) -> PathBuf {
        let inside = self.cluster().join("run");
        if inside.as_os_str().len() <= SOCKET_DIR_BYTES {
            return inside;
        }
        let hash = Sha256::digest(self.path.as_os_str().as_encoded_bytes());
        let name: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let runtime = if root { Some("/run".into()) } else { std::env::var_os("XDG_RUNTIME_DIR") };
        runtime
            .map(PathBuf::from)
            .filter(|dir| dir.is_dir() && dir.as_os_str().len() + 26 <= SOCKET_DIR_BYTES)
            .unwrap_or_else(|| PathBuf::from("/tmp"))
            .join(format!("milepost-{name}"))
    }

    /// Locks the folder for this process.
    pub(super) async fn lock(&self) -> Result<Lock, EmbeddedError> {
        let path = self.path.join("lock");
        let failed = |source| io_error(format!("cannot lock {}", path.display()), source);
        let mut options = File::options();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        // Who merely asks whether somebody serves the folder holds the lock for
        // an instant.
        for _ in 0..3 {
            match file.try_lock() {
                Ok(()) => {
                    file.set_len(0).map_err(failed)?;
                    return Ok(Lock { file, path });
                }
                Err(TryLockError::WouldBlock) => tokio::time::sleep(Duration::from_millis(100)).await,
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
        Err(EmbeddedError::Served { dir: self.path.clone(), address: read_address(&mut file) })
    }
}

/// Who serves a data folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// Nobody.
    No,
    /// A milepost that does not listen yet, or does not say where.
    Starting,
    /// A milepost that listens there.
    At(SocketAddr),
}

impl Served {
    /// Who serves that folder now.
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

/// This process serves the folder, for as long as it has this.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Tells others where.
    pub(super) fn announce(&self, address: SocketAddr) -> Result<(), EmbeddedError> {
        let mut file = &self.file;
        let mut write = || {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{address}")
        };
        write().map_err(|source| io_error(format!("cannot write {}", self.path.display()), source))
    }
}

/// A folder that only its owner can look into, made where it is missing. One
/// that is there and is not so may be somebody's trap.
pub(super) fn private_dir(path: &Path, owner: Option<Owner>) -> Result<(), EmbeddedError> {
    let failed = |source| io_error(format!("cannot make the dir {}", path.display()), source);
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            if let Some(Owner { uid, gid }) = owner {
                chown(path, Some(uid), Some(gid)).map_err(failed)?;
            }
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let found = fs::symlink_metadata(path).map_err(failed)?;
            let ours = owner.is_none_or(|owner| found.uid() == owner.uid);
            if found.is_dir() && ours && found.mode() & 0o077 == 0 {
                Ok(())
            } else {
                Err(EmbeddedError::NotPrivate(path.to_owned()))
            }
        }
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_data_folder_has_its_socket_in_a_short_one() {
        let short = DataDir { path: "/var/lib/milepost".into() };
        assert_eq!(short.socket_dir(true), Path::new("/var/lib/milepost/cluster/run"));

        let long = DataDir { path: format!("/{}", "x".repeat(100)).into() };
        let other = DataDir { path: format!("/{}", "y".repeat(100)).into() };
        for root in [true, false] {
            assert!(long.socket_dir(root).as_os_str().len() <= SOCKET_DIR_BYTES);
            assert_ne!(long.socket_dir(root), other.socket_dir(root));
        }
    }
}
