//! The one error type. Each variant is a meaning, not a place; the mapping to
//! gRPC stands in `services::status`.

use std::{error::Error as StdError, fmt, time::Duration};

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use uuid::Uuid;

use crate::progress::JobStatus;

/// What this crate's fallible functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed. See `ErrorReason` in `errors.proto` for what each means
/// to a caller.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No credential, or none that is good; why is never told.
    #[error("no valid credential")]
    CredentialInvalid,
    /// Unknown e-mail, wrong password or disabled user; which is never told.
    #[error("e-mail or password is wrong")]
    LogInFailed,
    /// The method is for the other role.
    #[error("this method is for {0}s")]
    RoleRequired(&'static str),
    /// The API key lacks a scope.
    #[error("the API key lacks the scope {0}")]
    ScopeRequired(&'static str),
    /// The method needs a session.
    #[error("this method needs a session; an API key will not do")]
    SessionRequired,
    /// Strangers may not sign up here.
    #[error("sign-up is closed on this server")]
    SignUpClosed,
    /// Fields at fault.
    #[error("{} of the request at fault: {}", .0.count(), .0.first())]
    Invalid(Violations),
    /// What does not exist for this caller.
    #[error("no such {}: {}", .resource.noun(), quoted(.name))]
    NotFound {
        /// What kind of thing.
        resource: Resource,
        /// What it was looked for by, as the caller gave it.
        name: String,
    },
    /// The e-mail has a user.
    #[error("a user with this e-mail exists")]
    EmailTaken,
    /// A write repeated under its key with other content.
    #[error("{} {} exists with other content: {}", .resource.noun(), quoted(.name), .differences.first())]
    Differs {
        /// What kind of thing.
        resource: Resource,
        /// Its key.
        name: String,
        /// The fields that differ.
        differences: Violations,
    },
    /// The job's log never changes again.
    #[error("the job is closed: {}", .status.name())]
    JobClosed {
        /// Which job.
        job_id: Uuid,
        /// How it ended.
        status: JobStatus,
    },
    /// The key had expired before.
    #[error("the API key had expired already")]
    ApiKeyAlreadyExpired(Uuid),
    /// The watch token had expired before.
    #[error("the watch token had expired already")]
    WatchTokenAlreadyExpired(Uuid),
    /// `expected_sequence` did not match.
    #[error("the last sequence of the job is {last_sequence}")]
    SequenceMismatch {
        /// The actual one.
        last_sequence: i64,
    },
    /// A position that the log has not reached.
    #[error("the position is beyond the end of the log")]
    PositionBeyondLog,
    /// Events removed by retention.
    #[error("events that were asked for have been removed")]
    EventsExpired {
        /// The first one left, of one job.
        first_sequence: Option<i64>,
    },
    /// Too much at once.
    #[error("too many {what} at once")]
    Overloaded {
        /// Of what.
        what: &'static str,
        /// When to try again.
        retry_after: Duration,
    },
    /// Too many log-ins failed.
    #[error("too many failed log-ins")]
    LogInThrottled {
        /// When to try again.
        retry_after: Duration,
    },
    /// The database does not answer.
    #[error("the database does not answer")]
    Unavailable(#[source] BoxError),
    /// This server shuts down.
    #[error("this server is shutting down")]
    Draining,
    /// The server's limit of time for a call passed, or the client's deadline.
    #[error("the call took too long")]
    DeadlineExceeded,
    /// A fault of ours.
    #[error("internal error")]
    Internal(#[source] BoxError),
}

/// Any error, as the source of ours.
pub type BoxError = Box<dyn StdError + Send + Sync>;

impl Error {
    /// One field at fault.
    pub fn invalid(field: impl fmt::Display, description: impl Into<String>) -> Self {
        let mut violations = Violations::default();
        violations.add(field, description);
        Self::Invalid(violations)
    }

    /// Something that does not exist for this caller.
    pub fn not_found(resource: Resource, name: &(impl ToString + ?Sized)) -> Self {
        Self::NotFound { resource, name: name.to_string() }
    }

    /// A fault of ours, in words.
    pub fn internal(source: impl Into<BoxError>) -> Self {
        Self::Internal(source.into())
    }

    /// The database does not answer.
    pub fn unavailable(source: impl Into<BoxError>) -> Self {
        Self::Unavailable(source.into())
    }

    /// Whether a write was refused for what it says, so that a stream of writes
    /// can go on after it.
    pub fn is_about_content(&self) -> bool {
        match self {
            Self::Invalid(_)
            | Self::NotFound { .. }
            | Self::Differs { .. }
            | Self::JobClosed { .. }
            | Self::SequenceMismatch { .. } => true,
            Self::CredentialInvalid
            | Self::LogInFailed
            | Self::RoleRequired(_)
            | Self::ScopeRequired(_)
            | Self::SessionRequired
            | Self::SignUpClosed
            | Self::EmailTaken
            | Self::ApiKeyAlreadyExpired(_)
            | Self::WatchTokenAlreadyExpired(_)
            | Self::PositionBeyondLog
            | Self::EventsExpired { .. }
            | Self::Overloaded { .. }
            | Self::LogInThrottled { .. }
            | Self::Unavailable(_)
            | Self::Draining
            | Self::DeadlineExceeded
            | Self::Internal(_) => false,
        }
    }
}

/// Constraint violations that a query expects are told apart by the query, see
/// [`violated`]; what arrives here is a database in trouble, or a fault of
/// ours.
impl From<DieselError> for Error {
    #[expect(clippy::wildcard_enum_match_arm, reason = "theirs, and not exhaustive")]
    fn from(error: DieselError) -> Self {
        match error {
            // A server that shuts down, starts, has no memory, disk or
            // connections left, or took longer than its time-outs allow.
            DieselError::DatabaseError(
                DatabaseErrorKind::Unknown
                | DatabaseErrorKind::ClosedConnection
                | DatabaseErrorKind::UnableToSendCommand
                | DatabaseErrorKind::SerializationFailure
                | DatabaseErrorKind::ReadOnlyTransaction,
                _,
            )
            | DieselError::BrokenTransactionManager
            | DieselError::RollbackErrorOnCommit { .. } => Self::Unavailable(Box::new(error)),
            fault => Self::Internal(Box::new(fault)),
        }
    }
}

/// The name of the constraint that a statement violated, if that is what went
/// wrong.
#[expect(clippy::wildcard_enum_match_arm, reason = "theirs, and not exhaustive")]
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

/// Kinds of things that can be missing or differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A customer.
    Customer,
    /// A job configuration.
    JobConfiguration,
    /// A job.
    Job,
    /// An event.
    Event,
    /// An API key.
    ApiKey,
    /// A watch token.
    WatchToken,
    /// A user.
    User,
}

impl Resource {
    /// The full name of its message in the API, for `ResourceInfo`.
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

    /// For a sentence.
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

/// Fields of a request and what is wrong with each, in field order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    noted: Vec<Violation>,
    known_step_tags: Option<usize>,
}

/// A field of a request and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Its path, such as `events[3].metadata.mean`.
    pub field: String,
    /// A sentence without its full stop.
    pub description: String,
}

impl Violations {
    /// Notes one more.
    pub fn add(&mut self, field: impl fmt::Display, description: impl Into<String>) {
        self.noted.push(Violation { field: field.to_string(), description: description.into() });
    }

    /// Notes how many tags of steps there are to choose from, where descriptions
    /// name the first ones only.
    pub fn know_step_tags(&mut self, total: usize) {
        self.known_step_tags = Some(total);
    }

    /// See [`know_step_tags`](Self::know_step_tags).
    pub fn known_step_tags(&self) -> Option<usize> {
        self.known_step_tags
    }

    /// `value`, unless anything was noted.
    pub fn or<T>(self, value: T) -> Result<T> {
        if self.noted.is_empty() { Ok(value) } else { Err(Error::Invalid(self)) }
    }

    /// Whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.noted.is_empty()
    }

    /// In field order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Violation> {
        self.noted.iter()
    }

    fn count(&self) -> String {
        match self.noted.len() {
            1 => "a field".to_owned(),
            n => format!("{n} fields"),
        }
    }

    fn first(&self) -> String {
        self.noted.first().map_or_else(String::new, |v| format!("{}: {}", v.field, v.description))
    }
}

/// `value` as an error quotes it: cut to
/// [`crate::limits::ERROR_QUOTE_CHARS`], control characters escaped.
pub fn quoted(value: &str) -> String {
    let limit = crate::limits::ERROR_QUOTE_CHARS;
    let mut quoted: String = value.chars().take(limit).flat_map(char::escape_debug).collect();
    if value.chars().nth(limit).is_some() {
        quoted.push('…');
    }
    format!("\"{quoted}\"")
}
