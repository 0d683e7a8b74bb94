//! Conversion of a batch in a request to a batch for the event log.

use std::{collections::HashSet, fmt, sync::Arc};

use prost::Message as _;

use crate::{
    error::{Error, Result, Violations, quoted, quoted_list},
    event_log::{Batch, NewEvent, Step},
    limits,
    models::{
        job::JobKey,
        job_configuration::MetadataKind,
        job_identity::{Configuration, JobIdentity},
    },
    pb,
    progress::EventKind,
    proto_enums::ProtoEnum as _,
    quota::QuotaUsed,
    services::{jobs::job_key, parse},
};

/// A well-formed batch that is not yet checked against its job's configuration.
pub(super) struct UncheckedBatch {
    pub(super) job: JobKey,
    expected_sequence: Option<i64>,
    events: Vec<UncheckedEvent>,
}

struct UncheckedEvent {
    event: NewEvent,
    /// Empty: the event has no step.
    step_tag: String,
    metadata: prost_types::Struct,
}

impl TryFrom<pb::AppendEventsRequest> for UncheckedBatch {
    type Error = Error;

    fn try_from(request: pb::AppendEventsRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let job = job_key!(&mut violations, request.job, append_events_request);
        batch(violations, job, request.expected_sequence, request.events)
    }
}

impl TryFrom<pb::PublishEventsRequest> for UncheckedBatch {
    type Error = Error;

    fn try_from(request: pb::PublishEventsRequest) -> Result<Self> {
        let mut violations = Violations::default();
        parse::text(&mut violations, "batch_id", request.batch_id);
        let job = job_key!(&mut violations, request.job, publish_events_request);
        batch(violations, job, request.expected_sequence, request.events)
    }
}

fn batch(
    mut violations: Violations,
    job: JobKey,
    expected_sequence: Option<i64>,
    events: Vec<pb::NewEvent>,
) -> Result<UncheckedBatch> {
    if expected_sequence.is_some_and(|expected| expected < 0) {
        violations.add("expected_sequence", "must not be negative");
    }
    if events.is_empty() || events.len() > limits::BATCH_EVENTS {
        violations.add("events", format!("must be 1 to {} events", limits::BATCH_EVENTS));
        return Err(Error::Invalid(violations));
    }
    let mut ids = HashSet::new();
    let mut unchecked = Vec::with_capacity(events.len());
    for (index, event) in events.into_iter().enumerate() {
        let event = unchecked_event(&mut violations, index, event);
        if let Some(id) = event.event.id
            && !ids.insert(id)
        {
            violations.add(format!("events[{index}].id"), "occurs twice in this batch");
        }
        unchecked.push(event);
    }
    violations.or(UncheckedBatch { job, expected_sequence, events: unchecked })
}

fn unchecked_event(violations: &mut Violations, index: usize, event: pb::NewEvent) -> UncheckedEvent {
    // A path is formatted only for a violation.
    let at = |field: &'static str| fmt::from_fn(move |f| write!(f, "events[{index}].{field}"));
    let id = parse::optional_uuid(violations, at("id"), &event.id);
    let kind = EventKind::from_proto(event.kind).unwrap_or_else(|| {
        violations.add(at("kind"), "must be STEP, ERROR, INFO, COMPLETE or PROGRESS");
        EventKind::Info
    });
    if kind.is_written_by_server() {
        violations.add(at("kind"), "is written by the server only");
    }
    let name = parse::text(violations, at("name"), event.name);
    let step_tag = parse::text(violations, at("step_tag"), event.step_tag);
    if kind == EventKind::Progress && step_tag.is_empty() {
        violations.add(at("step_tag"), "is required for PROGRESS");
    }
    let step_percent = event.step_percent.and_then(|percent| {
        if kind != EventKind::Progress {
            violations.add(at("step_percent"), "goes with PROGRESS only");
        }
        let percent = u8::try_from(percent).ok().filter(|percent| *percent <= limits::STEP_PERCENT);
        if percent.is_none() {
            violations.add(at("step_percent"), format!("must be 0 to {}", limits::STEP_PERCENT));
        }
        percent
    });
    let metadata = event.metadata.unwrap_or_default();
    check_metadata(violations, at("metadata"), &metadata);
    let occurred_at = parse::timestamp(violations, at("occurred_at"), event.occurred_at);
    let encoded = metadata.encode_to_vec();
    let event = NewEvent { id, kind, name, step: Step::None, step_percent, metadata: encoded, occurred_at };
    UncheckedEvent { event, step_tag, metadata }
}

