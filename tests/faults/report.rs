//! The report that a campaign prints: operations, faults and violations.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use crate::{
    campaign::CampaignResult,
    checker::{Guarantee, Violation, event_timeline, is_fault_free},
    fault::Fault,
    fault_injector::{InjectedFault, RECOVERY_LIMIT},
    history::{Body, Outcome},
    hostile::Answers,
};

/// How many violations of each guarantee are printed.
const MAX_PRINTED: usize = 5;

pub fn report(result: &CampaignResult) -> String {
    let mut text = String::new();
    operations(result, &mut text);
    hostile_tenant(result, &mut text);
    faults(result, &mut text);
    violations(result, &mut text);
    text
}

/// What the hostile tenant was answered, how long the appends of all others took meanwhile,
/// and the memory of the servers.
fn hostile_tenant(result: &CampaignResult, text: &mut String) {
    let history = &result.history;
    let _ = write!(
        text,
        "\n{:<40}{:>9} {:>9} {:>9} {:>11}\n",
        "the hostile tenant", "accepted", "refused", "limited", "unanswered"
    );
    for (load, Answers { accepted, refused, limited, unanswered }) in &history.hostile {
        let name = load.name();
        let _ = writeln!(text, "{name:<40}{accepted:>9} {refused:>9} {limited:>9} {unanswered:>11}");
    }
    let appends = history.batches.iter().flat_map(|batch| &batch.attempts);
    let answered = appends.filter(|attempt| matches!(attempt.outcome, Outcome::Appended(_)));
    let undisturbed = answered
        .filter(|attempt| is_fault_free(history, attempt.replica, attempt.sent_at, attempt.ended_at))
        .map(|attempt| attempt.ended_at - attempt.sent_at);
    let mut times: Vec<u128> = undisturbed.map(|time| time.as_millis()).collect();
    times.sort_unstable();
    let [median, late, longest] =
        [500, 990, 1_000].map(|permille| times.get(times.len() * permille / 1_000).or(times.last()));
    if let (Some(median), Some(late), Some(longest)) = (median, late, longest) {
        let _ = writeln!(
            text,
            "appends of the others without a fault: median {median} ms, p99 {late} ms, longest {longest} ms"
        );
    }
    let mib = |bytes: usize| bytes / 1024 / 1024;
    for replica in 0..2 {
        let peaks = history.memory_peaks.iter().filter(|peak| peak.replica == replica);
        let peaks: Vec<String> = peaks.map(|peak| mib(peak.bytes).to_string()).collect();
        let (peaks, bound) = (peaks.join(", "), mib(history.memory_bound_bytes));
        let _ = writeln!(text, "memory of server {replica} at most, by process: {peaks} of {bound} MiB");
    }
}

fn operations(result: &CampaignResult, text: &mut String) {
    let history = &result.history;
    let stored: usize =
        history.final_reads.iter().filter(|read| read.replica == 0).map(|read| read.log.len()).sum();
    let published = history.batches.iter().filter(|batch| batch.order.is_some()).count();
    let attempts = history.batches.iter().flat_map(|batch| &batch.attempts);
    let unanswered = attempts.filter(|attempt| matches!(attempt.outcome, Outcome::Unknown(_))).count();
    let batches_with = |wanted: fn(&Outcome) -> bool| {
        history.batches.iter().filter(|batch| batch.attempts.iter().any(|a| wanted(&a.outcome))).count()
    };
    let acknowledged = batches_with(|outcome| matches!(outcome, Outcome::Appended(_)));
    let refused = batches_with(|outcome| matches!(outcome, Outcome::Refused(_)));
    let streams: usize = history.watchers.iter().map(|record| record.streams.len()).sum();
    let messages = history.watchers.iter().flat_map(|record| &record.streams).flat_map(|s| &s.messages);
    let received: usize = messages
        .map(|message| match &message.body {
            Body::Events(events) => events.len(),
            Body::CaughtUp(..) | Body::Heartbeat | Body::End(..) | Body::ListEnd => 0,
        })
        .sum();
    let credentials = &history.credentials;
    let uses: usize = credentials.iter().map(|record| record.uses.len() + record.streams.len()).sum();
    let lost = history.set_backs.iter().flat_map(|set_back| set_back.logs.values());
    let lost: usize = lost.map(|log| log.events.len() - log.kept).sum();
    let _ = write!(
        text,
        "\n{} jobs, {stored} events stored, {lost} lost by {} failovers\n\
         {} batches appended by calls, {published} published; {acknowledged} acknowledged, {refused} refused, \
         {unanswered} answers lost\n\
         {streams} streams of {} watchers opened, {} messages with {received} events received\n\
         {} credentials made and ended, used {uses} times\n",
        history.jobs.len(),
        history.set_backs.len(),
        history.batches.len() - published,
        history.watchers.len(),
        result.messages,
        credentials.len(),
    );
}

/// Median and longest, in milliseconds.
fn median_and_longest(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let (Some(longest), median) = (times.last(), times.get(times.len() / 2)) else { return String::new() };
    format!("{:>8} {:>8}", median.unwrap_or(longest).as_millis(), longest.as_millis())
}

fn faults(result: &CampaignResult, text: &mut String) {
    let mut kinds: BTreeMap<Fault, Vec<&InjectedFault>> = BTreeMap::new();
    for injected in &result.injected_faults {
        kinds.entry(injected.fault).or_default().push(injected);
    }
    let _ = write!(
        text,
        "\n{:<32}{:>6}   without service, ms   until recovered, ms\n{:<38}{:>11} {:>8} {:>14} {:>8}\n",
        "fault", "times", "", "median", "longest", "median", "longest"
    );
    for (fault, injected_faults) in &kinds {
        let outages = || injected_faults.iter().flat_map(|injected| injected.outages);
        let _ = writeln!(
            text,
            "{:<32}{:>6}  {}      {}",
            fault.name(),
            injected_faults.len(),
            median_and_longest(outages().map(|outage| outage.longest_gap).collect()),
            median_and_longest(outages().map(|outage| outage.until_recovered).collect()),
        );
    }
    let _ = writeln!(text, "{:<32}{:>6}", "all", result.injected_faults.len());
    for injected in result.slow_recoveries() {
        let _ = writeln!(
            text,
            "SLOW RECOVERY: {:.3} s: {}: a replica did not append within {RECOVERY_LIMIT:?} after {:.3} s: {:?}",
            injected.began_at.as_secs_f64(),
            injected.what,
            injected.healed_at.as_secs_f64(),
            injected.outages,
        );
    }
}

fn violations(result: &CampaignResult, text: &mut String) {
    let mut kinds: BTreeMap<Guarantee, Vec<&Violation>> = BTreeMap::new();
    for violation in &result.violations {
        kinds.entry(violation.guarantee).or_default().push(violation);
    }
    let _ = writeln!(text, "\n{} violations", result.violations.len());
    for (guarantee, violations) in kinds {
        let _ = writeln!(text, "\n{guarantee}: {} violations", violations.len());
        // One message may cause many equal violations.
        let mut distinct = violations.clone();
        distinct.dedup_by_key(|violation| &violation.what);
        for violation in distinct.into_iter().take(MAX_PRINTED) {
            let event = violation.event.as_deref();
            let _ = writeln!(
                text,
                "- {} {}",
                event.map(|id| format!("event {id}:")).unwrap_or_default(),
                violation.what
            );
            for line in event.map(|id| event_timeline(&result.history, id)).unwrap_or_default() {
                let _ = writeln!(text, "    {line}");
            }
        }
    }
}
