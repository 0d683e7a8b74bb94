//! The tables of the documentation are complete and true.

use std::collections::BTreeSet;

use clap::CommandFactory as _;
use milepost::cli::Cli;

use crate::{
    metrics::get,
    support::{TestServer, page},
};

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
        for default in setting.get_default_values().iter().map(|value| value.to_str().unwrap()) {
            let shown = if default == "false" { "off".to_owned() } else { format!("`{default}`") };
            assert!(row[2].contains(&shown), "{flag} has the default {default}, not {}", row[2]);
        }
        flags.insert(flag);
    }
    let listed: BTreeSet<String> =
        rows.iter().flat_map(|row| row[1].split(',')).map(|flag| flag.trim().to_owned()).collect();
    assert_eq!(listed, flags);
}

/// The families of metrics that a text names.
fn families(text: &str) -> BTreeSet<&str> {
    let names = text.split(|c: char| !c.is_ascii_lowercase() && c != '_');
    names
        .filter(|name| name.starts_with("milepost_"))
        .map(|name| {
            let suffixes = ["_bucket", "_sum", "_count", "_total", "_info"];
            suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn monitoring_md_names_the_metrics_that_a_server_exports_and_its_alerts_no_others() {
    let server = TestServer::start().await;
    let (_, scraped) = get(server.metrics_address, "/metrics").await;
    let described: String = scraped.lines().filter(|line| line.starts_with("# TYPE ")).collect();
    assert_eq!(families(&page("docs/monitoring.md")), families(&described));
}
