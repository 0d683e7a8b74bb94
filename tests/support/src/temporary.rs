//! Temporary directories in which Postgres, servers and other programs run. They are
//! removed after the tests, also when the test process is killed.

use std::{
    env,
    fs::{self, File, Permissions},
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use uuid::Uuid;

use crate::processes;

/// A shell script that reads process ids until its standard input ends, each with the
/// start time of its process: an id may be a stranger's by the end. The input ends when
/// the test process drops the directory or exits, even by SIGKILL. The script then kills
/// these processes, stops every Postgres that runs in the directory (SIGQUIT is its
/// immediate shutdown), unmounts what is mounted there, and removes the directory.
const WATCHDOG: &str = r#"
guarded=$(cat)
echo "$guarded" | while read -r pid started; do
    stat=$(cat "/proc/$pid/stat") || continue
    # The name of the program may have spaces. Behind it, the start time is field 20.
    set -- ${stat##*) }
    [ "${20}" = "$started" ] && kill -KILL "$pid"
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
    case "$mount" in "$1" | "$1"/*) umount -l "$mount" ;; esac
done </proc/mounts
rm -rf "$1"
"#;

/// A temporary directory with a watchdog process. Dropping it stops every guarded
/// process and every Postgres that runs in it.
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
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(&path)
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

    /// Lets the watchdog kill this process when the directory is removed.
    pub fn guard(&self, pid: u32) {
        // A process that has ended already needs no guard.
        if let Some(started) = processes::start_time(pid) {
            writeln!(self.watchdog.stdin.as_ref().unwrap(), "{pid} {started}").unwrap();
        }
    }

    /// Starts a program in the directory, with a file there to append its output to. It
    /// ends when the child or the directory is dropped, and with the test process.
    pub fn run(&self, mut command: tokio::process::Command, log: &str) -> tokio::process::Child {
        command.stdout(self.log(log));
        self.spawn(command, log)
    }

    /// As [`Self::run`], except that standard output is what the command sets.
    pub fn spawn(&self, mut command: tokio::process::Command, log: &str) -> tokio::process::Child {
        command.current_dir(&self.path).stdin(Stdio::null()).stderr(self.log(log)).kill_on_drop(true);
        // Ctrl-C ends the test process alone, and the watchdog then ends the program.
        let spawned = command.process_group(0).spawn();
        let child = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        self.guard(child.id().expect("the program was just started"));
        child
    }

    fn log(&self, name: &str) -> File {
        File::options().create(true).append(true).open(self.path.join(name)).unwrap()
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        // A failure is ignored, since the directory is temporary.
        let _ = self.watchdog.wait();
    }
}
