//! Commands of the binary, as a script runs them.

use std::{
    net::SocketAddr,
    process::{Output, Stdio},
};

use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, process::Command};

use super::cli::milepost;
use crate::support::within_timeout;

/// The commands against one server, with one credential.
pub(super) struct Shell {
    server: String,
    secret: String,
}

/// What a command printed, and its exit code.
#[derive(Debug)]
pub(super) struct Printed {
    pub(super) code: i32,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Shell {
    pub(super) fn new(address: SocketAddr, secret: &str) -> Self {
        Self { server: address.to_string(), secret: secret.to_owned() }
    }

    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = milepost(arguments);
        command.env("MILEPOST_SERVER", &self.server).env("MILEPOST_API_KEY", &self.secret);
        command
    }

    pub(super) async fn run(&self, arguments: &[&str]) -> Printed {
        self.run_with(arguments, "").await
    }

    /// The same, with this text on standard input.
    pub(super) async fn run_with(&self, arguments: &[&str], input: &str) -> Printed {
        printed(self.command(arguments), input).await
    }

    /// The output of a command that succeeds, as a table.
    pub(super) async fn table(&self, arguments: &[&str]) -> String {
        self.run(arguments).await.succeeded(arguments)
    }

    /// The lines of JSON of a command that succeeds.
    pub(super) async fn json(&self, arguments: &[&str]) -> Vec<Value> {
        lines(&self.table(&[arguments, &["--output", "json"]].concat()).await)
    }
}

impl Printed {
    pub(super) fn succeeded(self, arguments: &[&str]) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "{arguments:?}: {}", self.stdout);
        self.stdout
    }
}

/// Runs a command with this text on standard input.
pub(super) async fn printed(mut command: Command, input: &str) -> Printed {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let written = async {
        // A command that refuses its command line reads nothing.
        let _closed = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
    };
    let ended = async { tokio::join!(child.wait_with_output(), written).0.unwrap() };
    let Output { status, stdout, stderr } = within_timeout("the command's end", ended).await;
    let [stdout, stderr] = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    Printed { code: status.code().unwrap(), stdout, stderr }
}

/// The objects of lines of JSON.
pub(super) fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{text}"))).collect()
}
