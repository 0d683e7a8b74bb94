//! Checks what everybody is promised while no fault affects a server, whatever the hostile
//! tenant asks for: calls are answered, and the memory of the servers is bounded. The hostile
//! tenant is answered, too, if only by refusals.

use super::{Guarantee, IndexedHistory, Violations};
use crate::{
    context::TIMEOUT,
    history::{FailedCall, Outcome, UnknownReason},
};

pub fn check(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    check_appends(indexed, violations);
    check_calls(indexed, violations);
    check_memory(indexed, violations);
    for (load, answers) in &indexed.history.hostile {
        if answers.accepted + answers.refused == 0 {
            let what = format!("the hostile tenant, {}: never answered: {answers:?}", load.name());
            violations.add(Guarantee::Contract, None, what);
        }
    }
}

/// Appends that failed with a status are checked with their batches.
fn check_appends(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    for batch in &indexed.history.batches {
        for attempt in &batch.attempts {
            let waited = attempt.ended_at.saturating_sub(attempt.sent_at);
            if matches!(attempt.outcome, Outcome::Unknown(UnknownReason::Abandoned))
                && waited >= TIMEOUT
                && indexed.is_fault_free(attempt.replica, attempt.sent_at, attempt.ended_at)
            {
                let what = format!(
                    "{}: an append sent at {:.3} s was not answered by server {} within {waited:?}, although \
                     no fault affected the server",
                    batch.writer,
                    attempt.sent_at.as_secs_f64(),
                    attempt.replica,
                );
                let first = batch.events.first().map(|event| event.id.as_str());
                violations.add(Guarantee::InTime, first, what);
            }
        }
    }
}

fn check_calls(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    for FailedCall { replica, method, sent_at, ended_at, reason } in &indexed.history.failed_calls {
        if indexed.is_fault_free(*replica, *sent_at, *ended_at) {
            let what = format!(
                "{method}, sent at {:.3} s to server {replica}, failed after {:.3} s although no fault \
                 affected the server: {reason:?}",
                sent_at.as_secs_f64(),
                ended_at.saturating_sub(*sent_at).as_secs_f64(),
            );
            violations.add(Guarantee::InTime, None, what);
        }
    }
}

fn check_memory(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    let (bound, mib) = (indexed.history.memory_bound_bytes, 1024 * 1024);
    for peak in indexed.history.memory_peaks.iter().filter(|peak| peak.bytes > bound) {
        let what = format!(
            "a process of server {} took {} MiB of memory, more than the {} MiB of its settings",
            peak.replica,
            peak.bytes / mib,
            bound / mib
        );
        violations.add(Guarantee::Contract, None, what);
    }
}
