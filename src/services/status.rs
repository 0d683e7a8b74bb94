//! The mapping of [`Error`] to gRPC: a code, a message, and google.rpc details that fit
//! into the trailers that common clients and proxies accept.

use std::{borrow::Cow, collections::HashMap, time::Duration};

use prost::Message;
use prost_types::Any;
use tonic::Code;
use tonic_types::{
    StatusExt as _,
    pb::{
        BadRequest, ErrorInfo, PreconditionFailure, QuotaFailure, ResourceInfo, RetryInfo,
        Status as RpcStatus, bad_request::FieldViolation, precondition_failure, quota_failure,
    },
};

use crate::{
    error::{Error, Resource, Violations, causes},
    limits::{ERROR_DETAILS_BYTES, ERROR_QUOTE_CHARS},
    pb::ErrorReason,
    quota::{Quota, QuotaUsed},
};

/// `domain` of every ErrorInfo.
const DOMAIN: &str = "milepost";
/// The key in the metadata of ErrorInfo that names a quota which is used up.
const QUOTA: &str = "quota";
/// Largest encoded `google.rpc.Status`, in bytes: base64 makes four bytes of three.
const STATUS_BYTES: usize = ERROR_DETAILS_BYTES / 4 * 3;
/// Longest message, in bytes. It travels twice: within the details, and beside them in
/// percent-encoding, up to three times as long.
const MESSAGE_BYTES: usize = 192;
/// Longest path of a field and longest description of a violation, in bytes.
const FIELD_BYTES: usize = 256;
const DESCRIPTION_BYTES: usize = 1024;
/// RetryInfo of a call that failed because the database is unavailable or the server is
/// draining.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let status = rpc_status(&error);
        let details = status.encode_to_vec().into();
        Self::with_details(Code::from_i32(status.code), status.message, details)
    }
}

/// Converts an error to the message that an answer within a stream contains: code,
/// message, and the details that a failed call has in its trailers. It also logs
/// internal errors and an unavailable database with their causes, which the caller does
/// not get; so it must be called once for each failure.
pub fn rpc_status(error: &Error) -> RpcStatus {
    log(error);
    let Answer { code, reason, metadata, details, violations } = answer(error);
    let info = ErrorInfo {
        reason: reason_name(reason).to_owned(),
        domain: DOMAIN.to_owned(),
        metadata: metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
    };
    let mut status = RpcStatus {
        code: code.into(),
        message: cut(&error.to_string(), MESSAGE_BYTES),
        details: [any("ErrorInfo", &info)].into_iter().chain(details).collect(),
    };
    if let Some(violations) = violations {
        let room = STATUS_BYTES.saturating_sub(status.encoded_len());
        status.details.push(bad_request(&violations, room));
    }
    status
}

pub(crate) fn code_of(error: &Error) -> Code {
    answer(error).code
}

pub(crate) fn reason(error: &Error) -> ErrorReason {
    answer(error).reason
}

/// The reason in ErrorInfo of a status; none if it is not one of milepost's own.
pub(crate) fn reason_of(status: &tonic::Status) -> Option<ErrorReason> {
    let info = status.get_details_error_info()?;
    ErrorReason::from_str_name(&format!("ERROR_REASON_{}", info.reason))
}

/// The quota that a call was refused for; none if it was not.
pub(crate) fn refused_quota(status: &tonic::Status) -> Option<Quota> {
    let info = status.get_details_error_info()?;
    Quota::ALL.into_iter().find(|quota| info.metadata.get(QUOTA).is_some_and(|name| name == quota.name()))
}

/// The parts of an answer, without its message.
struct Answer<'a> {
    code: Code,
    reason: ErrorReason,
    metadata: HashMap<&'static str, String>,
    details: Vec<Any>,
    /// For BadRequest, which gets the bytes that the other details leave.
    violations: Option<Cow<'a, Violations>>,
}

impl<'a> Answer<'a> {
    fn new(code: Code, reason: ErrorReason) -> Self {
        Self { code, reason, metadata: HashMap::new(), details: Vec::new(), violations: None }
    }

    fn metadata(mut self, key: &'static str, value: &impl ToString) -> Self {
        self.metadata.insert(key, value.to_string());
        self
    }

    fn violations(self, violations: Cow<'a, Violations>) -> Self {
        let answer = self.metadata("violations", &violations.iter().len());
        let answer = match violations.known_step_tags {
            Some(total) => answer.metadata("known_step_tags", &total),
            None => answer,
        };
        Self { violations: Some(violations), ..answer }
    }

