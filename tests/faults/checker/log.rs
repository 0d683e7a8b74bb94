//! Compares the requests of writers and their answers with the logs after the
//! campaign.

use std::{collections::HashMap, sync::Arc};

use milepost_client::pb;
use tonic::Code;

use super::{Guarantee, IndexedHistory, Log, Origin, Violations, losses::Loss};
use crate::history::{Attempt, Batch, Cancellation, Close, Moment, Outcome, Refusal, UnknownReason};

pub fn check(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    for (job, log) in indexed.logs.iter().enumerate() {
        check_log(indexed, job, log, violations);
    }
    let mut published: HashMap<(&str, usize), Vec<&Batch>> = HashMap::new();
    for batch in &indexed.history.batches {
        check_batch(indexed, batch, violations);
        if batch.order.is_some() {
            published.entry((&batch.writer, batch.job)).or_default().push(batch);
        }
    }
    for mut batches in published.into_values() {
        batches.sort_by_key(|batch| batch.order);
        check_published(indexed, &batches, violations);
    }
    for close in &indexed.history.closes {
        check_close(indexed, close, violations);
    }
    for cancellation in &indexed.history.cancellations {
        check_cancellation(indexed, cancellation, violations);
    }
    for read in indexed.history.final_reads.iter().filter(|read| read.replica == 0) {
        check_server_events(&read.found, &read.log, violations);
    }
}

/// Checks the events that the server alone writes: a `silent` one only after as long a silence of
/// the provider as the job allows, at most one until the provider's next event, and at most one
/// request of a cancellation.
fn check_server_events(job: &pb::Job, log: &[Arc<pb::Event>], violations: &mut Violations) {
    let nanos = |at: Option<prost_types::Timestamp>| {
        let at = at.unwrap_or_default();
        i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos)
    };
    let longest =
        job.max_silence.map(|length| i128::from(length.seconds) * 1_000_000_000 + i128::from(length.nanos));
    let (mut since, mut silent, mut cancellations) = (nanos(job.created_at), false, 0);
    for event in log {
        let at = nanos(event.created_at);
        match event.kind() {
            pb::EventKind::Silent => {
                if std::mem::replace(&mut silent, true) {
                    let what = "a second `silent` event without an event of the provider between";
                    violations.add(Guarantee::Unique, Some(&event.id), what);
                }
                if longest.is_none_or(|longest| at - since < longest) {
                    let what = format!(
                        "a `silent` event {} ns after the provider's last event; the job allows {longest:?}",
                        at - since
                    );
                    violations.add(Guarantee::Contract, Some(&event.id), what);
                }
            }
            pb::EventKind::CancellationRequested => {
                cancellations += 1;
                if cancellations > 1 {
                    let what = "a second request of a cancellation";
                    violations.add(Guarantee::Unique, Some(&event.id), what);
                }
            }
            _ => (since, silent) = (at, false),
        }
    }
}

fn check_cancellation(
    indexed: &IndexedHistory<'_>,
    cancellation: &Cancellation,
    violations: &mut Violations,
) {
    let Cancellation { job, reason, sent_at, outcome } = cancellation;
    if indexed.is_gone(*job) || indexed.losses_after(*job, *sent_at).next().is_some() {
        return;
    }
    let log = &indexed.logs[*job].events;
    let stored = log.iter().find(|event| event.kind() == pb::EventKind::CancellationRequested);
    let is_right = match (outcome, stored) {
        (Ok(existed), Some(event)) => *existed || event.name == *reason,
        // It was closed without.
        (Err(refusal), stored) => refusal.code == Code::FailedPrecondition && stored.is_none(),
        (Ok(_), None) => false,
    };
    if !is_right {
        let what = format!("RequestCancellation was answered by {outcome:?}, stored is {stored:?}");
        violations.add(Guarantee::Durable, stored.map(|event| event.id.as_str()), what);
    }
}

