//! Builders of events, each with a new id.

use milepost_client::pb::{EventKind, NewEvent};
use prost_types::{Struct, Value};
use uuid::Uuid;

fn event(kind: EventKind, name: &str, step_tag: &str) -> NewEvent {
    NewEvent {
        id: Uuid::now_v7().to_string(),
        kind: kind.into(),
        name: name.to_owned(),
        step_tag: step_tag.to_owned(),
        metadata: None,
        occurred_at: None,
        step_percent: None,
    }
}

/// A `step` event: the step of this tag is done.
pub fn step(tag: &str) -> NewEvent {
    event(EventKind::Step, tag, tag)
}

/// A `progress` event: the step of this tag is under way, so far.
pub fn progress(tag: &str, percent: i32) -> NewEvent {
    NewEvent { step_percent: Some(percent), ..event(EventKind::Progress, "", tag) }
}

/// An `info` event.
pub fn info(name: &str) -> NewEvent {
    event(EventKind::Info, name, "")
}

/// An `error` event.
pub fn error(name: &str) -> NewEvent {
    event(EventKind::Error, name, "")
}

/// A `complete` event, which closes the job.
pub fn complete() -> NewEvent {
    event(EventKind::Complete, "done", "")
}

/// The event with this name.
pub fn named(event: NewEvent, name: impl Into<String>) -> NewEvent {
    NewEvent { name: name.into(), ..event }
}

/// The event with this metadata.
pub fn with_metadata<const N: usize>(event: NewEvent, entries: [(&str, Value); N]) -> NewEvent {
    NewEvent { metadata: Some(metadata(entries)), ..event }
}

pub fn metadata<const N: usize>(entries: [(&str, Value); N]) -> Struct {
    Struct { fields: entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect() }
}
