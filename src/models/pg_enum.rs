//! Postgres enum types as Rust enums.

use std::io::Write as _;

use diesel::{
    deserialize::{self, FromSql},
    pg::{Pg, PgValue},
    serialize::{self, IsNull, Output, ToSql},
};

use crate::{
    models::{
        caller::{Scope, UserRole},
        job_configuration::MetadataKind,
    },
    progress::{EventKind, JobStatus},
    schema::sql_types,
};

macro_rules! pg_enum {
    ($rust:ty, $sql:ty { $($variant:ident = $label:literal),+ $(,)? }) => {
        impl ToSql<$sql, Pg> for $rust {
            fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
                out.write_all(match self { $(Self::$variant => $label,)+ })?;
                Ok(IsNull::No)
            }
        }

        impl FromSql<$sql, Pg> for $rust {
            fn from_sql(value: PgValue<'_>) -> deserialize::Result<Self> {
                match value.as_bytes() {
                    $($label => Ok(Self::$variant),)+
                    other => Err(format!("unknown label {}", String::from_utf8_lossy(other)).into()),
                }
            }
        }
    };
}

pg_enum!(UserRole, sql_types::UserRole { Customer = b"customer", Provider = b"provider" });
pg_enum!(Scope, sql_types::ApiKeyScope { Read = b"read", Append = b"append", Manage = b"manage" });
pg_enum!(JobStatus, sql_types::JobStatus {
    Pending = b"pending",
    Running = b"running",
    Failed = b"failed",
    Complete = b"complete",
    Cancelled = b"cancelled",
});
pg_enum!(EventKind, sql_types::EventKind {
    Step = b"step",
    Error = b"error",
    Info = b"info",
    Complete = b"complete",
    Close = b"close",
});
pg_enum!(MetadataKind, sql_types::MetadataKind { Text = b"text", Number = b"number", Link = b"link" });