fn check_close(indexed: &IndexedHistory<'_>, close: &Close, violations: &mut Violations) {
    let log = &indexed.logs[close.job];
    // The job may have been closed by an event that is lost, and may be lost itself.
    let explains = |loss: Loss<'_>| match (&close.outcome, loss.last()) {
        (Ok(closed), Some(last)) => {
            last.kind() == pb::EventKind::Close
                && last.sequence == closed.last_sequence
                && (closed.existed || last.name == close.reason)
        }
        (Err(refusal), Some(last)) if refusal.code == Code::FailedPrecondition => {
            last.kind() == pb::EventKind::Complete
        }
        _ => false,
    };
    let is_gone = matches!(&close.outcome, Err(refusal) if refusal.code == Code::NotFound)
        && indexed.is_gone(close.job);
    if is_gone || indexed.losses_after(close.job, close.sent_at).any(explains) {
        return;
    }
    let last = log.events.last();
    let kind = last.map(|event| event.kind());
    let id = last.map(|event| event.id.as_str());
    match &close.outcome {
        Ok(_) if kind != Some(pb::EventKind::Close) => {
            let what = "CloseJob was acknowledged, but the job's last event is no `close`";
            violations.add(Guarantee::Durable, id, what);
        }
        Ok(closed) => {
            if !closed.existed && last.is_some_and(|event| event.name != close.reason) {
                let what = format!(
                    "CloseJob answered that it closed the job for {:?}, stored is another reason",
                    close.reason
                );
                violations.add(Guarantee::Unique, id, what);
            }
            if usize::try_from(closed.last_sequence) != Ok(log.events.len()) {
                let what = format!(
                    "CloseJob was answered by {closed:?}, but {} events are stored",
                    log.events.len()
                );
                violations.add(Guarantee::Terminating, id, what);
            }
        }
        Err(Refusal { code: Code::FailedPrecondition, .. }) if kind == Some(pb::EventKind::Complete) => {}
        Err(refusal) => {
            let what = format!("CloseJob was refused by {refusal:?}, but the job's last event is {kind:?}");
            violations.add(Guarantee::Contract, id, what);
        }
    }
}

/// Checks a log by itself, that it has an order that the answers allow, and that a recorded request sent each of its events.
fn check_log(indexed: &IndexedHistory<'_>, job: usize, log: &Log, violations: &mut Violations) {
    if log.index_of.len() != log.events.len() {
        violations.add(
            Guarantee::Unique,
            None,
            format!("job {}: an event id is stored twice", indexed.history.jobs[job].id),
        );
    }
    check_states(indexed, job, &log.events, violations);
    for (event, origin) in log.events.iter().zip(&log.origins) {
        if let Origin::Unknown = origin {
            violations.add(Guarantee::Unique, Some(&event.id), "stored, but no recorded request sent it");
        }
    }
    // Backwards through the log: each event must have been first sent before any later
    // event was acknowledged.
    let mut earliest_answer = Moment::MAX;
    for (event, &origin) in log.events.iter().zip(&log.origins).rev() {
        if indexed.first_sent_at(origin) > earliest_answer {
            let what = "stored before an event that was acknowledged before this one was first sent";
            violations.add(Guarantee::Ordered, Some(&event.id), what);
        }
        let answered = match origin {
            Origin::Batch(number) => indexed.acknowledged_at(&indexed.history.batches[number]),
            Origin::Close(number) => Some(indexed.history.closes[number].ended_at),
            Origin::Cancellation(_) | Origin::Server | Origin::Unknown => None,
        };
        earliest_answer = earliest_answer.min(answered.unwrap_or(Moment::MAX));
    }
}

/// Checks the sequences, the states and the end of a log.
pub(super) fn check_states(
    indexed: &IndexedHistory<'_>,
    job: usize,
    events: &[Arc<pb::Event>],
    violations: &mut Violations,
) {
    let mut replay = indexed.replay(job);
    for (index, event) in events.iter().enumerate() {
        let id = Some(event.id.as_str());
        if event.sequence != i64::try_from(index + 1).unwrap() {
            let what = format!("sequence {} is stored where {} is expected", event.sequence, index + 1);
            violations.add(Guarantee::Ordered, id, what);
        }
        if replay.closed {
            violations.add(Guarantee::Terminating, id, "stored after the event that closed the job");
        }
        replay.apply(event.kind(), &event.step_tag, event.step_percent);
        if event.status() != replay.status || event.progress != Some(replay.progress) {
            let what = format!(
                "stored with {:?} {:?}, by the rules it is {:?} {:?}",
                event.status(),
                event.progress,
                replay.status,
                replay.progress
            );
            violations.add(Guarantee::Deterministic, id, what);
        }
    }
}

