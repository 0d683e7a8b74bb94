//! Turns a secret into a caller and a signal of the credential's end.
//!
//! A credential is looked up once and then cached. One task confirms all cached
//! credentials against the database every second or two. So a call costs no query, and
//! a revocation by another replica or an operator takes effect everywhere within
//! [`CREDENTIAL_CONFIRMED_WITHIN`](crate::limits::CREDENTIAL_CONFIRMED_WITHIN). A
//! revocation by this process takes effect at once, see [`Auth::revoke`].

mod admission;
mod cache;
mod confirmation;
mod credential;
mod log_in;
pub mod password;
mod removal;
mod streams;
mod tenants;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

pub(crate) use self::log_in::NewAccount;
pub use self::{
    admission::Admission,
    cache::Revocation,
    credential::Credential,
    password::Passwords,
    streams::{OpenStream, StreamReset},
    tenants::{HeldBytes, HeldMessages, OpenCall, Tenants},
};
use self::{
    cache::{Cache, Inserted},
    credential::Moment,
    streams::Streams,
};
pub(crate) use crate::config::AuthSettings;
use crate::{
    config::BcryptSettings,
    db::{
        Database, Identified as _, Payer,
        notifier::{Notification, Notifier},
    },
    error::{Error, Result},
    models::{caller::CredentialId, credential::authenticate},
    secret::{Secret, SecretHash},
};

/// Authenticates callers, and keeps their credentials confirmed.
#[derive(Clone, Debug)]
pub struct Auth {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    database: Database,
    notifier: Notifier,
    settings: AuthSettings,
    /// Most valid sessions of one user.
    sessions_per_user: i64,
    admission: Admission,
    passwords: Passwords,
    streams: Streams,
    tenants: Tenants,
    cache: Mutex<Cache>,
    /// When the last round of confirmation that succeeded began.
    confirmed_at: AtomicU64,
    /// Starts a round of confirmation before its time.
    notified: Arc<Notify>,
}

impl Auth {
    /// Starts the tasks that keep credentials confirmed, end those that expire, and remove
    /// those that ended long ago. They end after the last clone of this is dropped.
    pub fn start(
        database: Database,
        notifier: Notifier,
        settings: AuthSettings,
        sessions_per_user: i64,
    ) -> Self {
        let notified = Arc::new(Notify::new());
        let BcryptSettings { bcrypt_cost, bcrypt_parallel } = settings.bcrypt;
        let admission = Admission::new(database.settings().connections, bcrypt_parallel);
        let inner = Arc::new(Inner {
            passwords: Passwords::new(bcrypt_cost, bcrypt_parallel),
            streams: Streams::new(settings.streams_per_user, settings.token_streams_per_user),
            tenants: Tenants::new(settings.tenants),
            cache: Mutex::default(),
            confirmed_at: AtomicU64::new(Moment::now().0),
            notified: notified.clone(),
            database,
            notifier,
            settings,
            sessions_per_user,
            admission,
        });
        inner.database.spawn(confirmation::keep_confirmed(Arc::downgrade(&inner), notified));
        tokio::spawn(confirmation::end_expired(Arc::downgrade(&inner)));
        inner.database.spawn(removal::remove_ended(Arc::downgrade(&inner)));
        Self { inner }
    }

    pub(crate) fn settings(&self) -> &AuthSettings {
        &self.inner.settings
    }

    pub(crate) fn tenants(&self) -> &Tenants {
        &self.inner.tenants
    }

    pub(crate) fn admission(&self) -> &Admission {
        &self.inner.admission
    }

    /// The credential of this secret. [`Error::CredentialInvalid`] if it is not valid now,
    /// [`Error::Unavailable`] if it is not cached and the database does not answer.
    pub async fn authenticate(&self, secret: &str) -> Result<Arc<Credential>> {
        let secret = Secret::parse(secret).ok_or(Error::CredentialInvalid)?;
        let hash = secret.hash();
        match self.inner.cache.lock().get(&hash)? {
            Some(credential) if credential.is_confirmed() => return Ok(credential),
            _ => {}
        }
        self.inner.look_up(hash).await
    }

    /// How many credentials are cached, and how long ago all of them were confirmed.
    pub fn cached(&self) -> (usize, Duration) {
        let confirmed_at = Moment(self.inner.confirmed_at.load(Relaxed));
        (self.inner.cache.lock().len(), confirmed_at.elapsed())
    }

    /// Counts a stream under this credential until the returned value is dropped.
    /// `reset` resets the stream. [`Error::Overloaded`] if the user has as many streams as
    /// the settings allow.
    pub fn open_stream(&self, credential: Arc<Credential>, reset: StreamReset) -> Result<OpenStream> {
        self.inner.streams.open(credential, reset)
    }

    /// Ends credentials: on this replica at once, so that new calls with them are refused
    /// and their streams end; on the other replicas when they are notified. To be called
    /// when the revocation is committed.
    pub fn revoke(&self, revocation: Revocation) {
        self.inner.cache.lock().revoke(revocation);
        self.inner.notifier.notify(Notification::Credentials);
    }

    /// Ends a credential on this replica after this time, as the database has it.
    pub fn revoke_after(&self, id: CredentialId, left: Duration) {
        if left.is_zero() {
            self.revoke(Revocation::Credential(id));
        } else {
            self.inner.cache.lock().end_at(id, Moment::now().plus(left));
        }
    }

    /// Starts a round of confirmation now, since another replica ended a credential.
    pub fn confirm_now(&self) {
        self.inner.notified.notify_one();
    }
}

impl Inner {
    async fn look_up(&self, hash: SecretHash) -> Result<Arc<Credential>> {
        let _permit = self.admission.look_up()?;
        loop {
            let mark = self.cache.lock().mark();
            let mut connection = self.database.get(Payer::Share(self.admission.secrets.clone())).await?;
            let asked_at = Moment::now();
            let found = authenticate(&mut connection, &hash).await?;
            let identity = connection.identity();
            drop(connection);
            let mut cache = self.cache.lock();
            // Another database may have taken the place of the one that answered. It may lack
            // the credential, and may have refused it meanwhile.
            if self.database.identity() != Some(identity) {
                continue;
            }
            let Some((caller, lifetime)) = found else {
                cache.remove(&hash);
                return Err(Error::CredentialInvalid);
            };
            let credential = Credential::new(caller, lifetime, asked_at);
            match cache.insert(hash, credential, mark)? {
                Inserted::Valid(credential) => return Ok(credential),
                Inserted::Outdated => {}
            }
        }
    }
}
