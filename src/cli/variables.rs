//! Environment variables that look like settings and are none, such as mistyped ones.
//!
//! They are warned of and not refused. A Service of Kubernetes named `milepost` sets such
//! variables in every container beside it, and one file of variables may serve several
//! versions of milepost.

use std::{collections::BTreeSet, env};

use clap::Command;

/// How the variables of settings begin, but for DATABASE_URL.
const PREFIX: &str = "MILEPOST_";

/// Warns of each variable that begins like a setting and is none of any command.
pub(super) fn warn_of_unknown(command: &Command) {
    let mut settings = BTreeSet::new();
    collect(command, &mut settings);
    for (name, value) in env::vars_os() {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
        if is_unknown(name, value, &settings) {
            let nearest = nearest(name, &settings);
            tracing::warn!(variable = name, nearest, "a variable is ignored: no setting has this name");
        }
    }
}

/// The variables of a command's settings and of those of its subcommands.
fn collect(command: &Command, settings: &mut BTreeSet<String>) {
    let variables = command.get_arguments().filter_map(|argument| argument.get_env()?.to_str());
    settings.extend(variables.map(str::to_owned));
    command.get_subcommands().for_each(|subcommand| collect(subcommand, settings));
}

fn is_unknown(name: &str, value: &str, settings: &BTreeSet<String>) -> bool {
    name.starts_with(PREFIX) && !settings.contains(name) && !is_of_kubernetes(name, value)
}

/// Whether Kubernetes sets this variable for a Service whose name begins with `milepost`, such
/// as MILEPOST_SERVICE_HOST and MILEPOST_PORT_50051_TCP.
fn is_of_kubernetes(name: &str, value: &str) -> bool {
    let numbered = || name.split("_PORT_").skip(1).any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    name.contains("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT") && value.contains("://")
        || numbered()
}

/// The setting to whose name, without the prefix, the fewest characters lead.
fn nearest<'a>(name: &str, settings: &'a BTreeSet<String>) -> Option<&'a str> {
    let stem = |name: &'a str| name.strip_prefix(PREFIX).unwrap_or(name);
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    settings.iter().map(String::as_str).min_by_key(|setting| distance(name, stem(setting)))
}

/// How many characters must be added, removed or replaced to make one text of the other
/// (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, x) in from.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in to.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    fn settings() -> BTreeSet<String> {
        let mut settings = BTreeSet::new();
        collect(&Cli::command(), &mut settings);
        settings
    }

    #[test]
    fn a_mistyped_variable_has_a_nearest_setting() {
        let settings = settings();
        for (name, setting) in [
            ("MILEPOST_LISTN", "MILEPOST_LISTEN"),
            ("MILEPOST_RETENTION", "MILEPOST_RETENTION_S"),
            ("MILEPOST_DATABASE_URL", "DATABASE_URL"),
            ("MILEPOST_API_KEYS", "MILEPOST_API_KEY"),
            ("MILEPOST_DATABASE_CONNECTION", "MILEPOST_DATABASE_CONNECTIONS"),
        ] {
            assert!(is_unknown(name, "1", &settings), "{name}");
            assert_eq!(nearest(name, &settings), Some(setting));
        }
        assert!(is_unknown("MILEPOST_PORT", "50051", &settings));
    }

    #[test]
    fn settings_of_all_commands_and_variables_of_kubernetes_are_not_unknown() {
        let settings = settings();
        for (name, value) in [
            ("MILEPOST_LISTEN", "127.0.0.1:1"),
            ("MILEPOST_API_KEY", "mpk_"),
            ("MILEPOST_BCRYPT_COST", "4"),
            ("DATABASE_URL", "postgresql://"),
            ("PATH", "/bin"),
            ("MILEPOST_SERVICE_HOST", "10.0.0.1"),
            ("MILEPOST_SERVICE_PORT_GRPC", "50051"),
            ("MILEPOST_PORT", "tcp://10.0.0.1:50051"),
            ("MILEPOST_PORT_50051_TCP_ADDR", "10.0.0.1"),
            ("MILEPOST_METRICS_PORT_9090_TCP", "tcp://10.0.0.1:9090"),
        ] {
            assert!(!is_unknown(name, value, &settings), "{name}");
        }
    }
}
