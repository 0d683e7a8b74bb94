//! The events of the load, as milepost and its peers get them, and the checks of those that
//! watches receive.

use std::time::{Duration, Instant};

use milepost_client::pb::{self, NewEvent, append_events_request};
use prost::Message as _;
use tokio::sync::watch;
use uuid::Uuid;

use crate::{Result, accounts::step_tag, store::EventStream};

/// Length of each event's name, in bytes.
const NAME_BYTES: usize = 64;

/// An acknowledged event.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acked {
    /// Index of the log in the store's logs.
    pub(crate) log: usize,
    /// What the answer gave: for milepost and the naive peer the job's sequence, for etcd and
    /// NATS that of the whole store, for Durable Streams the length of the log in bytes.
    pub(crate) sequence: i64,
    /// The event id given by the client; nil for the peers.
    pub(crate) id: Uuid,
}

/// An event that a watch received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReceivedEvent {
    /// 1, 2, 3 … in each log.
    pub(crate) sequence: i64,
    /// The stamp that the event was appended with.
    pub(crate) stamp: u64,
}

/// A `step` event with a new id; its name begins with the stamp.
pub(crate) fn new_event(step: usize, stamp: u64) -> NewEvent {
    NewEvent {
        id: Uuid::now_v7().to_string(),
        kind: pb::EventKind::Step.into(),
        name: event_name(stamp),
        step_tag: step_tag(step),
        metadata: None,
        occurred_at: None,
        step_percent: None,
    }
}

/// A name of an event, with the stamp.
pub(crate) fn event_name(stamp: u64) -> String {
    format!("{stamp:020}{:.<1$}", "", NAME_BYTES - 20)
}

/// A request that appends events to a job.
pub(crate) fn append_request(job_id: String, events: Vec<NewEvent>) -> pb::AppendEventsRequest {
    let job = Some(append_events_request::Job::JobId(job_id));
    pb::AppendEventsRequest { job, expected_sequence: None, events }
}

/// An event as the text that peers store: the stamp, its number in the log, and padding. With
/// the log's name it has as many bytes as the `AppendEvents` request, less `overhead`.
pub(crate) fn peer_event(log: &str, step: usize, stamp: u64, number: i64, overhead: usize) -> String {
    let length = payload_bytes(log, step) - log.len() - overhead;
    format!("{:.<length$}", format!("{stamp:020}{number:020}"))
}

/// The event that a peer's watch received.
pub(crate) fn received_from_peer(text: &[u8]) -> Result<ReceivedEvent> {
    let number = std::str::from_utf8(text.get(20..40).ok_or("an event without a number")?)?.parse()?;
    Ok(ReceivedEvent { sequence: number, stamp: stamp_of(text)? })
}

/// The size in bytes of an `AppendEvents` request with one event.
pub(crate) fn payload_bytes(job_id: &str, step: usize) -> usize {
    // All ids have the same length: the job id stands in for an event id, which costs
    // time to generate.
    let event = NewEvent {
        id: job_id.to_owned(),
        kind: pb::EventKind::Step.into(),
        name: ".".repeat(NAME_BYTES),
        step_tag: step_tag(step),
        ..Default::default()
    };
    append_request(job_id.to_owned(), vec![event]).encoded_len()
}

/// Checks that a watch receives each event of a log once and in order. It holds the last
/// sequence, if it is known.
pub(crate) struct SequenceCheck(Option<i64>);

impl SequenceCheck {
    pub(crate) fn after(sequence: Option<i64>) -> Self {
        Self(sequence)
    }

    pub(crate) fn check(&mut self, event: ReceivedEvent) -> Result<()> {
        match self.0.replace(event.sequence) {
            Some(last) if event.sequence != last + 1 => {
                Err(format!("a watch received event {} after event {last}", event.sequence).into())
            }
            _ => Ok(()),
        }
    }
}

/// Reads a watch until it has received each event once and in order. `total` says how many
/// these are, after the last append. Returns the delays of the events that were sent `from`
/// this time after `started` on.
pub(crate) async fn delays(
    mut stream: EventStream,
    mut order: SequenceCheck,
    started: Instant,
    from: Duration,
    mut total: watch::Receiver<Option<usize>>,
) -> Result<Vec<Duration>> {
    let (mut count, mut delays) = (0, Vec::new());
    loop {
        let received = tokio::select! {
            received = stream.next() => received?,
            changed = total.changed() => { changed?; Vec::new() }
        };
        let now = started.elapsed();
        for event in received {
            order.check(event)?;
            count += 1;
            let sent = Duration::from_nanos(event.stamp);
            if sent >= from {
                delays.push(now.saturating_sub(sent));
            }
        }
        match *total.borrow() {
            Some(total) if count == total => return Ok(delays),
            Some(total) if count > total => {
                return Err(format!("a watcher received {count} events of {total}").into());
            }
            _ => {}
        }
    }
}

/// The stamp that a name or a peer's event begins with.
pub(crate) fn stamp_of(text: &[u8]) -> Result<u64> {
    Ok(std::str::from_utf8(text.get(..20).ok_or("an event without a stamp")?)?.parse()?)
}

/// Nanoseconds since `start`, for stamps.
pub(crate) fn stamp(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
