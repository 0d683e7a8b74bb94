//! Temporary directories in which Postgres and servers run. They are removed
//! after the tests, also when the test process is killed.

use std::{
    env,
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use uuid::Uuid;

/// A shell script that reads process ids until its standard input ends. The input
/// ends when the test process drops the directory or exits, even by SIGKILL. The
/// script then kills the servers of these ids, stops every Postgres that runs in
/// the directory (SIGQUIT is its immediate shutdown), unmounts what is mounted
/// there, and removes the directory.
const WATCHDOG: &str = r#"
pids=$(cat)
for pid in $pids; do
    [ "$(readlink "/proc/$pid/exe")" = "$2" ] && kill -KILL "$pid"
done
find "$1" -name postmaster.pid | while read -r file; do
    pid=$(head -n 1 "$file")
    # In the file of a Postgres of another PID namespace, or of one that was killed, the
    # id may be that of a stranger.
    [ "$(readlink "/proc/$pid/cwd")" = "${file%/*}" ] || continue
    children=$(cat "/proc/$pid/task/$pid/children")
    kill -QUIT "$pid"
    # A stopped process takes the signal once it continues.
    kill -CONT "$pid" $children
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

/// A temporary directory with a watchdog process. Dropping it stops every server
/// and every Postgres that runs in it.
#[derive(Debug)]
pub struct TemporaryDir {
    path: PathBuf,
    watchdog: Child,
}

impl TemporaryDir {
    pub fn new() -> Self {
        // Not below `target`: when the tests run as root, Postgres runs as another
        // user, which cannot enter root's home directory.
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
            // A process group of its own, so that Ctrl-C does not end the watchdog.
            .process_group(0)
            .spawn()
            .unwrap();
        Self { path, watchdog }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the watchdog kill the server of this process id when the directory is
    /// removed.
    pub fn guard(&mut self, pid: u32) {
        writeln!(self.watchdog.stdin.as_mut().unwrap(), "{pid}").unwrap();
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        // A failure is ignored, since the directory is temporary.
        let _ = self.watchdog.wait();
    }
}
