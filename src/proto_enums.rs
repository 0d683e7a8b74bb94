//! Conversions between protobuf and the values of models: enums, progress and time.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::{
    models::{
        caller::{KeyScope, UserRole},
        job_configuration::MetadataKind,
    },
    pb,
    progress::{EventKind, JobStatus, Progress},
};

/// An enum that has a value of the same name for each value of a proto enum but
/// UNSPECIFIED.
pub(crate) trait ProtoEnum: Sized {
    /// None for UNSPECIFIED and for numbers that the proto enum has not.
    fn from_proto(number: i32) -> Option<Self>;
    fn to_proto(self) -> i32;
}

macro_rules! proto_enum {
    ($enum:ident = $proto:ident: $($value:ident),*) => {
        impl ProtoEnum for $enum {
            fn from_proto(number: i32) -> Option<Self> {
                match pb::$proto::try_from(number).ok()? {
                    pb::$proto::Unspecified => None,
                    $(pb::$proto::$value => Some(Self::$value),)*
                }
            }

            fn to_proto(self) -> i32 {
                pb::$proto::from(self).into()
            }
        }

        impl From<$enum> for pb::$proto {
            fn from(value: $enum) -> Self {
                match value {
                    $($enum::$value => Self::$value,)*
                }
            }
        }
    };
}

proto_enum!(EventKind = EventKind: Step, Error, Info, Complete, Close, Progress, CancellationRequested, Silent);
proto_enum!(JobStatus = JobStatus: Pending, Running, Failed, Complete, Cancelled, Stalled);
proto_enum!(KeyScope = ApiKeyScope: Read, Append, Manage);
proto_enum!(MetadataKind = MetadataKind: Text, Number, Link);
proto_enum!(UserRole = UserRole: Customer, Provider);

impl From<Progress> for pb::Progress {
    fn from(progress: Progress) -> Self {
        Self {
            points_done: progress.points_done,
            points_total: progress.points_total,
            percent: progress.percent.into(),
        }
    }
}

pub(crate) fn duration(length: Duration) -> prost_types::Duration {
    let seconds = i64::try_from(length.as_secs()).unwrap_or(i64::MAX);
    prost_types::Duration { seconds, nanos: i32::try_from(length.subsec_nanos()).unwrap_or_default() }
}

pub(crate) fn timestamp(at: DateTime<Utc>) -> prost_types::Timestamp {
    // Below 1,000,000,000: Postgres has no leap seconds.
    let nanos = i32::try_from(at.timestamp_subsec_nanos()).unwrap_or_default();
    prost_types::Timestamp { seconds: at.timestamp(), nanos }
}
