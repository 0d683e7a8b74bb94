//! Requests that are as large as the API allows.

use milepost::limits::{BATCH_EVENTS, CONFIGURATION_STEPS, STEP_METADATA};
use milepost_client::pb::{self, EventKind};
use prost_types::{Struct, Value, value::Kind};
use uuid::Uuid;

/// Length of the metadata in bytes, with which 500 events, or 60, make a request of 0.99 MB.
/// The text repeats one character: Postgres stores it compressed, so that the disk of the
/// campaign does not fill.
const OF_500: usize = 1_890;
const OF_60: usize = 16_350;

pub fn text(value: String) -> Value {
    Value { kind: Some(Kind::StringValue(value)) }
}

pub fn metadata(fields: impl IntoIterator<Item = (String, Value)>) -> Struct {
    Struct { fields: fields.into_iter().collect() }
}

/// An event with a new id.
pub fn event() -> pb::NewEvent {
    pb::NewEvent {
        id: Uuid::now_v7().to_string(),
        kind: EventKind::Info.into(),
        name: "hostile".to_owned(),
        ..Default::default()
    }
}

/// 500 events with new ids.
pub fn small_events() -> Vec<pb::NewEvent> {
    (0..BATCH_EVENTS).map(|_| event()).collect()
}

/// Events with new ids that make a request of 0.99 MB: 500 of them, or 60 with as much
/// metadata as an event may have.
pub fn large_events(of_500: bool) -> Vec<pb::NewEvent> {
    let (events, bytes) = if of_500 { (BATCH_EVENTS, OF_500) } else { (60, OF_60) };
    let metadata = metadata([("text".to_owned(), text("x".repeat(bytes)))]);
    (0..events).map(|_| pb::NewEvent { metadata: Some(metadata.clone()), ..event() }).collect()
}

pub fn append(job_id: &str, events: Vec<pb::NewEvent>) -> pb::AppendEventsRequest {
    let job = Some(pb::append_events_request::Job::JobId(job_id.to_owned()));
    pb::AppendEventsRequest { job, expected_sequence: None, events }
}

/// A configuration with as many steps, and as much metadata of each, as it may have.
pub fn large_configuration(tag: &str, version: &str) -> pb::RegisterJobConfigurationRequest {
    let metadata = |number: usize| pb::MetadataConfiguration {
        name: format!("{number:02}"),
        kind: pb::MetadataKind::Text.into(),
        ..Default::default()
    };
    let step = |number: usize| pb::StepConfiguration {
        tag: format!("step-{number}"),
        name: "A step".to_owned(),
        points: 1,
        metadata: (0..STEP_METADATA).map(metadata).collect(),
        ..Default::default()
    };
    pb::RegisterJobConfigurationRequest {
        tag: tag.to_owned(),
        name: "Large".to_owned(),
        version: version.to_owned(),
        steps: (0..CONFIGURATION_STEPS).map(step).collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use milepost::limits::{MESSAGE_BYTES, METADATA_BYTES};
    use prost::Message as _;

    use super::*;

    #[test]
    fn large_batches_are_nearly_as_large_as_a_message_may_be() {
        for of_500 in [true, false] {
            let request = append(&Uuid::now_v7().to_string(), large_events(of_500));
            let bytes = request.encoded_len();
            assert!((980_000..MESSAGE_BYTES).contains(&bytes), "{bytes}");
            let metadata = request.events[0].metadata.as_ref().map_or(0, Struct::encoded_len);
            assert!(metadata <= METADATA_BYTES, "{metadata}");
        }
    }
}
