//! What each user has and is counted against a quota. See
//! migrations/2026-11-26-000002_accounts/up.sql for the tables and their locks.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    data_types::PgInterval,
    prelude::*,
    sql_types::{Array, BigInt, Interval, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _};
use uuid::Uuid;

use super::{caller::Viewer, duration};
use crate::{
    db::Transaction,
    error::{Error, Result},
    quota::{Quota, QuotaUsed},
    schema::user_usage,
};

/// Most changes that [`settle_some`] takes over.
const SETTLED_CHANGES: i32 = 10_000;

mod sql {
    use diesel::sql_types::{Integer, Uuid as SqlUuid};

    #[diesel::declare_sql_function]
    extern "SQL" {
        /// See migrations/2026-11-26-000002_accounts/up.sql.
        fn settle_usage(settled: SqlUuid) -> Record<(BigInt, BigInt, BigInt, BigInt, BigInt, Bool)>;

        /// Returns true if there may be more changes.
        fn settle_some_usage(most_changes: Integer) -> Bool;
    }
}

/// Configurations, open jobs, API keys, watch tokens and stored bytes of a user, and whether
/// there are changes that they lack.
type Settled = (i64, i64, i64, i64, i64, bool);

/// Returns the first of these quotas, with their limits, that the user has used up; none if
/// the user may have one more of each. The user's usage stays locked until the transaction
/// ends, so that nobody else takes what is left.
pub(super) async fn find_used_up(
    tx: &mut Transaction<'_>,
    user_id: Uuid,
    quotas: &[(Quota, i64)],
) -> Result<Option<QuotaUsed>> {
    loop {
        let (configurations, open_jobs, api_keys, watch_tokens, stored_bytes, more): Settled =
            diesel::select(sql::settle_usage(user_id)).get_result(tx).await?;
        let used = |quota| match quota {
            Quota::Configurations => configurations,
            Quota::OpenJobs => open_jobs,
            Quota::ApiKeys => api_keys,
            Quota::WatchTokens => watch_tokens,
            Quota::StoredBytes => stored_bytes,
            // Counted outside of transactions: see `crate::usage`.
            Quota::EventsPerDay => 0,
        };
        let used_up = quotas.iter().find_map(|&(quota, limit)| {
            let used = used(quota);
            (used >= limit).then_some(QuotaUsed { quota, limit, used, retry_after: None })
        });
        // What was taken away and is not subtracted yet may leave room.
        if used_up.is_none() || !more {
            return Ok(used_up);
        }
    }
}

/// As [`find_used_up`], for what has no key by which a request may be repeated. Fails with
/// [`Error::QuotaExceeded`].
pub(super) async fn demand_room(
    tx: &mut Transaction<'_>,
    user_id: Uuid,
    quotas: &[(Quota, i64)],
) -> Result<()> {
    find_used_up(tx, user_id, quotas).await?.map_or(Ok(()), |used| Err(Error::QuotaExceeded(used)))
}

/// Locks a user's usage until the transaction ends.
pub(super) async fn lock(tx: &mut Transaction<'_>, user_id: Uuid) -> Result<()> {
    let own = user_usage::table.find(user_id).select(user_usage::user_id);
    let _locked: Uuid = own.for_no_key_update().get_result(tx).await?;
    Ok(())
}

/// Takes over changes of users who add nothing themselves. Returns true if there may be more
/// changes.
pub async fn settle_some(tx: &mut Transaction<'_>) -> Result<bool> {
    Ok(diesel::select(sql::settle_some_usage(SETTLED_CHANGES)).get_result(tx).await?)
}

/// What a user has at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, QueryableByName)]
pub struct Usage {
    #[diesel(sql_type = BigInt)]
    pub configurations: i64,
    #[diesel(sql_type = BigInt)]
    pub open_jobs: i64,
    #[diesel(sql_type = BigInt)]
    pub api_keys: i64,
    /// Valid ones.
    #[diesel(sql_type = BigInt)]
    pub sessions: i64,
    #[diesel(sql_type = BigInt)]
    pub watch_tokens: i64,
    /// As of the last time that the servers wrote what was appended.
    #[diesel(sql_type = BigInt)]
    pub stored_bytes: i64,
    /// As `stored_bytes`.
    #[diesel(sql_type = BigInt)]
    pub day_events: i64,
    /// When the next day begins.
    #[diesel(sql_type = Timestamptz)]
    pub day_ends_at: DateTime<Utc>,
}