    fn resource(mut self, resource: Resource, name: &str, description: &str) -> Self {
        self.details.push(any(
            "ResourceInfo",
            &ResourceInfo {
                resource_type: resource.type_name().to_owned(),
                resource_name: quote(name),
                owner: String::new(),
                description: description.to_owned(),
            },
        ));
        self
    }

    fn precondition(mut self, subject: &impl ToString, description: &str) -> Self {
        let violation = precondition_failure::Violation {
            r#type: reason_name(self.reason).to_owned(),
            subject: subject.to_string(),
            description: description.to_owned(),
        };
        self.details.push(any("PreconditionFailure", &PreconditionFailure { violations: vec![violation] }));
        self
    }

    fn quota(mut self, subject: &str, description: String) -> Self {
        let violation =
            quota_failure::Violation { subject: subject.to_owned(), description, ..Default::default() };
        self.details.push(any("QuotaFailure", &QuotaFailure { violations: vec![violation] }));
        self
    }

    /// The quota, its limit and its use, for people in QuotaFailure and for programs in the
    /// metadata of ErrorInfo as well.
    fn quota_used(mut self, used: &QuotaUsed) -> Self {
        let QuotaUsed { quota, limit, used, .. } = used;
        let violation = quota_failure::Violation {
            subject: quota.name().to_owned(),
            description: format!("{used} of {limit} {} are used", quota.noun()),
            quota_metric: quota.name().to_owned(),
            quota_value: *limit,
            ..Default::default()
        };
        self.details.push(any("QuotaFailure", &QuotaFailure { violations: vec![violation] }));
        self.metadata(QUOTA, &quota.name()).metadata("limit", limit).metadata("used", used)
    }

    fn retry(mut self, after: Duration) -> Self {
        let retry_delay = prost_types::Duration::try_from(after).ok();
        self.details.push(any("RetryInfo", &RetryInfo { retry_delay }));
        self
    }
}

fn answer(error: &Error) -> Answer<'_> {
    use ErrorReason as Reason;
    match error {
        Error::CredentialInvalid => Answer::new(Code::Unauthenticated, Reason::CredentialInvalid),
        Error::LogInFailed => Answer::new(Code::Unauthenticated, Reason::LogInFailed),
        Error::RoleRequired(role) => {
            Answer::new(Code::PermissionDenied, Reason::RoleRequired).metadata("role", &role.to_uppercase())
        }
        Error::ScopeRequired(scope) => Answer::new(Code::PermissionDenied, Reason::ScopeRequired)
            .metadata("scope", &scope.to_uppercase()),
        Error::SessionRequired => Answer::new(Code::PermissionDenied, Reason::SessionRequired),
        Error::SignUpClosed => Answer::new(Code::PermissionDenied, Reason::SignUpClosed),
        Error::Invalid(violations) => {
            Answer::new(Code::InvalidArgument, Reason::FieldInvalid).violations(Cow::Borrowed(violations))
        }
        Error::NotFound { resource, name } => Answer::new(Code::NotFound, Reason::ResourceNotFound).resource(
            *resource,
            name,
            "does not exist for this caller",
        ),
        Error::EmailTaken => {
            let description = "a user with this e-mail exists";
            let mut violations = Violations::default();
            violations.add("email", description);
            Answer::new(Code::AlreadyExists, Reason::EmailTaken)
                .resource(Resource::User, "", description)
                .violations(Cow::Owned(violations))
        }
        Error::Differs { resource, name, differences } => {
            Answer::new(Code::AlreadyExists, differs_reason(*resource))
                .resource(*resource, name, "exists with other content")
                .violations(Cow::Borrowed(differences))
        }
        Error::JobClosed { job_id, status } => Answer::new(Code::FailedPrecondition, Reason::JobClosed)
            .metadata("status", &status.name())
            .precondition(job_id, "the log of a closed job never changes again"),
        Error::ApiKeyAlreadyExpired(id) => {
            Answer::new(Code::FailedPrecondition, Reason::ApiKeyAlreadyExpired)
                .precondition(id, "has ended before; nothing is changed")
        }
        Error::WatchTokenAlreadyExpired(id) => {
            Answer::new(Code::FailedPrecondition, Reason::WatchTokenAlreadyExpired)
                .precondition(id, "has ended before; nothing is changed")
        }
        Error::SequenceMismatch { last_sequence } => {
            Answer::new(Code::Aborted, Reason::SequenceMismatch).metadata("last_sequence", last_sequence)
        }
        Error::PositionBeyondLog => Answer::new(Code::OutOfRange, Reason::PositionBeyondLog),
        Error::LogSetBack => Answer::new(Code::OutOfRange, Reason::LogSetBack),
        Error::EventsExpired { first_sequence } => {
            let answer = Answer::new(Code::OutOfRange, Reason::EventsExpired);
            match first_sequence {
                Some(sequence) => answer.metadata("first_sequence", sequence),
                None => answer,
            }
        }
        Error::EventsRemoved(job_id) => Answer::new(Code::FailedPrecondition, Reason::EventsRemoved)
            .precondition(job_id, "retention has removed the events of the job"),
        Error::Overloaded { what, retry_after } => Answer::new(Code::ResourceExhausted, Reason::Overloaded)
            .quota(what, format!("too many {what} at once"))
            .retry(*retry_after),
        Error::RateExceeded { what, retry_after } => Answer::new(Code::ResourceExhausted, Reason::Overloaded)
            .quota(what, format!("too many {what}"))
            .retry(*retry_after),
        Error::LogInThrottled { retry_after } => Answer::new(Code::ResourceExhausted, Reason::LogInThrottled)
            .quota("log-in failures", "too many failed log-ins".to_owned())
            .retry(*retry_after),
        Error::QuotaExceeded(used) => {
            let answer = Answer::new(Code::ResourceExhausted, Reason::QuotaExceeded).quota_used(used);
            match used.retry_after {
                Some(retry_after) => answer.retry(retry_after),
                None => answer,
            }
        }
        Error::Unavailable(_) => {
            Answer::new(Code::Unavailable, Reason::DatabaseUnavailable).retry(RETRY_AFTER)
        }
        Error::Draining => Answer::new(Code::Unavailable, Reason::Draining).retry(RETRY_AFTER),
        Error::DeadlineExceeded => Answer::new(Code::DeadlineExceeded, Reason::DeadlineExceeded),
        Error::Internal(_) => Answer::new(Code::Internal, Reason::Internal),
    }
}