fn check_batch(indexed: &IndexedHistory<'_>, batch: &Batch, violations: &mut Violations) {
    let log = &indexed.logs[batch.job];
    let is_touched = indexed.is_touched(batch);
    // The first event of a batch is sent again in other batches, and is stored by one of
    // them if the batch was lost.
    let skipped = if is_touched { batch.repeats.max(1) } else { batch.repeats };
    let new_events = &batch.events[skipped..];
    let indexes: Vec<usize> =
        new_events.iter().filter_map(|event| log.index_of.get(&event.id).copied()).collect();
    let first = batch.events.first().map(|event| event.id.as_str());
    if !indexes.is_empty() && indexes.len() < new_events.len() {
        let what = format!("{} of the {} events of a batch are stored", indexes.len(), new_events.len());
        violations.add(Guarantee::Atomic, first, what);
    }
    if indexes.windows(2).any(|pair| pair[1] != pair[0] + 1) {
        violations.add(
            Guarantee::Atomic,
            first,
            format!("the events of a batch are not consecutive: indexes {indexes:?}"),
        );
    }
    for event in &batch.events {
        if let Some(&index) = log.index_of.get(&event.id)
            && !is_same(event, &log.events[index])
        {
            let what = format!("stored with another content than was sent: {event:?}");
            violations.add(Guarantee::Durable, Some(&event.id), what);
        }
    }
    if let (Some(expected), Some(&index)) = (batch.expected, indexes.first())
        && !is_touched
        && usize::try_from(expected) != Ok(index)
    {
        let what = format!(
            "expected_sequence was {expected}, but the batch is stored from sequence {} on",
            index + 1
        );
        violations.add(Guarantee::Contract, first, what);
    }
    for (number, attempt) in batch.attempts.iter().enumerate() {
        match &attempt.outcome {
            Outcome::Appended(answer) => check_answer(indexed, batch, number, answer, violations),
            Outcome::Refused(refusal) => check_refusal(indexed, batch, attempt, refusal, violations),
            Outcome::Unknown(UnknownReason::Broken(why))
                if indexed.is_fault_free(attempt.replica, attempt.sent_at, attempt.ended_at) =>
            {
                let what = format!("an append failed although no fault affected the server: {why}");
                violations.add(Guarantee::InTime, first, what);
            }
            Outcome::Unknown(_) => {}
        }
    }
}

fn check_answer(
    indexed: &IndexedHistory<'_>,
    batch: &Batch,
    attempt: usize,
    answer: &[pb::AppendedEvent],
    violations: &mut Violations,
) {
    let log = &indexed.logs[batch.job];
    if answer.len() != batch.events.len() {
        let what = format!("{} events were sent, the answer has {}", batch.events.len(), answer.len());
        return violations.add(
            Guarantee::Contract,
            batch.events.first().map(|event| event.id.as_str()),
            what,
        );
    }
    let answered_before =
        batch.attempts[..attempt].iter().any(|attempt| matches!(attempt.outcome, Outcome::Appended(_)));
    for (n, (event, appended)) in batch.events.iter().zip(answer).enumerate() {
        let id = Some(event.id.as_str());
        if event.id != appended.id {
            violations.add(
                Guarantee::Contract,
                id,
                format!("the answer has the id {} in its place", appended.id),
            );
            continue;
        }
        let lost = indexed.losses_after(batch.job, batch.attempts[attempt].sent_at);
        let mut lost = lost.filter_map(|loss| loss.event(appended.sequence));
        let lost = lost.find(|lost| lost.id == event.id);
        let stored = log.index_of.get(&event.id).map(|&index| &log.events[index]);
        // The answer may be of a time before the event was lost and sent again.
        let stored = stored.filter(|stored| stored.sequence == appended.sequence).or(lost).or(stored);
        let Some(stored) = stored else {
            let what = format!("acknowledged as sequence {}, but not stored", appended.sequence);
            violations.add(Guarantee::Durable, id, what);
            continue;
        };
        if stored.sequence != appended.sequence {
            let what =
                format!("acknowledged as sequence {}, stored as {}", appended.sequence, stored.sequence);
            violations.add(Guarantee::Durable, id, what);
        } else if ![Some(stored), lost]
            .into_iter()
            .flatten()
            .any(|stored| (stored.status, stored.progress) == (appended.status, appended.progress))
        {
            violations.add(
                Guarantee::Deterministic,
                id,
                format!("acknowledged as {appended:?}, stored as {stored:?}"),
            );
        }
        let was_acknowledged = answered_before || n < batch.repeats;
        let must_have_existed = was_acknowledged && !log.lost_ids.contains(&event.id);
        let may_have_existed = was_acknowledged || attempt > 0;
        if appended.existed && !may_have_existed || !appended.existed && must_have_existed {
            violations.add(
                Guarantee::Unique,
                id,
                format!("answered with a wrong `existed`: {}", appended.existed),
            );
        }
    }
}

