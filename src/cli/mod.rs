//! The commands.

mod database;
mod demo;
mod migrate;
mod screen;
mod serve;
mod user;
mod watch;

use std::{
    error::Error as StdError,
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use tonic::Status;

use crate::{
    config::{Config, TelemetryConfig},
    error::BoxError,
    telemetry,
};

/// Live, lossless progress of the jobs that somebody else runs for you.
///
/// Without a command it serves.
#[derive(Debug, Parser)]
#[command(name = "milepost", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(flatten)]
    telemetry: TelemetryConfig,

    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    serve: Config,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT; what happens without a command
    Serve(Config),
    /// Bring the database's schema up to date, or take the newest migrations back
    Migrate(migrate::Migrate),
    /// Make users and take their access away, straight in the database
    User(user::User),
    /// Follow a job in the terminal until it is closed; exits with 0 if it completed, otherwise with 2
    Watch(watch::Watch),
    /// See a job run: plays its provider and its customer against a running server, or one of its own
    Demo(demo::Demo),
}

/// Does what the command line says; the exit code of the process.
pub async fn run(cli: Cli) -> Result<ExitCode, BoxError> {
    let command = cli.command.unwrap_or(Command::Serve(cli.serve));
    let quiet = match &command {
        Command::Serve(_) => "info",
        Command::Migrate(_) | Command::User(_) | Command::Watch(_) => "warn",
        // What its own server says while it stops would spoil the picture.
        Command::Demo(_) => "error",
    };
    telemetry::init(cli.telemetry.log_format, cli.telemetry.log_level.as_deref().unwrap_or(quiet))?;
    match command {
        Command::Serve(config) => serve::run(&config).await,
        Command::Migrate(command) => command.run().await,
        Command::User(command) => command.run().await,
        Command::Watch(command) => command.run().await,
        Command::Demo(command) => command.run().await,
    }
}

/// An error and its causes, as one line for a person.
pub fn one_line(error: &(dyn StdError + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        // Many an error says what its cause says.
        if !line.contains(&words) {
            line.push_str(": ");
            line.push_str(&words);
        }
        cause = error.source();
    }
    line.replace('\n', " ")
}

/// Prints a line. An error where nobody reads it any more, so that whoever
/// prints without end comes to one.
fn say(line: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{line}")
}

/// What a server refused, in its words.
fn refused(status: &Status) -> BoxError {
    format!("{} ({:?})", status.message(), status.code()).into()
}
