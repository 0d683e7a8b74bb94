//! API keys: the credentials of a user's programs.

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use diesel::{dsl::now, prelude::*, sql_types::Timestamptz};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    config::QuotaSettings,
    db::Transaction,
    error::{Error, Resource, Result},
    models::{
        CreationCursor,
        audit_entry::{AuditAct, AuditEntry, Origin},
        caller::{Caller, CredentialId, KeyManager, KeyScope},
        interval, is_valid, oldest_first, usage,
    },
    quota::Quota,
    schema::api_keys,
    secret::SecretHash,
};

/// A row, without the hash of the secret.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = api_keys, check_for_backend(diesel::pg::Pg))]
pub struct ApiKey {
    pub id: Uuid,
    /// The first characters of the secret, for display.
    pub key_prefix: String,
    /// The owner's description of the key; may be empty.
    pub note: String,
    /// Postgres permits NULL in an array; a constraint on the table forbids it here.
    scopes: Vec<Option<KeyScope>>,
    /// From this time on the key is refused; none: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// When the key was revoked, since when it is refused; none: it was not.
    pub revoked_at: Option<DateTime<Utc>>,
    /// Written at most once a minute.
    pub last_used_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

#[derive(Clone, Debug)]
pub struct NewApiKey {
    pub key_hash: SecretHash,
    pub key_prefix: String,
    pub note: String,
    /// At least one, each once.
    pub scopes: Vec<KeyScope>,
    pub expires_at: Option<DateTime<Utc>>,
}

/// A key to replace, and the secret that replaces its own.
#[derive(Clone, Debug)]
pub struct RotatedKey {
    pub id: Uuid,
    pub key_hash: SecretHash,
    pub key_prefix: String,
    /// How long the old secret stays valid.
    pub overlap: Duration,
}

impl NewApiKey {
    /// Inserts a key of the manager's user. Without an expiry of its own it expires with the
    /// key that the call is made with.
    ///
    /// Fails with [`Error::Invalid`] if it is to expire later than that key,
    /// [`Error::QuotaExceeded`] if the user has too many keys.
    pub async fn create(
        mut self,
        tx: &mut Transaction<'_>,
        manager: KeyManager,
        origin: Origin,
        quotas: &QuotaSettings,
    ) -> Result<ApiKey> {
        self.expires_at = expire_with_maker(tx, &manager, self.expires_at, "expires_at").await?;
        usage::demand_room(tx, manager.user_id(), &[quotas.of(Quota::ApiKeys)]).await?;
        let key = self.insert(tx, &manager).await?;
        let (user_id, api_key_id) = (Some(manager.user_id()), Some(key.id));
        AuditEntry { user_id, api_key_id, ..origin.entry(AuditAct::ApiKeyCreated) }.insert(tx).await?;
        Ok(key)
    }

    async fn insert(self, tx: &mut Transaction<'_>, manager: &KeyManager) -> Result<ApiKey> {
        let scopes: Vec<Option<KeyScope>> = self.scopes.into_iter().map(Some).collect();
        Ok(diesel::insert_into(api_keys::table)
            .values((
                api_keys::id.eq(Uuid::now_v7()),
                api_keys::user_id.eq(manager.user_id()),
                api_keys::key_hash.eq(self.key_hash.as_bytes()),
                api_keys::key_prefix.eq(self.key_prefix),
                api_keys::note.eq(self.note),
                api_keys::scopes.eq(scopes),
                api_keys::expires_at.eq(self.expires_at),
            ))
            .returning(ApiKey::as_returning())
            .get_result(tx)
            .await?)
    }
}

/// The expiry of a new key that was to expire at this time: that of the key that the call is
/// made with, or an earlier one. Otherwise a key could outlive itself by making another one.
/// Fails with [`Error::Invalid`] on `field` if the time is later.
async fn expire_with_maker(
    tx: &mut Transaction<'_>,
    manager: &KeyManager,
    expires_at: Option<DateTime<Utc>>,
    field: &str,
) -> Result<Option<DateTime<Utc>>> {
    let Some(maker) = manager.key_id() else { return Ok(expires_at) };
    let maker = api_keys::table.find(maker).select(api_keys::expires_at);
    let latest: Option<Option<DateTime<Utc>>> = maker.get_result(tx).await.optional()?;
    let latest = latest.ok_or(Error::CredentialInvalid)?;
    match (expires_at, latest) {
        (Some(at), Some(latest)) if at > latest => {
            let latest = latest.to_rfc3339_opts(SecondsFormat::Micros, true);
            Err(Error::invalid(field, format!("must not expire later than the calling key, at {latest}")))
        }
        (expires_at, latest) => Ok(expires_at.or(latest)),
    }
}

impl ApiKey {
    pub fn cursor(&self) -> CreationCursor {
        CreationCursor { created_at: self.created_at, id: self.id }
    }

    /// The scopes that the key grants, each once.
    pub fn scopes(&self) -> impl Iterator<Item = KeyScope> {
        self.scopes.iter().copied().flatten()
    }

    /// Returns the key that the call is made with. Fails with
    /// [`Error::CredentialInvalid`] if the credential is not a key, or if its row no
    /// longer exists.
    pub async fn of_caller(conn: &mut AsyncPgConnection, caller: &Caller) -> Result<Self> {
        let CredentialId::ApiKey(id) = caller.credential() else { return Err(Error::CredentialInvalid) };
        let key = api_keys::table.find(id).select(Self::as_select()).get_result(conn).await.optional()?;
        key.ok_or(Error::CredentialInvalid)
    }

