//! Sizes, counts and durations: one request at the limit, one past it.

use std::time::Duration;

use milepost::limits::{
    BATCH_EVENTS, CONFIGURATION_STEPS, KEY_OVERLAP, MAX_SILENCE, METADATA_BYTES, METADATA_NAMES,
    PASSWORD_MAX_BYTES, PASSWORD_MIN_BYTES, STEP_METADATA, STEP_PERCENT, STEP_POINTS, TEXT_CHARS,
    WATCH_TOKEN_LIFETIME,
};
use milepost_client::pb;
use prost::Message;
use prost_types::{Struct, Value};

use super::scene::{Scene, assert_limit_named, exactly, large, sign_up};
use crate::support::{info, progress, registration, with_metadata};

/// A request at a limit and one past it.
struct Row {
    limits: &'static [&'static str],
    method: &'static str,
    at: Vec<u8>,
    past: Vec<u8>,
    field: &'static str,
    /// The limit as the refusal names it.
    named: String,
}

fn row(
    limits: &'static [&'static str],
    method: &'static str,
    field: &'static str,
    named: impl ToString + Copy,
    at: &impl Message,
    past: &impl Message,
) -> Row {
    let (at, past) = (at.encode_to_vec(), past.encode_to_vec());
    Row { limits, method, at, past, field, named: named.to_string() }
}

impl Scene {
    fn rotation(&self, overlap: prost_types::Duration) -> pb::RotateApiKeyRequest {
        pb::RotateApiKeyRequest { api_key_id: self.api_key_id.clone(), overlap: Some(overlap) }
    }

    fn rows(&self) -> Vec<Row> {
        const REGISTER: &str = "ConfigurationService/RegisterJobConfiguration";
        const APPEND: &str = "EventService/AppendEvents";
        let events = |count| self.batch((0..count).map(|_| info("x")).collect());
        let one = |event| self.batch(vec![event]);
        let (rotate, token) = ("AuthService/RotateApiKey", "AuthService/CreateWatchToken");
        let (shortest, _, longest) = WATCH_TOKEN_LIFETIME;
        vec![
            row(
                &["BATCH_EVENTS"],
                APPEND,
                "events",
                BATCH_EVENTS,
                &events(BATCH_EVENTS),
                &events(BATCH_EVENTS + 1),
            ),
            row(&["BATCH_EVENTS"], APPEND, "events", 1, &events(1), &events(0)),
            row(
                &["STEP_PERCENT"],
                APPEND,
                "events[0].step_percent",
                STEP_PERCENT,
                &one(progress(&"ü".repeat(TEXT_CHARS), i32::from(STEP_PERCENT))),
                &one(progress(&"ü".repeat(TEXT_CHARS), i32::from(STEP_PERCENT) + 1)),
            ),
            row(
                &["MAX_SILENCE"],
                REGISTER,
                "max_silence",
                10,
                &silence("2.4.0", exactly(MAX_SILENCE.0)),
                &silence("2.4.1", prost_types::Duration { seconds: 9, nanos: 999_999_999 }),
            ),
            row(
                &["MAX_SILENCE"],
                REGISTER,
                "max_silence",
                30,
                &silence("2.5.0", exactly(MAX_SILENCE.1)),
                &silence("2.5.1", longer(MAX_SILENCE.1)),
            ),
            row(
                &["METADATA_NAMES"],
                APPEND,
                "events[0].metadata",
                METADATA_NAMES,
                &one(names(METADATA_NAMES)),
                &one(names(METADATA_NAMES + 1)),
            ),
            row(
                &["METADATA_BYTES"],
                APPEND,
                "events[0].metadata",
                METADATA_BYTES,
                &one(large(METADATA_BYTES)),
                &one(large(METADATA_BYTES + 1)),
            ),
            row(
                &["TEXT_CHARS"],
                APPEND,
                "events[0].metadata",
                TEXT_CHARS,
                &one(with_metadata(info("x"), [(&"ü".repeat(TEXT_CHARS), Value::from(1.0))])),
                &one(with_metadata(info("x"), [(&"ü".repeat(TEXT_CHARS + 1), Value::from(1.0))])),
            ),
            row(
                &["CONFIGURATION_STEPS"],
                REGISTER,
                "steps",
                CONFIGURATION_STEPS,
                &steps("2.0.0", CONFIGURATION_STEPS),
                &steps("2.0.1", CONFIGURATION_STEPS + 1),
            ),
            row(
                &["STEP_METADATA"],
                REGISTER,
                "steps[0].metadata",
                STEP_METADATA,
                &declared("2.1.0", STEP_METADATA),
                &declared("2.1.1", STEP_METADATA + 1),
            ),
            row(
                &["STEP_POINTS"],
                REGISTER,
                "steps[0].points",
                STEP_POINTS,
                &registration("2.2.0", &[("load", STEP_POINTS)]),
                &registration("2.2.1", &[("load", STEP_POINTS + 1)]),
            ),
            row(
                &["STEP_POINTS"],
                REGISTER,
                "steps[0].points",
                0,
                &registration("2.3.0", &[("load", 0)]),
                &registration("2.3.1", &[("load", -1)]),
            ),
            row(
                &["PASSWORD_MIN_BYTES"],
                "AuthService/SignUp",
                "password",
                PASSWORD_MIN_BYTES,
                &sign_up(PASSWORD_MIN_BYTES),
                &sign_up(PASSWORD_MIN_BYTES - 1),
            ),
            row(
                &["PASSWORD_MAX_BYTES"],
                "AuthService/SignUp",
                "password",
                PASSWORD_MAX_BYTES,
                &sign_up(PASSWORD_MAX_BYTES),
                &sign_up(PASSWORD_MAX_BYTES + 1),
            ),
            row(
                &["KEY_OVERLAP"],
                rotate,
                "overlap",
                "2592000s",
                &self.rotation(exactly(KEY_OVERLAP.2)),
                &self.rotation(longer(KEY_OVERLAP.2)),
            ),
            row(
                &["WATCH_TOKEN_LIFETIME"],
                token,
                "lifetime",
                "2592000s",
                &self.token(exactly(longest)),
                &self.token(longer(longest)),
            ),
            row(
                &["WATCH_TOKEN_LIFETIME"],
                token,
                "lifetime",
                "1s",
                &self.token(exactly(shortest)),
                &self.token(exactly(shortest - Duration::from_nanos(1))),
            ),
        ]
    }
}

