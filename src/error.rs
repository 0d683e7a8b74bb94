//! The error type of this crate. A variant names what a failure means to a caller, not
//! where it occurs. `services::status` maps variants to gRPC.

use std::{error::Error as StdError, fmt, time::Duration};

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use uuid::Uuid;

use crate::{
    limits::{ERROR_QUOTE_CHARS, TEXT_CHARS},
    progress::JobStatus,
    quota::QuotaUsed,
};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed. `ErrorReason` in `errors.proto` describes each reason for
/// callers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No credential, or an invalid one. The answer never says why it is invalid.
    #[error("no valid credential")]
    CredentialInvalid,
    /// Unknown e-mail, wrong password or disabled user. The answer never says which.
    #[error("e-mail or password is wrong")]
    LogInFailed,
    /// The method requires this role, in lower case.
    #[error("this method is for {0}s")]
    RoleRequired(&'static str),
    /// The API key lacks this scope, in lower case.
    #[error("the API key lacks the scope {}", .0.to_uppercase())]
    ScopeRequired(&'static str),
    #[error("this method needs a session; an API key or a watch token is not enough")]
    SessionRequired,
    #[error("sign-up is closed on this server")]
    SignUpClosed,
    /// Fields of the request violate their rules.
    #[error("the request has {}: {}", .0.count(), .0.first())]
    Invalid(Violations),
    /// The resource does not exist, or this caller may not see it.
    #[error("no such {}: {}", .resource.noun(), quoted(.name))]
    NotFound {
        resource: Resource,
        /// The key in the request.
        name: String,
    },
    #[error("a user with this e-mail exists")]
    EmailTaken,
    /// A resource of the same key exists with other content.
    #[error("{} {} exists with other content: {}", .resource.noun(), quoted(.name), .differences.first())]
    Differs { resource: Resource, name: String, differences: Violations },
    /// The job is closed, so that its log never changes again.
    #[error("the job is closed: {}", .status.name())]
    JobClosed { job_id: Uuid, status: JobStatus },
    /// The API key of this id had expired before.
    #[error("the API key had expired already")]
    ApiKeyAlreadyExpired(Uuid),
    /// The watch token of this id had expired before.
    #[error("the watch token had expired already")]
    WatchTokenAlreadyExpired(Uuid),
    /// `expected_sequence` is not the last sequence of the job.
    #[error("the last sequence of the job is {last_sequence}")]
    SequenceMismatch { last_sequence: i64 },
    /// The log has not reached the requested position.
    #[error("the position is beyond the end of the log")]
    PositionBeyondLog,
    /// Events that the caller had read are lost: the database was set back to an earlier
    /// state, and the log may have other events now.
    #[error("the log was set back: events that were sent are lost")]
    LogSetBack,
    /// Retention has removed events that the request concerns.
    #[error("events that were asked for have been removed")]
    EventsExpired {
        /// The first sequence that is left, if the request concerns one job.
        first_sequence: Option<i64>,
    },
    /// Retention removes the events of the job that was to be held, or has removed them.
    #[error("the events of the job have been removed")]
    EventsRemoved(Uuid),
    /// A limit on what one server does at once, or in a period, is reached.
    #[error("too many {what} at once")]
    Overloaded {
        /// The limited quantity, as a plural noun.
        what: &'static str,
        /// Time until the next attempt is useful.
        retry_after: Duration,
    },
    /// A user does more in a period than the settings allow.
    #[error("too many {what}")]
    RateExceeded {
        /// The limited quantity, as a plural noun with its period.
        what: &'static str,
        /// Time until the same is allowed.
        retry_after: Duration,
    },
    /// Too many log-ins failed for this e-mail or address.
    #[error("too many failed log-ins")]
    LogInThrottled {
        /// Time until the next attempt is useful.
        retry_after: Duration,
    },
    /// A quota of the user, or for an append of the job's provider, is used up.
    #[error("the quota of {} {} is used up", .0.limit, .0.quota.noun())]
    QuotaExceeded(QuotaUsed),
    #[error("the database does not answer")]
    Unavailable(#[source] BoxError),
    #[error("this server is shutting down")]
    Draining,
    /// The call exceeded the server's time limit or the client's deadline.
    #[error("the call took too long")]
    DeadlineExceeded,
    /// A bug in milepost, or a failure of its environment.
    #[error("internal error")]
    Internal(#[source] BoxError),
}

/// The source of an [`Error`].
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// An error and its causes, from the outermost one on.
pub fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

impl Error {
    /// Makes [`Error::Invalid`] of one field.
    pub fn invalid(field: impl fmt::Display, description: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.add(field, description);
        Self::Invalid(violations)
    }

    /// Makes [`Error::NotFound`] of the key in the request.
    pub fn not_found(resource: Resource, name: &(impl ToString + ?Sized)) -> Self {
        Self::NotFound { resource, name: name.to_string() }
    }

    /// Makes [`Error::Internal`] of its cause, which is logged and not sent.
    pub fn internal(source: impl Into<BoxError>) -> Self {
        Self::Internal(source.into())
    }

    /// Makes [`Error::Unavailable`] of its cause, which is logged and not sent.
    pub fn unavailable(source: impl Into<BoxError>) -> Self {
        Self::Unavailable(source.into())
    }

    /// Whether a batch is refused because of its content. A publish stream continues
    /// after such a batch; every other error ends it.
    pub fn is_about_content(&self) -> bool {
        matches!(
            self,
            Self::Invalid(_)
                | Self::NotFound { .. }
                | Self::Differs { .. }
                | Self::JobClosed { .. }
                | Self::SequenceMismatch { .. }
        )
    }
}

/// What a failure of the database calls for.
///
/// | SQLSTATE | what happened | failure |
/// |---|---|---|
/// | none | the connection was closed, or broke | `Away` |
/// | 08, 53, 55P03, 57, 58 | starting or stopping, no memory, disk or connection left, too slow | `Away` |
/// | 40001, 40P01 | a serialization failure or a deadlock | `Away` |
/// | 25006 | the session is read-only | `Session` |
/// | 0A000 | "cached plan must not change result type": a column has another type now | `Session` |
/// | 26000 | the session has lost a prepared statement | `Session` |
/// | 22, 42 and constraints | milepost's statement, its role or its values | `Fault` |
///
/// Diesel hands on a kind, which is [`DatabaseErrorKind::Unknown`] for most states. Of these
/// the English message tells apart those that are not `Away`. All errors of a Postgres with
/// messages in another language count as `Away`, so that an outage never looks like a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The same may succeed later.
    Away,
    /// The same may succeed at once, over another connection.
    Session,
    /// The same fails again.
    Fault,
}

impl Failure {
    #[expect(clippy::wildcard_enum_match_arm, reason = "diesel's enum is not exhaustive")]
    pub fn of(error: &DieselError) -> Self {
        match error {
            DieselError::DatabaseError(DatabaseErrorKind::ReadOnlyTransaction, _) => Self::Session,
            DieselError::DatabaseError(DatabaseErrorKind::Unknown, information) => {
                let message = information.message();
                let prepared = message.starts_with("prepared statement ");
                if prepared || message == "cached plan must not change result type" {
                    return Self::Session;
                }
                let begins = ["permission denied", "syntax error", "invalid byte sequence", "value too long"];
                let fault = begins.iter().any(|begin| message.starts_with(begin))
                    || [" does not exist", " out of range"].iter().any(|end| message.ends_with(end));
                if fault { Self::Fault } else { Self::Away }
            }
            DieselError::DatabaseError(
                DatabaseErrorKind::ClosedConnection
                | DatabaseErrorKind::UnableToSendCommand
                | DatabaseErrorKind::SerializationFailure,
                _,
            )
            | DieselError::BrokenTransactionManager
            | DieselError::RollbackErrorOnCommit { .. } => Self::Away,
            _ => Self::Fault,
        }
    }
}

/// Makes [`Error::Unavailable`] or [`Error::Internal`]. A query that expects a
/// constraint violation handles it before, with [`violated`].
impl From<DieselError> for Error {
    fn from(error: DieselError) -> Self {
        match Failure::of(&error) {
            Failure::Away | Failure::Session => Self::Unavailable(Box::new(error)),
            Failure::Fault => Self::Internal(Box::new(error)),
        }
    }
}

/// Returns the name of the constraint that a statement violated; none for any other
/// error.
#[expect(clippy::wildcard_enum_match_arm, reason = "diesel's enum is not exhaustive")]
pub fn violated(error: &DieselError) -> Option<&str> {
    match error {
        DieselError::DatabaseError(
            DatabaseErrorKind::UniqueViolation
            | DatabaseErrorKind::ForeignKeyViolation
            | DatabaseErrorKind::CheckViolation
            | DatabaseErrorKind::NotNullViolation,
            information,
        ) => information.constraint_name(),
        _ => None,
    }
}

/// A kind of resource that an error names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    Customer,
    JobConfiguration,
    Job,
    Event,
    ApiKey,
    WatchToken,
    User,
}

impl Resource {
    /// The full name of the resource's protobuf message, for `ResourceInfo`.
    pub fn type_name(self) -> &'static str {
        match self {
            Self::Customer | Self::User => "milepost.v1.User",
            Self::JobConfiguration => "milepost.v1.JobConfiguration",
            Self::Job => "milepost.v1.Job",
            Self::Event => "milepost.v1.Event",
            Self::ApiKey => "milepost.v1.ApiKey",
            Self::WatchToken => "milepost.v1.WatchToken",
        }
    }

    /// The noun for the resource in error texts.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Customer => "customer",
            Self::User => "user",
            Self::JobConfiguration => "job configuration",
            Self::Job => "job",
            Self::Event => "event",
            Self::ApiKey => "API key",
            Self::WatchToken => "watch token",
        }
    }
}