    /// Lists at most `limit` keys of the manager's user, oldest first, beginning after
    /// the `created_at` and id in `after`.
    pub async fn list(
        conn: &mut AsyncPgConnection,
        manager: &KeyManager,
        after: Option<CreationCursor>,
        limit: i64,
    ) -> Result<Vec<Self>> {
        let query = api_keys::table.filter(api_keys::user_id.eq(manager.user_id())).select(Self::as_select());
        Ok(oldest_first!(api_keys, query, after, limit).load(conn).await?)
    }

    /// Revokes a key of the manager's user. Fails with [`Error::NotFound`] if the user
    /// has no such key, [`Error::ApiKeyAlreadyExpired`] if it has ended before.
    pub async fn expire(
        tx: &mut Transaction<'_>,
        manager: &KeyManager,
        id: Uuid,
        origin: &Origin,
    ) -> Result<Self> {
        let own = api_keys::table.find(id).filter(api_keys::user_id.eq(manager.user_id()));
        let expired: Option<Self> = diesel::update(own)
            .filter(is_valid(api_keys::revoked_at, api_keys::expires_at))
            .set(api_keys::revoked_at.eq(now))
            .returning(Self::as_returning())
            .get_result(tx)
            .await
            .optional()?;
        let Some(key) = expired else {
            let known: Option<Uuid> = own.select(api_keys::id).get_result(tx).await.optional()?;
            return Err(
                known.map_or_else(|| Error::not_found(Resource::ApiKey, &id), Error::ApiKeyAlreadyExpired)
            );
        };
        let (user_id, api_key_id) = (Some(manager.user_id()), Some(id));
        AuditEntry { user_id, api_key_id, ..origin.entry(AuditAct::ApiKeyExpired) }.insert(tx).await?;
        Ok(key)
    }

    /// Replaces a key of the manager's user by a new one with the same note, scopes and
    /// expiry. The old key expires after `overlap`, or earlier if it was to; without an
    /// overlap it is revoked. Returns the new key, the old key, and the time until the old
    /// key ends.
    ///
    /// Fails with [`Error::NotFound`] if the user has no such key,
    /// [`Error::ScopeRequired`] if the manager lacks a scope of the key,
    /// [`Error::ApiKeyAlreadyExpired`] if the key has ended before, [`Error::Invalid`] if it
    /// expires later than the key that the call is made with, [`Error::QuotaExceeded`] if
    /// rotations made too many keys.
    pub async fn rotate(
        tx: &mut Transaction<'_>,
        manager: &KeyManager,
        RotatedKey { id, key_hash, key_prefix, overlap }: RotatedKey,
        origin: &Origin,
        quotas: &QuotaSettings,
    ) -> Result<(Self, Self, Duration)> {
        let own = api_keys::table.find(id).filter(api_keys::user_id.eq(manager.user_id()));
        let valid = is_valid(api_keys::revoked_at, api_keys::expires_at);
        let old: Option<(Self, bool)> =
            own.select((Self::as_select(), valid)).for_no_key_update().get_result(tx).await.optional()?;
        let (old, valid) = old.ok_or_else(|| Error::not_found(Resource::ApiKey, &id))?;
        let scopes: Vec<KeyScope> = old.scopes().collect();
        manager.require(&scopes)?;
        if !valid {
            return Err(Error::ApiKeyAlreadyExpired(id));
        }
        let expires_at = expire_with_maker(tx, manager, old.expires_at, "api_key_id").await?;
        usage::demand_room(tx, manager.user_id(), &[quotas.of_rotated_keys()]).await?;
        let note = old.note;
        let new = NewApiKey { key_hash, key_prefix, note, scopes, expires_at };
        let new = new.insert(tx, manager).await?;
        if overlap.is_zero() {
            diesel::update(own).set(api_keys::revoked_at.eq(now)).execute(tx).await?;
        } else {
            let end = || (now.into_sql::<Timestamptz>() + interval(overlap)).nullable();
            diesel::update(own)
                .filter(api_keys::expires_at.is_null().or(api_keys::expires_at.gt(end())))
                .set(api_keys::expires_at.eq(end()))
                .execute(tx)
                .await?;
        }
        let (old, at): (Self, DateTime<Utc>) =
            own.select((Self::as_select(), now.into_sql::<Timestamptz>())).get_result(tx).await?;
        let ends_at = old.revoked_at.or(old.expires_at);
        let left = ends_at.and_then(|ends_at| (ends_at - at).to_std().ok()).unwrap_or_default();
        let entry = AuditEntry {
            user_id: Some(manager.user_id()),
            api_key_id: Some(id),
            new_api_key_id: Some(new.id),
            ..origin.entry(AuditAct::ApiKeyRotated)
        };
        entry.insert(tx).await?;
        Ok((new, old, left))
    }

    pub(super) async fn count_valid(conn: &mut AsyncPgConnection, user_id: Uuid) -> Result<i64> {
        Ok(api_keys::table
            .filter(api_keys::user_id.eq(user_id))
            .filter(is_valid(api_keys::revoked_at, api_keys::expires_at))
            .count()
            .get_result(conn)
            .await?)
    }
}
