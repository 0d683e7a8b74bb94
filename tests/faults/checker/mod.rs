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
use crate::history::{Attempt, History, Outcome};

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
    /// `expected_sequence`, refusals, codes: what the API says beyond the eight.
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

/// A job's log as it was found in the end, and where each of its events is.
struct Log {
    events: Vec<Arc<pb::Event>>,
    places: HashMap<String, usize>,
    /// Each event's batch, by place; none for what was not appended by one.
    batches: Vec<Option<usize>>,
}

/// The history, and what was found in the end.
struct Case<'a> {
    history: &'a History,
    logs: Vec<Log>,
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
        logs.resize_with(history.jobs.len(), || Log {
            events: Vec::new(),
            places: HashMap::new(),
            batches: Vec::new(),
        });
        // What another replica reads must be the same, see `reads`.
        for read in history.reads.iter().filter(|read| read.replica == 0) {
            let log = &mut logs[read.job];
            log.events.clone_from(&read.log);
            log.batches = vec![None; log.events.len()];
            log.places =
                read.log.iter().enumerate().map(|(place, event)| (event.id.clone(), place)).collect();
        }
        for (number, batch) in history.batches.iter().enumerate() {
            let log = &mut logs[batch.job];
            for event in &batch.events[batch.repeats..] {
                if let Some(&place) = log.places.get(&event.id) {
                    log.batches[place].get_or_insert(number);
                }
            }
        }
        Self { history, logs }
    }

    fn film(&self, job: usize) -> Film<'a> {
        Film::new(&self.history.configurations[self.history.jobs[job].configuration])
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
                Outcome::Unknown(what) => format!("unknown: {what}"),
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
