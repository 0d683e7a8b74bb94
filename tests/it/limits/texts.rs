//! Text limits: every string field of every request that is a text.

use std::time::Duration;

use milepost::limits::{PASSWORD_MIN_BYTES, TEXT_CHARS};
use milepost_client::pb;
use prost::Message as _;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, ReflectMessage as _, Value};
use tonic::Code;
use uuid::Uuid;

use super::scene::{Scene, assert_limit_named, exactly, sign_up};
use crate::support::{PASSWORD, info, raw, registration};

impl Scene {
    /// A valid request of the method, with one item in each list.
    pub(super) fn valid_request(&self, method: &str) -> Vec<u8> {
        let job_id = self.job.id.clone();
        let event = || info("x");
        let metadata = pb::MetadataConfiguration { name: "mean".to_owned(), ..Default::default() };
        match method.split('/').nth(1).unwrap() {
            "SignUp" => sign_up(PASSWORD_MIN_BYTES).encode_to_vec(),
            "LogIn" => {
                pb::LogInRequest { email: "nobody@example.com".to_owned(), password: PASSWORD.to_owned() }
                    .encode_to_vec()
            }
            "UpdateCurrentUser" => pb::UpdateCurrentUserRequest {
                user: Some(pb::User { first_name: "Ada".to_owned(), ..Default::default() }),
                update_mask: None,
            }
            .encode_to_vec(),
            "ChangePassword" => pb::ChangePasswordRequest {
                current_password: "not this one".to_owned(),
                new_password: PASSWORD.to_owned(),
            }
            .encode_to_vec(),
            "RegisterJobConfiguration" => {
                let mut request = registration("3.0.0", &[("load", 1)]);
                // Another tag each time, so that no version is registered twice.
                request.tag = Uuid::now_v7().to_string();
                request.steps[0].metadata.push(metadata);
                request.encode_to_vec()
            }
            "CreateJob" => pb::CreateJobRequest {
                provider_job_id: Uuid::now_v7().to_string(),
                customer: Some(pb::create_job_request::Customer::CustomerId(self.customer_id.clone())),
                configuration_tag: self.job.configuration_tag.clone(),
                ..Default::default()
            }
            .encode_to_vec(),
            "GetJobConfiguration" => pb::GetJobConfigurationRequest {
                key: Some(pb::get_job_configuration_request::Key::Tag(self.job.configuration_tag.clone())),
                ..Default::default()
            }
            .encode_to_vec(),
            "CloseJob" => pb::CloseJobRequest {
                // Not the job of this scene, which other requests need open.
                job: Some(pb::close_job_request::Job::ProviderJobId("none".to_owned())),
                reason: String::new(),
            }
            .encode_to_vec(),
            "RequestCancellation" => {
                pb::RequestCancellationRequest { job_id, reason: String::new() }.encode_to_vec()
            }
            "HoldJob" => pb::HoldJobRequest {
                job: Some(pb::hold_job_request::Job::ProviderJobId("none".to_owned())),
                held: true,
            }
            .encode_to_vec(),
            "AppendEvents" => self.batch(vec![event()]).encode_to_vec(),
            "PublishEvents" => pb::PublishEventsRequest {
                job: Some(pb::publish_events_request::Job::JobId(job_id)),
                events: vec![event()],
                ..Default::default()
            }
            .encode_to_vec(),
            "WatchEvents" => pb::WatchEventsRequest {
                scope: Some(pb::watch_events_request::Scope::AllJobs(pb::AllJobs::default())),
                ..Default::default()
            }
            .encode_to_vec(),
            "CreateWatchToken" => self.token(exactly(Duration::from_secs(60))).encode_to_vec(),
            "ListEvents"
            | "GetJob"
            | "EstimateJob"
            | "ListWatchTokens"
            | "ListJobs"
            | "SummarizeJobs"
            | "ExportJobs"
            | "ExportEvents"
            | "ListJobConfigurations"
            | "CreateApiKey" => Vec::new(),
            other => panic!("{other} has texts, but no valid request is defined here"),
        }
    }
}

