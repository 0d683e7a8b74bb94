//! Postgres enum types as Rust enums.

use crate::progress::{EventKind, JobStatus};

/// Defines an enum with the labels of a type in `schema::sql_types`. For an enum that is
/// defined elsewhere, it implements the conversions alone.
macro_rules! pg_enum {
    (
        $(#[$attribute:meta])*
        pub enum $enum:ident = $sql:ident {
            $($(#[$doc:meta])* $variant:ident = $label:literal,)+
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[derive(diesel::expression::AsExpression, diesel::deserialize::FromSqlRow)]
        #[diesel(sql_type = crate::schema::sql_types::$sql)]
        pub enum $enum {
            $($(#[$doc])* $variant,)+
        }

        crate::models::pg_enum::pg_enum!($enum = $sql { $($variant = $label,)+ });
    };
    ($enum:ident = $sql:ident { $($variant:ident = $label:literal,)+ }) => {
        impl $enum {
            /// The label in the Postgres enum.
            pub(crate) fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }

            /// The value with this label in the Postgres enum.
            pub(crate) fn of_label(label: &str) -> Option<Self> {
                match label {
                    $($label => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }

        const _: () = {
            use diesel::{deserialize, pg, serialize};
            use crate::schema::sql_types;

            impl serialize::ToSql<sql_types::$sql, pg::Pg> for $enum {
                fn to_sql<'b>(&'b self, out: &mut serialize::Output<'b, '_, pg::Pg>) -> serialize::Result {
                    std::io::Write::write_all(out, self.label().as_bytes())?;
                    Ok(serialize::IsNull::No)
                }
            }

            impl deserialize::FromSql<sql_types::$sql, pg::Pg> for $enum {
                fn from_sql(value: pg::PgValue<'_>) -> deserialize::Result<Self> {
                    let label = std::str::from_utf8(value.as_bytes())?;
                    Self::of_label(label).ok_or_else(|| format!("unknown label {label}").into())
                }
            }
        };
    };
}
pub(super) use pg_enum;

pg_enum!(JobStatus = JobStatus {
    Pending = "pending",
    Running = "running",
    Stalled = "stalled",
    Failed = "failed",
    Complete = "complete",
    Cancelled = "cancelled",
});
pg_enum!(EventKind = EventKind {
    Step = "step",
    Error = "error",
    Info = "info",
    Complete = "complete",
    Close = "close",
    Progress = "progress",
    CancellationRequested = "cancellation_requested",
    Silent = "silent",
});
