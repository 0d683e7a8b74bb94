//! The clients of the languages, and the run of the program of one.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    str::FromStr,
    time::Duration,
};

use milepost_testing::processes::{Signal, signal};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    time::{Instant, timeout_at},
};

use crate::output::Line;

/// How the program of a client is built and started, in the client's folder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client {
    pub(crate) name: &'static str,
    folder: &'static str,
    /// The commands that build it; OUT is a folder for what they make.
    build: &'static [&'static str],
    command: &'static str,
    variables: &'static [(&'static str, &'static str)],
}

/// RUST is this program.
pub(crate) const CLIENTS: [Client; 5] = [
    Client { name: "rust", folder: "rust", build: &[], command: "RUST --program", variables: &[] },
    Client {
        name: "python",
        folder: "python",
        build: &[],
        command: "python3 conformance/main.py threads",
        variables: &[("PYTHONPATH", "src")],
    },
    Client {
        name: "python-asyncio",
        folder: "python",
        build: &[],
        command: "python3 conformance/main.py asyncio",
        variables: &[("PYTHONPATH", "src")],
    },
    Client {
        name: "typescript",
        folder: "typescript",
        build: &["npx tsc", "npx tsc -p tsconfig.test.json"],
        command: "node build/conformance/main.js",
        variables: &[],
    },
    Client {
        name: "go",
        folder: "go",
        build: &["go build -o OUT/go ./conformance"],
        command: "OUT/go",
        variables: &[],
    },
];

impl FromStr for Client {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = CLIENTS.into_iter().find(|client| client.name == name);
        found.ok_or_else(|| format!("there are {}", CLIENTS.map(|client| client.name).join(", ")))
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Client {
    /// The command with its arguments, in the client's folder.
    fn command(&self, command: &str, out: &Path) -> Command {
        let program = env::current_exe().unwrap().display().to_string();
        let mut words = command
            .split(' ')
            .map(|word| word.replace("RUST", &program).replace("OUT", &out.display().to_string()));
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).current_dir(self.folder()).envs(self.variables.iter().copied());
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    fn folder(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(self.folder)
    }

    /// Builds the program, or says why it cannot be run.
    pub(crate) async fn build(&self, out: &Path) -> Result<(), String> {
        let folder = self.folder();
        if !folder.is_dir() {
            return Err(format!("{}: there is no folder {}", self.name, folder.display()));
        }
        for command in self.build {
            let status = self.command(command, out).status().await;
            if !status.as_ref().is_ok_and(ExitStatus::success) {
                return Err(format!("{}: {command}: {status:?}", self.name));
            }
        }
        Ok(())
    }

    /// Starts the program. Its standard error goes to a file.
    pub(crate) fn start(&self, out: &Path, variables: &[(&str, String)]) -> Run {
        let errors = out.join(format!("{}.errors", self.name));
        let mut command = self.command(self.command, out);
        command.envs(variables.iter().cloned()).stdout(Stdio::piped());
        command.stderr(fs::File::create(&errors).unwrap());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.command));
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Run { child, stdout, errors, lines: Vec::new(), wrong: Vec::new() }
    }
}

/// A program that runs.
#[derive(Debug)]
pub(crate) struct Run {
    child: Child,
    stdout: BufReader<ChildStdout>,
    errors: PathBuf,
    pub(crate) lines: Vec<Line>,
    /// What is wrong with the program itself.
    pub(crate) wrong: Vec<String>,
}

impl Run {
    /// Waits for the first line.
    pub(crate) async fn start(&mut self, longest: Duration) {
        self.read_until(Instant::now() + longest, 1).await;
    }

    /// Reads to the end of the output, and waits for the exit.
    pub(crate) async fn finish(&mut self, deadline: Instant) {
        self.read_until(deadline, usize::MAX).await;
        match timeout_at(deadline, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => return,
            Ok(status) => self.wrong.push(format!("it ended with {status:?}")),
            Err(_) => {
                self.wrong.push("it did not end in time".to_owned());
                if let Some(pid) = self.child.id() {
                    signal(pid, Signal::KILL);
                }
            }
        }
        let errors = fs::read_to_string(&self.errors).unwrap_or_default();
        let last: Vec<&str> = errors.lines().rev().take(20).collect();
        self.wrong.extend(last.into_iter().rev().map(|line| format!("  {line}")));
    }

    async fn read_until(&mut self, deadline: Instant, count: usize) {
        let mut text = String::new();
        while self.lines.len() < count {
            text.clear();
            match timeout_at(deadline, self.stdout.read_line(&mut text)).await {
                Ok(Ok(1..)) => {}
                Ok(Ok(0)) => return,
                Ok(Err(error)) => return self.wrong.push(format!("its output cannot be read: {error}")),
                Err(_) => return self.wrong.push("it printed nothing more in time".to_owned()),
            }
            match Line::parse(text.trim_end()) {
                Some(line) => self.lines.push(line),
                None => self.wrong.push(format!("unexpected output: {}", text.trim_end())),
            }
        }
    }
}
