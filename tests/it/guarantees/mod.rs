//! The guarantees of the event log, each in a file of its name.

mod atomic;
mod complete;
mod confined;
mod deterministic;
mod durable;
mod ordered;
mod resumable;
mod terminating;
mod unique;

use std::collections::HashMap;

use milepost_client::pb::{AppendedEvent, Event};

/// Groups events by job, in the order received. Panics if the sequences of a job
/// are not consecutive.
fn by_job<'a>(events: impl IntoIterator<Item = &'a Event>) -> HashMap<String, Vec<&'a Event>> {
    let mut jobs: HashMap<String, Vec<&Event>> = HashMap::new();
    for event in events {
        let log = jobs.entry(event.job_id.clone()).or_default();
        if let Some(last) = log.last() {
            assert_eq!(event.sequence, last.sequence + 1, "a gap or a repetition in job {}", event.job_id);
        }
        log.push(event);
    }
    jobs
}

/// Asserts that the log is numbered 1, 2, 3 … to its end.
#[track_caller]
fn assert_gap_free(log: &[Event]) {
    let sequences: Vec<i64> = log.iter().map(|event| event.sequence).collect();
    let expected: Vec<i64> = (1..).take(log.len()).collect();
    assert_eq!(sequences, expected);
}

fn sequences(events: &[AppendedEvent]) -> Vec<i64> {
    events.iter().map(|event| event.sequence).collect()
}
