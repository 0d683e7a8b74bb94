//! The binary: parse the command line, call it, exit code.

use std::{error::Error, io, process::ExitCode, time::Duration};

use clap::Parser as _;
use milepost::cli::{Cli, one_line};
use tokio::runtime::Runtime;

/// A call is many small allocations, freed on other threads than they were made
/// on.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long what was left to other threads, such as the look-up of a name, may
/// keep the end waiting.
const END: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("milepost: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(milepost::cli::run(cli));
    runtime.shutdown_timeout(END);
    match done {
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
