//! The message for what a user has, beside the quotas.

use crate::{
    config::QuotaSettings,
    models::usage::Usage,
    pb,
    proto_enums::timestamp,
    quota::Quota::{self, ApiKeys, Configurations, EventsPerDay, OpenJobs, StoredBytes, WatchTokens},
};

pub(super) fn usage_message(usage: Usage, quotas: &QuotaSettings) -> pb::GetUsageResponse {
    let of = |quota: Quota, used| Some(pb::QuotaUsage { used, limit: quotas.of(quota).1 });
    pb::GetUsageResponse {
        configurations: of(Configurations, usage.configurations),
        open_jobs: of(OpenJobs, usage.open_jobs),
        api_keys: of(ApiKeys, usage.api_keys),
        sessions: Some(pb::QuotaUsage { used: usage.sessions, limit: quotas.sessions_per_user }),
        watch_tokens: of(WatchTokens, usage.watch_tokens),
        stored_bytes: of(StoredBytes, usage.stored_bytes),
        events_per_day: of(EventsPerDay, usage.day_events),
        day_ends_at: Some(timestamp(usage.day_ends_at)),
    }
}
