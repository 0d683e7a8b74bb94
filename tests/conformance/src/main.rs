//! The official conformance suite of the Connect protocol against our layer: `cargo run
//! --package milepost-conformance`. It needs `connectconformance`, which
//! `go install connectrpc.com/conformance/cmd/connectconformance@v1.0.7` installs.
//!
//! The runner starts this binary as its server, once for each way to connect. `config.yaml` says
//! what is claimed, and `known-flaky.txt` which cases may fail, with the reasons.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by a panic, and the other lints do not help in test code"
)]

mod answers;
mod serve;
mod service;
mod trailers;

#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::doc_markdown,
    clippy::too_many_lines,
    dead_code,
    missing_debug_implementations,
    reason = "generated code"
)]
mod pb {
    tonic::include_proto!("connectrpc.conformance.v1");
}

use std::{
    env,
    path::Path,
    process::{Command, ExitCode},
};

/// The argument with which the runner starts this binary as a server.
const SERVER: &str = "as-a-server";

fn main() -> ExitCode {
    if env::args().any(|argument| argument == SERVER) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(serve::run());
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ran = Command::new("connectconformance")
        .args(["--mode", "server", "--conf"])
        .arg(folder.join("config.yaml"))
        .arg("--known-flaky")
        .arg(format!("@{}", folder.join("known-flaky.txt").display()))
        .args(env::args().skip(1))
        .arg("--")
        .arg(env::current_exe().unwrap())
        .arg(SERVER)
        .status();
    match ran {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cannot run connectconformance, which must be installed: {error}");
            ExitCode::FAILURE
        }
    }
}
