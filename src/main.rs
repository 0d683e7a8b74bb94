//! The binary: parse the command line, call it, exit code.

use std::process::ExitCode;

use clap::Parser as _;
use milepost::cli::{Cli, one_line};

#[tokio::main]
async fn main() -> ExitCode {
    match milepost::cli::run(Cli::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("milepost: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
