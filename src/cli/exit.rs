//! The exit codes of the command line, and what it says about a failure. No other place
//! decides by the code of a status.

use std::{error::Error as StdError, io, process::ExitCode};

use diesel::ConnectionError;
use milepost_client::{CallError, ClientError, is_transient, pb::JobStatus};
use tonic::{Code, Status};
use tonic_types::{FieldViolation, StatusExt as _};

use super::{clean, one_line};
use crate::{
    db::migrations::SchemaError,
    error::{Error, causes},
    services::status::code_of,
};

/// The exit codes in `--help`. `docs/command-line.md` has the same table.
pub(super) const EXIT_CODES: &str = "Exit codes:
  0  success; also if the reader of the output closes it, as `head` does
  1  any other error
  2  a wrong command line, or input that is refused
  3  the job was closed while it was failed (watch, demo, events tail)
  4  the job was closed before it was complete (watch, demo, events tail)
  5  what was named does not exist, or not for this credential
  6  the credential is not valid, or may not do this
  7  what is stored forbids it: other content, a closed job, a used-up quota
  8  no answer from the server or its database, or too many calls: try again";

const WRONG_INPUT: u8 = 2;
const FAILED: u8 = 3;
const CANCELLED: u8 = 4;
const NOT_FOUND: u8 = 5;
const REFUSED: u8 = 6;
const CONFLICT: u8 = 7;
const TRY_AGAIN: u8 = 8;

/// The command line or an input is wrong; says what to write.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct WrongInput(pub(super) String);

/// The exit code for a job that was closed with this status.
pub(super) fn of_job(status: JobStatus) -> ExitCode {
    match status {
        JobStatus::Complete => ExitCode::SUCCESS,
        JobStatus::Failed => ExitCode::from(FAILED),
        JobStatus::Cancelled => ExitCode::from(CANCELLED),
        // No closed job has these.
        JobStatus::Unspecified | JobStatus::Pending | JobStatus::Running | JobStatus::Stalled => {
            ExitCode::FAILURE
        }
    }
}