fn differs_reason(resource: Resource) -> ErrorReason {
    match resource {
        Resource::JobConfiguration => ErrorReason::JobConfigurationDiffers,
        Resource::Job => ErrorReason::JobDiffers,
        Resource::Event => ErrorReason::EventDiffers,
        // No request creates these resources by a key of the client.
        Resource::Customer | Resource::User | Resource::ApiKey | Resource::WatchToken => {
            ErrorReason::Internal
        }
    }
}

/// The reason's name in ErrorInfo, without the enum's prefix.
fn reason_name(reason: ErrorReason) -> &'static str {
    reason.as_str_name().trim_start_matches("ERROR_REASON_")
}

/// Makes a BadRequest of the first violations, as many as fit into `room` bytes.
fn bad_request(violations: &Violations, room: usize) -> Any {
    // The type's name, with the tags and lengths around it.
    let mut size = 64;
    let mut field_violations = Vec::new();
    for violation in violations.iter() {
        let violation = FieldViolation {
            field: cut(&violation.field, FIELD_BYTES),
            description: cut(&violation.description, DESCRIPTION_BYTES),
            ..Default::default()
        };
        // A tag of one byte and a length of at most two bytes.
        size += violation.encoded_len() + 3;
        if size > room {
            break;
        }
        field_violations.push(violation);
    }
    any("BadRequest", &BadRequest { field_violations })
}

fn any(name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("type.googleapis.com/google.rpc.{name}"), value: message.encode_to_vec() }
}

/// Cuts `text` to at most `bytes` bytes.
fn cut(text: &str, bytes: usize) -> String {
    if text.len() <= bytes {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(bytes - '…'.len_utf8())])
}

/// Cuts a name in the request to [`ERROR_QUOTE_CHARS`].
fn quote(name: &str) -> String {
    cut(name, name.char_indices().nth(ERROR_QUOTE_CHARS).map_or(name.len(), |(end, _)| end + '…'.len_utf8()))
}

