//! Sign-up, log-in and change of password.
//!
//! A log-in is counted as failed before its password is verified, so that concurrent
//! guesses are throttled like consecutive ones. Every log-in that fails makes as many
//! queries and verifies one hash, so that the time of the answer does not reveal whether
//! the e-mail has a user. How long failures block is decided by the SQL functions that
//! `models/log_in_throttle.rs` calls.

use std::sync::Arc;

use futures_util::FutureExt as _;
use tokio::sync::OwnedSemaphorePermit;
use tracing::Instrument as _;
use uuid::Uuid;

use super::{Auth, Credential, Revocation, admission::Unauthenticated};
use crate::{
    db::{Authority, Unconditional, read},
    error::{Error, Result},
    models::{
        audit_entry::Origin,
        caller::{Account, CredentialId, UserRole},
        email::{Email, EmailKey},
        log_in_throttle::{LogInAttempt, LogInClaim, begin_sign_up},
        session::{NewSession, Session},
        user::{NewUser, User},
    },
    secret::{Password, PasswordHash, Secret, SecretKind},
};

pub(crate) struct NewAccount {
    pub(crate) role: UserRole,
    pub(crate) email: Email,
    pub(crate) password: Password,
    pub(crate) first_name: String,
    pub(crate) last_name: String,
}

/// A user with a new session and its secret.
pub(crate) struct LoggedIn {
    pub(crate) user: User,
    pub(crate) session: Session,
    pub(crate) secret: Secret,
}

/// The outcome of a verification.
enum Verified<T> {
    Right(T),
    /// The password is wrong, or the attempt must not succeed; with the user who has the
    /// e-mail, if there is one.
    Wrong(Option<Uuid>),
}

impl Auth {
    /// Creates a user with a first session.
    pub(crate) async fn sign_up(&self, account: NewAccount, origin: Origin) -> Result<LoggedIn> {
        let NewAccount { role, email, password, first_name, last_name } = account;
        let database = &self.inner.database;
        let most = self.settings().sign_ups_per_hour;
        database
            .write(self.unauthenticated(), move |tx| {
                async move { begin_sign_up(tx, &origin, most).await }.boxed()
            })
            .await?;
        let permit = self.inner.admission.hash().await?;
        let password_hash = self.inner.passwords.hash_with(permit, password).await?;
        let new = NewUser { role, email, password_hash, first_name, last_name };
        let secret = Secret::generate(SecretKind::Session)?;
        let (secret_hash, lifetime) = (secret.hash(), self.settings().session_lifetime);
        let (user, session) = database
            .write(Unconditional, move |tx| {
                async move { new.sign_up(tx, secret_hash, lifetime, &origin).await }.boxed()
            })
            .await?;
        Ok(LoggedIn { user, session, secret })
    }

    /// Creates a session for the user with this e-mail and password. Without a password,
    /// which then has no permitted format, the log-in fails after the same work.
    pub(crate) async fn log_in(
        &self,
        email: EmailKey,
        password: Option<Password>,
        origin: Origin,
    ) -> Result<LoggedIn> {
        let claim = LogInClaim::new(email.clone(), origin);
        let (attempt, permit) = self.begin(self.unauthenticated(), claim).await?;
        let auth = self.clone();
        to_its_end(async move {
            let _permit = permit;
            let verified = auth.verify_log_in(&email, password, &attempt).await;
            auth.record(auth.unauthenticated(), attempt, verified).await?.ok_or(Error::LogInFailed)
        })
        .await
    }

    /// Sets the password of the credential's user, and ends the user's other sessions.
    /// Returns how many sessions ended, and how many API keys are still valid.
    pub(crate) async fn change_password(
        &self,
        credential: Arc<Credential>,
        current: Option<Password>,
        new: Password,
        origin: Origin,
    ) -> Result<(usize, i64)> {
        let account = credential.caller().account()?;
        let (email, hash) =
            read!(self.inner.database, account.tenant(), |conn| User::password_hash(conn, account))?;
        // A wrong current password counts as a failed log-in.
        let (attempt, permit) = self.begin(Arc::clone(&credential), LogInClaim::new(email, origin)).await?;
        let auth = self.clone();
        to_its_end(async move {
            let _permit = permit;
            let verified = auth.verify_change(&credential, account, hash, current, new, &attempt).await;
            let wrong = || Error::invalid("current_password", "is not the current password");
            auth.record(Unconditional, attempt, verified).await?.ok_or_else(wrong)
        })
        .await
    }

    fn unauthenticated(&self) -> Unauthenticated {
        Unauthenticated(self.inner.admission.passwords.clone())
    }

    /// Counts a log-in as failed. A restricted one first waits for a permit to hash, which
    /// the caller keeps until the log-in ends.
    async fn begin(
        &self,
        authority: impl Authority + Clone,
        claim: LogInClaim,
    ) -> Result<(LogInAttempt, Option<OwnedSemaphorePermit>)> {
        let database = &self.inner.database;
        let first = claim.clone();
        let begun =
            database.write(authority.clone(), move |tx| async move { first.begin(tx).await }.boxed()).await?;
        if let Some(attempt) = begun {
            return Ok((attempt, None));
        }
        let permit = self.inner.admission.hash().await?;
        let attempt = database
            .write(authority, move |tx| async move { claim.begin_restricted(tx).await }.boxed())
            .await?;
        Ok((attempt, Some(permit)))
    }

