//! Users: sign-up, passwords, names, and what operators change.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::{case_when, now},
    prelude::*,
    sql_types::Timestamptz,
};
use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _};
use uuid::Uuid;

use crate::{
    db::Transaction,
    error::{Error, Resource, Result, violated},
    models::{
        api_key::ApiKey,
        audit_entry::{AuditAct, AuditEntry, Origin},
        caller::{Account, Caller, CustomerAccount, Subject, UserRole},
        customer_code::CustomerCode,
        email::{Email, EmailKey},
        log_in_throttle::{LogInAttempt, LogInClaim},
        session::{NewSession, Session},
    },
    schema::users,
    secret::{PasswordHash, SecretHash},
};

/// A row, without the hash of the password, which only its verification reads.
#[derive(Clone, Debug, Queryable, Selectable)]
#[diesel(table_name = users, check_for_backend(diesel::pg::Pg))]
pub struct User {
    pub id: Uuid,
    pub role: UserRole,
    /// As given at sign-up.
    pub email: String,
    /// May be empty.
    pub first_name: String,
    /// May be empty.
    pub last_name: String,
    /// None for a provider.
    pub customer_code: Option<String>,
    /// From this time on every credential of the user is refused.
    pub disabled_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

#[derive(Clone, Debug)]
pub struct NewUser {
    pub role: UserRole,
    pub email: Email,
    pub password_hash: PasswordHash,
    pub first_name: String,
    pub last_name: String,
}

impl NewUser {
    /// Inserts the user, for an operator. Fails with [`Error::EmailTaken`] if another
    /// user has an e-mail of the same key.
    pub async fn create(self, tx: &mut Transaction<'_>) -> Result<User> {
        let user = self.insert(tx).await?;
        let user_id = Some(user.id);
        AuditEntry { user_id, ..Origin::OPERATOR.entry(AuditAct::UserCreated) }.insert(tx).await?;
        Ok(user)
    }

    async fn insert(self, tx: &mut Transaction<'_>) -> Result<User> {
        let customer_code = match self.role {
            UserRole::Customer => Some(CustomerCode::generate()?),
            UserRole::Provider => None,
        };
        diesel::insert_into(users::table)
            .values((
                users::id.eq(Uuid::now_v7()),
                users::role.eq(self.role),
                users::email.eq(self.email.as_str()),
                users::email_key.eq(self.email.key().as_str()),
                users::password_hash.eq(self.password_hash.as_str()),
                users::first_name.eq(self.first_name),
                users::last_name.eq(self.last_name),
                users::customer_code.eq(customer_code.as_ref().map(CustomerCode::as_str)),
            ))
            .returning(User::as_returning())
            .get_result(tx)
            .await
            .map_err(|error| match violated(&error) {
                Some("users_email_key_key") => Error::EmailTaken,
                _ => error.into(),
            })
    }

    /// Inserts the user with a first session, and makes the pair of e-mail and client
    /// address a known one. Fails with [`Error::EmailTaken`] as [`Self::create`] does.
    pub async fn sign_up(
        self,
        tx: &mut Transaction<'_>,
        secret_hash: SecretHash,
        lifetime: Duration,
        origin: &Origin,
    ) -> Result<(User, Session)> {
        let claim = LogInClaim::new(self.email.key().clone(), *origin);
        let user = self.insert(tx).await?;
        let session = NewSession { user_id: user.id, secret_hash, lifetime }.insert(tx).await?;
        claim.record_success(tx, None).await?;
        let (user_id, session_id) = (Some(user.id), Some(session.id));
        AuditEntry { user_id, session_id, ..origin.entry(AuditAct::SignUp) }.insert(tx).await?;
        Ok((user, session))
    }
}

/// New names of a user, which may be empty. None leaves the name as it is.
#[derive(Clone, Debug, AsChangeset)]
#[diesel(table_name = users)]
pub struct Names {
    pub first_name: Option<String>,
    pub last_name: Option<String>,
}

impl User {
    /// Returns the user on whose behalf the call is made. Fails with
    /// [`Error::SessionRequired`] for a watch token, which belongs to a job.
    pub async fn of_caller(conn: &mut AsyncPgConnection, caller: &Caller) -> Result<Self> {
        let Subject::User { id, .. } = caller.subject() else { return Err(Error::SessionRequired) };
        Ok(users::table.find(id).select(Self::as_select()).get_result(conn).await?)
    }