/// Prints on stderr why a command failed, and returns its exit code.
pub fn report(error: &(dyn StdError + 'static)) -> ExitCode {
    // The reader of stdout, such as `head`, has closed it.
    if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    match status_of(error) {
        Some(status) => eprintln!("{}", describe(status)),
        None => eprintln!("milepost: {}", one_line(error)),
    }
    ExitCode::from(exit_code(error))
}

/// The status of a call that failed.
fn status_of<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Status> {
    error.downcast_ref().or_else(|| Some(error.downcast_ref::<CallError>()?.status()))
}

fn exit_code(error: &(dyn StdError + 'static)) -> u8 {
    if let Some(status) = status_of(error) {
        return of_status(status).0;
    }
    if is_refused_by_database(error) {
        return 1;
    }
    let in_database = match error.downcast_ref() {
        Some(SchemaError::Unavailable(error)) => Some(error),
        Some(SchemaError::Connect(_)) => return TRY_AGAIN,
        Some(_) | None => error.downcast_ref::<Error>(),
    };
    if let Some(error) = in_database {
        return of_code(code_of(error), true).0;
    }
    match error.downcast_ref() {
        Some(ClientError::Connect(..)) => TRY_AGAIN,
        Some(ClientError::Address(_) | ClientError::Credential) => WRONG_INPUT,
        Some(ClientError::Tls(_) | ClientError::Answer { .. }) => 1,
        None if error.is::<WrongInput>() => WRONG_INPUT,
        None => 1,
    }
}

/// Whether a connection to the database failed for what only the operator can change.
fn is_refused_by_database(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|cause| matches!(cause.downcast_ref(), Some(ConnectionError::InvalidConnectionUrl(_))))
}

/// Whether the same call may succeed later.
pub(super) fn may_succeed_later(status: &Status) -> bool {
    of_status(status).0 == TRY_AGAIN
}

/// The exit code of a status, and what to do about it.
fn of_status(status: &Status) -> (u8, &'static str) {
    if is_broken(status) {
        return of_code(Code::Unavailable, true);
    }
    of_code(status.code(), status.get_details_retry_info().is_some())
}

/// Whether the connection broke: such a status has a source, which no status that a server
/// sent has.
fn is_broken(status: &Status) -> bool {
    status.source().is_some() && is_transient(status)
}

fn of_code(code: Code, waiting_helps: bool) -> (u8, &'static str) {
    match code {
        Code::InvalidArgument => (WRONG_INPUT, "correct this and run the command again"),
        Code::NotFound => {
            (NOT_FOUND, "check the id, and whose it is: what belongs to others does not exist for you")
        }
        Code::Unauthenticated => {
            (REFUSED, "set MILEPOST_API_KEY to a valid secret: this one is unknown, expired or revoked")
        }
        Code::PermissionDenied => (REFUSED, "use a credential that may do this"),
        Code::AlreadyExists => {
            (CONFLICT, "nothing was changed: choose another name or id, or send what is stored")
        }
        Code::FailedPrecondition => (CONFLICT, "nothing was changed"),
        Code::Aborted => (CONFLICT, "nothing was changed: read the later events and decide again"),
        Code::OutOfRange => (CONFLICT, "start at another position"),
        Code::ResourceExhausted if !waiting_helps => {
            (CONFLICT, "close or expire what is not needed, or ask the operator for a larger quota")
        }
        Code::ResourceExhausted | Code::Unavailable | Code::DeadlineExceeded => {
            (TRY_AGAIN, "run the command again")
        }
        Code::Internal => (1, "the log of the server has the cause"),
        Code::Unimplemented => (1, "the server has another version than this command line"),
        Code::Ok | Code::Cancelled | Code::Unknown | Code::DataLoss => (1, ""),
    }
}

/// A status for the terminal: message and reason, the fields at fault, what to do.
fn describe(status: &Status) -> String {
    let details = status.get_error_details();
    let mut text = match status.source() {
        Some(broken) if is_broken(status) => {
            format!("milepost: the connection to the server broke: {}", one_line(broken))
        }
        _ => {
            let code = || format!("{:?}", status.code());
            let reason = details.error_info().map_or_else(code, |info| info.reason.clone());
            clean(&format!("milepost: {} ({reason})", status.message()))
        }
    };
    let fields = details.bad_request().map_or(&[][..], |request| &request.field_violations);
    // The message has a single one already, unless it is too long for that.
    let is_told = |field: &FieldViolation| fields.len() == 1 && status.message().contains(&field.description);
    for field in fields.iter().filter(|field| !is_told(field)) {
        text.push_str("\n  ");
        text.push_str(&clean(&format!("{}: {}", field.field, field.description)));
    }
    let (_, what_to_do) = of_status(status);
    if !what_to_do.is_empty() {
        text.push_str(&format!("\n  {what_to_do}"));
    }
    if let Some(delay) = details.retry_info().and_then(|info| info.retry_delay) {
        text.push_str(&format!(", in {} s at the earliest", delay.as_secs_f64().ceil()));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn only_what_waiting_may_help_has_the_exit_code_to_try_again() {
        let retry = ErrorDetails::with_retry_info(Some(Duration::from_millis(1500)));
        let throttled = Status::with_error_details(Code::ResourceExhausted, "too many calls", retry);
        let used_up = Status::resource_exhausted("the quota is used up");
        let broken = Status::from_error(Box::new(io::Error::other("connection reset")));
        for (status, code, said) in [
            (throttled, 8, "run the command again, in 2 s at the earliest"),
            (used_up, 7, "a larger quota"),
            (broken, 8, "the connection to the server broke: connection reset"),
            (Status::unavailable("draining"), 8, "draining (Unavailable)"),
            (Status::internal("internal error"), 1, "the log of the server"),
            (Status::not_found("\u{1b}[2J"), 5, "\u{fffd}[2J"),
        ] {
            assert_eq!(exit_code(&status), code, "{status}");
            assert!(describe(&status).contains(said), "{said:?} in {}", describe(&status));
        }
    }

    #[test]
    fn failures_of_the_database_have_the_codes_of_the_api() {
        let unavailable = || Error::unavailable("no route to host");
        assert_eq!(exit_code(&unavailable()), TRY_AGAIN);
        assert_eq!(exit_code(&SchemaError::Unavailable(unavailable())), TRY_AGAIN);
        assert_eq!(exit_code(&SchemaError::Older(3)), 1);
        for (error, code) in [
            (ConnectionError::BadConnection("connection refused".to_owned()), TRY_AGAIN),
            (ConnectionError::InvalidConnectionUrl("wrong password".to_owned()), 1),
        ] {
            assert_eq!(exit_code(&SchemaError::Connect(error)), code);
        }
        assert_eq!(exit_code(&Error::EmailTaken), CONFLICT);
    }
}
