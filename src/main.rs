//! The binary: parse the command line, call it, exit code.

use std::{error::Error, io, process::ExitCode};

use clap::Parser as _;
use milepost::cli::{Cli, one_line};

/// A call is many small allocations, freed on other threads than they were made
/// on.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    match milepost::cli::run(Cli::parse()).await {
        Ok(code) => code,
        // Whoever read has had enough.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("milepost: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
