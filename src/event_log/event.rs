//! A row of the event log, encoded once for all its watchers.

use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use prost::{
    Message,
    bytes::BufMut,
    encoding::{self, WireType},
};
use uuid::Uuid;

use super::scope::Scope;
use crate::{
    error::{Error, Result},
    json,
    models::{
        event::Event,
        job_identity::{JobIdentity, StepIdentity},
    },
    pb::{self, EVENTS_FIELD, WatchedEvents},
    progress::{EventKind, JobStatus, Progress},
    proto_enums::{ProtoEnum as _, timestamp},
    telemetry::metrics::Received,
};

/// A row of the log with what its encoding needs.
#[derive(Debug)]
pub(crate) struct CommittedEvent {
    pub(crate) row: Event,
    pub(crate) job: Arc<JobIdentity>,
    /// The row's step, if it names one.
    pub(crate) step: Option<Arc<StepIdentity>>,
}

/// A committed event, as the tail delivers it to every watcher.
#[derive(Debug)]
pub(crate) struct LogEvent {
    pub(crate) job: Arc<JobIdentity>,
    pub(crate) position: i64,
    pub(crate) sequence: i64,
    pub(crate) kind: EventKind,
    pub(crate) status: JobStatus,
    pub(crate) progress: Progress,
    /// A whole field `events` of [`WatchedEvents`]: its key, its length, and the
    /// encoded `milepost.v1.Event`.
    pub(crate) encoded: Bytes,
    /// As `encoded`, with the event as JSON; none until the first watcher wants it.
    json: OnceLock<Bytes>,
    /// When this process learned of the commit; none for an event that was read as
    /// the past.
    pub(crate) received: Option<Received>,
}

impl LogEvent {
    pub(crate) fn new(event: &CommittedEvent, received: Option<Received>) -> Self {
        let CommittedEvent { row, job, step } = event;
        let progress =
            Progress { points_done: row.points_done, points_total: job.points_total, percent: row.percent };
        Self {
            position: row.position,
            sequence: row.sequence,
            kind: row.kind,
            status: row.status,
            progress,
            encoded: encode(row, progress, job, step.as_deref()),
            json: OnceLock::new(),
            job: Arc::clone(job),
            received,
        }
    }

    /// Whether the log of the event's job ends with it.
    pub(crate) fn closes(&self) -> bool {
        matches!(self.kind, EventKind::Complete | EventKind::Close)
    }

    /// The number that a watch of this scope compares with its cursor.
    pub(crate) fn cursor_in(&self, scope: &Scope) -> i64 {
        match scope {
            Scope::Job(_) => self.sequence,
            Scope::All { .. } => self.position,
        }
    }

    /// As `encoded`, with the event as JSON. It is made once, for all watchers that want it.
    pub(crate) fn json(&self) -> Result<Bytes> {
        if let Some(json) = self.json.get() {
            return Ok(json.clone());
        }
        let json = json::event_field_to_json(&self.encoded).map_err(Error::internal)?;
        Ok(self.json.get_or_init(|| json.into()).clone())
    }

    /// The event as a message, for a page of ListEvents.
    pub(crate) fn message(&self) -> Result<pb::Event> {
        let events = WatchedEvents::decode(self.encoded.clone()).map_err(Error::internal)?.events;
        events.into_iter().next().ok_or_else(|| Error::internal("an event that encodes to nothing"))
    }
}

/// Encodes field by field, in the order of the numbers, what `pb::Event` would
/// encode. The metadata is copied from the row and not decoded.
fn encode(row: &Event, progress: Progress, job: &JobIdentity, step: Option<&StepIdentity>) -> Bytes {
    let mut event = BytesMut::with_capacity(256 + row.name.len() + row.event_metadata.len());
    put_uuid(1, row.id, &mut event);
    put_uuid(2, row.job_id, &mut event);
    put_int64(3, row.sequence, &mut event);
    put_int64(4, row.kind.to_proto().into(), &mut event);
    put_bytes(5, row.name.as_bytes(), &mut event);
    if let Some(step) = step {
        put_bytes(6, step.tag.as_bytes(), &mut event);
        put_bytes(7, step.name.as_bytes(), &mut event);
    }
    put_bytes(8, &row.event_metadata, &mut event);
    if let Some(at) = row.occurred_at {
        encoding::message::encode(9, &timestamp(at), &mut event);
    }
    encoding::message::encode(10, &timestamp(row.created_at), &mut event);
    put_int64(11, row.status.to_proto().into(), &mut event);
    encoding::message::encode(12, &pb::Progress::from(progress), &mut event);
    put_bytes(13, job.provider_job_id.as_bytes(), &mut event);
    if let Some(percent) = row.step_percent {
        // An optional field is encoded even if it is 0.
        encoding::int32::encode(14, &percent.into(), &mut event);
    }

    let mut field = BytesMut::with_capacity(event.len() + 8);
    put_bytes(EVENTS_FIELD, &event, &mut field);
    field.freeze()
}