/// Violations of a request's fields, in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    violations: Vec<Violation>,
    /// How many step tags the configuration has, because a description names only the
    /// first of them.
    pub known_step_tags: Option<usize>,
}

/// A violation of one field of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The field's path, such as `events[3].metadata.mean`.
    pub field: String,
    /// What the rule is, or what violates it; a sentence without its full stop.
    pub description: String,
}

impl Violations {
    /// Adds a violation of `field`.
    pub fn add(&mut self, field: impl fmt::Display, description: impl Into<String>) {
        self.violations.push(Violation { field: field.to_string(), description: description.into() });
    }

    /// Adds a violation of `field` if the stored text differs from the given one.
    pub fn add_if_different(&mut self, field: impl fmt::Display, given: &str, stored: &str) {
        if given != stored {
            self.add(field, format!("is stored as {}", quoted(stored)));
        }
    }

    /// Returns what `parse` returns, or [`Error::Invalid`] if it adds a violation.
    pub fn check<T>(parse: impl FnOnce(&mut Self) -> T) -> Result<T> {
        let mut violations = Self::default();
        let value = parse(&mut violations);
        violations.or(value)
    }

    /// Returns `value`, or [`Error::Invalid`] if there is a violation.
    pub fn or<T>(self, value: T) -> Result<T> {
        if self.violations.is_empty() { Ok(value) } else { Err(Error::Invalid(self)) }
    }

