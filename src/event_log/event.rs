//! A row of the log to the bytes that watchers receive, once for all of them.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Utc};
use prost::{
    DecodeError, Message,
    bytes::{Buf, BufMut},
    encoding::{self, DecodeContext, WireType},
};
use uuid::Uuid;

use super::job_cache::JobIdentity;
use crate::{
    error::{Error, Result},
    models::event::Event,
    pb,
    progress::{EventKind, JobStatus, Progress},
    telemetry::metrics::Received,
};

/// A committed event, as the tail hands it to every watcher.
#[derive(Debug)]
pub(crate) struct LogEvent {
    pub(crate) job: Arc<JobIdentity>,
    pub(crate) position: i64,
    pub(crate) sequence: i64,
    pub(crate) kind: EventKind,
    pub(crate) status: JobStatus,
    pub(crate) progress: Progress,
    /// A field `events` of a message, whole: its key, its length, the encoded
    /// `milepost.v1.Event`.
    pub(crate) encoded: Bytes,
    /// When it was learned of, unless it was read as the past.
    pub(crate) received: Option<Received>,
}

impl LogEvent {
    /// Whether nothing can come after it in its job's log.
    pub(crate) fn closes(&self) -> bool {
        matches!(self.kind, EventKind::Complete | EventKind::Close)
    }

    /// As a message, for a page.
    pub(crate) fn message(&self) -> Result<pb::Event> {
        let events = WatchedEvents::decode(self.encoded.clone()).map_err(Error::internal)?.events;
        events.into_iter().next().ok_or_else(|| Error::internal("an event that encodes to nothing"))
    }

    /// From its row.
    pub(crate) fn new(row: &Event, job: Arc<JobIdentity>, received: Option<Received>) -> Self {
        let progress = Progress {
            points_done: row.points_done,
            points_total: job.configuration.weights.total(),
            percent: row.percent,
        };
        Self {
            position: row.position,
            sequence: row.sequence,
            kind: row.kind,
            status: row.status,
            progress,
            encoded: encode(row, progress, &job),
            job,
            received,
        }
    }
}

/// Field by field in the order of their numbers, as `pb::Event` would encode
/// itself, but from the row as it is: above all, metadata are copied, not
/// decoded.
fn encode(row: &Event, progress: Progress, job: &JobIdentity) -> Bytes {
    let step = row.step_configuration_id.and_then(|id| job.configuration.step_by_id(id));
    let mut event = BytesMut::with_capacity(256 + row.name.len() + row.event_metadata.len());
    put_uuid(1, row.id, &mut event);
    put_uuid(2, row.job_id, &mut event);
    put_int64(3, row.sequence, &mut event);
    put_int64(4, i32::from(pb::EventKind::from(row.kind)).into(), &mut event);
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
    put_int64(11, i32::from(pb::JobStatus::from(row.status)).into(), &mut event);
    encoding::message::encode(12, &pb::Progress::from(progress), &mut event);
    put_bytes(13, job.provider_job_id.as_bytes(), &mut event);

    let mut field = BytesMut::with_capacity(event.len() + 8);
    put_bytes(EVENTS, &event, &mut field);
    field.freeze()
}

/// The number of the field `events` of WatchedEvents.
const EVENTS: u32 = 1;

/// Nothing for nothing, as proto3 has it.
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

/// Enums encode alike.
fn put_int64(number: u32, value: i64, to: &mut BytesMut) {
    if value != 0 {
        encoding::int64::encode(number, &value, to);
    }
}

/// The message of this name: to send, events that were encoded before; received,
/// events.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WatchedEvents {
    /// Those received. To send, leave it empty.
    pub events: Vec<pb::Event>,
    encoded: Vec<Bytes>,
}

impl WatchedEvents {
    /// To send.
    pub(crate) fn new(events: &[Arc<LogEvent>]) -> Self {
        let encoded = events.iter().map(|event| event.encoded.clone()).collect();
        Self { events: Vec::new(), encoded }
    }
}

