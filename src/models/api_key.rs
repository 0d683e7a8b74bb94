//! API keys: the credentials of a user's programs.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{dsl::now, prelude::*, sql_types::Timestamptz};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    db::Transaction,
    error::{Error, Resource, Result},
    models::{
        CreationCursor,
        audit_entry::{AuditAct, AuditEntry, Origin},
        caller::{Caller, CredentialId, KeyManager, KeyScope},
        interval, is_valid, oldest_first,
    },
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

impl NewApiKey {
    /// Inserts a key of the manager's user.
    pub async fn create(
        self,
        tx: &mut Transaction<'_>,
        manager: KeyManager,
        origin: Origin,
    ) -> Result<ApiKey> {
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
    /// [`Error::ApiKeyAlreadyExpired`] if the key has ended before.
    pub async fn rotate(
        tx: &mut Transaction<'_>,
        manager: &KeyManager,
        id: Uuid,
        key_hash: SecretHash,
        key_prefix: String,
        overlap: Duration,
        origin: &Origin,
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
        let (note, expires_at) = (old.note, old.expires_at);
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
