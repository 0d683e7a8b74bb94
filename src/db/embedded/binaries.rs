//! Finds the Postgres binaries installed on this machine, and the user to run them
//! as.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use tokio::process::Command;

use super::{EmbeddedError, io_error};

/// Oldest major version of Postgres that milepost supports.
pub(in crate::db) const OLDEST_MAJOR: u32 = 15;

/// A directory with `initdb`, `pg_ctl` and `postgres`.
#[derive(Clone, Debug)]
pub(super) struct Binaries {
    pub(super) dir: PathBuf,
    major: u32,
}

/// The ids of the unprivileged user that Postgres runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Owner {
    /// The error for the topmost ancestor of `dir` that this user may not enter.
    fn inaccessible(self, dir: &Path) -> Option<EmbeddedError> {
        let closed = dir.ancestors().filter(|dir| {
            fs::metadata(dir).is_ok_and(|found| {
                let search_bit = match (found.uid() == self.uid, found.gid() == self.gid) {
                    (true, _) => 0o100,
                    (false, true) => 0o010,
                    (false, false) => 0o001,
                };
                found.mode() & search_bit == 0
            })
        });
        closed.last().map(|dir| EmbeddedError::Inaccessible { dir: dir.to_owned(), uid: self.uid })
    }
}

impl Binaries {
    /// Finds the binaries of the version `major`, or without one the newest supported.
    pub(super) async fn find(major: Option<u32>) -> Result<Self, EmbeddedError> {
        let mut best: Option<Self> = None;
        for dir in candidates() {
            let Some(found) = Self::in_dir(dir).await else { continue };
            let fits = major.map_or(found.major >= OLDEST_MAJOR, |major| found.major == major);
            if fits && best.as_ref().is_none_or(|best| best.major < found.major) {
                best = Some(found);
            }
        }
        best.ok_or(major.map_or(EmbeddedError::NotInstalled, EmbeddedError::OtherVersion))
    }

    async fn in_dir(dir: PathBuf) -> Option<Self> {
        if !["initdb", "pg_ctl", "postgres"].iter().all(|name| dir.join(name).is_file()) {
            return None;
        }
        let output = Command::new(dir.join("postgres")).arg("--version").output().await.ok()?;
        let major = major_version(&String::from_utf8_lossy(&output.stdout))?;
        Some(Self { dir, major })
    }
}

/// A command that runs as the user `owner` and in `dir`. Its environment is cleared, so
/// that variables such as PGDATA cannot change what it does.
pub(super) fn command(program: impl AsRef<OsStr>, owner: Option<Owner>, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).stdin(Stdio::null()).env_clear().env("LC_ALL", "C");
    for kept in ["PATH", "TZ", "LD_LIBRARY_PATH"] {
        if let Some(value) = std::env::var_os(kept) {
            command.env(kept, value);
        }
    }
    if let Some(Owner { uid, gid }) = owner {
        command.uid(uid).gid(gid);
    }
    command
}

/// The error for a command that could not be run.
pub(super) fn command_failed(
    name: &str,
    owner: Option<Owner>,
    dir: &Path,
    source: io::Error,
) -> EmbeddedError {
    match owner.and_then(|owner| owner.inaccessible(dir)) {
        Some(error) if source.kind() == io::ErrorKind::PermissionDenied => error,
        _ => EmbeddedError::Io { failure: format!("cannot run {name}"), source },
    }
}

/// The directories of PATH's `pg_ctl`, with symbolic links resolved, then those of
/// Debian's packages.
fn candidates() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path)
        .filter_map(|dir| fs::canonicalize(dir.join("pg_ctl")).ok())
        .filter_map(|file| file.parent().map(Path::to_owned))
        .collect();
    if let Ok(versions) = fs::read_dir("/usr/lib/postgresql") {
        dirs.extend(versions.flatten().map(|version| version.path().join("bin")));
    }
    dirs
}

/// The major version in `postgres (PostgreSQL) 15.13 (Debian 15.13-0)`.
fn major_version(line: &str) -> Option<u32> {
    let version = line.split_once(") ")?.1;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The error for a failed command: its stderr on one line, or its exit status.
pub(super) fn command_error(command: &'static str, output: &Output) -> EmbeddedError {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let message = if lines.is_empty() { output.status.to_string() } else { lines.join(" ") };
    EmbeddedError::Command { command, message }
}

/// The user that Postgres runs as, since it refuses to run as root. None if this
/// process is not root; otherwise the owner of the existing cluster directory, or
/// the user `postgres` or `nobody`.
pub(super) async fn owner(cluster: &Path) -> Result<Option<Owner>, EmbeddedError> {
    if !is_root().await? {
        return Ok(None);
    }
    match fs::metadata(cluster) {
        Ok(metadata) => Ok(Some(Owner { uid: metadata.uid(), gid: metadata.gid() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            for name in ["postgres", "nobody"] {
                if let (Ok(uid), Ok(gid)) = (id(&["-u", name]).await, id(&["-g", name]).await) {
                    return Ok(Some(Owner { uid, gid }));
                }
            }
            Err(EmbeddedError::NoUser)
        }
        Err(error) => Err(io_error("cannot read the owner of", cluster)(error)),
    }
}

/// The names of the users that may connect as milepost's role: root, the user of this
/// process, and the `owner`, unless it is `nobody`, as which other services may run too.
pub(super) async fn users(owner: Option<Owner>) -> Result<Vec<String>, EmbeddedError> {
    let mut users = vec!["root".to_owned(), id_output(&["-un"]).await?];
    if let Some(Owner { uid, .. }) = owner {
        // An owner without a name cannot be allowed, and root can connect all the same.
        users.extend(id_output(&["-un", &uid.to_string()]).await.ok().filter(|name| name != "nobody"));
    }
    users.sort();
    users.dedup();
    Ok(users)
}

pub(super) async fn is_root() -> Result<bool, EmbeddedError> {
    Ok(id(&["-u"]).await? == 0)
}

async fn id(arguments: &[&str]) -> Result<u32, EmbeddedError> {
    let text = id_output(arguments).await?;
    text.parse()
        .map_err(|_| EmbeddedError::Command { command: "id", message: format!("it printed {text:?}") })
}

async fn id_output(arguments: &[&str]) -> Result<String, EmbeddedError> {
    let output = Command::new("id").args(arguments).output().await;
    let output =
        output.map_err(|source| EmbeddedError::Io { failure: "cannot run id".to_owned(), source })?;
    if !output.status.success() {
        return Err(command_error("id", &output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_parsed_from_the_output_of_postgres_version() {
        assert_eq!(major_version("postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)\n"), Some(15));
        assert_eq!(major_version("postgres (PostgreSQL) 19beta2\n"), Some(19));
        assert_eq!(major_version("command not found"), None);
    }
}