fn names(count: usize) -> pb::NewEvent {
    let fields = (0..count).map(|n| (format!("name {n}"), Value::from(1.0))).collect();
    pb::NewEvent { metadata: Some(Struct { fields }), ..info("x") }
}

fn steps(version: &str, count: usize) -> pb::RegisterJobConfigurationRequest {
    let tags: Vec<String> = (0..count).map(|n| n.to_string()).collect();
    registration(version, &tags.iter().map(|tag| (tag.as_str(), 1)).collect::<Vec<_>>())
}

fn silence(version: &str, length: prost_types::Duration) -> pb::RegisterJobConfigurationRequest {
    pb::RegisterJobConfigurationRequest { max_silence: Some(length), ..registration(version, &[("load", 1)]) }
}

fn declared(version: &str, count: usize) -> pb::RegisterJobConfigurationRequest {
    let mut request = registration(version, &[("load", 1)]);
    let names = (0..count).map(|n| n.to_string());
    request.steps[0].metadata =
        names.map(|name| pb::MetadataConfiguration { name, ..Default::default() }).collect();
    request
}

fn longer(duration: Duration) -> prost_types::Duration {
    exactly(duration + Duration::from_nanos(1))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_at_a_limit_passes_and_one_past_it_is_refused_with_the_limit() {
    let scene = Scene::new().await;
    for Row { limits, method, at, past, field, named } in scene.rows() {
        let case = format!("{limits:?}");
        assert_limit_named(scene.call(method, past).await, &case, field, &named);
        if let Err(status) = scene.call(method, at).await {
            panic!("{case}: a request at the limit is refused: {status:?}");
        }
    }
}
