//! Keeps cached credentials confirmed: one task asks the database every second or two
//! which of them are still valid. A credential that was not confirmed within
//! [`CREDENTIAL_CONFIRMED_WITHIN`] is refused by `super::credential`.

use std::{
    sync::{Arc, Weak, atomic::Ordering::Relaxed},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use super::{Inner, cache::Cached, credential::Moment};
use crate::{
    db::OwnConnection,
    error::{Error, Result},
    limits::CREDENTIAL_CONFIRMED_WITHIN,
    models::credential,
};

/// Pause between two rounds. Several rounds fit into [`CREDENTIAL_CONFIRMED_WITHIN`].
const ROUND: Duration = Duration::from_millis(1_500);
/// Pause after a round that failed.
const RETRY: Duration = Duration::from_millis(250);
/// Least pause before a round, however often another replica notifies.
const LEAST_PAUSE: Duration = Duration::from_millis(100);
/// How often expired credentials are ended, whether the database is available or not.
const EXPIRY: Duration = Duration::from_secs(1);
/// How often the use of one credential is recorded.
const RECORD_USE: Duration = Duration::from_secs(60);

pub(super) async fn keep_confirmed(auth: Weak<Inner>, notified: Arc<Notify>) {
    let mut pause = ROUND;
    let mut failing = false;
    let mut kept = None;
    loop {
        sleep(LEAST_PAUSE).await;
        tokio::select! {
            () = sleep(pause) => {}
            () = notified.notified() => {}
        }
        let Some(auth) = auth.upgrade() else { return };
        // A connection whose peer is gone may give no answer for minutes.
        let round = timeout(CREDENTIAL_CONFIRMED_WITHIN, auth.confirm(&mut kept)).await;
        match round.unwrap_or_else(|elapsed| Err(Error::unavailable(elapsed))) {
            Ok(()) => (pause, failing) = (ROUND, false),
            Err(error) => {
                pause = RETRY;
                // Logged once an outage, not at every attempt.
                if !failing {
                    tracing::warn!(cause = ?error, "credentials cannot be confirmed");
                }
                failing = true;
            }
        }
    }
}

/// Ends credentials that expire, and forgets those that are not used.
pub(super) async fn end_expired(auth: Weak<Inner>) {
    while let Some(auth) = auth.upgrade() {
        auth.cache.lock().drop_idle(RECORD_USE);
        drop(auth);
        sleep(EXPIRY).await;
    }
}

impl Inner {
    /// One round, over a connection of its own: unauthenticated callers that use up their
    /// share of the pool must not keep all others waiting.
    async fn confirm(&self, kept: &mut Option<OwnConnection>) -> Result<()> {
        let asked_at = Moment::now();
        let cached = self.cache.lock().all();
        if !cached.is_empty() {
            let mut connection = self.database.kept_or_new(kept).await?;
            let ids = |cached: &[Cached]| cached.iter().map(|cached| cached.id).collect::<Vec<_>>();
            let validity = credential::validity(&mut connection, &ids(&cached)).await?;
            let mut used = Vec::new();
            for cached in cached {
                // Forgotten meanwhile, and held by no stream.
                let Some(credential) = cached.credential.upgrade() else { continue };
                match validity.get(&cached.id) {
                    Some(true) => credential.confirm(asked_at),
                    known => {
                        let mut cache = self.cache.lock();
                        cache.remove_ended(&cached.hash, &credential);
                        if known.is_some() {
                            cache.refuse(cached.hash);
                        }
                    }
                }
                if credential.use_to_record(RECORD_USE) {
                    used.push(cached);
                }
            }
            if !used.is_empty() {
                let ids = ids(&used);
                connection.write(|tx| async move { credential::record_use(tx, &ids).await }.boxed()).await?;
                let recorded = used.iter().filter_map(|cached| cached.credential.upgrade());
                recorded.for_each(|credential| credential.use_recorded(asked_at));
            }
            *kept = Some(connection);
        }
        self.confirmed_at.store(asked_at.0, Relaxed);
        Ok(())
    }
}
