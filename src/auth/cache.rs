//! The credentials that this process remembers: good ones only.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use uuid::Uuid;

use super::credential::{Credential, Moment};
use crate::{
    error::{Error, Result},
    limits::CREDENTIALS,
    models::caller::{Caller, CredentialId, Subject},
    secret::SecretHash,
};

/// How many endings are remembered for the look-ups in flight.
const ENDINGS: usize = 1_024;

/// What has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// One session or API key.
    Credential(CredentialId),
    /// All sessions of a user, but for one that is kept.
    OtherSessions {
        /// Whose.
        user_id: Uuid,
        /// The one that goes on.
        kept: Uuid,
    },
}

impl Ending {
    fn concerns(self, caller: &Caller) -> bool {
        match (self, caller.subject(), caller.credential()) {
            (Self::Credential(ended), _, id) => ended == id,
            (
                Self::OtherSessions { user_id, kept },
                Subject::User { id, .. },
                CredentialId::Session(session),
            ) => id == user_id && session != kept,
            (Self::OtherSessions { .. }, Subject::User { .. }, CredentialId::ApiKey(_))
            | (Self::OtherSessions { .. }, Subject::Job(_), _) => false,
        }
    }
}

/// How a look-up went.
#[derive(Debug)]
pub(super) enum Looked {
    /// The credential may be used.
    Good(Arc<Credential>),
    /// The database was asked too early: what it said is good may have ended
    /// since.
    TooEarly,
}

#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<SecretHash, Arc<Credential>>,
    /// The last ones, and how many there ever were.
    endings: VecDeque<Ending>,
    endings_ever: u64,
}

impl Cache {
    /// What is remembered of a secret, good or not; noted as used.
    pub(super) fn get(&self, hash: &SecretHash) -> Option<Arc<Credential>> {
        let credential = self.entries.get(hash)?;
        credential.touch();
        Some(credential.clone())
    }

    /// To be taken before the database is asked about a secret.
    pub(super) fn mark(&self) -> u64 {
        self.endings_ever
    }

    /// Remembers what the database said is good, unless it ended since `mark`.
    /// [`Error::Overloaded`] if there is no room.
    pub(super) fn insert(&mut self, hash: SecretHash, credential: Credential, mark: u64) -> Result<Looked> {
        let since = usize::try_from(self.endings_ever - mark).unwrap_or(usize::MAX);
        let mut unheard = self.endings.iter().rev().take(since);
        if since > self.endings.len() || unheard.any(|ending| ending.concerns(credential.caller())) {
            return Ok(Looked::TooEarly);
        }
        // Whoever was faster is kept, for streams may wait for its end.
        if let Some(known) = self.entries.get(&hash).filter(|known| known.is_good()) {
            known.confirm(credential.confirmed_at());
            known.touch();
            return Ok(Looked::Good(known.clone()));
        }
        if self.entries.len() >= CREDENTIALS {
            self.make_room()?;
        }
        let credential = Arc::new(credential);
        self.entries.insert(hash, credential.clone());
        Ok(Looked::Good(credential))
    }

    /// Ends what this concerns, and what look-ups in flight may yet find.
    pub(super) fn end(&mut self, ending: Ending) {
        if self.endings.len() == ENDINGS {
            self.endings.pop_front();
        }
        self.endings.push_back(ending);
        self.endings_ever += 1;
        self.entries.retain(|_, credential| {
            let ended = ending.concerns(credential.caller());
            if ended {
                credential.end();
            }
            !ended
        });
    }

    /// Ends what the database says is not good.
    pub(super) fn forget(&mut self, hash: &SecretHash) {
        if let Some(credential) = self.entries.remove(hash) {
            credential.end();
        }
    }

    /// The same of this very credential; another may have taken its place.
    pub(super) fn drop_ended(&mut self, hash: &SecretHash, credential: &Arc<Credential>) {
        credential.end();
        if self.entries.get(hash).is_some_and(|known| Arc::ptr_eq(known, credential)) {
            self.entries.remove(hash);
        }
    }

    /// All of them. Those that somebody holds, as open streams do, are used.
    pub(super) fn all(&self) -> Vec<(SecretHash, Arc<Credential>)> {
        let held = self.entries.values().filter(|credential| Arc::strong_count(credential) > 1);
        held.for_each(|credential| credential.touch());
        self.entries.iter().map(|(hash, credential)| (*hash, credential.clone())).collect()
    }

    /// Forgets what was not used for a while, and what has expired.
    pub(super) fn drop_idle(&mut self, idle: Duration) {
        self.entries.retain(|_, credential| credential.is_good() && !credential.is_idle(idle));
    }

    /// Forgets the half that was used longest ago of those that nobody holds:
    /// half, so that the work is worth it.
    fn make_room(&mut self) -> Result<()> {
        let free = |credential: &Arc<Credential>| Arc::strong_count(credential) == 1;
        let mut used: Vec<Moment> =
            self.entries.values().filter(|credential| free(credential)).map(|c| c.used_at()).collect();
        used.sort_unstable();
        let Some(&median) = used.get(used.len() / 2) else {
            return Err(Error::Overloaded {
                what: "credentials in use",
                retry_after: Duration::from_secs(1),
            });
        };
        self.entries.retain(|_, credential| !free(credential) || credential.used_at() > median);
        Ok(())
    }
}
