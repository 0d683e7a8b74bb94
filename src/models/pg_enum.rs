//! Postgres enum types as Rust enums.

use std::io::Write as _;

use diesel::{
    deserialize::{self, FromSql},
    pg::{Pg, PgValue},
    serialize::{self, IsNull, Output, ToSql},
};

use crate::{
    models::{
        audit_entry::{AuditAct, AuditActor},
        caller::{KeyScope, UserRole},
        job_configuration::MetadataKind,
    },
    progress::{EventKind, JobStatus},
    schema::sql_types,
};

macro_rules! pg_enum {
    ($rust:ty, $sql:ty { $($variant:ident = $label:literal),+ $(,)? }) => {
        impl $rust {
            /// The label in the Postgres enum.
            pub(crate) fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }

        impl ToSql<$sql, Pg> for $rust {
            fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
                out.write_all(self.label().as_bytes())?;
                Ok(IsNull::No)
            }
        }

        impl FromSql<$sql, Pg> for $rust {
            fn from_sql(value: PgValue<'_>) -> deserialize::Result<Self> {
                match std::str::from_utf8(value.as_bytes())? {
                    $($label => Ok(Self::$variant),)+
                    other => Err(format!("unknown label {other}").into()),
                }
            }
        }
    };
}

pg_enum!(UserRole, sql_types::UserRole { Customer = "customer", Provider = "provider" });
pg_enum!(KeyScope, sql_types::ApiKeyScope { Read = "read", Append = "append", Manage = "manage" });
pg_enum!(JobStatus, sql_types::JobStatus {
    Pending = "pending",
    Running = "running",
    Failed = "failed",
    Complete = "complete",
    Cancelled = "cancelled",
});
pg_enum!(EventKind, sql_types::EventKind {
    Step = "step",
    Error = "error",
    Info = "info",
    Complete = "complete",
    Close = "close",
});
pg_enum!(MetadataKind, sql_types::MetadataKind { Text = "text", Number = "number", Link = "link" });
pg_enum!(AuditAct, sql_types::AuditAct {
    SignUp = "sign_up",
    LogIn = "log_in",
    LogInFailed = "log_in_failed",
    LogOut = "log_out",
    PasswordChanged = "password_changed",
    ApiKeyCreated = "api_key_created",
    ApiKeyRotated = "api_key_rotated",
    ApiKeyExpired = "api_key_expired",
    WatchTokenCreated = "watch_token_created",
    WatchTokenExpired = "watch_token_expired",
    JobClosed = "job_closed",
    UserCreated = "user_created",
    PasswordSet = "password_set",
    UserDisabled = "user_disabled",
});
pg_enum!(AuditActor, sql_types::AuditActor {
    Anonymous = "anonymous",
    Session = "session",
    ApiKey = "api_key",
    WatchToken = "watch_token",
    Operator = "operator",
});
