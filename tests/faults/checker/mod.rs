//! Holds what was sent, told and seen against the guarantees. Knows the rules
//! and the history, and nothing of how milepost works.

mod film;
mod log;
mod reads;
mod streams;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use milepost::pb;

use self::film::Film;
use crate::history::{Attempt, History, Moment, Outcome};

/// What a violation is one of.
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
    /// `expected_sequence`, refusals, codes, availability: what the API says
    /// beyond the eight.
    Contract,
}

/// Something that must not be.
#[derive(Clone, Debug)]
pub struct Violation {
    pub guarantee: Guarantee,
    pub what: String,
    /// The event concerned.
    pub event: Option<String>,
}

/// Collects them.
#[derive(Default)]
pub struct Violations(pub Vec<Violation>);

impl Violations {
    fn add(&mut self, guarantee: Guarantee, event: Option<&str>, what: impl Into<String>) {
        self.0.push(Violation { guarantee, what: what.into(), event: event.map(str::to_owned) });
    }
}

impl fmt::Display for Guarantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Contract => f.write_str("contract"),
            numbered => write!(f, "guarantee {} ({numbered:?})", *numbered as u8),
        }
    }
}

/// Whose an event is.
#[derive(Clone, Copy)]
enum Origin {
    Batch(usize),
    Close(usize),
    Nobody,
}

/// A job's log as it was found in the end, and where each of its events is.
#[derive(Default)]
struct Log {
    events: Vec<Arc<pb::Event>>,
    places: HashMap<String, usize>,
    /// By place.
    origins: Vec<Origin>,
    /// By place: when it can have been there at the earliest.
    earliest: Vec<Moment>,
    /// When each sequence was first acknowledged: a moment, and the highest
    /// sequence acknowledged until then.
    acknowledged: Vec<(Moment, i64)>,
}

/// The history, and what was found in the end.
struct Case<'a> {
    history: &'a History,
    logs: Vec<Log>,
    /// Of jobs, by their ids.
    numbers: HashMap<&'a str, usize>,
}

/// Everything that is wrong with a history.
pub fn check(history: &History) -> Vec<Violation> {
    let mut violations = Violations::default();
    let case = Case::new(history);
    log::check(&case, &mut violations);
    reads::check(&case, &mut violations);
    streams::check(&case, &mut violations);
    for unexcused in &history.unexcused {
        let at = unexcused.at.as_secs_f64();
        violations.add(Guarantee::Contract, None, format!("at {at:.3} s: {}", unexcused.what));
    }
    violations.0
}

impl<'a> Case<'a> {
    fn new(history: &'a History) -> Self {
        let mut logs: Vec<Log> = Vec::new();
        logs.resize_with(history.jobs.len(), Log::default);
        // What another replica reads must be the same, see `reads`.
        for read in history.reads.iter().filter(|read| read.replica == 0) {
            let log = &mut logs[read.job];
            log.events.clone_from(&read.log);
            log.origins = vec![Origin::Nobody; log.events.len()];
            log.places =
                read.log.iter().enumerate().map(|(place, event)| (event.id.clone(), place)).collect();
        }
        for (number, batch) in history.batches.iter().enumerate() {
            let log = &mut logs[batch.job];
            for event in &batch.events[batch.repeats..] {
                if let Some(&place) = log.places.get(&event.id)
                    && let Origin::Nobody = log.origins[place]
                {
                    log.origins[place] = Origin::Batch(number);
                }
            }
            for attempt in &batch.attempts {
                if let Outcome::Appended(events) = &attempt.outcome
                    && let Some(last) = events.iter().map(|event| event.sequence).max()
                {
                    log.acknowledged.push((attempt.over, last));
                }
            }
        }
        for (number, close) in history.closes.iter().enumerate() {
            let log = &mut logs[close.job];
            if let Some((last, origin)) = log.events.last().zip(log.origins.last_mut())
                && (last.kind(), &last.name) == (pb::EventKind::Close, &close.reason)
            {
                *origin = Origin::Close(number);
            }
            if let Ok(closed) = &close.outcome {
                log.acknowledged.push((close.over, closed.last_sequence));
            }
        }
        for log in &mut logs {
            let mut earliest = Moment::ZERO;
            for &origin in &log.origins {
                earliest = earliest.max(first_sent(history, origin));
                log.earliest.push(earliest);
            }
            log.acknowledged.sort_unstable();
            let mut highest = 0;
            for (_, sequence) in &mut log.acknowledged {
                highest = highest.max(*sequence);
                *sequence = highest;
            }
        }
        let numbers =
            history.jobs.iter().enumerate().map(|(number, job)| (job.id.as_str(), number)).collect();
        Self { history, logs, numbers }
    }