/// Checks that a refused batch is not stored, and that its refusal has a reason.
fn check_refusal(
    indexed: &IndexedHistory<'_>,
    batch: &Batch,
    attempt: &Attempt,
    refusal: &Refusal,
    violations: &mut Violations,
) {
    let log = &indexed.logs[batch.job];
    let first = batch.events.first().map(|event| event.id.as_str());
    let stored = batch.events[batch.repeats..].iter().any(|event| log.index_of.contains_key(&event.id))
        || batch.repeats == batch.events.len() && !indexed.is_touched(batch);
    if stored {
        let what = format!("refused by {refusal:?}, but stored");
        violations.add(Guarantee::Unique, first, what);
        return;
    }
    let has_reason = match refusal.code {
        Code::Aborted => match (batch.expected, refusal.last_sequence) {
            (Some(expected), Some(last)) => {
                let possible = indexed.acknowledged_before(batch.job, attempt.sent_at)
                    ..=indexed.possible_by(batch.job, attempt.ended_at);
                let was_possible = |loss: Loss<'_>| loss.event(last).is_some();
                let mut losses = indexed.losses_after(batch.job, attempt.sent_at);
                expected != last && (possible.contains(&last) || losses.any(was_possible))
            }
            // Refusals in publish streams are recorded without a last sequence. They are
            // wrong unless the server has written an event before, or events are lost: a
            // publisher is its job's only writer, and counts what it has sent.
            _ => {
                let before = |event: &&Arc<pb::Event>| {
                    batch.expected.is_some_and(|expected| event.sequence <= expected + 1)
                };
                log.events.iter().filter(before).any(|event| is_written_by_server(event))
                    || indexed.losses(batch.job).any(|loss| attempt.ended_at >= loss.set_back.lost_from)
            }
        },
        Code::NotFound => indexed.is_gone(batch.job),
        Code::FailedPrecondition => {
            let last = log.events.last().zip(log.origins.last());
            let was_closed = |loss: Loss<'_>| loss.last().is_some_and(|last| is_closing(last));
            let mut losses = indexed.losses_after(batch.job, attempt.sent_at);
            losses.any(was_closed)
                || last.is_some_and(|(event, &origin)| {
                    is_closing(event) && indexed.first_sent_at(origin) < attempt.ended_at
                })
        }
        _ => false,
    };
    if !has_reason {
        violations.add(
            Guarantee::Contract,
            first,
            format!("refused by {refusal:?} without a reason for that"),
        );
    }
}

pub(super) fn is_closing(event: &pb::Event) -> bool {
    matches!(event.kind(), pb::EventKind::Complete | pb::EventKind::Close)
}

/// Checks the batches of one publisher for one job, in the order in which they were
/// sent: their events are stored in this order, and none after a batch that was
/// neither stored nor refused.
fn check_published(indexed: &IndexedHistory<'_>, batches: &[&Batch], violations: &mut Violations) {
    let mut last = None;
    let mut one_is_missing = false;
    for batch in batches {
        let first = &batch.events[batch.repeats];
        let refused = batch.attempts.iter().any(|attempt| matches!(attempt.outcome, Outcome::Refused(_)));
        let index = indexed.logs[batch.job].index_of.get(&first.id).copied();
        match index {
            None => one_is_missing |= !refused && !indexed.is_touched(batch),
            Some(index) => {
                if one_is_missing || last.is_some_and(|last| index < last) {
                    let what = "published after a batch that is not stored before this one";
                    violations.add(Guarantee::Ordered, Some(&first.id), what);
                }
                last = Some(index);
            }
        }
    }
}

/// Whether no writer sent the event.
fn is_written_by_server(event: &pb::Event) -> bool {
    matches!(event.kind(), pb::EventKind::Silent | pb::EventKind::CancellationRequested)
}

/// Whether an event is stored as it was sent; times are stored in microseconds.
fn is_same(sent: &pb::NewEvent, stored: &pb::Event) -> bool {
    let occurred_at = sent.occurred_at.map(|mut at| {
        at.nanos -= at.nanos % 1_000;
        at
    });
    sent.kind == stored.kind
        && sent.name == stored.name
        && sent.step_tag == stored.step_tag
        && sent.step_percent == stored.step_percent
        && sent.metadata.clone().unwrap_or_default() == stored.metadata.clone().unwrap_or_default()
        && occurred_at == stored.occurred_at
}
