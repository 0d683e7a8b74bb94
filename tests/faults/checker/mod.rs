//! Checks a history against the guarantees. The checker knows the documented rules and
//! shares only the protobuf types with the implementation.

mod availability;
mod credentials;
mod log;
mod losses;
mod reads;
mod set_back_watches;
mod streams;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::Arc,
};

use milepost_client::pb;
use milepost_testing::Replay;

use self::losses::{is_lost, losses};
use crate::history::{Attempt, Body, History, Moment, Outcome};

/// The guarantee that a violation breaks, numbered as in the README.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Guarantee {
    Durable = 1,
    Ordered,
    Unique,
    Atomic,
    Complete,
    Resumable,
    Terminating,
    Deterministic,
    Confined,
    /// What holds when commits are lost.
    LostCommits,
    /// What the API promises beyond the nine: `expected_sequence`, refusals, status
    /// codes, availability.
    Contract,
    /// What fails or takes too long although no fault affects it. Only a strict run fails for
    /// this, since a busy machine explains it.
    InTime,
}

#[derive(Clone, Debug)]
pub struct Violation {
    pub guarantee: Guarantee,
    pub what: String,
    /// The id of the event concerned.
    pub event: Option<String>,
}

#[derive(Default)]
pub struct Violations(pub Vec<Violation>);

impl Violations {
    fn add(&mut self, guarantee: Guarantee, event: Option<&str>, what: impl Into<String>) {
        self.0.push(Violation { guarantee, what: what.into(), event: event.map(str::to_owned) });
    }

    /// Adds violations that a busy machine explains.
    fn add_late(&mut self, Self(late): Self) {
        self.0.extend(late.into_iter().map(|late| Violation { guarantee: Guarantee::InTime, ..late }));
    }
}

impl fmt::Display for Guarantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LostCommits => f.write_str("when commits are lost"),
            Self::Contract => f.write_str("contract"),
            Self::InTime => f.write_str("in time"),
            numbered => write!(f, "guarantee {} ({numbered:?})", *numbered as u8),
        }
    }
}

/// The recorded request that appended an event, by its number in the history.
#[derive(Clone, Copy)]
enum Origin {
    Batch(usize),
    Close(usize),
    Cancellation(usize),
    /// A `silent` event, which no request asks for.
    Server,
    Unknown,
}

/// A job's log after the campaign, as replica 0 returned it.
#[derive(Default)]
struct Log {
    events: Vec<Arc<pb::Event>>,
    /// The index in `events` of each event id.
    index_of: HashMap<String, usize>,
    /// Of each event in `events`.
    origins: Vec<Origin>,
    /// Of each event in `events`: the earliest moment at which it can have been stored.
    earliest: Vec<Moment>,
    /// The answered appends in the order of their answers: the moment, and the highest
    /// sequence acknowledged by then.
    acknowledged: Vec<(Moment, i64)>,
    /// The ids of events that were lost. They may have been sent again.
    lost_ids: HashSet<String>,
}

/// The history with an index of each job's log.
struct IndexedHistory<'a> {
    history: &'a History,
    logs: Vec<Log>,
    /// The number of each job id.
    job_numbers: HashMap<&'a str, usize>,
}

/// All violations in a history.
pub fn check(history: &History) -> Vec<Violation> {
    let mut violations = Violations::default();
    let indexed = IndexedHistory::new(history);
    log::check(&indexed, &mut violations);
    losses::check(&indexed, &mut violations);
    reads::check(&indexed, &mut violations);
    streams::check(&indexed, &mut violations);
    credentials::check(&indexed, &mut violations);
    availability::check(&indexed, &mut violations);
    for unexpected in &history.unexpected_answers {
        let at = unexpected.at.as_secs_f64();
        violations.add(Guarantee::Contract, None, format!("at {at:.3} s: {}", unexpected.what));
    }
    violations.0
}

