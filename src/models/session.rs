//! Sessions: what a log-in creates.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{dsl::now, prelude::*, sql_types::Timestamptz};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use crate::{
    db::Transaction,
    error::{Error, Result},
    models::{
        audit_entry::{AuditAct, AuditEntry, Origin},
        caller::Account,
        interval, is_valid,
        log_in_throttle::LogInAttempt,
        usage,
    },
    schema::{sessions, users},
    secret::{PasswordHash, SecretHash},
};

/// A row, without the hash of the secret.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = sessions, check_for_backend(diesel::pg::Pg))]
pub struct Session {
    pub id: Uuid,
    /// The user who logged in.
    pub user_id: Uuid,
    /// From this time on the session is refused. It may be revoked before.
    pub expires_at: DateTime<Utc>,
    /// Written at most once a minute.
    pub last_used_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

#[derive(Clone, Copy, Debug)]
pub struct NewSession {
    pub user_id: Uuid,
    pub secret_hash: SecretHash,
    /// Time until the session expires, counted from its insertion.
    pub lifetime: Duration,
}

impl NewSession {
    pub(super) async fn insert(self, tx: &mut Transaction<'_>) -> Result<Session> {
        let lifetime = interval(self.lifetime);
        Ok(diesel::insert_into(sessions::table)
            .values((
                sessions::id.eq(Uuid::now_v7()),
                sessions::user_id.eq(self.user_id),
                sessions::secret_hash.eq(self.secret_hash.as_bytes()),
                sessions::expires_at.eq(now.into_sql::<Timestamptz>() + lifetime),
            ))
            .returning(Session::as_returning())
            .get_result(tx)
            .await?)
    }

    /// Inserts the session and records the attempt's success. Of a user who would then have
    /// more than `most` valid sessions, the oldest ones end; their ids are returned as well.
    ///
    /// Returns none if the user's password no longer has the hash `verified`, or if the user
    /// is disabled. The user's row stays locked until the commit, so that a later change of
    /// the password or a disabling finds this session and ends it.
    pub async fn log_in(
        self,
        tx: &mut Transaction<'_>,
        verified: &PasswordHash,
        attempt: &LogInAttempt,
        most: i64,
    ) -> Result<Option<(Session, Vec<Uuid>)>> {
        let user: Option<Uuid> = users::table
            .find(self.user_id)
            .filter(users::password_hash.eq(verified.as_str()))
            .filter(users::disabled_at.is_null())
            .select(users::id)
            .for_share()
            .get_result(tx)
            .await
            .optional()?;
        if user.is_none() {
            return Ok(None);
        }
        // First, since this may wait for the user's other transactions: the rows of the
        // attempt are those of everybody at its address.
        let ended = Session::end_oldest(tx, self.user_id, most, attempt.origin()).await?;
        let user_id = Some(self.user_id);
        let session = self.insert(tx).await?;
        attempt.succeed(tx).await?;
        let entry = attempt.origin().entry(AuditAct::LogIn);
        AuditEntry { user_id, session_id: Some(session.id), ..entry }.insert(tx).await?;
        Ok(Some((session, ended)))
    }
}

impl Session {
    /// Returns the session that the call is made with. Fails with
    /// [`Error::CredentialInvalid`] if its row no longer exists.
    pub async fn of_account(conn: &mut AsyncPgConnection, account: Account) -> Result<Self> {
        let own = sessions::table.find(account.session_id()).select(Self::as_select());
        own.get_result(conn).await.optional()?.ok_or(Error::CredentialInvalid)
    }

    /// Ends the session that the call is made with. Does nothing if it has ended.
    pub async fn end(tx: &mut Transaction<'_>, account: Account, origin: Origin) -> Result<()> {
        let ended = diesel::update(sessions::table.find(account.session_id()))
            .filter(is_valid(sessions::revoked_at, sessions::expires_at.nullable()))
            .set(sessions::revoked_at.eq(now))
            .execute(tx)
            .await?;
        if ended == 0 {
            return Ok(());
        }
        let (user_id, session_id) = (Some(account.user_id()), Some(account.session_id()));
        AuditEntry { user_id, session_id, ..origin.entry(AuditAct::LogOut) }.insert(tx).await
    }

    /// Ends the oldest valid sessions of a user, so that one more makes at most `most` of
    /// them. Returns those that it ended. The user's usage stays locked until the
    /// transaction ends, so that concurrent log-ins count each other's sessions.
    async fn end_oldest(
        tx: &mut Transaction<'_>,
        user_id: Uuid,
        most: i64,
        origin: &Origin,
    ) -> Result<Vec<Uuid>> {
        usage::lock(tx, user_id).await?;
        diesel::alias!(sessions as valid_sessions: ValidSessions);
        let (created_at, id) =
            (valid_sessions.field(sessions::created_at), valid_sessions.field(sessions::id));
        let too_many = valid_sessions
            .filter(valid_sessions.field(sessions::user_id).eq(user_id))
            .filter(valid_sessions.field(sessions::revoked_at).is_null())
            .filter(valid_sessions.field(sessions::expires_at).gt(now))
            .order((created_at.desc(), id.desc()))
            .offset(most.saturating_sub(1))
            .select(id);
        // A session that another transaction has ended meanwhile stays as it is.
        let ended: Vec<Uuid> = diesel::update(sessions::table)
            .filter(sessions::id.eq_any(too_many))
            .filter(is_valid(sessions::revoked_at, sessions::expires_at.nullable()))
            .set(sessions::revoked_at.eq(now))
            .returning(sessions::id)
            .get_results(tx)
            .await?;
        let entry = |id: &Uuid| AuditEntry {
            user_id: Some(user_id),
            session_id: Some(*id),
            ..origin.entry(AuditAct::SessionEnded)
        };
        AuditEntry::insert_all(ended.iter().map(entry).collect(), tx).await?;
        Ok(ended)
    }

    /// Ends all valid sessions of a user except `kept`, and returns how many it ended.
    pub(super) async fn end_all(
        tx: &mut Transaction<'_>,
        user_id: Uuid,
        kept: Option<Uuid>,
    ) -> Result<usize> {
        Ok(diesel::update(sessions::table)
            .filter(sessions::user_id.eq(user_id))
            .filter(sessions::id.ne_all(kept))
            .filter(is_valid(sessions::revoked_at, sessions::expires_at.nullable()))
            .set(sessions::revoked_at.eq(now))
            .execute(tx)
            .await?)
    }
}