    /// Lists users from the oldest to the newest, for an operator: those after the user of the
    /// id `after`, of this role or of any, and only disabled ones if `disabled`.
    pub async fn list(
        conn: &mut AsyncPgConnection,
        role: Option<UserRole>,
        disabled: bool,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<Self>> {
        let mut query = users::table.order(users::id).limit(limit).select(Self::as_select()).into_boxed();
        if let Some(role) = role {
            query = query.filter(users::role.eq(role));
        }
        if disabled {
            query = query.filter(users::disabled_at.is_not_null());
        }
        if let Some(after) = after {
            query = query.filter(users::id.gt(after));
        }
        Ok(query.load(conn).await?)
    }

    /// Returns the user with this e-mail, disabled or not, and the hash of their
    /// password. Only for the verification of a password.
    pub async fn find_by_email(
        conn: &mut AsyncPgConnection,
        email: &EmailKey,
    ) -> Result<Option<(Self, PasswordHash)>> {
        let query = users::table.filter(users::email_key.eq(email.as_str()));
        let row =
            query.select((Self::as_select(), users::password_hash)).get_result(conn).await.optional()?;
        Ok(row.map(|(user, hash)| (user, PasswordHash::new(hash))))
    }

    /// Whether this is the id of a customer who is not disabled.
    pub(super) async fn is_customer(conn: &mut AsyncPgConnection, id: Uuid) -> Result<bool> {
        let query = users::table
            .filter(users::id.eq(id))
            .filter(users::role.eq(UserRole::Customer).and(users::disabled_at.is_null()));
        Ok(query.select(users::id).first::<Uuid>(conn).await.optional()?.is_some())
    }

    /// Returns the key of the caller's e-mail and the hash of their password.
    pub async fn password_hash(
        conn: &mut AsyncPgConnection,
        account: Account,
    ) -> Result<(EmailKey, PasswordHash)> {
        let row = users::table.find(account.user_id()).select((users::email_key, users::password_hash));
        let (email, hash): (String, String) = row.get_result(conn).await?;
        Ok((EmailKey::stored(email), PasswordHash::new(hash)))
    }

    /// Replaces the hash `old` by the hash `new` of the same password. Does nothing
    /// if the password has changed since.
    pub async fn rehash(
        tx: &mut Transaction<'_>,
        id: Uuid,
        old: &PasswordHash,
        new: &PasswordHash,
    ) -> Result<()> {
        diesel::update(users::table.find(id))
            .filter(users::password_hash.eq(old.as_str()))
            .set(users::password_hash.eq(new.as_str()))
            .execute(tx)
            .await?;
        Ok(())
    }

    /// Sets the caller's names and returns the changed user.
    pub async fn rename(tx: &mut Transaction<'_>, account: Account, names: Names) -> Result<Self> {
        Ok(diesel::update(users::table.find(account.user_id()))
            .set(names)
            .returning(Self::as_returning())
            .get_result(tx)
            .await?)
    }

    /// Gives the calling customer a new code, and returns the changed user.
    pub async fn renew_customer_code(
        tx: &mut Transaction<'_>,
        customer: CustomerAccount,
        code: CustomerCode,
        origin: &Origin,
    ) -> Result<Self> {
        let user = diesel::update(users::table.find(customer.user_id()))
            .set(users::customer_code.eq(code.as_str()))
            .returning(Self::as_returning())
            .get_result(tx)
            .await?;
        let entry = origin.entry(AuditAct::CustomerCodeRenewed);
        AuditEntry { user_id: Some(customer.user_id()), ..entry }.insert(tx).await?;
        Ok(user)
    }

    /// Sets the caller's password, records the attempt's success and ends the other
    /// sessions of the user. Returns how many sessions it ended and how many API keys
    /// are still valid; none if the password no longer has the hash `old`.
    pub async fn change_password(
        tx: &mut Transaction<'_>,
        account: Account,
        old: &PasswordHash,
        new: &PasswordHash,
        attempt: &LogInAttempt,
    ) -> Result<Option<(usize, i64)>> {
        let user = users::table
            .find(account.user_id())
            .filter(users::password_hash.eq(old.as_str()))
            .filter(users::disabled_at.is_null());
        let changed = diesel::update(user).set(users::password_hash.eq(new.as_str())).execute(tx).await?;
        if changed == 0 {
            return Ok(None);
        }
        let ended = Session::end_all(tx, account.user_id(), Some(account.session_id())).await?;
        let keys = ApiKey::count_valid(tx, account.user_id()).await?;
        attempt.succeed(tx).await?;
        let entry = attempt.origin().entry(AuditAct::PasswordChanged);
        AuditEntry { user_id: Some(account.user_id()), ..entry }.insert(tx).await?;
        Ok(Some((ended, keys)))
    }

    /// Sets a user's password and ends all their sessions, for an operator. Fails with
    /// [`Error::NotFound`] if no user has the e-mail.
    pub async fn set_password(
        tx: &mut Transaction<'_>,
        email: &EmailKey,
        new: &PasswordHash,
    ) -> Result<Self> {
        let user = diesel::update(users::table)
            .filter(users::email_key.eq(email.as_str()))
            .set(users::password_hash.eq(new.as_str()))
            .returning(Self::as_returning())
            .get_result(tx)
            .await
            .optional()?;
        Self::end_sessions(tx, user, email, AuditAct::PasswordSet).await
    }

    /// Disables a user, for an operator: ends all sessions and refuses the user's
    /// log-ins and API keys from now on. A repeated call leaves `disabled_at` as it
    /// is. Fails with [`Error::NotFound`] if no user has the e-mail.
    pub async fn disable(tx: &mut Transaction<'_>, email: &EmailKey) -> Result<Self> {
        let first = case_when(users::disabled_at.is_null(), now.into_sql::<Timestamptz>().nullable());
        let user = diesel::update(users::table)
            .filter(users::email_key.eq(email.as_str()))
            .set(users::disabled_at.eq(first.otherwise(users::disabled_at)))
            .returning(Self::as_returning())
            .get_result(tx)
            .await
            .optional()?;
        Self::end_sessions(tx, user, email, AuditAct::UserDisabled).await
    }

    /// Lets a disabled user log in again, for an operator; returns the user and whether they
    /// were disabled. A trigger revokes every credential from before. Fails with
    /// [`Error::NotFound`] if no user has the e-mail.
    pub async fn enable(tx: &mut Transaction<'_>, email: &EmailKey) -> Result<(Self, bool)> {
        // A provider may have a million watch tokens.
        tx.batch_execute("SET LOCAL statement_timeout = 0").await?;
        let of_email = users::email_key.eq(email.as_str());
        let enabled = diesel::update(users::table)
            .filter(of_email)
            .filter(users::disabled_at.is_not_null())
            .set(users::disabled_at.eq(None::<DateTime<Utc>>))
            .returning(Self::as_returning())
            .get_result(tx)
            .await
            .optional()?;
        if let Some(user) = enabled {
            let entry = Origin::OPERATOR.entry(AuditAct::UserEnabled);
            AuditEntry { user_id: Some(user.id), ..entry }.insert(tx).await?;
            return Ok((user, true));
        }
        let found =
            users::table.filter(of_email).select(Self::as_select()).get_result(tx).await.optional()?;
        Ok((found.ok_or_else(|| Error::not_found(Resource::User, email.as_str()))?, false))
    }

    async fn end_sessions(
        tx: &mut Transaction<'_>,
        changed: Option<Self>,
        email: &EmailKey,
        act: AuditAct,
    ) -> Result<Self> {
        let user = changed.ok_or_else(|| Error::not_found(Resource::User, email.as_str()))?;
        Session::end_all(tx, user.id, None).await?;
        AuditEntry { user_id: Some(user.id), ..Origin::OPERATOR.entry(act) }.insert(tx).await?;
        Ok(user)
    }
}
