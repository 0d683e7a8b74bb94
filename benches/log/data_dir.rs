//! A temporary folder that is gone after the benchmark, and with it whatever
//! runs in it or was started for it, however the benchmark ends.

use std::{
    env, fs,
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use uuid::Uuid;

use crate::Result;

/// Waits until its input ends, which it does when we let go of it or die, even
/// by SIGKILL. Then ends the processes that it has read of, each a process id
/// and what it executes, and every Postgres that runs in the folder (SIGQUIT
/// is its immediate shutdown), and removes the folder.
const WATCHDOG: &str = r#"
guarded=$(cat)
echo "$guarded" | while read -r pid exe; do
    [ -n "$pid" ] && [ "$(readlink "/proc/$pid/exe")" = "$exe" ] && kill -KILL "$pid"
done
find "$1" -name postmaster.pid | while read -r file; do
    kill -QUIT "$(head -n 1 "$file")"
    tries=0
    while [ -e "$file" ] && [ "$tries" -lt 200 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
done
rm -rf "$1"
"#;

/// A folder with a watchdog.
pub(crate) struct Dir {
    path: PathBuf,
    watchdog: Child,
}

impl Dir {
    pub(crate) fn new() -> Result<Self> {
        // Not below `target`: as root the database runs as another user, who
        // may not enter root's home.
        let path = env::temp_dir().join(format!("milepost-bench-{}", Uuid::now_v7().simple()));
        fs::create_dir(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C in the terminal is for us, not for the watchdog.
            .process_group(0)
            .spawn()?;
        Ok(Self { path, watchdog })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Has this process end with the folder.
    pub(crate) fn guard(&mut self, pid: u32) -> Result<()> {
        let exe = fs::read_link(format!("/proc/{pid}/exe"))?;
        if let Some(stdin) = &mut self.watchdog.stdin {
            writeln!(stdin, "{pid} {}", exe.display())?;
        }
        Ok(())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        // Nothing to tell if it fails: the folder is a temporary one.
        let _ = self.watchdog.wait();
    }
}
