//! The alerts and the dashboard of `packaging/` against the metrics of a server.

use std::collections::{BTreeMap, BTreeSet};

use milepost_client::pb::ErrorReason;
use serde_json::Value;

use super::metrics::{Samples, wait_for_sample};
use crate::support::{TestServer, page};

/// The labels that Prometheus adds to whatever it scrapes.
const ADDED: [&str; 2] = ["job", "instance"];

/// A query, and the texts that show its labels.
struct Query {
    text: String,
    labels_shown: BTreeSet<String>,
}

/// Each alert's query with the labels in its annotations, as `$labels.NAME`.
fn alerts() -> Vec<Query> {
    let file = page("packaging/alerts.yml");
    let alerts = file.split("- alert: ").skip(1).map(|alert| {
        let text = alert.split("expr: ").nth(1).unwrap().lines().next().unwrap().to_owned();
        Query { text, labels_shown: words_after(alert, "$labels.") }
    });
    alerts.collect()
}

/// Each query of the dashboard, with the labels in its legend, as `{{NAME}}`.
fn dashboard() -> Vec<Query> {
    let file: Value = serde_json::from_str(&page("packaging/grafana.json")).unwrap();
    let panels = file["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let queries = targets.map(|target| {
        let labels_shown = words_after(target["legendFormat"].as_str().unwrap(), "{{");
        Query { text: target["expr"].as_str().unwrap().to_owned(), labels_shown }
    });
    let variables = file["templating"]["list"].as_array().unwrap().iter();
    let variables = variables.filter_map(|variable| variable["definition"].as_str());
    let variables = variables.map(|query| Query { text: query.to_owned(), labels_shown: BTreeSet::new() });
    queries.chain(variables).collect()
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The words that follow a prefix.
fn words_after(text: &str, prefix: &str) -> BTreeSet<String> {
    text.split(prefix).skip(1).map(|rest| rest.split(|c| !is_word(c)).next().unwrap().to_owned()).collect()
}

/// The labels of each series name of a scrape, with their values.
fn labels(samples: &Samples) -> BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>> {
    let mut series: BTreeMap<&str, BTreeMap<&str, BTreeSet<&str>>> = BTreeMap::new();
    for sample in samples.keys() {
        let (name, pairs) = sample.trim_end_matches('}').split_once('{').unwrap_or((sample, ""));
        let labels = series.entry(name).or_default();
        for (label, value) in pairs.split(',').filter_map(|pair| pair.split_once('=')) {
            labels.entry(label).or_default().insert(value.trim_matches('"'));
        }
    }
    series
}

/// Labels, and the values that each may have.
type Matchers<'a> = Vec<(&'a str, Vec<&'a str>)>;

/// The selectors of a query: the names of series, with what stands in braces behind them.
fn selectors(query: &str) -> Vec<(&str, Matchers<'_>)> {
    let starts = ["milepost_", "process_"].map(|prefix| query.match_indices(prefix));
    let starts = starts.into_iter().flatten().map(|(start, _)| &query[start..]);
    let selectors = starts.map(|text| {
        let (name, rest) = text.split_at(text.find(|c| !is_word(c)).unwrap_or(text.len()));
        let matchers = rest.strip_prefix('{').map_or("", |rest| rest.split('}').next().unwrap());
        let matchers = matchers.split(',').filter_map(|matcher| {
            let (label, values) = matcher.split_once(['=', '!'])?;
            Some((label, values.trim_start_matches(['=', '~']).trim_matches('"').split('|').collect()))
        });
        (name, matchers.collect())
    });
    selectors.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_alerts_and_the_dashboard_ask_for_series_and_labels_that_a_server_has() {
    let server = TestServer::start().await;
    server.customer().await;
    let sign_up =
        "milepost_calls_total{method=\"milepost.v1.AuthService/SignUp\",code=\"OK\",protocol=\"grpc\"}";
    let samples = wait_for_sample(&server, sign_up, |calls| calls > 0.0).await;
    let series = labels(&samples);
    for Query { text, labels_shown } in alerts().iter().chain(&dashboard()) {
        let mut known = BTreeSet::from(ADDED);
        let selectors = selectors(text);
        assert!(!selectors.is_empty() || text.starts_with("up{"), "no series: {text}");
        for (name, matchers) in selectors {
            let labels = series.get(name).unwrap_or_else(|| panic!("no server has {name}: {text}"));
            known.extend(labels.keys());
            for (label, wanted) in matchers.into_iter().filter(|(label, _)| !ADDED.contains(label)) {
                let values = labels.get(label).unwrap_or_else(|| panic!("{name} has no {label}: {text}"));
                for value in wanted {
                    // The series of most reasons begin with their first refusal.
                    let reason = format!("ERROR_REASON_{value}");
                    let is_reason = label == "reason" && ErrorReason::from_str_name(&reason).is_some();
                    assert!(is_reason || values.contains(value), "no {label} is {value}: {text}");
                }
            }
        }
        // Behind an aggregation there are the labels that it keeps.
        let aggregated = ["sum", "max", "count"].iter().any(|name| text.contains(&format!("{name}(")));
        let kept = match text.split_once(" by (") {
            Some((_, rest)) => rest.split(')').next().unwrap().split(", ").collect(),
            None if aggregated => BTreeSet::new(),
            None => known.clone(),
        };
        assert!(kept.is_subset(&known), "{kept:?} in {text}");
        assert!(labels_shown.iter().all(|label| kept.contains(label.as_str())), "{labels_shown:?} of {text}");
    }
}
