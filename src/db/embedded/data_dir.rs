//! The layout of the data directory. `locks.rs` has its locks.
//!
//! ```text
//! lock               locked by the milepost that serves the directory; its address
//! postgres.lock      locked by every process of the Postgres that milepost started
//! pg_hba.conf        who may connect to Postgres, written at each start
//! pg_ident.conf
//! cluster/           accessible only to the user that Postgres runs as
//!     data/          the cluster that initdb made
//!     data.new/      an unfinished run of initdb
//!     run/           the Unix socket
//!     postgres.log
//! ```

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use super::{EmbeddedError, binaries::Owner, io_error};

/// Longest directory, in bytes, whose socket `/.s.PGSQL.5432` fits into the 103 bytes
/// that every Unix allows for the path of a socket.
const SOCKET_DIR_BYTES: usize = 103 - "/.s.PGSQL.5432".len();

/// The paths in a data directory.
#[derive(Clone, Debug)]
pub(super) struct DataDir {
    /// Path with symbolic links resolved.
    pub(super) path: PathBuf,
}

impl DataDir {
    /// Opens the directory; creates it if it is missing.
    pub(super) fn open(path: &Path) -> Result<Self, EmbeddedError> {
        let failed = io_error("cannot create the data directory", path);
        if !path.exists() {
            fs::create_dir_all(path).map_err(failed)?;
            // Under any umask, the user that Postgres runs as must be able to reach
            // the cluster directory.
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

    /// The lock file of Postgres in the cluster.
    pub(super) fn pid_file(&self) -> PathBuf {
        self.data().join("postmaster.pid")
    }

    pub(super) fn unfinished_data(&self) -> PathBuf {
        self.cluster().join("data.new")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.cluster().join("postgres.log")
    }

    pub(super) fn lock_path(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// The file of the rules by which Postgres authenticates connections. Outside of the
    /// cluster, the user that Postgres runs as cannot change it.
    pub(super) fn hba(&self) -> PathBuf {
        self.path.join("pg_hba.conf")
    }

    /// The file of the users that these rules name.
    pub(super) fn ident(&self) -> PathBuf {
        self.path.join("pg_ident.conf")
    }

    /// The major version of Postgres that created the cluster; none without a cluster.
    pub(super) fn data_version(&self) -> Option<u32> {
        fs::read_to_string(self.data().join("PG_VERSION")).ok()?.trim().parse().ok()
    }

    /// The directory of the socket: inside the data directory, or, if that path is too
    /// long for a socket, in the system's runtime directory under a hash of the path.
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

    /// Writes a file that other users may read.
    pub(super) fn write(&self, path: &Path, text: &str) -> Result<(), EmbeddedError> {
        let new = path.with_extension("new");
        let write = || {
            if let Err(error) = fs::remove_file(&new)
                && error.kind() != io::ErrorKind::NotFound
            {
                return Err(error);
            }
            let mut file = File::options().write(true).create_new(true).open(&new)?;
            file.set_permissions(fs::Permissions::from_mode(0o644))?;
            file.write_all(text.as_bytes())?;
            fs::rename(&new, path)
        };
        write().map_err(io_error("cannot write", path))
    }
}

/// Creates a directory that only its owner can access, or checks an existing one:
/// with other permissions or another owner it may be the trap of another user.
pub(super) fn private_dir(path: &Path, owner: Option<Owner>) -> Result<(), EmbeddedError> {
    let failed = io_error("cannot create the directory", path);
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            if let Some(Owner { uid, gid }) = owner {
                chown(path, Some(uid), Some(gid)).map_err(failed)?;
            }
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let found = fs::symlink_metadata(path).map_err(failed)?;
            let owned = owner.is_none_or(|owner| found.uid() == owner.uid);
            if found.is_dir() && owned && found.mode() & 0o077 == 0 {
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
    fn a_long_data_directory_has_its_socket_in_a_short_directory() {
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
