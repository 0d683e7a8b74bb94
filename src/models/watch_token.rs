//! Watch tokens: what people without an account follow one job with.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{dsl::now, prelude::*, sql_types::Timestamptz};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    error::{Error, Resource, Result},
    models::{
        audit_entry::{AuditAct, AuditEntry, Origin},
        caller::{Caller, CredentialId, KeyScope, Provider, Subject},
        interval,
    },
    schema::{users, watch_tokens},
    secret::SecretHash,
};

/// A row, but for the hash of the secret.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = watch_tokens, check_for_backend(diesel::pg::Pg))]
pub struct WatchToken {
    /// Version 7.
    pub id: Uuid,
    /// What it shows.
    pub job_id: Uuid,
    /// How the secret begins.
    pub secret_prefix: String,
    /// Its maker's words about it; may be empty.
    pub note: String,
    /// From then on it is refused.
    pub expires_at: DateTime<Utc>,
    /// To the minute.
    pub last_used_at: Option<DateTime<Utc>>,
    /// By the database's clock.
    pub created_at: DateTime<Utc>,
}

/// A token to be.
#[derive(Clone, Debug)]
pub struct NewWatchToken {
    /// One of the provider's.
    pub job_id: Uuid,
    /// Of its secret.
    pub secret_hash: SecretHash,
    /// How the secret begins.
    pub secret_prefix: String,
    /// May be empty.
    pub note: String,
    /// How long it is good, from now.
    pub lifetime: Duration,
}

impl NewWatchToken {
    /// Stores it as made by the job's provider.
    pub async fn create(
        self,
        conn: &mut AsyncPgConnection,
        provider: Provider,
        origin: &Origin,
    ) -> Result<WatchToken> {
        let (token, entry) = conn
            .transaction(async |conn| {
                let token = self.insert(conn, provider).await?;
                let entry = token.entry(AuditAct::WatchTokenCreated, provider, origin);
                Ok::<_, Error>((token, entry.insert(conn).await?))
            })
            .await?;
        entry.committed();
        Ok(token)
    }

    async fn insert(self, conn: &mut AsyncPgConnection, provider: Provider) -> Result<WatchToken> {
        let lifetime = interval(self.lifetime);
        Ok(diesel::insert_into(watch_tokens::table)
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
            .get_result(conn)
            .await?)
    }
}

confirmable!(WatchToken, watch_tokens);

impl WatchToken {
    /// Who calls with this secret, and for how long it is good; none unless it
    /// is good now.
    pub async fn authenticate(
        conn: &mut AsyncPgConnection,
        secret: &SecretHash,
    ) -> Result<Option<(Caller, Option<Duration>)>> {
        let row: Option<(Self, DateTime<Utc>)> = watch_tokens::table
            .inner_join(users::table)
            .filter(watch_tokens::secret_hash.eq(secret.as_bytes()))
            .filter(watch_tokens::expires_at.gt(now))
            .filter(users::disabled_at.is_null())
            .select((Self::as_select(), now.into_sql::<Timestamptz>()))
            .get_result(conn)
            .await
            .optional()?;
        Ok(row.map(|(token, asked_at)| {
            let credential = CredentialId::WatchToken(token.id);
            let caller = Caller::new(Subject::Job(token.job_id), credential, vec![KeyScope::Read]);
            (caller, Some((token.expires_at - asked_at).to_std().unwrap_or_default()))
        }))
    }

    /// The token of this id, for the one who calls with it.
    pub async fn of_caller(conn: &mut AsyncPgConnection, caller: &Caller) -> Result<Self> {
        let CredentialId::WatchToken(id) = caller.credential() else { return Err(Error::CredentialInvalid) };
        let token: Option<Self> =
            watch_tokens::table.find(id).select(Self::as_select()).get_result(conn).await.optional()?;
        token.ok_or(Error::CredentialInvalid)
    }

    /// The provider's tokens of one of their jobs, oldest first, those after
    /// `after` where given: a page of at most `limit`.
    pub async fn list(
        conn: &mut AsyncPgConnection,
        provider: Provider,
        job_id: Uuid,
        after: Option<(DateTime<Utc>, Uuid)>,
        limit: i64,
    ) -> Result<Vec<Self>> {
        let mut query = watch_tokens::table
            .filter(watch_tokens::user_id.eq(provider.id()))
            .filter(watch_tokens::job_id.eq(job_id))
            .order((watch_tokens::created_at, watch_tokens::id))
            .limit(limit)
            .select(Self::as_select())
            .into_boxed();
        if let Some((created_at, id)) = after {
            query = query.filter(
                watch_tokens::created_at
                    .gt(created_at)
                    .or(watch_tokens::created_at.eq(created_at).and(watch_tokens::id.gt(id))),
            );
        }
        Ok(query.load(conn).await?)
    }

    /// Ends a token of the provider's; [`Error::WatchTokenAlreadyExpired`] if
    /// it had ended before.
    pub async fn expire(
        conn: &mut AsyncPgConnection,
        provider: Provider,
        id: Uuid,
        origin: &Origin,
    ) -> Result<Self> {
        let (token, entry) = conn
            .transaction(async |conn| {
                let own = watch_tokens::table.find(id).filter(watch_tokens::user_id.eq(provider.id()));
                let expired: Option<Self> = diesel::update(own)
                    .filter(watch_tokens::expires_at.gt(now))
                    .set(watch_tokens::expires_at.eq(now))
                    .returning(Self::as_returning())
                    .get_result(conn)
                    .await
                    .optional()?;
                let Some(token) = expired else {
                    let known: Option<Uuid> =
                        own.select(watch_tokens::id).get_result(conn).await.optional()?;
                    return Err(known.map_or_else(
                        || Error::not_found(Resource::WatchToken, &id),
                        Error::WatchTokenAlreadyExpired,
                    ));
                };
                let entry = token.entry(AuditAct::WatchTokenExpired, provider, origin);
                Ok((token, entry.insert(conn).await?))
            })
            .await?;
        entry.committed();
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
