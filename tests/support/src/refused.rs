//! Assertions about error statuses and their details.

use std::collections::HashMap;

use milepost::limits;
use milepost_client::pb::ErrorReason;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// The decoded details of an error status.
#[derive(Debug)]
pub struct Refusal {
    pub details: ErrorDetails,
    /// The metadata of ErrorInfo.
    pub metadata: HashMap<String, String>,
    /// The field of each BadRequest violation, in order.
    pub fields: Vec<String>,
}

/// Decodes an error status and checks what holds for every error of the API.
#[track_caller]
fn refusal(status: &Status, code: Code, reason: ErrorReason) -> Refusal {
    assert_eq!(status.code(), code, "{status:?}");
    let details = status.check_error_details().expect("the details decode");
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}")).clone();
    assert_eq!(info.domain, "milepost");
    assert_eq!(info.reason, reason.as_str_name().trim_start_matches("ERROR_REASON_"), "{status:?}");
    assert!(!status.message().is_empty(), "the message is empty");
    assert!(
        status.details().len().div_ceil(3) * 4 <= limits::ERROR_DETAILS_BYTES,
        "{} bytes",
        status.details().len()
    );
    let fields = details
        .bad_request()
        .map(|bad| bad.field_violations.iter().map(|violation| violation.field.clone()).collect())
        .unwrap_or_default();
    Refusal { metadata: info.metadata, fields, details }
}

/// Asserts that the call failed with this code and reason.
#[track_caller]
pub fn assert_refused<T: std::fmt::Debug>(
    answer: Result<T, Status>,
    code: Code,
    reason: ErrorReason,
) -> Refusal {
    match answer {
        Ok(answer) => panic!("expected {code:?}, got {answer:?}"),
        Err(status) => refusal(&status, code, reason),
    }
}

/// Asserts that the call failed with INVALID_ARGUMENT for exactly these fields.
#[track_caller]
pub fn assert_violations<T: std::fmt::Debug>(answer: Result<T, Status>, fields: &[&str]) -> Refusal {
    let refusal = assert_refused(answer, Code::InvalidArgument, ErrorReason::FieldInvalid);
    assert_eq!(refusal.fields, fields, "{:?}", refusal.details);
    refusal
}
