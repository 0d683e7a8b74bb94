//! Reverts migrations, and refuses to do so unasked where data would be lost or servers
//! would fail.

use std::path::Path;

use diesel::{
    QueryableByName, sql_query,
    sql_types::{BigInt, Bool, Nullable, Text},
};
use diesel_async::{AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl as _};
use diesel_migrations::MigrationHarness as _;

use super::{MIGRATIONS, SchemaError, applied_versions, known_versions, lock, retry_locked_tables};

/// Reverts the newest `count` migrations, and returns their versions, newest first. Needs
/// tokio's multi-thread runtime.
///
/// Fails, and reverts nothing, if fewer migrations are applied or one of these is unknown here.
/// Without `confirmed` it also fails while servers are connected or the database has users.
pub async fn revert(
    url: &str,
    ca: Option<&Path>,
    count: usize,
    confirmed: bool,
) -> Result<Vec<String>, SchemaError> {
    let mut harness = lock(url, ca).await?;
    let (applied, known) = (applied_versions(&mut harness)?, known_versions()?);
    if count > applied.len() {
        return Err(SchemaError::Count { count, applied: applied.len() });
    }
    if let Some(unknown) = applied.iter().rev().take(count).find(|version| !known.contains(*version)) {
        return Err(SchemaError::Unknown(unknown.clone()));
    }
    if !confirmed {
        let mut connection = harness.into_inner();
        refuse_loss(&mut connection).await?;
        harness = AsyncMigrationHarness::new(connection);
    }
    let mut reverted = Vec::new();
    for _ in 0..count {
        reverted.push(
            retry_locked_tables(|| harness.revert_last_migration(MIGRATIONS).map(|v| v.to_string())).await?,
        );
    }
    Ok(reverted)
}

/// An error that names the connected servers and the number of users, if there are any.
/// Everything else that a database holds belongs to users.
async fn refuse_loss(connection: &mut AsyncPgConnection) -> Result<(), SchemaError> {
    let Servers { sessions, addresses, migrated } = sql_query(SERVERS).get_result(connection).await?;
    let users = if migrated {
        let Users { users } = sql_query("SELECT count(*) AS users FROM users").get_result(connection).await?;
        users
    } else {
        0
    };
    let mut reasons = Vec::new();
    if sessions > 0 {
        let from = addresses.map(|addresses| format!(", from {addresses}")).unwrap_or_default();
        reasons.push(format!("servers are connected (sessions named milepost: {sessions}{from}): stop them"));
    }
    if users > 0 {
        reasons.push(format!(
            "the database has data (users: {users}), and what only the reverted migrations can hold would be lost: \
             make a back-up"
        ));
    }
    if reasons.is_empty() { Ok(()) } else { Err(SchemaError::Loss(reasons.join("; "))) }
}

/// The sessions of servers, which name themselves `milepost`, and the addresses of those that
/// this role may see.
const SERVERS: &str = "SELECT count(*) AS sessions,
        string_agg(DISTINCT CASE WHEN client_port < 0 THEN 'a Unix socket' ELSE host(client_addr) END, ', ')
            AS addresses,
        to_regclass('users') IS NOT NULL AS migrated
    FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'milepost'";

#[derive(QueryableByName)]
struct Servers {
    #[diesel(sql_type = BigInt)]
    sessions: i64,
    #[diesel(sql_type = Nullable<Text>)]
    addresses: Option<String>,
    #[diesel(sql_type = Bool)]
    migrated: bool,
}

#[derive(QueryableByName)]
struct Users {
    #[diesel(sql_type = BigInt)]
    users: i64,
}
