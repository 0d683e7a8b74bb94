//! The credentials that this process remembers: good ones only.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Weak},
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
    /// One session, API key or watch token.
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
            (
                Self::OtherSessions { .. },
                Subject::User { .. },
                CredentialId::ApiKey(_) | CredentialId::WatchToken(_),
            )
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

/// A credential that is remembered, in the hands of somebody who does not keep
/// it from making room.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) hash: SecretHash,
    pub(super) id: CredentialId,
    pub(super) credential: Weak<Credential>,
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
        self.note(ending);
        self.entries.retain(|_, credential| {
            let ended = ending.concerns(credential.caller());
            if ended {
                credential.end();
            }
            !ended
        });
    }

    /// Has a credential end then, unless it ends before. Look-ups in flight may
    /// not have heard of that.
    pub(super) fn end_at(&mut self, id: CredentialId, at: Moment) {
        let ending = Ending::Credential(id);
        self.note(ending);
        let concerned = self.entries.values().filter(|credential| ending.concerns(credential.caller()));
        concerned.for_each(|credential| credential.end_at(at));
    }

    fn note(&mut self, ending: Ending) {
        if self.endings.len() == ENDINGS {
            self.endings.pop_front();
        }
        self.endings.push_back(ending);
        self.endings_ever += 1;
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

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// All of them. Those that somebody holds, as open streams do, are used.
    pub(super) fn all(&self) -> Vec<Known> {
        let held = self.entries.values().filter(|credential| Arc::strong_count(credential) > 1);
        held.for_each(|credential| credential.touch());
        let known = |(hash, credential): (&SecretHash, &Arc<Credential>)| Known {
            hash: *hash,
            id: credential.caller().credential(),
            credential: Arc::downgrade(credential),
        };
        self.entries.iter().map(known).collect()
    }

    /// Forgets what was not used for a while, and ends what has expired.
    pub(super) fn drop_idle(&mut self, idle: Duration) {
        self.entries.retain(|_, credential| {
            let good = credential.is_good();
            if !good {
                credential.end();
            }
            good && !credential.is_idle(idle)
        });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        models::session::tests::caller,
        secret::{Secret, SecretKind},
    };

    fn hash() -> SecretHash {
        Secret::generate(SecretKind::Session).expect("randomness").hash()
    }

    fn credential(user_id: Uuid, id: CredentialId) -> Credential {
        Credential::new(caller(user_id, id), None, Moment::now())
    }

    /// A look-up that began at `mark`.
    fn look_up(
        cache: &mut Cache,
        hash: SecretHash,
        credential: Credential,
        mark: u64,
    ) -> Option<Arc<Credential>> {
        match cache.insert(hash, credential, mark).expect("room") {
            Looked::Good(credential) => Some(credential),
            Looked::TooEarly => None,
        }
    }

    #[test]
    fn what_ended_during_its_look_up_is_not_remembered() {
        let (mut cache, hash, user) = (Cache::default(), hash(), Uuid::now_v7());
        let (session, other) = (CredentialId::Session(Uuid::now_v7()), CredentialId::Session(Uuid::now_v7()));
        let mark = cache.mark();
        cache.end(Ending::Credential(other));
        assert!(look_up(&mut cache, hash, credential(user, session), mark).is_some(), "another one ended");
        cache.forget(&hash);
        for ending in
            [Ending::Credential(session), Ending::OtherSessions { user_id: user, kept: Uuid::now_v7() }]
        {
            let mark = cache.mark();
            cache.end(ending);
            assert!(look_up(&mut cache, hash, credential(user, session), mark).is_none(), "{ending:?}");
            let mark = cache.mark();
            assert!(look_up(&mut cache, hash, credential(user, session), mark).is_some(), "asked again");
            cache.forget(&hash);
        }
        let mark = cache.mark();
        for _ in 0..=ENDINGS {
            cache.end(Ending::Credential(other));
        }
        assert!(look_up(&mut cache, hash, credential(user, session), mark).is_none(), "who knows");
    }

    #[test]
    fn what_is_to_end_sooner_ends_then_though_it_is_only_being_looked_up() {
        let (mut cache, hash, user) = (Cache::default(), hash(), Uuid::now_v7());
        let [key, other] = [(); 2].map(|()| CredentialId::ApiKey(Uuid::now_v7()));
        let mark = cache.mark();
        let cached = look_up(&mut cache, hash, credential(user, key), mark).expect("no endings");
        let others = look_up(&mut cache, super::tests::hash(), credential(user, other), mark);
        cache.end_at(key, Moment::now());
        assert!(!cached.is_good() && others.is_some_and(|other| other.is_good()));
        assert!(look_up(&mut cache, hash, credential(user, key), mark).is_none(), "asked too early");
    }

    #[test]
    fn a_new_password_ends_the_users_other_sessions_only() {
        let (mut cache, user, kept) = (Cache::default(), Uuid::now_v7(), Uuid::now_v7());
        let ids = [
            (user, CredentialId::Session(kept)),
            (user, CredentialId::Session(Uuid::now_v7())),
            (user, CredentialId::ApiKey(Uuid::now_v7())),
            (Uuid::now_v7(), CredentialId::Session(Uuid::now_v7())),
        ];
        let credentials =
            ids.map(|(user, id)| look_up(&mut cache, hash(), credential(user, id), 0).expect("no endings"));
        cache.end(Ending::OtherSessions { user_id: user, kept });
        assert_eq!(credentials.map(|credential| credential.is_good()), [true, false, true, true]);
        assert_eq!(cache.entries.len(), 3);
    }

    #[test]
    fn a_second_look_up_gives_what_the_first_remembered() {
        let (mut cache, hash, user) = (Cache::default(), hash(), Uuid::now_v7());
        let id = CredentialId::ApiKey(Uuid::now_v7());
        let first = look_up(&mut cache, hash, credential(user, id), 0).expect("a credential");
        let second = look_up(&mut cache, hash, credential(user, id), 0).expect("a credential");
        assert!(Arc::ptr_eq(&first, &second));
        first.end();
        let third = look_up(&mut cache, hash, credential(user, id), 0).expect("a credential");
        assert!(third.is_good() && !Arc::ptr_eq(&first, &third));
        cache.drop_ended(&hash, &first);
        assert!(cache.get(&hash).is_some_and(|known| known.is_good()), "another's place");
    }

    #[test]
    fn only_what_nobody_holds_makes_room() {
        let mut cache = Cache::default();
        let fill = |cache: &mut Cache| {
            let id = CredentialId::ApiKey(Uuid::now_v7());
            cache.insert(hash(), credential(Uuid::nil(), id), 0)
        };
        let held: Vec<_> = (0..4).map(|_| fill(&mut cache).expect("room")).collect();
        for _ in 4..CREDENTIALS {
            fill(&mut cache).expect("room");
        }
        // As a round of confirmation has them.
        let all = cache.all();
        let last = fill(&mut cache).expect("room");
        assert!(cache.entries.len() < CREDENTIALS);
        assert!(all.iter().any(|known| known.credential.upgrade().is_none()));
        for looked in held.iter().chain([&last]) {
            let Looked::Good(credential) = looked else { panic!("too early") };
            assert!(cache.entries.values().any(|known| Arc::ptr_eq(known, credential)));
        }
        let all: Vec<_> = cache.entries.values().cloned().collect();
        while cache.entries.len() < CREDENTIALS {
            cache.entries.insert(hash(), all[0].clone());
        }
        assert!(matches!(fill(&mut cache), Err(Error::Overloaded { .. })), "all are held");
    }

    #[test]
    fn what_is_idle_or_expired_is_forgotten() {
        let mut cache = Cache::default();
        let id = CredentialId::ApiKey(Uuid::now_v7());
        let expired = Credential::new(caller(Uuid::nil(), id), Some(Duration::ZERO), Moment::now());
        let expired = look_up(&mut cache, hash(), expired, 0).expect("a credential");
        assert!(!expired.is_good());
        look_up(&mut cache, hash(), credential(Uuid::nil(), id), 0);
        cache.drop_idle(Duration::from_secs(60));
        assert_eq!(cache.entries.len(), 1);
        cache.drop_idle(Duration::ZERO);
        assert_eq!(cache.entries.len(), 0);
    }
}