impl Message for WatchedEvents {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        encoding::message::encode_repeated(EVENTS, &self.events, buf);
        for field in &self.encoded {
            buf.put_slice(field);
        }
    }

    fn merge_field(
        &mut self,
        number: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        context: DecodeContext,
    ) -> std::result::Result<(), DecodeError> {
        match number {
            EVENTS => encoding::message::merge_repeated(wire_type, &mut self.events, buf, context),
            _ => encoding::skip_field(wire_type, number, buf, context),
        }
    }

    fn encoded_len(&self) -> usize {
        encoding::message::encoded_len_repeated(EVENTS, &self.events)
            + self.encoded.iter().map(Bytes::len).sum::<usize>()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// As every message has it.
pub(crate) fn timestamp(at: DateTime<Utc>) -> prost_types::Timestamp {
    // Below 1,000,000,000, but in a leap second, which Postgres has none of.
    let nanos = i32::try_from(at.timestamp_subsec_nanos()).unwrap_or_default();
    prost_types::Timestamp { seconds: at.timestamp(), nanos }
}

impl From<EventKind> for pb::EventKind {
    fn from(kind: EventKind) -> Self {
        match kind {
            EventKind::Step => Self::Step,
            EventKind::Error => Self::Error,
            EventKind::Info => Self::Info,
            EventKind::Complete => Self::Complete,
            EventKind::Close => Self::Close,
        }
    }
}

impl From<JobStatus> for pb::JobStatus {
    fn from(status: JobStatus) -> Self {
        match status {
            JobStatus::Pending => Self::Pending,
            JobStatus::Running => Self::Running,
            JobStatus::Failed => Self::Failed,
            JobStatus::Complete => Self::Complete,
            JobStatus::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Progress> for pb::Progress {
    fn from(progress: Progress) -> Self {
        Self {
            points_done: progress.points_done,
            points_total: progress.points_total,
            percent: progress.percent.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost_types::{Struct, Value};

    use super::*;
    use crate::{
        event_log::Configuration,
        models::job_configuration::{JobConfiguration, StepConfiguration},
    };

    fn job() -> Arc<JobIdentity> {
        let step = StepConfiguration {
            id: Uuid::from_u128(7),
            tag: "load".to_owned(),
            name: "Load the slice".to_owned(),
            points: 0,
            metadata: Vec::new(),
        };
        let tree = JobConfiguration {
            id: Uuid::from_u128(1),
            provider_id: Uuid::from_u128(2),
            tag: "ct".to_owned(),
            name: "CT".to_owned(),
            version: "1.0.0".to_owned(),
            created_at: DateTime::UNIX_EPOCH,
            steps: vec![step],
        };
        Arc::new(JobIdentity {
            id: Uuid::from_u128(3),
            provider_id: Uuid::from_u128(2),
            customer_id: Uuid::from_u128(4),
            provider_job_id: "scan-1".to_owned(),
            configuration: Arc::new(Configuration { weights: tree.weights(), tree }),
        })
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
            event_metadata: Vec::new(),
            occurred_at: None,
            points_done: 0,
            percent: 0,
            ..row()
        };
        for row in [row(), bare] {
            let event = LogEvent::new(&row, job(), None);
            let message = event.message().expect("it decodes");
            let whole = WatchedEvents { events: vec![message.clone()], encoded: Vec::new() };
            assert_eq!(whole.encode_to_vec(), event.encoded);
            let sent = WatchedEvents::new(&[Arc::new(event)]);
            assert_eq!(sent.encoded_len(), whole.encoded_len());
            assert_eq!(sent.encode_to_vec(), whole.encode_to_vec());
            assert_eq!((message.sequence, &message.name), (row.sequence, &row.name));
            assert_eq!(message.step_tag.is_empty(), row.step_configuration_id.is_none());
            assert_eq!(message.metadata.is_none(), row.event_metadata.is_empty());
            assert_eq!(message.occurred_at.is_none(), row.occurred_at.is_none());
            assert_eq!(message.provider_job_id, "scan-1");
        }
    }
}