/// Metadata must be flat, with texts, finite numbers and booleans, within its limits.
fn check_metadata(violations: &mut Violations, field: impl fmt::Display, metadata: &prost_types::Struct) {
    use prost_types::value::Kind;
    if metadata.fields.len() > limits::METADATA_NAMES {
        violations.add(&field, format!("must have at most {} names", limits::METADATA_NAMES));
        return;
    }
    if metadata.encoded_len() > limits::METADATA_BYTES {
        violations.add(&field, format!("must be at most {} bytes encoded", limits::METADATA_BYTES));
        return;
    }
    for (name, value) in &metadata.fields {
        if name.contains('\0') || name.chars().count() > limits::TEXT_CHARS {
            violations.add(
                &field,
                format!("a name must be at most {} characters, without NUL", limits::TEXT_CHARS),
            );
        }
        let description = match &value.kind {
            Some(Kind::StringValue(text)) if text.contains('\0') => "must not contain NUL",
            Some(Kind::NumberValue(number)) if !number.is_finite() => "must be finite",
            Some(Kind::StringValue(_) | Kind::NumberValue(_) | Kind::BoolValue(_)) => continue,
            Some(Kind::StructValue(_) | Kind::ListValue(_)) => "must not be nested",
            Some(Kind::NullValue(_)) | None => "must not be null",
        };
        violations.add(format!("{field}.{name}"), description);
    }
}

impl UncheckedBatch {
    /// How many events it has.
    pub(super) fn len(&self) -> usize {
        self.events.len()
    }

    /// Checks the batch against the job's configuration. The violations go into the
    /// batch: the event log answers them only after its own checks of stored ids,
    /// `expected_sequence` and status.
    pub(super) fn for_job(
        &self,
        job: Arc<JobIdentity>,
        configuration: &Configuration,
        quota_used: Option<QuotaUsed>,
    ) -> Batch {
        let mut violations = Violations::default();
        let events = self.events.iter().enumerate().map(|(index, unchecked)| {
            let UncheckedEvent { event, step_tag, metadata } = unchecked;
            let mut event = event.clone();
            if !step_tag.is_empty() {
                event.step = match configuration.step(step_tag) {
                    None => {
                        violations
                            .add(format!("events[{index}].step_tag"), unknown_step(step_tag, configuration));
                        violations.known_step_tags = Some(configuration.tree.steps.len());
                        Step::Unknown
                    }
                    Some((position, step)) => {
                        for declared in &step.metadata {
                            let value =
                                metadata.fields.get(&declared.name).and_then(|value| value.kind.as_ref());
                            if let Some(description) = value.and_then(|value| mismatch(declared.kind, value))
                            {
                                violations
                                    .add(format!("events[{index}].metadata.{}", declared.name), description);
                            }
                        }
                        Step::Known(position, Arc::clone(&configuration.steps[position]))
                    }
                };
            }
            event
        });
        let events = events.collect();
        let weights = Arc::clone(&configuration.weights);
        let expected_sequence = self.expected_sequence;
        Batch { expected_sequence, events, violations, quota_used, job, weights, audit: None }
    }
}

/// Describes an unknown step tag, with the first of the known ones.
fn unknown_step(tag: &str, configuration: &Configuration) -> String {
    let tree = &configuration.tree;
    let known = quoted_list(tree.steps.iter().map(|step| step.tag.as_str()));
    format!("{} is not a step of {} {}; known: {known}", quoted(tag), quoted(&tree.tag), tree.version)
}

fn mismatch(declared: MetadataKind, value: &prost_types::value::Kind) -> Option<&'static str> {
    use prost_types::value::Kind;
    match (declared, value) {
        (MetadataKind::Number, Kind::NumberValue(_)) | (MetadataKind::Text, Kind::StringValue(_)) => None,
        (MetadataKind::Link, Kind::StringValue(text)) if is_link(text) => None,
        (MetadataKind::Number, _) => Some("must be a number"),
        (MetadataKind::Text, _) => Some("must be a text"),
        (MetadataKind::Link, _) => Some("must be an absolute http or https URL"),
    }
}

fn is_link(text: &str) -> bool {
    text.parse::<http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
    })
}
