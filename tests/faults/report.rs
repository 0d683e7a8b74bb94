//! What a campaign did and found, for people.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use crate::{
    campaign::Finding,
    checker::{Guarantee, Violation, biography},
    history::{Body, Outcome},
    nemesis::{Episode, Fault, PROMISE},
};

/// Violations of one guarantee that are told in full.
const TOLD: usize = 5;

pub fn report(finding: &Finding) -> String {
    let mut text = String::new();
    operations(finding, &mut text);
    faults(finding, &mut text);
    violations(finding, &mut text);
    text
}

fn operations(finding: &Finding, text: &mut String) {
    let history = &finding.history;
    let stored: usize =
        history.reads.iter().filter(|read| read.replica == 0).map(|read| read.log.len()).sum();
    let published = history.batches.iter().filter(|batch| batch.order.is_some()).count();
    let attempts = history.batches.iter().flat_map(|batch| &batch.attempts);
    let lost = attempts.filter(|attempt| matches!(attempt.outcome, Outcome::Unknown(_))).count();
    let answered = |wanted: fn(&Outcome) -> bool| {
        history.batches.iter().filter(|batch| batch.attempts.iter().any(|a| wanted(&a.outcome))).count()
    };
    let acknowledged = answered(|outcome| matches!(outcome, Outcome::Appended(_)));
    let refused = answered(|outcome| matches!(outcome, Outcome::Refused(_)));
    let streams: usize = history.chains.iter().map(|chain| chain.streams.len()).sum();
    let messages = history.chains.iter().flat_map(|chain| &chain.streams).flat_map(|s| &s.messages);
    let seen: usize = messages
        .map(|message| match &message.body {
            Body::Events(events) => events.len(),
            Body::CaughtUp(_) | Body::Heartbeat | Body::Ended(..) | Body::Listed => 0,
        })
        .sum();
    let _ = write!(
        text,
        "\n{} jobs, {stored} events stored\n\
         {} batches appended by calls, {published} published; {acknowledged} acknowledged, {refused} refused, \
         {lost} answers lost\n\
         {streams} streams of {} watchers opened, {} messages with {seen} events received\n",
        history.jobs.len(),
        history.batches.len() - published,
        history.chains.len(),
        finding.messages,
    );
}

/// Median and longest, in milliseconds.
fn median_and_longest(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let (Some(longest), median) = (times.last(), times.get(times.len() / 2)) else { return String::new() };
    format!("{:>8} {:>8}", median.unwrap_or(longest).as_millis(), longest.as_millis())
}

fn faults(finding: &Finding, text: &mut String) {
    let mut kinds: BTreeMap<Fault, Vec<&Episode>> = BTreeMap::new();
    for episode in &finding.episodes {
        kinds.entry(episode.fault).or_default().push(episode);
    }
    let _ = write!(
        text,
        "\n{:<32}{:>6}   without service, ms   until it was back, ms\n{:<38}{:>11} {:>8} {:>14} {:>8}\n",
        "fault", "times", "", "median", "longest", "median", "longest"
    );
    for (fault, episodes) in &kinds {
        let outages = || episodes.iter().flat_map(|episode| episode.outages);
        let _ = writeln!(
            text,
            "{:<32}{:>6}  {}      {}",
            fault.name(),
            episodes.len(),
            median_and_longest(outages().map(|outage| outage.without).collect()),
            median_and_longest(outages().map(|outage| outage.until_back).collect()),
        );
    }
    let _ = writeln!(text, "{:<32}{:>6}", "all", finding.episodes.len());
    for episode in finding.late() {
        let _ = writeln!(
            text,
            "LATE: {:.3} s: {}: not back within {PROMISE:?} of {:.3} s: {:?}",
            episode.began.as_secs_f64(),
            episode.what,
            episode.healed.as_secs_f64(),
            episode.outages,
        );
    }
}

fn violations(finding: &Finding, text: &mut String) {
    let mut kinds: BTreeMap<Guarantee, Vec<&Violation>> = BTreeMap::new();
    for violation in &finding.violations {
        kinds.entry(violation.guarantee).or_default().push(violation);
    }
    let _ = writeln!(text, "\n{} violations", finding.violations.len());
    for (guarantee, violations) in kinds {
        let _ = writeln!(text, "\n{guarantee}: {} violations", violations.len());
        // One message may make many of the same.
        let mut told = violations.clone();
        told.dedup_by_key(|violation| &violation.what);
        for violation in told.into_iter().take(TOLD) {
            let event = violation.event.as_deref();
            let _ = writeln!(
                text,
                "- {} {}",
                event.map(|id| format!("event {id}:")).unwrap_or_default(),
                violation.what
            );
            for line in event.map(|id| biography(&finding.history, id)).unwrap_or_default() {
                let _ = writeln!(text, "    {line}");
            }
        }
    }
}
