//! The commands for probes, shells and packages, and the settings file of the package.

use std::{
    fs,
    process::{Output, Stdio},
};

use clap::{ArgAction, CommandFactory as _};
use milepost::cli::Cli;
use tokio::{net::TcpListener, process::Command};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{Authority, TemporaryDir, TestServer, TlsFiles, page, within_timeout};

/// The exit code of a command, its stdout and its stderr.
async fn milepost(arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
    command.args(arguments).env_remove("MILEPOST_SERVER").stdin(Stdio::null()).kill_on_drop(true);
    let Output { status, stdout, stderr } =
        within_timeout("the command's end", command.output()).await.unwrap();
    let [stdout, stderr] = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (status.code().unwrap(), stdout, stderr)
}

/// Asserts that `milepost health` exits with 1 and prints one line with these words.
async fn assert_unhealthy(arguments: &[&str], words: &str) {
    let (code, stdout, stderr) = milepost(&[&["health"], arguments].concat()).await;
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (1, "", 1), "{stderr}");
    assert!(stderr.contains(words), "{words:?} is not in {stderr}");
}

async fn assert_healthy(arguments: &[&str]) {
    let (code, stdout, stderr) = milepost(&[&["health"], arguments].concat()).await;
    assert_eq!((code, stdout.as_str()), (0, "serving\n"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_a_server_that_is_ready_from_one_that_only_runs() {
    let server = TestServer::start().await;
    let address = server.address.to_string();
    let (ready, runs) =
        (["--server", address.as_str()], ["--server", address.as_str(), "--service", "liveness"]);
    server.wait_for_health("", ServingStatus::Serving).await;
    assert_healthy(&ready).await;
    assert_healthy(&runs).await;
    server.database.make_unavailable().await;
    server.wait_for_health("", ServingStatus::NotServing).await;
    assert_unhealthy(&ready, "is not serving").await;
    assert_healthy(&runs).await;
    assert_unhealthy(&["--server", &address, "--service", "nonsense"], "not registered").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_of_a_server_that_does_not_answer_is_an_error_in_one_line() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = listener.local_addr().unwrap().to_string();
    assert_unhealthy(&["--server", &silent], &silent).await;
    drop(listener);
    assert_unhealthy(&["--server", &silent], &silent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_verifies_the_server_by_the_authority_of_its_flag() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    let server = TestServer::with_tls(&files.server(), &authority).await;
    server.wait_for_health("", ServingStatus::Serving).await;
    let address = format!("https://{}", server.address);
    let ca = files.client().tls_ca.unwrap();
    assert_healthy(&["--server", &address, "--tls-ca", ca.to_str().unwrap()]).await;
    assert_unhealthy(&["--server", &address], "--tls-ca").await;
}

#[tokio::test]
async fn completions_and_manual_pages_have_every_command() {
    let cli = Cli::command();
    let commands =
        || cli.get_subcommands().filter(|command| !command.is_hide_set()).map(|command| command.get_name());
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, stderr) = milepost(&["completion", shell]).await;
        assert_eq!(code, 0, "{stderr}");
        for command in commands() {
            assert!(script.contains(command), "{command} in the completions of {shell}");
        }
    }

    let dir = TemporaryDir::new();
    let (code, _, stderr) = milepost(&["man", dir.path().to_str().unwrap()]).await;
    assert_eq!(code, 0, "{stderr}");
    for command in commands() {
        let written = fs::read_to_string(dir.path().join(format!("milepost-{command}.1"))).unwrap();
        assert!(written.contains(".SH OPTIONS"), "{written}");
    }
    let serve = fs::read_to_string(dir.path().join("milepost-serve.1")).unwrap();
    assert!(serve.contains("MILEPOST_LISTEN"), "the pages name the variables of the settings");
    let (code, _, stderr) = milepost(&["man", dir.path().join("missing").to_str().unwrap()]).await;
    assert_eq!((code, stderr.lines().count()), (1, 1), "{stderr}");
}

#[test]
fn the_settings_file_of_the_package_names_settings_with_values_that_they_take() {
    let mut cli = Cli::command();
    cli.build();
    let serve = cli.find_subcommand("serve").unwrap();
    let text = page("packaging/milepost.env");
    let lines = text.lines().filter_map(|line| line.strip_prefix('#')?.split_once("='"));
    let mut settings = 0;
    for (name, value) in lines.filter(|(name, _)| !name.contains(' ')) {
        let value = value.strip_suffix('\'').unwrap_or_else(|| panic!("{name} has no closing quote"));
        let setting = serve.get_arguments().find(|setting| setting.get_env().is_some_and(|env| env == name));
        let setting = setting.unwrap_or_else(|| panic!("{name} is no setting"));
        if matches!(setting.get_action(), ArgAction::SetTrue) {
            assert_eq!(value, "true", "{name}");
        } else {
            let flag = format!("--{}={value}", setting.get_long().unwrap());
            Cli::command().try_get_matches_from(["milepost", "serve", &flag]).unwrap();
        }
        settings += 1;
    }
    assert_eq!(settings, text.matches("='").count() - 1, "all lines but the one that explains the form");
}
