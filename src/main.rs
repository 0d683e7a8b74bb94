//! The binary: parses the command line, runs the command, sets the exit code.

use std::{process::ExitCode, time::Duration};

use clap::Parser as _;
use milepost::cli::{Cli, report, run_as_init};
use tokio::runtime::Runtime;

/// A call makes many small allocations, many of which another thread frees:
/// mimalloc is chosen for that. It does not ask for huge pages (`no_thp`), which would take a
/// quarter more memory for open watches.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Longest that the exit waits for blocking work on other threads, such as the
/// look-up of a host name.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return run_as_init().unwrap_or_else(|error| {
            eprintln!("milepost: cannot run as PID 1: {error}");
            ExitCode::FAILURE
        });
    }
    let cli = Cli::parse();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("milepost: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(milepost::cli::run(cli));
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    result.unwrap_or_else(|error| report(error.as_ref()))
}
