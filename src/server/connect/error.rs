//! Errors as Connect sends them: JSON, with the details in base64 and, for people, decoded.

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use http::{HeaderMap, StatusCode};
use prost::Message as _;
use serde_json::{Map, Value, json};
use tonic::{Code, Status};
use tonic_types::pb::Status as RpcStatus;

use crate::json::{DESCRIPTORS, to_json};

/// `{"code": …, "message": …, "details": […]}`.
pub(super) fn error_json(status: &Status) -> Value {
    let mut error = Map::new();
    error.insert("code".to_owned(), code_name(status.code()).into());
    if !status.message().is_empty() {
        error.insert("message".to_owned(), status.message().into());
    }
    let details = RpcStatus::decode(status.details()).map(|status| status.details).unwrap_or_default();
    if !details.is_empty() {
        let details: Vec<_> = details
            .iter()
            .map(|any| {
                let name = any.type_url.rsplit('/').next().unwrap_or_default();
                let mut detail = json!({ "type": name, "value": STANDARD_NO_PAD.encode(&any.value) });
                if let Some(decoded) = decoded(name, &any.value) {
                    detail["debug"] = decoded;
                }
                detail
            })
            .collect();
        error.insert("details".to_owned(), details.into());
    }
    error.into()
}

fn decoded(name: &str, bytes: &[u8]) -> Option<Value> {
    let mut json = Vec::new();
    to_json(&DESCRIPTORS.get_message_by_name(name)?, bytes, &mut json).ok()?;
    serde_json::from_slice(&json).ok()
}

/// The last message of a stream: the error, if it failed, and the trailers.
pub(super) fn end_of_stream(status: &Status, trailers: &HeaderMap) -> Value {
    let mut end = Map::new();
    if status.code() != Code::Ok {
        end.insert("error".to_owned(), error_json(status));
    }
    if !trailers.is_empty() {
        let values =
            |name| trailers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
        let metadata: Map<_, _> =
            trailers.keys().map(|name| (name.to_string(), values(name).collect())).collect();
        end.insert("metadata".to_owned(), metadata.into());
    }
    end.into()
}

/// The name of a code (Connect protocol, "Error codes").
pub(super) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "canceled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

/// The HTTP status of a unary call that failed (Connect protocol, "Error codes").
pub(super) fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        // 499, which no standard has.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::status::tests::one_of_each;

    #[test]
    fn every_error_is_json_with_all_of_its_details() {
        for (error, code, reason) in one_of_each() {
            let status = Status::from(error);
            let json = error_json(&status);
            assert_eq!(json["code"], code_name(code), "{reason}");
            assert_eq!(json["message"], status.message(), "{reason}");
            assert!(http_status(code).is_client_error() || http_status(code).is_server_error(), "{reason}");
            let sent = RpcStatus::decode(status.details()).expect("details").details;
            let details = json["details"].as_array().expect("details");
            assert_eq!(details.len(), sent.len(), "{reason}");
            for (detail, sent) in details.iter().zip(&sent) {
                let name = detail["type"].as_str().expect("a name");
                assert_eq!(sent.type_url, format!("type.googleapis.com/{name}"));
                let value = detail["value"].as_str().expect("base64");
                assert_eq!(STANDARD_NO_PAD.decode(value).expect("base64"), sent.value, "{reason}");
                assert!(detail["debug"].is_object(), "{reason}: {detail}");
            }
            assert_eq!(details[0]["debug"]["reason"], reason);
        }
    }
}
