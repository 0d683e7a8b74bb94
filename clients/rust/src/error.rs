//! The error of a call, with its details decoded.

use std::{fmt, sync::Arc, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, ErrorInfo, FieldViolation, StatusExt as _};

/// The domain of every ErrorInfo of milepost.
const DOMAIN: &str = "milepost";

/// Why a call failed. `Display` shows the code, the reason, the message and the fields at fault.
#[derive(Clone, Debug)]
pub struct CallError {
    status: Status,
    details: Arc<ErrorDetails>,
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let details = Arc::new(status.get_error_details());
        Self { status, details }
    }
}

impl CallError {
    /// The code of the status.
    pub fn code(&self) -> Code {
        self.status.code()
    }

    /// The message of the status, for people.
    pub fn message(&self) -> &str {
        self.status.message()
    }

    /// The reason, such as `JOB_CLOSED`: the name of an `ErrorReason` without its prefix. None
    /// if the error is not one of a service of milepost, as with a broken connection.
    pub fn reason(&self) -> Option<&str> {
        self.info().map(|info| info.reason.as_str())
    }

    /// The fields at fault, of INVALID_ARGUMENT and ALREADY_EXISTS.
    pub fn violations(&self) -> &[FieldViolation] {
        self.details.bad_request().map_or(&[], |bad| &bad.field_violations)
    }

    /// How long to wait before the same call may succeed, as the server says.
    pub fn retry_delay(&self) -> Option<Duration> {
        self.details.retry_info()?.retry_delay
    }

    /// All details of the status.
    pub fn details(&self) -> &ErrorDetails {
        &self.details
    }

    /// The status as tonic has it.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Whether the same call may succeed later, see [`is_transient`].
    pub fn is_transient(&self) -> bool {
        use Code::{Aborted, Cancelled, DeadlineExceeded, Internal, ResourceExhausted, Unavailable, Unknown};
        match (self.code(), self.info()) {
            (Unavailable | DeadlineExceeded, _) => true,
            (ResourceExhausted, Some(_)) => self.details.retry_info().is_some(),
            // Clients and proxies name a broken connection differently.
            (ResourceExhausted | Unknown | Internal | Cancelled | Aborted, None) => true,
            _ => false,
        }
    }

    /// Whether a stream goes on in a new call. Once a stream has sent a message, any error that is
    /// not one of milepost is a broken connection.
    pub(crate) fn interrupts_stream(&self, has_sent: bool) -> bool {
        self.is_transient() || (has_sent && self.info().is_none())
    }

    /// Whether the server refuses the content of the request, so that other requests may succeed.
    pub(crate) fn refuses_content(&self) -> bool {
        use Code::{Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, OutOfRange};
        let code = self.code();
        matches!(code, InvalidArgument | NotFound | AlreadyExists | FailedPrecondition | OutOfRange)
            || (code == Aborted && self.info().is_some())
    }

    /// The ErrorInfo of milepost.
    fn info(&self) -> Option<&ErrorInfo> {
        self.details.error_info().filter(|info| info.domain == DOMAIN)
    }

    /// The name of the code, as in `INVALID_ARGUMENT`.
    pub(crate) fn code_name(&self) -> String {
        let mut name = String::new();
        for letter in format!("{:?}", self.code()).chars() {
            if letter.is_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.push(letter.to_ascii_uppercase());
        }
        name
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.code_name())?;
        if let Some(reason) = self.reason() {
            write!(f, " ({reason})")?;
        }
        write!(f, ": {}", self.message())?;
        for violation in self.violations() {
            write!(f, "; {}: {}", violation.field, violation.description)?;
        }
        Ok(())
    }
}

impl std::error::Error for CallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.status)
    }
}

/// Whether the same call may succeed later: the server is unavailable or overloaded, or the
/// connection broke.
///
/// An error of milepost has an ErrorInfo. It is transient if its code is UNAVAILABLE or
/// DEADLINE_EXCEEDED, or RESOURCE_EXHAUSTED with RetryInfo. An error without one is a broken
/// connection if its code is UNAVAILABLE, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNKNOWN,
/// INTERNAL, CANCELLED or ABORTED. After a stream has sent a message, every error without an
/// ErrorInfo is a broken connection.
pub fn is_transient(status: &Status) -> bool {
    CallError::from(status.clone()).is_transient()
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, time::Duration};

    use super::*;

    fn error(code: Code, domain: Option<&str>, retry: bool) -> CallError {
        let mut details = ErrorDetails::new();
        if let Some(domain) = domain {
            details.set_error_info("SOME_REASON", domain, HashMap::new());
        }
        if retry {
            details.set_retry_info(Some(Duration::from_secs(3)));
        }
        Status::with_error_details(code, "no", details).into()
    }

    #[test]
    fn errors_are_transient_by_code_and_origin() {
        for (code, without_info, with_info) in [
            (Code::Unavailable, true, true),
            (Code::DeadlineExceeded, true, true),
            (Code::ResourceExhausted, true, false),
            (Code::Unknown, true, false),
            (Code::Internal, true, false),
            (Code::Cancelled, true, false),
            (Code::Aborted, true, false),
            (Code::Unauthenticated, false, false),
            (Code::InvalidArgument, false, false),
            (Code::DataLoss, false, false),
        ] {
            assert_eq!(error(code, None, false).is_transient(), without_info, "{code:?}");
            assert_eq!(error(code, Some("example.com"), false).is_transient(), without_info, "{code:?}");
            assert_eq!(error(code, Some(DOMAIN), false).is_transient(), with_info, "{code:?}");
        }
        assert!(error(Code::ResourceExhausted, Some(DOMAIN), true).is_transient());
        assert!(is_transient(&Status::from_error(Box::new(std::io::Error::other("reset")))));
    }

    #[test]
    fn an_error_after_a_message_ends_a_stream_only_if_it_is_one_of_milepost() {
        for code in [Code::Unauthenticated, Code::InvalidArgument, Code::NotFound, Code::DataLoss, Code::Ok] {
            assert!(!error(code, None, false).interrupts_stream(false), "{code:?}");
            assert!(error(code, None, false).interrupts_stream(true), "{code:?}");
            assert!(!error(code, Some(DOMAIN), false).interrupts_stream(true), "{code:?}");
        }
        assert!(error(Code::Unavailable, Some(DOMAIN), false).interrupts_stream(false));
    }

    #[test]
    fn an_aborted_call_is_refused_only_by_milepost() {
        assert!(error(Code::Aborted, Some(DOMAIN), false).refuses_content());
        assert!(!error(Code::Aborted, None, false).refuses_content());
        assert!(error(Code::OutOfRange, None, false).refuses_content());
        assert!(!error(Code::Unauthenticated, Some(DOMAIN), false).refuses_content());
    }

    #[test]
    fn an_error_shows_its_code_reason_message_and_fields() {
        let mut details = ErrorDetails::with_error_info("FIELD_INVALID", DOMAIN, HashMap::new());
        details.set_retry_info(Some(Duration::from_secs(3)));
        details.add_bad_request_violation("events[0].name", "at most 256 characters");
        let error = CallError::from(Status::with_error_details(
            Code::InvalidArgument,
            "a field is at fault",
            details,
        ));
        assert_eq!(
            error.to_string(),
            "INVALID_ARGUMENT (FIELD_INVALID): a field is at fault; events[0].name: at most 256 characters"
        );
        assert_eq!(
            (error.reason(), error.retry_delay()),
            (Some("FIELD_INVALID"), Some(Duration::from_secs(3)))
        );
        assert_eq!(CallError::from(Status::ok("")).code_name(), "OK");
    }
}