    pub fn is_empty(&self) -> bool {
        self.violations.is_empty()
    }

    /// The violations, in the order of the fields.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Violation> {
        self.violations.iter()
    }

    fn count(&self) -> String {
        match self.violations.len() {
            1 => "an invalid field".to_owned(),
            n => format!("{n} invalid fields"),
        }
    }

    fn first(&self) -> String {
        self.violations.first().map_or_else(String::new, |v| format!("{}: {}", v.field, v.description))
    }
}

/// The rule of every text: at most [`TEXT_CHARS`] Unicode scalar values without NUL, which
/// Postgres cannot store. The error describes the violation.
pub fn check_text(text: &str) -> Result<(), String> {
    // The length in bytes comes first: it bounds the work of counting characters.
    if text.len() > 4 * TEXT_CHARS || text.chars().count() > TEXT_CHARS {
        return Err(format!("{} must have at most {TEXT_CHARS} characters", quoted(text)));
    }
    if text.contains('\0') {
        return Err(format!("{} must not contain NUL", quoted(text)));
    }
    Ok(())
}

/// Quotes `value` for an error text: cuts it to [`ERROR_QUOTE_CHARS`] and escapes control
/// characters.
pub fn quoted(value: &str) -> String {
    let quoted: String = value.chars().take(ERROR_QUOTE_CHARS).flat_map(char::escape_debug).collect();
    let ellipsis = if value.chars().nth(ERROR_QUOTE_CHARS).is_some() { "…" } else { "" };
    format!("\"{quoted}{ellipsis}\"")
}

/// Most bytes of [`quoted_list`], unless the first value alone is longer.
const QUOTED_LIST_BYTES: usize = 256;

/// Quotes the first of these values for an error text, as many as there is room for; `none`
/// if there are none.
pub fn quoted_list<'a>(values: impl IntoIterator<Item = &'a str>) -> String {
    let mut list = String::new();
    for value in values.into_iter().map(quoted) {
        if list.is_empty() {
            list = value;
        } else if list.len() + value.len() > QUOTED_LIST_BYTES {
            list.push_str(", …");
            break;
        } else {
            list.push_str(", ");
            list.push_str(&value);
        }
    }
    if list.is_empty() { "none".to_owned() } else { list }
}
