//! What the tests of limits share.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use milepost::limits::TEXT_CHARS;
use milepost_client::pb::{self, ErrorReason};
use prost::Message as _;
use prost_types::Value;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::support::{
    TestServer, User, assert_refused, info, raw, registration, with_metadata, within_timeout,
};

/// A provider with a job, whose only step has a tag of the maximal length.
pub(super) struct Scene {
    pub(super) server: TestServer,
    pub(super) provider: User,
    pub(super) secret: String,
    pub(super) customer_id: String,
    customer_secret: String,
    pub(super) job: pb::Job,
    pub(super) api_key_id: String,
}

impl Scene {
    pub(super) async fn new() -> Self {
        let server = TestServer::start().await;
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        let mut request = registration("1.0.0", &[("load", 1)]);
        request.steps[0].tag = "ü".repeat(TEXT_CHARS);
        provider.register(request).await;
        let job = provider.job(&customer).await;
        let (secret, customer_secret) = (server.log_in(&provider).await, server.log_in(&customer).await);
        let key = provider.session.auth.create_api_key(pb::CreateApiKeyRequest::default()).await.unwrap();
        Self {
            provider,
            secret,
            customer_secret,
            customer_id: customer.id,
            job,
            api_key_id: key.into_inner().api_key.unwrap().id,
            server,
        }
    }

    pub(super) async fn call(&self, method: &str, message: Vec<u8>) -> Result<Bytes, Status> {
        let first = async {
            let channel = self.server.channel.clone();
            let is_of_customer = method == "JobService/RequestCancellation";
            let secret = if is_of_customer { &self.customer_secret } else { &self.secret };
            let mut answers = raw::open(channel, Some(secret), method, [message]).await?;
            Ok::<_, Status>(answers.message().await?.expect("an answer"))
        };
        let answer = within_timeout("an answer", first).await?;
        if method == "EventService/PublishEvents" {
            let answer = pb::PublishEventsResponse::decode(answer.clone()).unwrap();
            if let Some(pb::publish_events_response::Outcome::Refused(status)) = answer.outcome {
                let details = status.encode_to_vec().into();
                return Err(Status::with_details(Code::from(status.code), status.message, details));
            }
        }
        Ok(answer)
    }

    pub(super) fn batch(&self, events: Vec<pb::NewEvent>) -> pb::AppendEventsRequest {
        let job = Some(pb::append_events_request::Job::JobId(self.job.id.clone()));
        pb::AppendEventsRequest { job, expected_sequence: None, events }
    }

    pub(super) fn token(&self, lifetime: prost_types::Duration) -> pb::CreateWatchTokenRequest {
        let job = Some(pb::create_watch_token_request::Job::JobId(self.job.id.clone()));
        pb::CreateWatchTokenRequest { job, note: String::new(), lifetime: Some(lifetime) }
    }
}

/// An event whose metadata has exactly this many bytes.
pub(super) fn large(bytes: usize) -> pb::NewEvent {
    let mut sized =
        (0..64).map(|less| with_metadata(info("x"), [("text", Value::from("x".repeat(bytes - less)))]));
    sized.find(|event| event.metadata.as_ref().unwrap().encoded_len() == bytes).unwrap()
}

pub(super) fn sign_up(password_bytes: usize) -> pb::SignUpRequest {
    pb::SignUpRequest {
        role: pb::UserRole::Customer.into(),
        email: format!("{}@example.com", Uuid::now_v7()),
        password: "x".repeat(password_bytes),
        ..Default::default()
    }
}

pub(super) fn exactly(duration: Duration) -> prost_types::Duration {
    duration.try_into().unwrap()
}

/// Asserts that the value past the limit was refused: with this field alone, and
/// with a description that names the limit.
#[track_caller]
pub(super) fn assert_limit_named(answer: Result<Bytes, Status>, case: &str, field: &str, limit: &str) {
    let Err(status) = answer else { panic!("{case}: {field} past its limit passed") };
    let refusal =
        assert_refused(Err::<(), _>(status.clone()), Code::InvalidArgument, ErrorReason::FieldInvalid);
    assert_eq!(refusal.fields, [field], "{case}: {status:?}");
    let description = &refusal.details.bad_request().unwrap().field_violations[0].description;
    let words: BTreeSet<&str> = description.split([' ', ',']).collect();
    assert!(words.contains(limit), "{case}: {description:?} does not name the limit {limit}");
}