    fn first_sent(&self, origin: Origin) -> Moment {
        first_sent(self.history, origin)
    }

    /// The highest sequence of a job that was acknowledged before a moment.
    fn acknowledged(&self, job: usize, before: Moment) -> i64 {
        let moments = &self.logs[job].acknowledged;
        let known = moments.partition_point(|(moment, _)| *moment < before);
        known.checked_sub(1).map_or(0, |last| moments[last].1)
    }

    /// The highest sequence of a job that can have been there by a moment.
    fn possible(&self, job: usize, by: Moment) -> i64 {
        let there = self.logs[job].earliest.partition_point(|earliest| *earliest <= by);
        i64::try_from(there).unwrap()
    }

    /// Whether nothing was broken that a server needs, all the time.
    fn is_calm(&self, replica: usize, from: Moment, to: Moment) -> bool {
        let mut disturbances = self.history.disturbances.iter();
        !disturbances.any(|disturbance| {
            disturbance.touches[replica] && disturbance.from <= to && disturbance.to >= from
        })
    }

    fn film(&self, job: usize) -> Film<'a> {
        Film::new(&self.history.configurations[self.history.jobs[job].configuration])
    }
}

/// Never before then; for what nobody sent, any time.
fn first_sent(history: &History, origin: Origin) -> Moment {
    match origin {
        Origin::Batch(number) => history.batches[number].first_sent(),
        Origin::Close(number) => history.closes[number].sent,
        Origin::Nobody => Moment::ZERO,
    }
}

/// What is known about an event, line by line.
pub fn biography(history: &History, id: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for batch in history.batches.iter().filter(|batch| batch.events.iter().any(|event| event.id == id)) {
        let place = batch.events.iter().position(|event| event.id == id).unwrap_or_default();
        lines.push(format!(
            "sent by {} as event {} of {} to job {}, expecting {:?}",
            batch.writer,
            place + 1,
            batch.events.len(),
            history.jobs[batch.job].id,
            batch.expected
        ));
        let mut again = 0;
        for (number, Attempt { replica, sent, over, outcome }) in batch.attempts.iter().enumerate() {
            let said = match outcome {
                Outcome::Appended(events) => format!("appended: {:?}", events.get(place)),
                Outcome::Refused(refusal) => format!("refused: {refusal:?}"),
                Outcome::Unknown(_) if number > 2 => {
                    again += 1;
                    continue;
                }
                Outcome::Unknown(lost) => format!("unknown: {lost:?}"),
            };
            let (sent, over) = (sent.as_secs_f64(), over.as_secs_f64());
            lines.push(format!("  {sent:.3} s to {over:.3} s, server {replica}: {said}"));
        }
        if again > 0 {
            lines.push(format!("  and {again} more times, unknown"));
        }
    }
    for read in &history.reads {
        if let Some(event) = read.log.iter().find(|event| event.id == id) {
            lines.push(format!("found at the end by server {}: {event:?}", read.replica));
        }
    }
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for chain in &history.chains {
        for message in chain.streams.iter().flat_map(|stream| &stream.messages) {
            if let crate::history::Body::Events(events) = &message.body
                && events.iter().any(|event| event.id == id)
            {
                *seen.entry(&chain.name).or_default() += 1;
            }
        }
    }
    lines.push(format!("seen by watchers: {seen:?}"));
    lines
}
