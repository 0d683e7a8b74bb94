//! The programs that tests run: those of the installed Postgres, the user that they run as,
//! and programs in environments of Python.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::fs::{MetadataExt as _, chown},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::process::Command;

use crate::within;

/// Longest that a program may run, such as one that installs others.
const PROGRAM: Duration = Duration::from_secs(1_200);

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

/// Whether [`command`] finds this program.
pub fn is_installed(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(["/usr/sbin".into()]).any(|dir| dir.join(program).is_file())
}

/// Panics unless [`command`] finds this program.
#[track_caller]
pub fn require(program: &str, package: &str) {
    assert!(is_installed(program), "{program} is not installed; Debian: apt-get install {package}");
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

/// A command that is also found where Debian has those of administrators.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", format!("{}:/usr/sbin", env::var("PATH").unwrap_or_default()));
    command
}

/// The same command as the user as whom Postgres runs.
pub fn postgres_command(program: impl AsRef<OsStr>) -> Command {
    if !is_root() {
        return command(program);
    }
    let mut command = command("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(program);
    command
}

/// Runs a command to its end, which must be a success, and returns its standard output.
pub async fn succeed(command: &mut Command) -> String {
    let running = command.kill_on_drop(true).stdin(Stdio::null()).output();
    let output = within(PROGRAM, "the end of a program", running).await;
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{command:?}: {}: {stdout}{stderr}", output.status);
    stdout
}

/// Makes an environment of Python with these packages, unless the directory has it already.
/// Returns its `python`.
pub async fn python_with(interpreter: &str, packages: &[&str], venv: &Path) -> PathBuf {
    let python = venv.join("bin/python");
    // Written last, so that an interrupted installation is repeated.
    let marker = venv.join("made-from.txt");
    let wanted: String = packages.iter().map(|package| format!("{package}\n")).collect();
    if fs::read_to_string(&marker).ok().as_ref() != Some(&wanted) {
        require(interpreter, "python3-venv");
        succeed(Command::new(interpreter).args(["-m", "venv", "--clear"]).arg(venv)).await;
        let mut pip = Command::new(&python);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(packages);
        succeed(&mut pip).await;
        fs::write(&marker, wanted).unwrap();
    }
    python
}