/// proto3 encodes an empty field as nothing.
fn put_bytes(number: u32, bytes: &[u8], to: &mut BytesMut) {
    if !bytes.is_empty() {
        encoding::encode_key(number, WireType::LengthDelimited, to);
        encoding::encode_varint(bytes.len() as u64, to);
        to.put_slice(bytes);
    }
}

fn put_uuid(number: u32, id: Uuid, to: &mut BytesMut) {
    put_bytes(number, id.hyphenated().encode_lower(&mut Uuid::encode_buffer()).as_bytes(), to);
}

/// An enum is encoded as an int64 is.
fn put_int64(number: u32, value: i64, to: &mut BytesMut) {
    if value != 0 {
        encoding::int64::encode(number, &value, to);
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use prost_types::{Struct, Value};

    use super::*;
    use crate::models::labels::Labels;

    fn job() -> Arc<JobIdentity> {
        Arc::new(JobIdentity {
            id: Uuid::from_u128(3),
            provider_id: Uuid::from_u128(2),
            customer_id: Uuid::from_u128(4),
            provider_job_id: "scan-1".to_owned(),
            configuration_id: Uuid::from_u128(1),
            configuration_tag: "ct".to_owned(),
            labels: Labels::default(),
            points_total: 1,
        })
    }

    fn step() -> Arc<StepIdentity> {
        let (tag, name) = ("load".to_owned(), "Load the slice".to_owned());
        Arc::new(StepIdentity { id: Uuid::from_u128(7), tag, name })
    }

    fn row() -> Event {
        let value = |value: f64| Value::from(value);
        let fields = [("mean".to_owned(), value(-0.0)), ("é".to_owned(), Value::from("ü"))];
        let metadata = Struct { fields: fields.into_iter().collect() };
        Event {
            job_id: Uuid::from_u128(3),
            sequence: 300,
            position: 400,
            id: Uuid::from_u128(5),
            kind: EventKind::Step,
            name: "Loaded".to_owned(),
            step_configuration_id: Some(Uuid::from_u128(7)),
            step_percent: Some(0),
            event_metadata: metadata.encode_to_vec(),
            occurred_at: DateTime::from_timestamp(-1, 500_000),
            status: JobStatus::Running,
            points_done: 1,
            percent: 99,
            created_at: DateTime::from_timestamp(1_700_000_000, 123_456_000).expect("a time"),
        }
    }

    #[test]
    fn an_event_is_encoded_as_the_message_would_encode_itself() {
        let bare = Event {
            name: String::new(),
            step_configuration_id: None,
            step_percent: None,
            event_metadata: Vec::new(),
            occurred_at: None,
            points_done: 0,
            percent: 0,
            ..row()
        };
        for row in [row(), bare] {
            let step = row.step_configuration_id.map(|_| step());
            let committed = CommittedEvent { row, job: job(), step };
            let event = LogEvent::new(&committed, None);
            let row = committed.row;
            let message = event.message().expect("it decodes");
            let mut whole = WatchedEvents::default();
            whole.events.push(message.clone());
            assert_eq!(whole.encode_to_vec(), event.encoded);
            let sent = WatchedEvents::from_encoded(vec![event.encoded]);
            assert_eq!(sent.encoded_len(), whole.encoded_len());
            assert_eq!(sent.encode_to_vec(), whole.encode_to_vec());
            assert_eq!((message.sequence, &message.name), (row.sequence, &row.name));
            assert_eq!(message.step_tag.is_empty(), row.step_configuration_id.is_none());
            assert_eq!(message.step_percent, row.step_percent.map(i32::from));
            assert_eq!(message.metadata.is_none(), row.event_metadata.is_empty());
            assert_eq!(message.occurred_at.is_none(), row.occurred_at.is_none());
            assert_eq!(message.provider_job_id, "scan-1");
        }
    }

    #[test]
    fn the_json_of_an_event_is_made_once() {
        let event = LogEvent::new(&CommittedEvent { row: row(), job: job(), step: Some(step()) }, None);
        let first = event.json().expect("JSON");
        let text = String::from_utf8_lossy(&first);
        for part in
            ["\"sequence\":\"300\"", "\"stepTag\":\"load\"", "\"createdAt\":\"2023-11-14T22:13:20.123456Z\""]
        {
            assert!(text.contains(part), "{text}");
        }
        let second = event.json().expect("JSON");
        assert_eq!((first.as_ptr(), first.len()), (second.as_ptr(), second.len()));
    }
}