    async fn verify_log_in(
        &self,
        email: &EmailKey,
        password: Option<Password>,
        attempt: &LogInAttempt,
    ) -> Result<Verified<LoggedIn>> {
        let (database, passwords) = (&self.inner.database, &self.inner.passwords);
        let mut user_id = None;
        // A second round, in case another log-in replaces the hash meanwhile.
        for _ in 0..2 {
            let mut connection = database.get(self.unauthenticated().payer()).await?;
            let found = User::find_by_email(&mut connection, email).await?;
            drop(connection);
            user_id = found.as_ref().map(|(user, _)| user.id);
            let hash = found.as_ref().map(|(_, hash)| hash.clone());
            let admitted = passwords.verify(password.clone(), hash).await? && attempt.may_succeed();
            let Some((user, hash)) = found.filter(|(user, _)| admitted && user.disabled_at.is_none()) else {
                break;
            };
            // The setting of the cost may have changed since the hash was made.
            let outdated = password.clone().filter(|_| passwords.is_outdated(&hash));
            let renewed = match outdated {
                Some(password) => Some(passwords.hash(password).await?),
                None => None,
            };
            let secret = Secret::generate(SecretKind::Session)?;
            let (secret_hash, lifetime) = (secret.hash(), self.settings().session_lifetime);
            let new = NewSession { user_id: user.id, secret_hash, lifetime };
            let (auth, verified, attempt) = (self.clone(), hash.clone(), attempt.clone());
            let most = self.inner.sessions_per_user;
            let session = database
                .write(Unconditional, move |tx| {
                    async move {
                        let logged_in = new.log_in(tx, &verified, &attempt, most).await?;
                        let Some((session, ended)) = logged_in else { return Ok(None) };
                        tx.after_commit(move || auth.end_sessions(ended));
                        Ok(Some(session))
                    }
                    .boxed()
                })
                .await?;
            let Some(session) = session else { continue };
            if let Some(renewed) = renewed {
                self.renew_hash(user.id, hash, renewed).await;
            }
            return Ok(Verified::Right(LoggedIn { user, session, secret }));
        }
        Ok(Verified::Wrong(user_id))
    }

    fn end_sessions(&self, ended: Vec<Uuid>) {
        for id in ended {
            self.revoke(Revocation::Credential(CredentialId::Session(id)));
        }
    }

    async fn renew_hash(&self, user_id: Uuid, old: PasswordHash, new: PasswordHash) {
        if let Err(error) = self
            .inner
            .database
            .write(Unconditional, move |tx| {
                async move { User::rehash(tx, user_id, &old, &new).await }.boxed()
            })
            .await
        {
            tracing::warn!(cause = ?error, "cannot renew a password hash until the next log-in");
        }
    }

    async fn verify_change(
        &self,
        credential: &Arc<Credential>,
        account: Account,
        mut hash: PasswordHash,
        current: Option<Password>,
        new: Password,
        attempt: &LogInAttempt,
    ) -> Result<Verified<(usize, i64)>> {
        let (database, passwords) = (&self.inner.database, &self.inner.passwords);
        // A second round, in case a log-in replaces the hash meanwhile.
        for _ in 0..2 {
            if !passwords.verify(current.clone(), Some(hash.clone())).await? || !attempt.may_succeed() {
                break;
            }
            let new_hash = passwords.hash(new.clone()).await?;
            let (auth, attempt) = (self.clone(), attempt.clone());
            if let Some(changed) = database
                .write(Arc::clone(credential), move |tx| {
                    async move {
                        let changed = User::change_password(tx, account, &hash, &new_hash, &attempt).await?;
                        if changed.is_some() {
                            let (user_id, kept) = (account.user_id(), account.session_id());
                            tx.after_commit(move || auth.revoke(Revocation::OtherSessions { user_id, kept }));
                        }
                        Ok(changed)
                    }
                    .boxed()
                })
                .await?
            {
                return Ok(Verified::Right(changed));
            }
            (_, hash) = read!(database, account.tenant(), |conn| User::password_hash(conn, account))?;
        }
        Ok(Verified::Wrong(Some(account.user_id())))
    }

    /// Records how an attempt ended, and returns none if the password was wrong. An
    /// attempt whose password could not be verified is withdrawn in the background, so
    /// that it does not count as failed.
    async fn record<T>(
        &self,
        authority: impl Authority,
        attempt: LogInAttempt,
        verified: Result<Verified<T>>,
    ) -> Result<Option<T>> {
        let database = self.inner.database.clone();
        match verified {
            Ok(Verified::Right(value)) => Ok(Some(value)),
            Ok(Verified::Wrong(user_id)) => database
                .write(authority, move |tx| async move { attempt.fail(tx, user_id).await }.boxed())
                .await
                .map(|()| None),
            Err(error) => {
                // In the background, because the caller has probably waited for a timeout.
                tokio::spawn(async move {
                    if let Err(error) = database
                        .write(authority, move |tx| async move { attempt.withdraw(tx).await }.boxed())
                        .await
                    {
                        tracing::warn!(cause = ?error, "an unverified log-in stays counted as failed");
                    }
                });
                Err(error)
            }
        }
    }
}

/// Runs `work` to its end, even if the caller leaves: the outcome of a log-in is recorded.
async fn to_its_end<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work.in_current_span()).await.map_err(Error::internal)?
}
