//! The quotas of each user.

use clap::{Args, builder::RangedI64ValueParser, value_parser};

use crate::quota::Quota;

/// The most that each user may have. Honest use does not meet the defaults.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Quotas")]
pub struct QuotaSettings {
    /// Most configurations that one provider may register, counting each version
    #[arg(long, env = "MILEPOST_CONFIGURATIONS_PER_USER", default_value_t = 10_000, value_name = "COUNT",
          value_parser = most(1_000_000_000), display_order = 901)]
    pub configurations_per_user: i64,

    /// Most open jobs of one provider; closed jobs do not count
    #[arg(long, env = "MILEPOST_OPEN_JOBS_PER_USER", default_value_t = 1_000_000, value_name = "COUNT",
          value_parser = most(1_000_000_000), display_order = 902)]
    pub open_jobs_per_user: i64,

    /// Most API keys of one user, counting ended ones until they are removed after 30 days; rotations may
    /// exceed it tenfold
    #[arg(long, env = "MILEPOST_API_KEYS_PER_USER", default_value_t = 1_000, value_name = "COUNT",
          value_parser = most(1_000_000), display_order = 903)]
    pub api_keys_per_user: i64,

    /// Most valid sessions of one user; a log-in beyond it ends the oldest session
    #[arg(long, env = "MILEPOST_SESSIONS_PER_USER", default_value_t = 1_000, value_name = "COUNT",
          value_parser = most(100_000), display_order = 904)]
    pub sessions_per_user: i64,

    /// Most watch tokens of one provider, counting ended ones until they are removed after 30 days
    #[arg(long, env = "MILEPOST_WATCH_TOKENS_PER_USER", default_value_t = 1_000_000, value_name = "COUNT",
          value_parser = most(1_000_000_000), display_order = 905)]
    pub watch_tokens_per_user: i64,

    /// Most bytes of jobs and events that are stored of one provider, in MiB
    #[arg(long, env = "MILEPOST_STORED_MIB_PER_USER", default_value_t = 1_048_576, value_name = "MIB",
          value_parser = most(1_000_000_000_000), display_order = 906)]
    pub stored_mib_per_user: i64,

    /// Most events that one provider may append in a day (UTC)
    #[arg(long, env = "MILEPOST_EVENTS_PER_USER_DAY", default_value_t = 1_000_000_000, value_name = "COUNT",
          value_parser = most(1_000_000_000_000_000), display_order = 907)]
    pub events_per_user_day: i64,
}

/// How many times `--api-keys-per-user` a user's keys may be if rotations made them.
const ROTATED_KEYS: i64 = 10;

impl QuotaSettings {
    /// A quota and its limit.
    pub fn of(&self, quota: Quota) -> (Quota, i64) {
        let limit = match quota {
            Quota::Configurations => self.configurations_per_user,
            Quota::OpenJobs => self.open_jobs_per_user,
            Quota::ApiKeys => self.api_keys_per_user,
            Quota::WatchTokens => self.watch_tokens_per_user,
            Quota::StoredBytes => self.stored_mib_per_user.saturating_mul(1024 * 1024),
            Quota::EventsPerDay => self.events_per_user_day,
        };
        (quota, limit)
    }

    /// The limit of API keys for a rotation: a secret must be replaceable when the quota is
    /// used up, but each rotation adds a row.
    pub fn of_rotated_keys(&self) -> (Quota, i64) {
        (Quota::ApiKeys, self.api_keys_per_user.saturating_mul(ROTATED_KEYS))
    }
}

/// Parses a count from 1 to `most`.
fn most(most: i64) -> RangedI64ValueParser<i64> {
    value_parser!(i64).range(1..=most)
}
