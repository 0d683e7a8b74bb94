//! The three kinds of credentials, looked up together through the view `credentials`.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};
use diesel::{
    dsl::now,
    prelude::*,
    sql_types::{Array, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _};
use uuid::Uuid;

use self::view::credentials;
use super::{
    caller::{Caller, CredentialId, KeyScope, Subject, Tenant, UserRole},
    is_valid,
};
use crate::{
    db::Transaction,
    error::{Error, Result},
    schema::users,
    secret::SecretHash,
};

#[allow(missing_docs, reason = "the columns of the view")]
mod view {
    diesel::table! {
        use diesel::sql_types::*;
        use crate::schema::sql_types::ApiKeyScope;

        /// See migrations/2026-11-26-000007_watch_tokens/up.sql.
        credentials (id) {
            id -> Uuid,
            kind -> Text,
            secret_hash -> Binary,
            user_id -> Uuid,
            job_id -> Nullable<Uuid>,
            scopes -> Nullable<Array<Nullable<ApiKeyScope>>>,
            expires_at -> Nullable<Timestamptz>,
            revoked_at -> Nullable<Timestamptz>,
        }
    }
}

diesel::joinable!(credentials -> users (user_id));
diesel::allow_tables_to_appear_in_same_query!(credentials, users);

#[derive(Queryable, Selectable)]
#[diesel(table_name = credentials, check_for_backend(diesel::pg::Pg))]
struct Row {
    id: Uuid,
    kind: String,
    user_id: Uuid,
    job_id: Option<Uuid>,
    scopes: Option<Vec<Option<KeyScope>>>,
    expires_at: Option<DateTime<Utc>>,
}

/// Returns the caller to whom this secret belongs, and the time until the secret expires,
/// if it does; zero if it has expired or was revoked. None if the secret is unknown or
/// its user disabled.
pub async fn authenticate(
    connection: &mut AsyncPgConnection,
    secret: &SecretHash,
) -> Result<Option<(Caller, Option<Duration>)>> {
    let valid = is_valid(credentials::revoked_at, credentials::expires_at);
    let found: Option<(Row, UserRole, DateTime<Utc>, bool)> = credentials::table
        .inner_join(users::table)
        .filter(credentials::secret_hash.eq(secret.as_bytes()))
        .filter(users::disabled_at.is_null())
        .select((Row::as_select(), users::role, now.into_sql::<Timestamptz>(), valid))
        .get_result(connection)
        .await
        .optional()?;
    let Some((row, role, database_now, valid)) = found else { return Ok(None) };
    let left = |at: DateTime<Utc>| (at - database_now).to_std().unwrap_or_default();
    let lifetime = if valid { row.expires_at.map(left) } else { Some(Duration::ZERO) };
    Ok(Some((row.caller(role)?, lifetime)))
}

impl Row {
    fn caller(self, role: UserRole) -> Result<Caller> {
        let user = Subject::User { id: self.user_id, role };
        let id = credential_id(&self.kind, self.id)?;
        let (subject, scopes) = match (id, self.job_id) {
            (CredentialId::Session(_), _) => (user, vec![KeyScope::Read, KeyScope::Append, KeyScope::Manage]),
            (CredentialId::ApiKey(_), _) => (user, self.scopes.into_iter().flatten().flatten().collect()),
            (CredentialId::WatchToken(_), Some(job_id)) => (Subject::Job(job_id), vec![KeyScope::Read]),
            (CredentialId::WatchToken(_), None) => {
                return Err(Error::internal("a watch token without a job"));
            }
        };
        // The user of a watch token is the provider of its job.
        Ok(Caller::new(subject, Tenant::of_user(self.user_id), id, scopes))
    }
}

/// Returns whether each of these credentials is valid now; not those that are gone or
/// whose user is disabled.
pub async fn validity(
    connection: &mut AsyncPgConnection,
    ids: &[CredentialId],
) -> Result<HashMap<CredentialId, bool>> {
    let ids: Vec<Uuid> = ids.iter().map(|id| id.uuid()).collect();
    let valid = is_valid(credentials::revoked_at, credentials::expires_at);
    let known: Vec<(String, Uuid, bool)> = credentials::table
        .inner_join(users::table)
        .filter(credentials::id.eq_any(ids))
        .filter(users::disabled_at.is_null())
        .select((credentials::kind, credentials::id, valid))
        .load(connection)
        .await?;
    known.into_iter().map(|(kind, id, valid)| Ok((credential_id(&kind, id)?, valid))).collect()
}

/// Records that these credentials were used, unless that was recorded within a minute.
///
/// Nothing waits for that: the commit does not wait for a standby, and rows that another
/// transaction has locked are left out.
pub async fn record_use(tx: &mut Transaction<'_>, ids: &[CredentialId]) -> Result<()> {
    tx.batch_execute("SET LOCAL synchronous_commit = local").await?;
    for (table, of_table) in [
        ("sessions", (|id| matches!(id, CredentialId::Session(_))) as fn(&CredentialId) -> bool),
        ("api_keys", |id| matches!(id, CredentialId::ApiKey(_))),
        ("watch_tokens", |id| matches!(id, CredentialId::WatchToken(_))),
    ] {
        let ids: Vec<Uuid> = ids.iter().filter(|id| of_table(id)).map(|id| id.uuid()).collect();
        if ids.is_empty() {
            continue;
        }
        let update = format!(
            "UPDATE {table} SET last_used_at = now() WHERE id IN (SELECT id FROM {table} WHERE id = ANY ($1) \
             AND (last_used_at IS NULL OR last_used_at <= now() - interval '1 minute') \
             FOR NO KEY UPDATE SKIP LOCKED)"
        );
        diesel::sql_query(update).bind::<Array<SqlUuid>, _>(ids).execute(tx).await?;
    }
    Ok(())
}

fn credential_id(kind: &str, id: Uuid) -> Result<CredentialId> {
    match kind {
        "session" => Ok(CredentialId::Session(id)),
        "api_key" => Ok(CredentialId::ApiKey(id)),
        "watch_token" => Ok(CredentialId::WatchToken(id)),
        _ => Err(Error::internal("a credential of an unknown kind")),
    }
}
