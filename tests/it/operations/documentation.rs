//! The pages of the documentation, whose commands and tables the tests hold against milepost.

use std::collections::BTreeSet;

use clap::CommandFactory as _;
use milepost::cli::Cli;

use super::metrics::wait_for_sample;
use crate::support::{TestServer, page};

#[test]
fn settings_md_lists_every_setting_of_serve_with_its_default() {
    let mut cli = Cli::command();
    cli.build();
    let page = page("docs/settings.md");
    let rows: Vec<Vec<&str>> =
        page.lines().filter(|line| line.starts_with("| `--")).map(|line| line.split('|').collect()).collect();
    let settings = cli.find_subcommand("serve").unwrap().get_arguments();
    let mut flags = BTreeSet::new();
    for setting in settings.filter(|setting| setting.get_id() != "help") {
        let flag = format!("`--{}`", setting.get_long().expect("a flag"));
        let [row] = rows.iter().filter(|row| row[1].contains(&flag)).collect::<Vec<_>>()[..] else {
            panic!("{flag} is not in one row");
        };
        // A default that is hidden depends on the machine.
        let defaults = setting.get_default_values().iter().filter(|_| !setting.is_hide_default_value_set());
        for default in defaults.map(|value| value.to_str().unwrap()) {
            let shown = if default == "false" { "off".to_owned() } else { format!("`{default}`") };
            assert!(row[2].contains(&shown), "{flag} has the default {default}, not {}", row[2]);
        }
        flags.insert(flag);
    }
    let listed: BTreeSet<String> =
        rows.iter().flat_map(|row| row[1].split(',')).map(|flag| flag.trim().to_owned()).collect();
    assert_eq!(listed, flags);
}

#[test]
fn command_line_md_names_every_command() {
    let page = page("docs/command-line.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `milepost ")).collect();
    for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("milepost {}", command.get_name());
        let of_group: Vec<String> = command
            .get_subcommands()
            .map(|subcommand| format!("`{name} {}`", subcommand.get_name()))
            .collect();
        for name in if of_group.is_empty() { vec![format!("`{name}`")] } else { of_group } {
            assert_eq!(rows.iter().filter(|row| row.contains(&name)).count(), 1, "{name}");
        }
    }
}

/// The families of metrics that a text names.
fn families(text: &str) -> BTreeSet<&str> {
    let names = text.split(|c: char| !c.is_ascii_lowercase() && c != '_');
    names
        .filter(|name| name.starts_with("milepost_") || name.starts_with("process_"))
        .map(|name| {
            let suffixes = ["_bucket", "_sum", "_count", "_total", "_info"];
            suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn monitoring_md_names_the_metrics_that_a_server_exports_and_no_others() {
    let server = TestServer::start().await;
    server.customer().await;
    let sign_up =
        "milepost_calls_total{method=\"milepost.v1.AuthService/SignUp\",code=\"OK\",protocol=\"grpc\"}";
    let samples = wait_for_sample(&server, sign_up, |calls| calls > 0.0).await;
    let series = samples.into_keys().collect::<Vec<_>>().join("\n");
    assert_eq!(families(&page("docs/monitoring.md")), families(&series));
}
