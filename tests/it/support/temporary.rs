//! Folders that a Postgres runs in, and that are gone after the tests, however
//! these end.

use std::{
    env,
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use uuid::Uuid;

/// Waits until its input ends, which it does when we let go of it or die, even
/// by SIGKILL. Then ends the servers whose process ids it has read, and every
/// Postgres that runs in the folder (SIGQUIT is its immediate shutdown), unmounts
/// what is mounted there, and removes the folder.
const WATCHDOG: &str = r#"
pids=$(cat)
for pid in $pids; do
    [ "$(readlink "/proc/$pid/exe")" = "$2" ] && kill -KILL "$pid"
done
find "$1" -name postmaster.pid | while read -r file; do
    kill -QUIT "$(head -n 1 "$file")"
    tries=0
    while [ -e "$file" ] && [ "$tries" -lt 200 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
done
while read -r _ mount _; do
    case "$mount" in "$1"/*) umount -l "$mount" ;; esac
done </proc/mounts
rm -rf "$1"
"#;

/// A folder with a watchdog. Dropping it stops what runs in it.
#[derive(Debug)]
pub struct TemporaryDir {
    path: PathBuf,
    watchdog: Child,
}

impl TemporaryDir {
    pub fn new() -> Self {
        // Not below `target`: as root the database runs as another user, who
        // may not enter root's home.
        let path = env::temp_dir().join(format!("milepost-test-{}", Uuid::now_v7().simple()));
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(&path)
            .arg(env!("CARGO_BIN_EXE_milepost"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C in the terminal is for us, not for the watchdog.
            .process_group(0)
            .spawn()
            .unwrap();
        Self { path, watchdog }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has the server of this process id ended with the folder.
    pub fn guard(&mut self, pid: u32) {
        writeln!(self.watchdog.stdin.as_mut().unwrap(), "{pid}").unwrap();
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        // Nothing to tell if it fails: the folder is a temporary one.
        let _ = self.watchdog.wait();
    }
}
