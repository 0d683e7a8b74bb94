//! A secret becomes a caller, and a signal of its end.
//!
//! A credential is looked up once and then remembered; one task asks the
//! database every second or two which of those in use are still good, so
//! that a call costs no query and an end that another replica or an operator
//! brought about is known everywhere within
//! [`CREDENTIAL_CONFIRMED_WITHIN`].
//! What ends here ends at once, see [`Auth::end`].

mod cache;
mod credential;
pub mod password;
mod streams;

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use diesel_async::AsyncPgConnection;
use tokio::{
    sync::{Notify, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use self::{cache::Ending, credential::Credential, password::Passwords, streams::OpenStream};
use self::{
    cache::{Cache, Known, Looked},
    credential::Moment,
    streams::Streams,
};
use crate::{
    db::{Asker, Database},
    error::{Error, Result},
    limits::{CREDENTIAL_CONFIRMED_WITHIN, UNAUTHENTICATED_CALLS},
    models::{api_key::ApiKey, caller::CredentialId, session::Session, watch_token::WatchToken},
    secret::{Secret, SecretHash, SecretKind},
};

/// How often the database is asked which credentials are still good. Several
/// rounds fit into the time that one may go unconfirmed.
const CONFIRM_EVERY: Duration = Duration::from_millis(1_500);
/// How soon it is asked again after it did not answer.
const CONFIRM_AGAIN: Duration = Duration::from_millis(250);
/// Least time from one round to the next, however often the bell rings.
const PAUSE: Duration = Duration::from_millis(100);
/// How often what has expired is ended, whether the database answers or not.
const END_EXPIRED_EVERY: Duration = Duration::from_secs(1);
/// How often the use of one credential is written down.
const NOTE_EVERY: Duration = Duration::from_secs(60);

/// What the operator decides about credentials.
#[derive(Clone, Debug)]
pub struct AuthSettings {
    /// How long a session lives; not extended by use.
    pub session_lifetime: Duration,
    /// bcrypt's cost, 4 to 31: each step doubles the work.
    pub bcrypt_cost: u32,
    /// Most passwords that are hashed at once.
    pub bcrypt_parallel: usize,
    /// Whether strangers may sign up.
    pub sign_up_open: bool,
    /// Most streams of one user that are open on this replica.
    pub streams_per_user: usize,
    /// Whose word is taken for where a call comes from.
    pub trusted_proxies: Vec<IpAddr>,
}

/// Looks credentials up, and keeps those in use confirmed.
#[derive(Clone, Debug)]
pub struct Auth {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    database: Database,
    settings: AuthSettings,
    passwords: Passwords,
    streams: Streams,
    cache: Mutex<Cache>,
    /// Places of those whose secret is looked up.
    look_ups: Semaphore,
    /// When the last round of confirmation began that came to its end.
    confirmed_at: AtomicU64,
    /// Rings for a round of confirmation before its time.
    bell: Arc<Notify>,
}

impl Auth {
    /// Starts the tasks that keep credentials confirmed and end those that expire, on
    /// the runtime that this is called on. They end after the last clone of this has
    /// gone.
    pub fn start(database: Database, settings: AuthSettings) -> Self {
        let bell = Arc::new(Notify::new());
        let inner = Arc::new(Inner {
            passwords: Passwords::new(settings.bcrypt_cost, settings.bcrypt_parallel),
            streams: Streams::new(settings.streams_per_user),
            settings,
            cache: Mutex::default(),
            look_ups: Semaphore::new(UNAUTHENTICATED_CALLS),
            database,
            confirmed_at: AtomicU64::new(Moment::now().0),
            bell: bell.clone(),
        });
        tokio::spawn(keep_confirmed(Arc::downgrade(&inner), bell));
        tokio::spawn(end_expired(Arc::downgrade(&inner)));
        Self { inner }
    }

    /// What it was started with.
    pub fn settings(&self) -> &AuthSettings {
        &self.inner.settings
    }

    /// Where passwords are hashed and verified.
    pub fn passwords(&self) -> &Passwords {
        &self.inner.passwords
    }

    /// The credential that this secret is, if it is good now.
    ///
    /// [`Error::CredentialInvalid`] if not, [`Error::Unavailable`] if it is not
    /// known to be good and the database does not answer.
    pub async fn authenticate(&self, secret: &str) -> Result<Arc<Credential>> {
        let secret = Secret::parse(secret).ok_or(Error::CredentialInvalid)?;
        let hash = secret.hash();
        match self.inner.cache().get(&hash) {
            Some(credential) if !credential.is_good() => return Err(Error::CredentialInvalid),
            Some(credential) if credential.is_confirmed() => return Ok(credential),
            _ => {}
        }
        self.inner.look_up(secret.kind(), hash).await
    }

    /// How many credentials are remembered, and how long ago all of them were
    /// last confirmed.
    pub fn cached(&self) -> (usize, Duration) {
        let confirmed_at = Moment(self.inner.confirmed_at.load(Relaxed));
        (self.inner.cache().len(), confirmed_at.elapsed())
    }

    /// Counts a stream under this credential, for as long as what is given back
    /// lives; `connection` cuts the stream's connection when cancelled.
    /// [`Error::Overloaded`] where the user has as many as may be.
    pub fn open_stream(
        &self,
        credential: Arc<Credential>,
        connection: CancellationToken,
    ) -> Result<OpenStream> {
        self.inner.streams.open(credential, connection)
    }

    /// Ends credentials on this replica at once: new calls with them are
    /// refused, streams are told. To be called after the database was told,
    /// and by work that does not stop when its caller leaves.
    pub fn end(&self, ending: Ending) {
        self.inner.cache().end(ending);
    }

    /// Has a credential end on this replica once as much time has passed: then
    /// as at [`Auth::end`], though nobody says so once more.
    pub fn end_after(&self, id: CredentialId, left: Duration) {
        self.inner.cache().end_at(id, Moment::now().plus(left));
    }

    /// Asks the database now which credentials are still good, rather than at
    /// the next round: for whoever hears that one has ended elsewhere.
    pub fn reconfirm_now(&self) {
        self.inner.bell.notify_one();
    }
}

impl Inner {
    fn cache(&self) -> MutexGuard<'_, Cache> {
        // Nothing that holds it can leave it half changed.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn look_up(&self, kind: SecretKind, hash: SecretHash) -> Result<Arc<Credential>> {
        let _place = self.look_ups.try_acquire().map_err(|_| Error::Overloaded {
            what: "secrets to look up",
            retry_after: Duration::from_secs(1),
        })?;
        loop {
            let mark = self.cache().mark();
            let mut conn = self.database.get_for(Asker::WithSecret).await?;
            let asked_at = Moment::now();
            let found = match kind {
                SecretKind::Session => Session::authenticate(&mut conn, &hash).await?,
                SecretKind::ApiKey => ApiKey::authenticate(&mut conn, &hash).await?,
                SecretKind::WatchToken => WatchToken::authenticate(&mut conn, &hash).await?,
            };
            drop(conn);
            let Some((caller, lifetime)) = found else {
                self.cache().forget(&hash);
                return Err(Error::CredentialInvalid);
            };
            let credential = Credential::new(caller, lifetime, asked_at);
            match self.cache().insert(hash, credential, mark)? {
                Looked::Good(credential) => return Ok(credential),
                Looked::TooEarly => {}
            }
        }
    }

    /// One round: what the database says of all that is remembered. Over a
    /// connection of its own: what strangers ask for must not keep everybody
    /// waiting.
    async fn confirm(&self, kept: &mut Option<AsyncPgConnection>) -> Result<()> {
        let asked_at = Moment::now();
        let known = self.cache().all();
        if !known.is_empty() {
            let mut conn = self.database.kept_or_new(kept).await?;
            let good = Ids::of(&known).still_good(&mut conn).await?;
            let mut used = Vec::new();
            for known in known {
                // Forgotten meanwhile, and nobody's.
                let Some(credential) = known.credential.upgrade() else { continue };
                if good.contains(&known.id) {
                    credential.confirm(asked_at);
                } else {
                    self.cache().drop_ended(&known.hash, &credential);
                }
                if credential.use_to_note(NOTE_EVERY) {
                    used.push(known);
                }
            }
            Ids::of(&used).note_use(&mut conn).await?;
            let noted = used.iter().filter_map(|known| known.credential.upgrade());
            noted.for_each(|credential| credential.noted(asked_at));
            *kept = Some(conn);
        }
        self.confirmed_at.store(asked_at.0, Relaxed);
        Ok(())
    }
}

/// Ids by kind; sorted, so that replicas that write at once lock rows in one
/// order.
#[derive(Default)]
struct Ids {
    sessions: Vec<Uuid>,
    api_keys: Vec<Uuid>,
    watch_tokens: Vec<Uuid>,
}

impl Ids {
    fn of(credentials: &[Known]) -> Self {
        let mut ids = Self::default();
        for known in credentials {
            match known.id {
                CredentialId::Session(id) => ids.sessions.push(id),
                CredentialId::ApiKey(id) => ids.api_keys.push(id),
                CredentialId::WatchToken(id) => ids.watch_tokens.push(id),
            }
        }
        for ids in [&mut ids.sessions, &mut ids.api_keys, &mut ids.watch_tokens] {
            ids.sort_unstable();
        }
        ids
    }

    async fn still_good(&self, conn: &mut AsyncPgConnection) -> Result<HashSet<CredentialId>> {
        let mut good = HashSet::new();
        if !self.sessions.is_empty() {
            let still = Session::still_valid(conn, &self.sessions).await?;
            good.extend(still.into_iter().map(CredentialId::Session));
        }
        if !self.api_keys.is_empty() {
            let still = ApiKey::still_valid(conn, &self.api_keys).await?;
            good.extend(still.into_iter().map(CredentialId::ApiKey));
        }
        if !self.watch_tokens.is_empty() {
            let still = WatchToken::still_valid(conn, &self.watch_tokens).await?;
            good.extend(still.into_iter().map(CredentialId::WatchToken));
        }
        Ok(good)
    }

    async fn note_use(&self, conn: &mut AsyncPgConnection) -> Result<()> {
        if !self.sessions.is_empty() {
            Session::note_use(conn, &self.sessions).await?;
        }
        if !self.api_keys.is_empty() {
            ApiKey::note_use(conn, &self.api_keys).await?;
        }
        if !self.watch_tokens.is_empty() {
            WatchToken::note_use(conn, &self.watch_tokens).await?;
        }
        Ok(())
    }
}

async fn keep_confirmed(inner: Weak<Inner>, bell: Arc<Notify>) {
    let mut wait = CONFIRM_EVERY;
    let mut failing = false;
    let mut connection = None;
    loop {
        sleep(PAUSE).await;
        tokio::select! {
            () = sleep(wait) => {}
            () = bell.notified() => {}
        }
        let Some(inner) = inner.upgrade() else { return };
        // A connection whose peer is gone answers nothing, for minutes.
        let round = timeout(CREDENTIAL_CONFIRMED_WITHIN, inner.confirm(&mut connection)).await;
        match round.unwrap_or_else(|elapsed| Err(Error::unavailable(elapsed))) {
            Ok(()) => (wait, failing) = (CONFIRM_EVERY, false),
            Err(error) => {
                wait = CONFIRM_AGAIN;
                // Once an outage.
                if !failing {
                    tracing::warn!(cause = ?error, "credentials cannot be confirmed");
                }
                failing = true;
            }
        }
    }
}

async fn end_expired(inner: Weak<Inner>) {
    while let Some(inner) = inner.upgrade() {
        inner.cache().drop_idle(NOTE_EVERY);
        drop(inner);
        sleep(END_EXPIRED_EVERY).await;
    }
}
