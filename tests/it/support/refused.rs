//! What a refusal says.

use std::collections::HashMap;

use milepost::{limits, pb::ErrorReason};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// The details of an error, ready to be compared.
#[derive(Debug)]
pub struct Refusal {
    pub details: ErrorDetails,
    /// ErrorInfo's.
    pub metadata: HashMap<String, String>,
    /// The fields at fault, in order.
    pub fields: Vec<String>,
}

/// Decodes a refusal and checks what holds for every one of them.
#[track_caller]
fn refusal(status: &Status, code: Code, reason: ErrorReason) -> Refusal {
    assert_eq!(status.code(), code, "{status:?}");
    let details = status.check_error_details().expect("details that decode");
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}")).clone();
    assert_eq!(info.domain, "milepost");
    assert_eq!(info.reason, reason.as_str_name().trim_start_matches("ERROR_REASON_"), "{status:?}");
    assert!(!status.message().is_empty(), "a sentence for a developer");
    assert!(status.details().len() <= limits::ERROR_DETAILS_BYTES, "{} bytes", status.details().len());
    let fields = details
        .bad_request()
        .map(|bad| bad.field_violations.iter().map(|violation| violation.field.clone()).collect())
        .unwrap_or_default();
    Refusal { metadata: info.metadata, fields, details }
}

/// The call was refused so.
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

/// The call was refused for the shape of exactly these fields.
#[track_caller]
pub fn assert_violations<T: std::fmt::Debug>(answer: Result<T, Status>, fields: &[&str]) -> Refusal {
    let refusal = assert_refused(answer, Code::InvalidArgument, ErrorReason::FieldInvalid);
    assert_eq!(refusal.fields, fields, "{:?}", refusal.details);
    refusal
}