impl<'a> IndexedHistory<'a> {
    fn new(history: &'a History) -> Self {
        let mut logs: Vec<Log> = Vec::new();
        logs.resize_with(history.jobs.len(), Log::default);
        // `reads` checks that the other replica returns the same.
        for read in history.final_reads.iter().filter(|read| read.replica == 0) {
            let log = &mut logs[read.job];
            log.events.clone_from(&read.log);
            log.origins = vec![Origin::Unknown; log.events.len()];
            log.index_of =
                read.log.iter().enumerate().map(|(index, event)| (event.id.clone(), index)).collect();
        }
        for (number, batch) in history.batches.iter().enumerate() {
            let log = &mut logs[batch.job];
            for event in &batch.events[batch.repeats..] {
                if let Some(&index) = log.index_of.get(&event.id)
                    && let Origin::Unknown = log.origins[index]
                {
                    log.origins[index] = Origin::Batch(number);
                }
            }
            for attempt in &batch.attempts {
                let Outcome::Appended(events) = &attempt.outcome else { continue };
                let sequences = events.iter().map(|event| event.sequence);
                let kept =
                    sequences.filter(|&sequence| !is_lost(history, batch.job, sequence, attempt.sent_at));
                log.acknowledged.extend(kept.max().map(|last| (attempt.ended_at, last)));
            }
        }
        for (number, close) in history.closes.iter().enumerate() {
            let log = &mut logs[close.job];
            if let Some((last, origin)) = log.events.last().zip(log.origins.last_mut())
                && (last.kind(), &last.name) == (pb::EventKind::Close, &close.reason)
            {
                *origin = Origin::Close(number);
            }
            if let Ok(closed) = &close.outcome
                && !is_lost(history, close.job, closed.last_sequence, close.sent_at)
            {
                log.acknowledged.push((close.ended_at, closed.last_sequence));
            }
        }
        for (number, cancellation) in history.cancellations.iter().enumerate() {
            let log = &mut logs[cancellation.job];
            for (event, origin) in log.events.iter().zip(&mut log.origins) {
                let kind = pb::EventKind::CancellationRequested;
                if (event.kind(), &event.name) == (kind, &cancellation.reason) {
                    *origin = Origin::Cancellation(number);
                }
            }
        }
        for log in &mut logs {
            let silent = log.events.iter().zip(&mut log.origins);
            silent
                .filter(|(event, _)| event.kind() == pb::EventKind::Silent)
                .for_each(|(_, origin)| *origin = Origin::Server);
        }
        for (job, log) in logs.iter_mut().enumerate() {
            let lost = losses(history, job).flat_map(|loss| &loss.log.events[loss.log.kept..]);
            log.lost_ids = lost.map(|event| event.id.clone()).collect();
            let mut earliest = Moment::ZERO;
            for &origin in &log.origins {
                earliest = earliest.max(first_sent_at(history, origin));
                log.earliest.push(earliest);
            }
            log.acknowledged.sort_unstable();
            let mut highest = 0;
            for (_, sequence) in &mut log.acknowledged {
                highest = highest.max(*sequence);
                *sequence = highest;
            }
        }
        let job_numbers =
            history.jobs.iter().enumerate().map(|(number, job)| (job.id.as_str(), number)).collect();
        Self { history, logs, job_numbers }
    }

    fn first_sent_at(&self, origin: Origin) -> Moment {
        first_sent_at(self.history, origin)
    }

    /// The highest sequence of a job that was acknowledged before this moment.
    fn acknowledged_before(&self, job: usize, moment: Moment) -> i64 {
        let acknowledged = &self.logs[job].acknowledged;
        let count = acknowledged.partition_point(|(answered, _)| *answered < moment);
        count.checked_sub(1).map_or(0, |last| acknowledged[last].1)
    }

    /// The highest sequence of a job that can have been stored at this moment.
    fn possible_by(&self, job: usize, moment: Moment) -> i64 {
        let count = self.logs[job].earliest.partition_point(|earliest| *earliest <= moment);
        i64::try_from(count).unwrap()
    }

    fn is_fault_free(&self, replica: usize, from: Moment, to: Moment) -> bool {
        is_fault_free(self.history, replica, from, to)
    }

    fn replay(&self, job: usize) -> Replay<'a> {
        Replay::new(&self.history.configurations[self.history.jobs[job].configuration])
    }
}

/// Whether no fault affected a replica in this time.
pub fn is_fault_free(history: &History, replica: usize, from: Moment, to: Moment) -> bool {
    let mut fault_windows = history.fault_windows.iter();
    !fault_windows.any(|window| window.affects[replica] && window.from <= to && window.to >= from)
}

/// When the request that appended an event was first sent; zero if it is unknown.
fn first_sent_at(history: &History, origin: Origin) -> Moment {
    match origin {
        Origin::Batch(number) => history.batches[number].first_sent_at(),
        Origin::Close(number) => history.closes[number].sent_at,
        Origin::Cancellation(number) => history.cancellations[number].sent_at,
        Origin::Server | Origin::Unknown => Moment::ZERO,
    }
}

/// All that the history records about an event, line by line.
pub fn event_timeline(history: &History, id: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for batch in history.batches.iter().filter(|batch| batch.events.iter().any(|event| event.id == id)) {
        let index = batch.events.iter().position(|event| event.id == id).unwrap_or_default();
        lines.push(format!(
            "sent by {} as event {} of {} to job {}, expecting {:?}",
            batch.writer,
            index + 1,
            batch.events.len(),
            history.jobs[batch.job].id,
            batch.expected
        ));
        let mut omitted = 0;
        for (number, Attempt { replica, sent_at, ended_at, outcome }) in batch.attempts.iter().enumerate() {
            let answer = match outcome {
                Outcome::Appended(events) => format!("appended: {:?}", events.get(index)),
                Outcome::Refused(refusal) => format!("refused: {refusal:?}"),
                Outcome::Unknown(_) if number > 2 => {
                    omitted += 1;
                    continue;
                }
                Outcome::Unknown(reason) => format!("unknown: {reason:?}"),
            };
            let (sent_s, ended_s) = (sent_at.as_secs_f64(), ended_at.as_secs_f64());
            lines.push(format!("  {sent_s:.3} s to {ended_s:.3} s, server {replica}: {answer}"));
        }
        if omitted > 0 {
            lines.push(format!("  {omitted} more attempts with unknown outcome"));
        }
    }
    for read in &history.final_reads {
        if let Some(event) = read.log.iter().find(|event| event.id == id) {
            lines
                .push(format!("stored after the campaign, as server {} returns it: {event:?}", read.replica));
        }
    }
    let mut received: BTreeMap<&str, u32> = BTreeMap::new();
    for record in &history.watchers {
        for message in record.streams.iter().flat_map(|stream| &stream.messages) {
            if let Body::Events(events) = &message.body
                && events.iter().any(|event| event.id == id)
            {
                *received.entry(&record.name).or_default() += 1;
            }
        }
    }
    lines.push(format!("received by watchers, with how often: {received:?}"));
    lines
}
