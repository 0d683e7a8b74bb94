//! Settings: `--help` lists them all, and each takes effect.

use std::{collections::BTreeMap, process::Stdio};

use clap::CommandFactory as _;
use milepost::cli::Cli;
use tokio::process::Command;

use crate::support::{ServerProcess, TestDatabase, within_timeout};

/// Value names of settings that have no default.
const OPTIONAL: [&str; 4] = ["FILE", "URL", "ADDRESSES", "ORIGINS"];

#[tokio::test]
async fn help_lists_every_setting_with_its_flag_its_variable_and_its_default_or_unit() {
    let mut cli = Cli::command();
    cli.build();
    let serve = cli.find_subcommand("serve").unwrap();
    let mut help = Command::new(env!("CARGO_BIN_EXE_milepost"));
    let help = help.args(["serve", "--help"]).stdin(Stdio::null()).kill_on_drop(true).output();
    let help = String::from_utf8(within_timeout("help", help).await.unwrap().stdout).unwrap();
    let mut entries: BTreeMap<&str, String> = BTreeMap::new();
    let mut flag = "";
    for line in help.lines() {
        if let Some(name) = line.split_whitespace().find(|word| word.starts_with("--"))
            && line.trim_start().starts_with('-')
        {
            flag = name;
        }
        entries.entry(flag).or_default().push_str(line);
    }
    for setting in serve.get_arguments().filter(|argument| argument.get_id() != "help") {
        let flag = format!("--{}", setting.get_long().expect("a flag"));
        let entry = entries.get(flag.as_str()).unwrap_or_else(|| panic!("{flag} in {help}"));
        let variable = match flag.as_str() {
            "--database-url" => "DATABASE_URL".to_owned(),
            _ => format!("MILEPOST_{}", flag[2..].replace('-', "_").to_uppercase()),
        };
        assert!(entry.contains(&format!("[env: {variable}")), "{variable} in {entry}");
        // A flag without a value is off by default.
        let value = entry.split_once(&format!("{flag} <")).and_then(|(_, rest)| rest.split_once('>'));
        if let Some((value, _)) = value {
            assert!(OPTIONAL.contains(&value) || entry.contains("default"), "{entry}");
            assert_eq!(value == "SECONDS", flag.ends_with("-s"), "{entry}");
        }
    }
}

#[tokio::test]
async fn serve_does_not_start_unless_streams_per_user_is_less_than_streams_per_connection() {
    for (of_user, of_connection) in [("1000", "1000"), ("99999", "1000"), ("500", "2")] {
        let arguments = ["--streams-per-user", of_user, "--streams-per-connection", of_connection];
        let (code, stderr) = refused(&arguments).await;
        assert_eq!((code, stderr.lines().count()), (Some(1), 1), "{stderr}");
        let named = format!("--streams-per-user {of_user} must be less than");
        assert!(stderr.contains(&named) && stderr.contains(of_connection), "{stderr}");
    }
}

#[tokio::test]
async fn an_invalid_value_is_a_usage_error_that_says_what_to_write() {
    for (setting, value, words) in [
        ("--log-level", "warning", "write error, warn, info, debug, trace or off"),
        ("--log-level", "info,milepost", "milepost is not a level"),
        ("--listen", "localhost:0", "127.0.0.1:0 or [::1]:0"),
        ("--listen", ":50051", "0.0.0.0:50051"),
        ("--metrics-listen", "localhost", "127.0.0.1:PORT"),
        ("--allow-origin", "https://app.example.com/", "https://app.example.com or"),
    ] {
        let (code, stderr) = refused(&[setting, value]).await;
        assert_eq!(code, Some(2), "{setting} {value}: {stderr}");
        assert!(stderr.contains(setting) && stderr.contains(words), "{words} in {stderr}");
    }
}

/// The exit code and the errors of a server that does not start with these arguments.
async fn refused(arguments: &[&str]) -> (Option<i32>, String) {
    let mut serve = Command::new(env!("CARGO_BIN_EXE_milepost"));
    serve
        .arg("serve")
        .args(arguments)
        .env_remove("DATABASE_URL")
        .env("MILEPOST_DATA_DIR", "/dev/null/nowhere")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = within_timeout("a refusal", serve.output()).await.unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// A server on a new database, with one more environment variable.
async fn configured(variable: &'static str, value: &str) -> ServerProcess {
    let database = TestDatabase::migrated().await;
    ServerProcess::on_with(&database, &[(variable, value)]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_variable_that_is_no_setting_is_warned_of_with_the_nearest_setting() {
    let server = configured("MILEPOST_RETENTION", "3600").await;
    let log = server.log();
    let warning: Vec<&str> = log.lines().filter(|line| line.contains("no setting has this name")).collect();
    assert_eq!(warning.len(), 1, "{log}");
    for word in ["WARN", "\"MILEPOST_RETENTION\"", "\"MILEPOST_RETENTION_S\""] {
        assert!(warning[0].contains(word), "{word} in {warning:?}");
    }
}

/// The tests' Postgres has a max_connections of 500, of which 3 are reserved. The server uses
/// up to eleven connections outside of the pool.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_beyond_max_connections_is_warned_of_with_the_numbers() {
    let warning = "lower --database-connections to";
    let server = configured("MILEPOST_DATABASE_CONNECTIONS", "486").await;
    let log = server.log();
    for words in [warning, "to 485 or raise", "\"max_connections\":500", "\"database_connections\":486"] {
        assert!(log.contains(words), "{words} in {log}");
    }
    let server = configured("MILEPOST_DATABASE_CONNECTIONS", "485").await;
    assert!(!server.log().contains(warning), "{}", server.log());
}
