//! The command line: one module for each command.

mod completion;
mod configurations;
mod connection;
mod database;
mod demo;
mod events;
mod exit;
mod export;
mod health;
mod hold;
mod init;
mod jobs;
mod keys;
mod migrate;
mod output;
mod screen;
mod serve;
mod share;
mod summary;
mod user;
mod values;
mod variables;
mod watch;

use std::{
    error::Error as StdError,
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{CommandFactory as _, Parser, Subcommand};

use self::exit::EXIT_CODES;
pub use self::{connection::connect, exit::report, init::run_as_init};
use crate::{
    config::{Config, TelemetrySettings},
    error::BoxError,
    telemetry,
};

/// Live and lossless progress of jobs: providers append events, customers watch them.
///
/// Without a command, milepost runs serve.
#[derive(Debug, Parser)]
#[command(name = "milepost", version, args_conflicts_with_subcommands = true, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    telemetry: TelemetrySettings,

    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    serve: Config,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a server until SIGTERM or SIGINT; the default command
    Serve(Config),
    /// Apply the database's missing migrations, or revert the newest ones
    Migrate(migrate::Migrate),
    /// List and create users, set their passwords, disable and enable them, directly in the database
    User(user::User),
    /// List, show, create and close jobs
    Jobs(jobs::Jobs),
    /// List, append and follow events
    Events(events::Events),
    /// List, show and register job configurations
    Configurations(configurations::Configurations),
    /// Create, list and expire API keys
    Keys(keys::Keys),
    /// Watch a job in the terminal until it is closed
    Watch(watch::Watch),
    /// Make a link that shows a job in a browser, to whoever has the link
    Share(share::Share),
    /// Count jobs, and say how long they took
    Summary(summary::Summary),
    /// Write jobs or events as CSV or JSON lines
    Export(export::Export),
    /// Keep a job from retention, or no longer
    Hold(hold::Hold),
    /// Show a sample job: acts as its provider and its customer, on a running server or one that it starts
    Demo(demo::Demo),
    /// Ask a server whether it is ready, or whether it runs at all
    Health(health::Health),
    /// Print the completions of a shell
    Completion(completion::Completion),
    /// Write the manual pages
    #[command(hide = true)]
    Man(completion::Man),
}

/// Runs the command of the command line and returns the exit code of the process.
pub async fn run(cli: Cli) -> Result<ExitCode, BoxError> {
    let command = cli.command.unwrap_or(Command::Serve(cli.serve));
    let default_level = match &command {
        Command::Serve(_) => "info",
        Command::Migrate(_)
        | Command::User(_)
        | Command::Jobs(_)
        | Command::Events(_)
        | Command::Configurations(_)
        | Command::Keys(_)
        | Command::Watch(_)
        | Command::Share(_)
        | Command::Summary(_)
        | Command::Export(_)
        | Command::Hold(_)
        | Command::Health(_)
        | Command::Completion(_)
        | Command::Man(_) => "warn",
        // Warnings of its own server would break up the progress bar.
        Command::Demo(_) => "error,milepost::cli=warn",
    };
    let log_level = cli.telemetry.log_level.as_deref().filter(|filter| !filter.is_empty());
    telemetry::init(cli.telemetry.log_format, log_level.unwrap_or(default_level))?;
    variables::warn_of_unknown(&Cli::command());
    match command {
        Command::Serve(config) => serve::run(&config).await,
        Command::Migrate(command) => command.run().await,
        Command::User(command) => command.run().await,
        Command::Jobs(command) => command.run().await,
        Command::Events(command) => command.run().await,
        Command::Configurations(command) => command.run().await,
        Command::Keys(command) => command.run().await,
        Command::Watch(command) => command.run().await,
        Command::Share(command) => command.run().await,
        Command::Summary(command) => command.run().await,
        Command::Export(command) => command.run().await,
        Command::Hold(command) => command.run().await,
        Command::Demo(command) => command.run().await,
        Command::Health(command) => command.run().await,
        Command::Completion(command) => command.run(),
        Command::Man(command) => command.run(),
    }
}

/// An error and its causes as one line, for the terminal.
pub fn one_line(error: &(dyn StdError + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Many errors repeat the text of their cause.
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    clean(&line.replace('\n', " "))
}

/// Prints a line on stdout. An error once stdout is closed, so that an endless
/// command ends.
fn print_line(line: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{line}")
}

/// Replaces control characters, line separators, and the characters that reorder text (the
/// property Bidi_Control of Unicode's PropList.txt): text from other users must neither
/// command the terminal nor pass for something else.
fn clean(text: &str) -> String {
    let is_unsafe = |c: char| {
        c.is_control()
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if is_unsafe(c) { '\u{fffd}' } else { c }).collect()
}
