//! What writers sent and were told, against what is stored in the end.

use std::collections::HashMap;

use milepost::pb;
use tonic::Code;

use super::{Case, Guarantee, Log, Origin, Violations};
use crate::history::{Attempt, Batch, Close, Lost, Moment, Outcome, Refusal};

pub fn check(case: &Case<'_>, violations: &mut Violations) {
    for (job, log) in case.logs.iter().enumerate() {
        check_log(case, job, log, violations);
    }
    let mut published: HashMap<(&str, usize), Vec<&Batch>> = HashMap::new();
    for batch in &case.history.batches {
        check_batch(case, batch, violations);
        if batch.order.is_some() {
            published.entry((&batch.writer, batch.job)).or_default().push(batch);
        }
    }
    for mut batches in published.into_values() {
        batches.sort_by_key(|batch| batch.order);
        check_published(case, &batches, violations);
    }
    for close in &case.history.closes {
        check_close(&case.logs[close.job], close, violations);
    }
}

fn check_close(log: &Log, close: &Close, violations: &mut Violations) {
    let last = log.events.last();
    let kind = last.map(|event| event.kind());
    let id = last.map(|event| event.id.as_str());
    match &close.outcome {
        Ok(_) if kind != Some(pb::EventKind::Close) => {
            let what = "CloseJob was answered and the job's last event is no `close`";
            violations.add(Guarantee::Durable, id, what);
        }
        Ok(closed) => {
            if !closed.existed && last.is_some_and(|event| event.name != close.reason) {
                let what = format!("closed for {:?}, it was said, and it was not so before", close.reason);
                violations.add(Guarantee::Unique, id, what);
            }
            if usize::try_from(closed.last_sequence) != Ok(log.events.len()) {
                let what = format!("CloseJob was answered as {closed:?} of {} events", log.events.len());
                violations.add(Guarantee::Terminating, id, what);
            }
        }
        Err(Refusal { code: Code::FailedPrecondition, .. }) if kind == Some(pb::EventKind::Complete) => {}
        Err(refusal) => {
            let what = format!("CloseJob was refused by {refusal:?}, and the job ends with {kind:?}");
            violations.add(Guarantee::Contract, id, what);
        }
    }
}

/// The log by itself, and that it says nothing that nobody sent.
fn check_log(case: &Case<'_>, job: usize, log: &Log, violations: &mut Violations) {
    if log.places.len() != log.events.len() {
        violations.add(
            Guarantee::Unique,
            None,
            format!("job {}: an id is stored twice", case.history.jobs[job].id),
        );
    }
    let mut film = case.film(job);
    let mut later = Moment::MAX;
    for (place, event) in log.events.iter().enumerate() {
        let id = Some(event.id.as_str());
        if event.sequence != i64::try_from(place + 1).unwrap() {
            let what = format!("sequence {} stands at place {}", event.sequence, place + 1);
            violations.add(Guarantee::Ordered, id, what);
        }
        if film.closed {
            violations.add(Guarantee::Terminating, id, "an event after the job was closed");
        }
        film.play(event.kind(), &event.step_tag);
        if event.status() != film.status || event.progress != Some(film.progress) {
            let what = format!(
                "stored with {:?} {:?}, and by the rules it is {:?} {:?}",
                event.status(),
                event.progress,
                film.status,
                film.progress
            );
            violations.add(Guarantee::Deterministic, id, what);
        }
        if let Origin::Nobody = log.origins[place] {
            violations.add(Guarantee::Unique, id, "stored, and nobody sent it");
        }
    }
    // From the end: what was acknowledged before another was sent is before it.
    for (event, &origin) in log.events.iter().zip(&log.origins).rev() {
        if case.first_sent(origin) > later {
            let what = "stands before an event that had been acknowledged when it was first sent";
            violations.add(Guarantee::Ordered, Some(&event.id), what);
        }
        let answered = match origin {
            Origin::Batch(number) => case.history.batches[number].answer().map(|(attempt, _)| attempt.over),
            Origin::Close(number) => Some(case.history.closes[number].over),
            Origin::Nobody => None,
        };
        later = later.min(answered.unwrap_or(Moment::MAX));
    }
}

fn check_batch(case: &Case<'_>, batch: &Batch, violations: &mut Violations) {
    let log = &case.logs[batch.job];
    let fresh = &batch.events[batch.repeats..];
    let places: Vec<usize> = fresh.iter().filter_map(|event| log.places.get(&event.id).copied()).collect();
    let first = batch.events.first().map(|event| event.id.as_str());
    if !places.is_empty() && places.len() < fresh.len() {
        let what = format!("{} of the {} events of a batch are stored", places.len(), fresh.len());
        violations.add(Guarantee::Atomic, first, what);
    }
    if places.windows(2).any(|pair| pair[1] != pair[0] + 1) {
        violations.add(Guarantee::Atomic, first, format!("the events of a batch are apart, at {places:?}"));
    }
    for event in &batch.events {
        if let Some(&place) = log.places.get(&event.id)
            && !is_same(event, &log.events[place])
        {
            let what = format!("stored with other content than {event:?}");
            violations.add(Guarantee::Durable, Some(&event.id), what);
        }
    }
    if let (Some(expected), Some(&place)) = (batch.expected, places.first())
        && usize::try_from(expected) != Ok(place)
    {
        let what = format!("expected to follow sequence {expected} and is stored as {}", place + 1);
        violations.add(Guarantee::Contract, first, what);
    }
    for (number, attempt) in batch.attempts.iter().enumerate() {
        match &attempt.outcome {
            Outcome::Appended(answer) => check_answer(case, batch, number, answer, violations),
            Outcome::Refused(refusal) => check_refusal(case, batch, attempt, refusal, violations),
            Outcome::Unknown(Lost::Broken(why))
                if case.is_calm(attempt.replica, attempt.sent, attempt.over) =>
            {
                let what = format!("an append came to nothing when all was well: {why}");
                violations.add(Guarantee::Contract, first, what);
            }
            Outcome::Unknown(_) => {}
        }
    }
}

