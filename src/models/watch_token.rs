//! Watch tokens: credentials that show one job to people without an account.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{dsl::now, prelude::*, sql_types::Timestamptz};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    config::QuotaSettings,
    db::Transaction,
    error::{Error, Resource, Result, violated},
    models::{
        CreationCursor,
        audit_entry::{AuditAct, AuditEntry, Origin},
        caller::{Caller, CredentialId, Provider},
        interval, is_valid, oldest_first, usage,
    },
    quota::Quota,
    schema::watch_tokens,
    secret::SecretHash,
};

/// A row, without the hash of the secret.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = watch_tokens, check_for_backend(diesel::pg::Pg))]
pub struct WatchToken {
    pub id: Uuid,
    /// The one job that the token shows.
    pub job_id: Uuid,
    /// The first characters of the secret, for display.
    pub secret_prefix: String,
    /// The creator's description of the token; may be empty.
    pub note: String,
    /// From this time on the token is refused.
    pub expires_at: DateTime<Utc>,
    /// When the token was revoked, since when it is refused; none: it was not.
    pub revoked_at: Option<DateTime<Utc>>,
    /// Written at most once a minute.
    pub last_used_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

#[derive(Clone, Debug)]
pub struct NewWatchToken {
    /// A job of the provider who creates the token.
    pub job_id: Uuid,
    pub secret_hash: SecretHash,
    pub secret_prefix: String,
    pub note: String,
    /// Time until the token expires, counted from its insertion.
    pub lifetime: Duration,
}

impl NewWatchToken {
    /// Inserts the token, with the job's provider as its creator. Fails with
    /// [`Error::QuotaExceeded`] if the provider has too many tokens.
    pub async fn create(
        self,
        tx: &mut Transaction<'_>,
        provider: Provider,
        origin: Origin,
        quotas: &QuotaSettings,
    ) -> Result<WatchToken> {
        usage::demand_room(tx, provider.id(), &[quotas.of(Quota::WatchTokens)]).await?;
        let lifetime = interval(self.lifetime);
        let token: WatchToken = diesel::insert_into(watch_tokens::table)
            .values((
                watch_tokens::id.eq(Uuid::now_v7()),
                watch_tokens::job_id.eq(self.job_id),
                watch_tokens::user_id.eq(provider.id()),
                watch_tokens::secret_hash.eq(self.secret_hash.as_bytes()),
                watch_tokens::secret_prefix.eq(self.secret_prefix),
                watch_tokens::note.eq(self.note),
                watch_tokens::expires_at.eq(now.into_sql::<Timestamptz>() + lifetime),
            ))
            .returning(WatchToken::as_returning())
            .get_result(tx)
            .await
            .map_err(|error| match violated(&error) {
                // The job's row was deleted since the job was found.
                Some("watch_tokens_job_id_fkey") => Error::not_found(Resource::Job, &self.job_id),
                _ => error.into(),
            })?;
        token.entry(AuditAct::WatchTokenCreated, provider, &origin).insert(tx).await?;
        Ok(token)
    }
}

impl WatchToken {
    pub fn cursor(&self) -> CreationCursor {
        CreationCursor { created_at: self.created_at, id: self.id }
    }

    /// Returns the token that the call is made with. Fails with
    /// [`Error::CredentialInvalid`] if the credential is not a token, or if its row no
    /// longer exists.
    pub async fn of_caller(conn: &mut AsyncPgConnection, caller: &Caller) -> Result<Self> {
        let CredentialId::WatchToken(id) = caller.credential() else { return Err(Error::CredentialInvalid) };
        let token =
            watch_tokens::table.find(id).select(Self::as_select()).get_result(conn).await.optional()?;
        token.ok_or(Error::CredentialInvalid)
    }

    /// Lists at most `limit` of the provider's tokens of one job, oldest first,
    /// beginning after the `created_at` and id in `after`.
    pub async fn list(
        conn: &mut AsyncPgConnection,
        provider: Provider,
        job_id: Uuid,
        after: Option<CreationCursor>,
        limit: i64,
    ) -> Result<Vec<Self>> {
        let query = watch_tokens::table
            .filter(watch_tokens::user_id.eq(provider.id()))
            .filter(watch_tokens::job_id.eq(job_id))
            .select(Self::as_select());
        Ok(oldest_first!(watch_tokens, query, after, limit).load(conn).await?)
    }

    /// Revokes a token of the provider. Fails with [`Error::NotFound`] if the provider
    /// has no such token, [`Error::WatchTokenAlreadyExpired`] if it has ended before.
    pub async fn expire(
        tx: &mut Transaction<'_>,
        provider: Provider,
        id: Uuid,
        origin: &Origin,
    ) -> Result<Self> {
        let own = watch_tokens::table.find(id).filter(watch_tokens::user_id.eq(provider.id()));
        let expired: Option<Self> = diesel::update(own)
            .filter(is_valid(watch_tokens::revoked_at, watch_tokens::expires_at.nullable()))
            .set(watch_tokens::revoked_at.eq(now))
            .returning(Self::as_returning())
            .get_result(tx)
            .await
            .optional()?;
        let Some(token) = expired else {
            let known: Option<Uuid> = own.select(watch_tokens::id).get_result(tx).await.optional()?;
            return Err(known.map_or_else(
                || Error::not_found(Resource::WatchToken, &id),
                Error::WatchTokenAlreadyExpired,
            ));
        };
        token.entry(AuditAct::WatchTokenExpired, provider, origin).insert(tx).await?;
        Ok(token)
    }

    fn entry(&self, act: AuditAct, provider: Provider, origin: &Origin) -> AuditEntry {
        AuditEntry {
            user_id: Some(provider.id()),
            watch_token_id: Some(self.id),
            job_id: Some(self.job_id),
            ..origin.entry(act)
        }
    }
}