impl Usage {
    /// Fails with [`Error::CredentialInvalid`] if the viewer is no user.
    pub async fn of(conn: &mut AsyncPgConnection, viewer: Viewer) -> Result<Self> {
        let usage = diesel::sql_query(
            "SELECT usage.configurations + changes.configurations AS configurations,
                 usage.open_jobs + changes.open_jobs AS open_jobs,
                 usage.api_keys + changes.api_keys AS api_keys,
                 usage.watch_tokens + changes.watch_tokens AS watch_tokens,
                 greatest(usage.stored_bytes + changes.stored_bytes + coalesce(appended.stored_bytes, 0), 0)
                     AS stored_bytes,
                 CASE WHEN appended.day = utc_day() THEN appended.day_events ELSE 0 END AS day_events,
                 (SELECT count(*) FROM sessions
                  WHERE user_id = usage.user_id AND revoked_at IS NULL AND expires_at > now()) AS sessions,
                 (utc_day() + 1)::timestamp AT TIME ZONE 'UTC' AS day_ends_at
             FROM user_usage AS usage
             LEFT JOIN event_usage AS appended ON appended.user_id = usage.user_id
             CROSS JOIN LATERAL (
                 SELECT coalesce(sum(configurations), 0)::bigint AS configurations,
                     coalesce(sum(open_jobs), 0)::bigint AS open_jobs,
                     coalesce(sum(api_keys), 0)::bigint AS api_keys,
                     coalesce(sum(watch_tokens), 0)::bigint AS watch_tokens,
                     coalesce(sum(stored_bytes), 0)::bigint AS stored_bytes
                 FROM usage_changes WHERE usage_changes.user_id = usage.user_id) AS changes
             WHERE usage.user_id = $1",
        );
        let own: Option<Self> = usage.bind::<SqlUuid, _>(viewer.id()).get_result(conn).await.optional()?;
        own.ok_or(Error::CredentialInvalid)
    }
}

/// Events that a provider appended through one server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Appended {
    pub bytes: i64,
    pub events: i64,
}

/// What the events of a provider come to, appended through all servers.
#[derive(Clone, Copy, Debug)]
pub struct EventTotal {
    pub user_id: Uuid,
    /// Those of jobs as well.
    pub stored_bytes: i64,
    pub day_events: i64,
    /// Time until the next day begins.
    pub day_left: Duration,
}

#[derive(QueryableByName)]
struct EventTotalRow {
    #[diesel(sql_type = SqlUuid)]
    user_id: Uuid,
    #[diesel(sql_type = BigInt)]
    stored_bytes: i64,
    #[diesel(sql_type = BigInt)]
    day_events: i64,
    #[diesel(sql_type = Interval)]
    day_left: PgInterval,
}

impl EventTotal {
    /// Adds what was appended, which may be nothing, and returns what it comes to. The users
    /// must be in the order of their ids.
    ///
    /// The commit does not wait for a standby: what is lost is the count of a second.
    pub async fn add(tx: &mut Transaction<'_>, appended: &[(Uuid, Appended)]) -> Result<Vec<Self>> {
        tx.batch_execute("SET LOCAL synchronous_commit = local").await?;
        let column = |value: fn(&Appended) -> i64| -> Vec<i64> {
            appended.iter().map(|(_, added)| value(added)).collect()
        };
        let rows: Vec<EventTotalRow> = diesel::sql_query("SELECT * FROM add_event_usage($1, $2, $3)")
            .bind::<Array<SqlUuid>, _>(appended.iter().map(|(id, _)| *id).collect::<Vec<_>>())
            .bind::<Array<BigInt>, _>(column(|added| added.bytes))
            .bind::<Array<BigInt>, _>(column(|added| added.events))
            .load(tx)
            .await?;
        let total = |row: EventTotalRow| Self {
            user_id: row.user_id,
            stored_bytes: row.stored_bytes,
            day_events: row.day_events,
            day_left: duration(row.day_left),
        };
        Ok(rows.into_iter().map(total).collect())
    }
}
