//! The installed Postgres, whose programs a test runs by itself, and the user that they run as.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, chown},
    path::{Path, PathBuf},
};

use tokio::process::Command;

/// Whether the tests run as root, which some of them need.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// The directory of the programs of the newest Postgres.
pub fn newest_postgres() -> PathBuf {
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = installed
        .filter_map(|version| Some((version.file_name().to_str()?.parse::<u32>().ok()?, version.path())))
        .max();
    newest.expect("a Postgres of Debian's packages").1.join("bin")
}

/// Makes a directory for the user as whom Postgres runs.
pub fn make_postgres_dir(path: &Path) {
    fs::create_dir(path).unwrap();
    give_to_postgres(path);
}

/// Makes a file or directory one of the user as whom Postgres runs, since it refuses to run as
/// root.
pub fn give_to_postgres(path: &Path) {
    if is_root() {
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let postgres = passwd.lines().find(|line| line.starts_with("postgres:")).unwrap();
        let ids: Vec<u32> = postgres.split(':').filter_map(|field| field.parse().ok()).collect();
        chown(path, Some(ids[0]), Some(ids[1])).unwrap();
    }
}

/// A command that runs as the user as whom Postgres runs.
pub fn postgres_command(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(program);
    command
}
