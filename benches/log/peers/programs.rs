//! The programs of the peers. They are built on first use and stay in `target/peers`, until
//! another version is pinned.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, time::timeout};

use crate::Result;

/// A module of its own, whose `go.mod` pins the versions.
const GO_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/log/peers/servers");
const GO_MOD: &str = include_str!("servers/go.mod");
const ETCD: &str = "go.etcd.io/etcd/server/v3";
const NATS: &str = "github.com/nats-io/nats-server/v2";
const DURABLE_STREAMS: &str = "durable-streams";
const DURABLE_STREAMS_VERSION: &str = "0.1.5";
/// Longest that a build may take, with its downloads.
const BUILD_TIMEOUT: Duration = Duration::from_secs(1_800);

#[derive(Clone, Copy)]
pub(super) enum Program {
    Etcd,
    Nats,
    DurableStreams,
}

impl Program {
    /// The file name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Nats => "nats-server",
            Self::DurableStreams => "durable-streams-server",
        }
    }

    pub(super) fn version(self) -> &'static str {
        match self {
            Self::Etcd => go_version(ETCD),
            Self::Nats => go_version(NATS),
            Self::DurableStreams => DURABLE_STREAMS_VERSION,
        }
    }

    pub(super) fn path(self) -> PathBuf {
        target().join("bin").join(self.name())
    }

    /// Builds the program unless this version of it is there.
    pub(super) async fn build(self) -> Result<()> {
        // Written last, so that an interrupted build is repeated.
        let marker = target().join(format!("{}.made-from", self.name()));
        let wanted = match self {
            Self::Etcd | Self::Nats => GO_MOD,
            Self::DurableStreams => DURABLE_STREAMS_VERSION,
        };
        if self.path().is_file() && fs::read_to_string(&marker).is_ok_and(|made_from| made_from == wanted) {
            return Ok(());
        }
        eprintln!("building {} {}", self.name(), self.version());
        fs::create_dir_all(target().join("bin"))?;
        let mut command = self.build_command();
        let running = command.kill_on_drop(true).stdin(Stdio::null()).output();
        let output = timeout(BUILD_TIMEOUT, running).await?;
        let builder = command.as_std().get_program().display();
        let output = output.map_err(|error| format!("{builder} cannot be run: {error}"))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{builder}: {}: {stderr}", output.status).into());
        }
        Ok(fs::write(&marker, wanted)?)
    }

    fn build_command(self) -> Command {
        let package = match self {
            Self::Etcd => ETCD,
            Self::Nats => NATS,
            Self::DurableStreams => {
                let mut cargo = Command::new("cargo");
                cargo.args(["install", "--locked", "--version", DURABLE_STREAMS_VERSION, "--root"]);
                cargo.arg(target()).arg("--target-dir").arg(target().join("build")).arg(DURABLE_STREAMS);
                return cargo;
            }
        };
        let mut go = Command::new("go");
        go.current_dir(GO_MODULE).args(["build", "-o"]).arg(self.path()).arg(package);
        go
    }
}

/// `target/peers`.
fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("peers")
}

/// The version of a Go module that `go.mod` requires.
fn go_version(module: &str) -> &'static str {
    let required = |line: &'static str| line.trim().strip_prefix(module)?.split_whitespace().next();
    GO_MOD.lines().find_map(required).map_or("unknown", |version| version.trim_start_matches('v'))
}