fn log(error: &Error) {
    let chain = causes(error).skip(1).map(ToString::to_string).collect::<Vec<_>>().join(": ");
    if let Error::Internal(_) = error {
        tracing::error!(cause = chain, "{error}");
    } else if let Error::Unavailable(_) = error {
        tracing::warn!(cause = chain, "{error}");
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::progress::JobStatus;

    fn used_up(retry_after: Option<Duration>) -> Error {
        Error::QuotaExceeded(QuotaUsed { quota: Quota::OpenJobs, limit: 3, used: 4, retry_after })
    }

    pub(crate) fn one_of_each() -> Vec<(Error, Code, &'static str)> {
        let mut differences = Violations::default();
        differences.add("name", "is \"a\", was \"b\"");
        let differs =
            |resource| Error::Differs { resource, name: "k".to_owned(), differences: differences.clone() };
        let retry_after = Duration::from_secs(2);
        vec![
            (Error::CredentialInvalid, Code::Unauthenticated, "CREDENTIAL_INVALID"),
            (Error::LogInFailed, Code::Unauthenticated, "LOG_IN_FAILED"),
            (Error::RoleRequired("provider"), Code::PermissionDenied, "ROLE_REQUIRED"),
            (Error::ScopeRequired("read"), Code::PermissionDenied, "SCOPE_REQUIRED"),
            (Error::SessionRequired, Code::PermissionDenied, "SESSION_REQUIRED"),
            (Error::SignUpClosed, Code::PermissionDenied, "SIGN_UP_CLOSED"),
            (Error::invalid("f", "d"), Code::InvalidArgument, "FIELD_INVALID"),
            (Error::not_found(Resource::Job, "j"), Code::NotFound, "RESOURCE_NOT_FOUND"),
            (Error::EmailTaken, Code::AlreadyExists, "EMAIL_TAKEN"),
            (differs(Resource::JobConfiguration), Code::AlreadyExists, "JOB_CONFIGURATION_DIFFERS"),
            (differs(Resource::Job), Code::AlreadyExists, "JOB_DIFFERS"),
            (differs(Resource::Event), Code::AlreadyExists, "EVENT_DIFFERS"),
            (
                Error::JobClosed { job_id: Uuid::nil(), status: JobStatus::Cancelled },
                Code::FailedPrecondition,
                "JOB_CLOSED",
            ),
            (Error::LogInThrottled { retry_after }, Code::ResourceExhausted, "LOG_IN_THROTTLED"),
            (Error::ApiKeyAlreadyExpired(Uuid::nil()), Code::FailedPrecondition, "API_KEY_ALREADY_EXPIRED"),
            (
                Error::WatchTokenAlreadyExpired(Uuid::nil()),
                Code::FailedPrecondition,
                "WATCH_TOKEN_ALREADY_EXPIRED",
            ),
            (Error::SequenceMismatch { last_sequence: 7 }, Code::Aborted, "SEQUENCE_MISMATCH"),
            (Error::PositionBeyondLog, Code::OutOfRange, "POSITION_BEYOND_LOG"),
            (Error::LogSetBack, Code::OutOfRange, "LOG_SET_BACK"),
            (Error::EventsExpired { first_sequence: Some(3) }, Code::OutOfRange, "EVENTS_EXPIRED"),
            (Error::EventsRemoved(Uuid::nil()), Code::FailedPrecondition, "EVENTS_REMOVED"),
            (Error::Overloaded { what: "log-ins", retry_after }, Code::ResourceExhausted, "OVERLOADED"),
            (Error::RateExceeded { what: "calls", retry_after }, Code::ResourceExhausted, "OVERLOADED"),
            (used_up(Some(retry_after)), Code::ResourceExhausted, "QUOTA_EXCEEDED"),
            (Error::unavailable("SELECT secret"), Code::Unavailable, "DATABASE_UNAVAILABLE"),
            (Error::Draining, Code::Unavailable, "DRAINING"),
            (Error::DeadlineExceeded, Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (Error::internal("SELECT secret"), Code::Internal, "INTERNAL"),
        ]
    }

    #[test]
    fn every_error_has_its_code_and_a_reason_of_the_proto_enum() {
        let mut reasons = Vec::new();
        for (error, code, reason) in one_of_each() {
            let status = tonic::Status::from(error);
            assert_eq!(status.code(), code, "{reason}");
            let info = status.get_details_error_info().expect("an ErrorInfo");
            assert_eq!((info.domain.as_str(), info.reason.as_str()), ("milepost", reason));
            assert!(ErrorReason::from_str_name(&format!("ERROR_REASON_{reason}")).is_some(), "{reason}");
            reasons.push(info.reason);
        }
        // The enum's values are numbered without gaps; 0 is never sent.
        let all = (1..).map_while(|n| ErrorReason::try_from(n).ok()).count();
        reasons.sort();
        reasons.dedup();
        assert_eq!(reasons.len(), all, "there is an error for each reason");
    }

    #[test]
    fn retryable_errors_carry_retry_info() {
        for (error, code, reason) in one_of_each() {
            let retry = tonic::Status::from(error).get_details_retry_info();
            let expected = if code == Code::Unavailable {
                Some(RETRY_AFTER)
            } else {
                (code == Code::ResourceExhausted).then_some(Duration::from_secs(2))
            };
            assert_eq!(retry.and_then(|info| info.retry_delay), expected, "{reason}");
        }
    }

    #[test]
    fn a_used_up_quota_says_its_limit_and_its_use_and_to_retry_only_if_that_helps() {
        let details = tonic::Status::from(used_up(None)).get_error_details();
        assert!(details.retry_info().is_none());
        let metadata = &details.error_info().expect("an ErrorInfo").metadata;
        assert_eq!(["quota", "limit", "used"].map(|key| metadata[key].as_str()), ["open_jobs", "3", "4"]);
        let violation = &details.quota_failure().expect("a QuotaFailure").violations[0];
        assert_eq!((violation.subject.as_str(), violation.quota_value), ("open_jobs", 3));
        assert_eq!(violation.description, "4 of 3 open jobs are used");
    }

    #[test]
    fn errors_carry_the_details_and_metadata_of_their_code() {
        for (error, code, reason) in one_of_each() {
            let details = tonic::Status::from(error).get_error_details();
            assert_eq!(
                details.precondition_failure().is_some(),
                code == Code::FailedPrecondition,
                "{reason}"
            );
            let names_a_resource = matches!(code, Code::NotFound | Code::AlreadyExists);
            assert_eq!(details.resource_info().is_some(), names_a_resource, "{reason}");
            assert_eq!(details.quota_failure().is_some(), code == Code::ResourceExhausted, "{reason}");
            let metadata = &details.error_info().expect("an ErrorInfo").metadata;
            let expected = match reason {
                "ROLE_REQUIRED" => Some(("role", "PROVIDER")),
                "SCOPE_REQUIRED" => Some(("scope", "READ")),
                "JOB_CLOSED" => Some(("status", "CANCELLED")),
                "SEQUENCE_MISMATCH" => Some(("last_sequence", "7")),
                "EVENTS_EXPIRED" => Some(("first_sequence", "3")),
                _ => None,
            };
            if let Some((key, value)) = expected {
                assert_eq!(metadata.get(key).map(String::as_str), Some(value), "{reason}");
            }
        }
    }

    #[test]
    fn causes_are_never_sent() {
        for (error, _, reason) in one_of_each() {
            let status = tonic::Status::from(error);
            let sent = format!("{status:?} {:?}", status.get_error_details());
            assert!(!sent.contains("SELECT"), "{reason}: {sent}");
        }
    }

    #[test]
    fn five_hundred_violations_fit_into_three_kibibytes_of_base64() {
        for character in ["x", "\u{1F9E0}", "é", "\u{7}", "ﾾ"] {
            for length in [1, 10, 64, 500, 100_000] {
                let mut violations = Violations::default();
                for index in 0..500 {
                    violations.add(
                        format!("events[{index}].{}", character.repeat(length)),
                        character.repeat(length),
                    );
                }
                for error in [
                    Error::Invalid(violations.clone()),
                    Error::Differs {
                        resource: Resource::Event,
                        name: character.repeat(length),
                        differences: violations,
                    },
                ] {
                    assert_fits(error, 500);
                }
            }
        }
    }

    fn assert_fits(error: Error, total: usize) {
        let status = tonic::Status::from(error);
        let mut headers = http::HeaderMap::new();
        status.add_header(&mut headers).expect("valid headers");
        let sent = headers["grpc-status-details-bin"].len();
        assert!(sent <= ERROR_DETAILS_BYTES, "{sent} bytes");
        assert!(status.message().len() <= MESSAGE_BYTES);
        let details = status.get_error_details();
        let listed = &details.bad_request().expect("a BadRequest").field_violations;
        assert!(!listed.is_empty() && listed.len() < total);
        for (index, violation) in listed.iter().enumerate() {
            assert!(violation.field.starts_with(&format!("events[{index}].")), "in field order");
        }
        let metadata = &details.error_info().expect("an ErrorInfo").metadata;
        assert_eq!(metadata["violations"], total.to_string());
    }

    #[test]
    fn long_names_are_cut() {
        for character in ["x", "\u{1F9E0}"] {
            let status = tonic::Status::from(Error::not_found(Resource::Job, &character.repeat(100_000)));
            let name = status.get_details_resource_info().expect("a ResourceInfo").resource_name;
            assert_eq!(name, format!("{}…", character.repeat(ERROR_QUOTE_CHARS)));
            let short =
                tonic::Status::from(Error::not_found(Resource::Job, &character.repeat(ERROR_QUOTE_CHARS)));
            let name = short.get_details_resource_info().expect("a ResourceInfo").resource_name;
            assert_eq!(name, character.repeat(ERROR_QUOTE_CHARS));
        }
    }
}
