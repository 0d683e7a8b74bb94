//! Requests that a limit or a rule does not allow, each of which must be refused by a status
//! that says so.

use milepost::limits::{BATCH_EVENTS, METADATA_NAMES, TEXT_CHARS};
use milepost_client::pb::{self, WatchEventsRequest, watch_events_request::Start};
use prost_types::{ListValue, Struct, Value, value::Kind};
use tonic::Code;

use super::{Hostile, requests};

const PAUSE_MS: u64 = 150;
/// Lists in lists: more than a decoder of protobuf goes down by default.
const NESTED: usize = 50;

/// Makes the events of a batch that must be refused.
const BATCHES: [fn() -> Vec<pb::NewEvent>; 9] = [
    || vec![with_metadata("nested", nested(NESTED))],
    || vec![with_metadata("null", Value { kind: Some(Kind::NullValue(0)) })],
    || vec![with_metadata("nan", Value { kind: Some(Kind::NumberValue(f64::NAN)) })],
    || vec![with_metadata("long", requests::text("x".repeat(17 * 1024)))],
    many_names,
    || vec![requests::event(); 2],
    || vec![pb::NewEvent { step_tag: "no such step".to_owned(), ..requests::event() }],
    || vec![pb::NewEvent { name: "x".repeat(TEXT_CHARS + 1), ..requests::event() }],
    || (0..=BATCH_EVENTS).map(|_| requests::event()).collect(),
];

fn with_metadata(name: &str, value: Value) -> pb::NewEvent {
    let metadata = requests::metadata([(name.to_owned(), value)]);
    pb::NewEvent { metadata: Some(metadata), ..requests::event() }
}

fn nested(lists: usize) -> Value {
    (0..lists).fold(requests::text(String::new()), |inner, _| Value {
        kind: Some(Kind::ListValue(ListValue { values: vec![inner] })),
    })
}

fn many_names() -> Vec<pb::NewEvent> {
    let fields = (0..=METADATA_NAMES).map(|number| (number.to_string(), requests::text(String::new())));
    let metadata: Struct = requests::metadata(fields);
    vec![pb::NewEvent { metadata: Some(metadata), ..requests::event() }]
}

/// Sends one invalid request after the other.
pub async fn send_invalid_requests(mut hostile: Hostile) {
    while let Some(job) = hostile.create_job().await {
        while !hostile.is_finishing() {
            let which = hostile.random.usize(..BATCHES.len() + 2);
            let refusal = match BATCHES.get(which) {
                Some(events) => hostile.append(requests::append(&job, events())).await.map(drop),
                None if which == BATCHES.len() => list_from_no_page(&hostile, &job).await,
                None => watch_from_no_token(&hostile, &job).await,
            };
            match refusal {
                Ok(()) => hostile.context.record_unexpected(format!("invalid request {which} was accepted")),
                Err(Code::NotFound) => break,
                Err(_) => {}
            }
            hostile.pause(PAUSE_MS).await;
        }
    }
}

async fn list_from_no_page(hostile: &Hostile, job: &str) -> Result<(), Code> {
    let request = pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(job.to_owned())),
        page_token: "no page".to_owned(),
        ..Default::default()
    };
    hostile.call(hostile.client.events.clone().list_events(request)).await.map(drop)
}

async fn watch_from_no_token(hostile: &Hostile, job: &str) -> Result<(), Code> {
    let request = WatchEventsRequest {
        scope: Some(pb::watch_events_request::Scope::JobId(job.to_owned())),
        start: Some(Start::ResumeToken("no token".to_owned())),
        ..Default::default()
    };
    hostile.call(hostile.client.events.clone().watch_events(request)).await.map(drop)
}