/// Whether a string field is no text: an id, a token, a time zone, the key of a label, a path of a field mask, or
/// a new password, whose limit is in bytes.
fn is_no_text(method: &str, path: &str) -> bool {
    let name = path.rsplit('.').next().unwrap();
    path.starts_with("update_mask")
        || ["user.id", "user.email"].contains(&path)
        || (name == "id" && method != "ListJobs")
        || [
            "job_id",
            "customer_id",
            "customer_code",
            "counterpart_id",
            "api_key_id",
            "watch_token_id",
            "page_token",
            "resume_token",
            "time_zone",
            "label_key",
            "new_password",
        ]
        .contains(&name)
        || (method, path) == ("SignUp", "password")
}

/// The paths of all string fields of a message, with the first item of each list.
fn strings(message: &MessageDescriptor, within: &str, paths: &mut Vec<String>) {
    for field in message.fields() {
        let index = if field.is_list() { "[0]" } else { "" };
        let path = format!("{within}{}{index}", field.name());
        match field.kind() {
            Kind::String => paths.push(path),
            // Metadata and labels have limits of their own.
            Kind::Message(inner)
                if !field.is_map() && !inner.full_name().starts_with("google.protobuf.Struct") =>
            {
                strings(&inner, &format!("{path}."), paths);
            }
            _ => {}
        }
    }
}

/// Sets the field at the path and adds the messages that are missing on the way.
fn set(message: &mut DynamicMessage, path: &str, value: Value) {
    let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let (name, is_list) = first.strip_suffix("[0]").map_or((first, false), |name| (name, true));
    let Some(rest) = rest else {
        let value = if is_list { Value::List(vec![value]) } else { value };
        return message.set_field_by_name(name, value);
    };
    let field = message.descriptor().get_field_by_name(name).unwrap();
    let Kind::Message(kind) = field.kind() else { panic!("{path}") };
    let inner = match message.get_field_mut(&field) {
        Value::List(items) => {
            if items.is_empty() {
                items.push(Value::Message(DynamicMessage::new(kind)));
            }
            &mut items[0]
        }
        inner => inner,
    };
    set(inner.as_message_mut().unwrap(), rest, value);
}

/// A text of this many characters that is valid in this field.
fn text(path: &str, chars: usize) -> String {
    match path.rsplit('.').next().unwrap() {
        "email" => format!("{}@example.com", "a".repeat(chars - 12)),
        "version" | "configuration_version" => format!("1.0.0-{}", "a".repeat(chars - 6)),
        "password" | "current_password" => "x".repeat(chars),
        _ => "ü".repeat(chars),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_text_has_at_most_256_characters() {
    let scene = Scene::new().await;
    let mut texts = 0;
    for method in raw::methods() {
        let mut paths = Vec::new();
        strings(&method.input(), "", &mut paths);
        for path in paths.into_iter().filter(|path| !is_no_text(method.name(), path)) {
            texts += 1;
            let name = raw::name(&method);
            let case = format!("{name} {path}");
            let with = |chars| {
                let valid = scene.valid_request(&name);
                let mut message = DynamicMessage::decode(method.input(), valid.as_slice()).unwrap();
                set(&mut message, &path, Value::String(text(&path, chars)));
                message.encode_to_vec()
            };
            let past = scene.call(&name, with(TEXT_CHARS + 1)).await;
            assert_limit_named(past, &case, &path, &TEXT_CHARS.to_string());
            let at = scene.call(&name, with(TEXT_CHARS)).await;
            // The call may fail because no such resource exists, or the password is wrong.
            if let Err(status) = at {
                let wrong = status.code() == Code::InvalidArgument;
                let wrong = wrong && (path != "current_password" || status.message().contains("256"));
                assert!(!wrong, "{case}: {status:?}");
            }
        }
    }
    assert!(texts > 40, "{texts}");
}
