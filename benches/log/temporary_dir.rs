//! A temporary directory for the benchmark. However the benchmark ends, the directory
//! is removed and the processes started for it are ended.

use std::{
    env, fs,
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use uuid::Uuid;

use crate::Result;

/// A shell script that waits for the end of its stdin, which the benchmark closes or
/// which closes when the benchmark dies, even by SIGKILL. Then the script kills the
/// processes given on stdin, each by a line of process id and executable. It shuts down
/// every Postgres in the directory (SIGQUIT is its immediate shutdown) and removes the
/// directory.
const WATCHDOG: &str = r#"
guarded=$(cat)
echo "$guarded" | while read -r pid exe; do
    [ -n "$pid" ] && [ "$(readlink "/proc/$pid/exe")" = "$exe" ] && kill -KILL "$pid"
done
find "$1" -name postmaster.pid | while read -r file; do
    pid=$(head -n 1 "$file")
    # After a crash of Postgres, the id may be that of a stranger.
    [ "$(readlink "/proc/$pid/cwd")" = "${file%/*}" ] || continue
    kill -QUIT "$pid"
    tries=0
    while [ -e "$file" ] && [ "$tries" -lt 200 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
done
rm -rf "$1"
"#;

/// A directory, and the watchdog that cleans it up.
pub(crate) struct TemporaryDir {
    path: PathBuf,
    watchdog: Child,
}

impl TemporaryDir {
    pub(crate) fn new() -> Result<Self> {
        // Not below `target`: started as root, Postgres runs as another user, who may
        // not enter root's home.
        let path = env::temp_dir().join(format!("milepost-bench-{}", Uuid::now_v7().simple()));
        fs::create_dir(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // In a process group of its own, Ctrl-C in the terminal does not end it.
            .process_group(0)
            .spawn()?;
        Ok(Self { path, watchdog })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Has the watchdog kill this process when the directory is removed.
    pub(crate) fn guard(&mut self, pid: u32) -> Result<()> {
        let exe = fs::read_link(format!("/proc/{pid}/exe"))?;
        if let Some(stdin) = &mut self.watchdog.stdin {
            writeln!(stdin, "{pid} {}", exe.display())?;
        }
        Ok(())
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        // A failure leaves behind only a temporary directory.
        let _ = self.watchdog.wait();
    }
}