fn check_answer(
    case: &Case<'_>,
    batch: &Batch,
    attempt: usize,
    answer: &[pb::AppendedEvent],
    violations: &mut Violations,
) {
    let log = &case.logs[batch.job];
    if answer.len() != batch.events.len() {
        let what = format!("{} events were sent and {} answered", batch.events.len(), answer.len());
        return violations.add(
            Guarantee::Contract,
            batch.events.first().map(|event| event.id.as_str()),
            what,
        );
    }
    let answered_before =
        batch.attempts[..attempt].iter().any(|attempt| matches!(attempt.outcome, Outcome::Appended(_)));
    for (n, (event, told)) in batch.events.iter().zip(answer).enumerate() {
        let id = Some(event.id.as_str());
        if event.id != told.id {
            violations.add(Guarantee::Contract, id, format!("answered as {}", told.id));
            continue;
        }
        let Some(stored) = log.places.get(&event.id).map(|&place| &log.events[place]) else {
            let what = format!("acknowledged as sequence {} and not stored", told.sequence);
            violations.add(Guarantee::Durable, id, what);
            continue;
        };
        if stored.sequence != told.sequence {
            let what = format!("acknowledged as sequence {}, stored as {}", told.sequence, stored.sequence);
            violations.add(Guarantee::Durable, id, what);
        } else if (stored.status, stored.progress) != (told.status, told.progress) {
            violations.add(
                Guarantee::Deterministic,
                id,
                format!("acknowledged as {told:?}, stored as {stored:?}"),
            );
        }
        let must_have_existed = answered_before || n < batch.repeats;
        let may_have_existed = must_have_existed || attempt > 0;
        if told.existed && !may_have_existed || !told.existed && must_have_existed {
            violations.add(Guarantee::Unique, id, format!("answered with existed {}", told.existed));
        }
    }
}

/// What is refused is not stored; and what is stored is not refused.
fn check_refusal(
    case: &Case<'_>,
    batch: &Batch,
    attempt: &Attempt,
    refusal: &Refusal,
    violations: &mut Violations,
) {
    let log = &case.logs[batch.job];
    let first = batch.events.first().map(|event| event.id.as_str());
    let stored = batch.events[batch.repeats..].iter().any(|event| log.places.contains_key(&event.id))
        || batch.repeats == batch.events.len();
    if stored {
        let what = format!("refused by {refusal:?} although it is stored");
        violations.add(Guarantee::Unique, first, what);
        return;
    }
    let excused = match refusal.code {
        Code::Aborted => match (batch.expected, refusal.last_sequence) {
            (Some(expected), Some(last)) => {
                let can_be =
                    case.acknowledged(batch.job, attempt.sent)..=case.possible(batch.job, attempt.over);
                expected != last && can_be.contains(&last)
            }
            // A publish stream's refusal tells it elsewhere; but who alone
            // writes to a job knows where it ends.
            _ => false,
        },
        Code::FailedPrecondition => {
            let last = log.events.last().zip(log.origins.last());
            last.is_some_and(|(event, &origin)| is_closing(event) && case.first_sent(origin) < attempt.over)
        }
        _ => false,
    };
    if !excused {
        violations.add(Guarantee::Contract, first, format!("refused without a reason by {refusal:?}"));
    }
}

pub(super) fn is_closing(event: &pb::Event) -> bool {
    matches!(event.kind(), pb::EventKind::Complete | pb::EventKind::Close)
}

/// Batches of one writer for one job, in the order sent: each is before the
/// next, and nothing is stored after one that is not.
fn check_published(case: &Case<'_>, batches: &[&Batch], violations: &mut Violations) {
    let mut last = None;
    let mut lost = false;
    for batch in batches {
        let first = &batch.events[batch.repeats];
        let refused = batch.attempts.iter().any(|attempt| matches!(attempt.outcome, Outcome::Refused(_)));
        let place = case.logs[batch.job].places.get(&first.id).copied();
        match place {
            None => lost |= !refused,
            Some(place) => {
                if lost || last.is_some_and(|last| place < last) {
                    let what = "published after a batch that is not stored before it";
                    violations.add(Guarantee::Ordered, Some(&first.id), what);
                }
                last = Some(place);
            }
        }
    }
}

/// Whether what is stored is what was sent.
fn is_same(sent: &pb::NewEvent, stored: &pb::Event) -> bool {
    let occurred_at = sent.occurred_at.map(|mut at| {
        at.nanos -= at.nanos % 1_000;
        at
    });
    sent.kind == stored.kind
        && sent.name == stored.name
        && sent.step_tag == stored.step_tag
        && sent.metadata.clone().unwrap_or_default() == stored.metadata.clone().unwrap_or_default()
        && occurred_at == stored.occurred_at
}
