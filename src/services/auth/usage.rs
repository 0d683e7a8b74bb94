//! The message for what a user has, beside the quotas.

use crate::{
    config::{AuthSettings, QuotaSettings},
    models::usage::Usage,
    pb,
    proto_enums::timestamp,
    quota::Quota::{self, ApiKeys, Configurations, EventsPerDay, OpenJobs, StoredBytes, WatchTokens},
    telemetry::metrics::gauge_value,
};

pub(super) fn usage_message(
    usage: Usage,
    quotas: &QuotaSettings,
    AuthSettings { streams_per_user, tenants, .. }: &AuthSettings,
) -> pb::GetUsageResponse {
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
        each_server: Some(pb::ServerLimits {
            calls_per_second: tenants.calls_per_second.into(),
            events_per_second: tenants.events_per_second.into(),
            calls_in_flight: gauge_value(tenants.calls_in_flight),
            bytes_in_flight: gauge_value(tenants.bytes_in_flight_mib * 1024 * 1024),
            streams: gauge_value(*streams_per_user),
        }),
    }
}
