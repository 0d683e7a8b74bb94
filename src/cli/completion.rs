//! `milepost completion SHELL` and `milepost man DIRECTORY`: what shells and `man` know of the
//! command line, written from its definition.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::Cli;
use crate::error::BoxError;

/// The shell.
#[derive(Args, Clone, Debug)]
pub(super) struct Completion {
    /// Shell whose completions are printed
    shell: Shell,
}

impl Completion {
    pub(super) fn run(&self) -> Result<ExitCode, BoxError> {
        // clap_complete panics if it cannot write.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "milepost", &mut script);
        io::stdout().write_all(&script)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Where manual pages are written.
#[derive(Args, Clone, Debug)]
pub(super) struct Man {
    /// Directory, which must exist
    directory: PathBuf,
}

impl Man {
    pub(super) fn run(&self) -> Result<ExitCode, BoxError> {
        let written = clap_mangen::generate_to(Cli::command(), &self.directory);
        written
            .map_err(|error| format!("cannot write manual pages to {}: {error}", self.directory.display()))?;
        Ok(ExitCode::SUCCESS)
    }
}
