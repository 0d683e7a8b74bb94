//! The quotas of a user: what is counted, and a quota that is used up.

use std::time::Duration;

/// What a quota counts. The number of sessions has no place here: a log-in beyond it ends
/// the oldest session and is not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    Configurations,
    OpenJobs,
    ApiKeys,
    WatchTokens,
    StoredBytes,
    EventsPerDay,
}

impl Quota {
    pub const ALL: [Self; 6] = [
        Self::Configurations,
        Self::OpenJobs,
        Self::ApiKeys,
        Self::WatchTokens,
        Self::StoredBytes,
        Self::EventsPerDay,
    ];

    /// The name in errors and metrics, which is that of the field of `GetUsageResponse`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Configurations => "configurations",
            Self::OpenJobs => "open_jobs",
            Self::ApiKeys => "api_keys",
            Self::WatchTokens => "watch_tokens",
            Self::StoredBytes => "stored_bytes",
            Self::EventsPerDay => "events_per_day",
        }
    }

    /// The plural noun in error texts.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Configurations => "registered configurations",
            Self::OpenJobs => "open jobs",
            Self::ApiKeys => "API keys",
            Self::WatchTokens => "watch tokens",
            Self::StoredBytes => "stored bytes",
            Self::EventsPerDay => "events of this day",
        }
    }
}

/// A quota of which nothing is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaUsed {
    pub quota: Quota,
    /// The most that the user may have.
    pub limit: i64,
    /// What the user has, which may exceed the limit.
    pub used: i64,
    /// Time until waiting alone helps; none if it never does.
    pub retry_after: Option<Duration>,
}
