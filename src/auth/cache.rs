//! The cache of credentials, which contains valid ones only.

use std::{
    collections::{HashMap, HashSet, VecDeque},
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

/// How many revocations are kept for the look-ups in flight.
const REVOCATIONS: usize = 1_024;

/// The credentials that a revocation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revocation {
    /// One session, API key or watch token.
    Credential(CredentialId),
    /// All sessions of a user but one.
    OtherSessions {
        user_id: Uuid,
        /// The session that stays valid.
        kept: Uuid,
    },
}

impl Revocation {
    fn concerns(self, caller: &Caller) -> bool {
        match self {
            Self::Credential(ended) => ended == caller.credential(),
            Self::OtherSessions { user_id, kept } => {
                matches!(caller.subject(), Subject::User { id, .. } if id == user_id)
                    && matches!(caller.credential(), CredentialId::Session(id) if id != kept)
            }
        }
    }
}

/// The result of inserting a looked-up credential.
#[derive(Debug)]
pub(super) enum Inserted {
    Valid(Arc<Credential>),
    /// The credential may have been revoked after the database was asked.
    Outdated,
}

/// A cached credential, without a reference that would keep it in the cache.
#[derive(Debug)]
pub(super) struct Cached {
    pub(super) hash: SecretHash,
    pub(super) id: CredentialId,
    pub(super) credential: Weak<Credential>,
}

#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<SecretHash, Arc<Credential>>,
    /// The last revocations, and how many there have been in all.
    revocations: VecDeque<Revocation>,
    revocations_ever: u64,
    refused: Refused,
}

/// Secrets whose credentials have expired or were revoked, and stay refused by this process
/// even if the database's clock is set back or a failover loses the revocation. At most as
/// many as credentials are cached; one more drops the oldest.
#[derive(Debug, Default)]
struct Refused {
    hashes: HashSet<SecretHash>,
    oldest_first: VecDeque<SecretHash>,
}

impl Refused {
    fn insert(&mut self, hash: SecretHash) {
        if !self.hashes.insert(hash) {
            return;
        }
        self.oldest_first.push_back(hash);
        if self.oldest_first.len() > CREDENTIALS
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.hashes.remove(&oldest);
        }
    }
}

impl Cache {
    /// The cached credential of a secret; the use is noted. [`Error::CredentialInvalid`] if
    /// the credential has ended.
    pub(super) fn get(&mut self, hash: &SecretHash) -> Result<Option<Arc<Credential>>> {
        let cached = self.entries.get(hash).cloned();
        if cached.as_ref().is_some_and(|credential| !credential.is_valid()) {
            self.refuse(*hash);
        }
        if self.refused.hashes.contains(hash) {
            return Err(Error::CredentialInvalid);
        }
        Ok(cached.inspect(|credential| credential.touch()))
    }

    /// To be taken before the database is asked about a secret.
    pub(super) fn mark(&self) -> u64 {
        self.revocations_ever
    }

    /// Caches a looked-up credential, unless it was revoked since `mark`.
    /// [`Error::CredentialInvalid`] if it has ended, [`Error::Overloaded`] if there is no
    /// room.
    pub(super) fn insert(&mut self, hash: SecretHash, credential: Credential, mark: u64) -> Result<Inserted> {
        let since = usize::try_from(self.revocations_ever - mark).unwrap_or(usize::MAX);
        let mut later = self.revocations.iter().rev().take(since);
        if since > self.revocations.len() || later.any(|revocation| revocation.concerns(credential.caller()))
        {
            return Ok(Inserted::Outdated);
        }
        if !credential.is_valid() {
            self.refuse(hash);
        }
        // A concurrent look-up that was faster keeps its entry, since streams may wait for
        // the end of that one.
        if let Some(cached) = self.get(&hash)? {
            cached.confirm(credential.confirmed_at());
            return Ok(Inserted::Valid(cached));
        }
        if self.entries.len() >= CREDENTIALS {
            self.make_room()?;
        }
        let credential = Arc::new(credential);
        self.entries.insert(hash, credential.clone());
        Ok(Inserted::Valid(credential))
    }

    /// Ends the concerned credentials, also those that look-ups in flight may find.
    pub(super) fn revoke(&mut self, revocation: Revocation) {
        self.note(revocation);
        self.entries.retain(|hash, credential| {
            let ended = revocation.concerns(credential.caller());
            if ended {
                credential.end();
                self.refused.insert(*hash);
            }
            !ended
        });
    }

    /// Has a credential end at this time, unless it ends before. A look-up in flight may
    /// have read the time before it was set.
    pub(super) fn end_at(&mut self, id: CredentialId, at: Moment) {
        let revocation = Revocation::Credential(id);
        self.note(revocation);
        let concerned = self.entries.values().filter(|credential| revocation.concerns(credential.caller()));
        concerned.for_each(|credential| credential.end_at(at));
    }

    fn note(&mut self, revocation: Revocation) {
        if self.revocations.len() == REVOCATIONS {
            self.revocations.pop_front();
        }
        self.revocations.push_back(revocation);
        self.revocations_ever += 1;
    }

    /// Ends the credential of a secret that is unknown or whose user is disabled.
    pub(super) fn remove(&mut self, hash: &SecretHash) {
        if let Some(credential) = self.entries.remove(hash) {
            credential.end();
        }
    }

    /// Ends this credential, and removes it unless another entry has taken its place.
    pub(super) fn remove_ended(&mut self, hash: &SecretHash, credential: &Arc<Credential>) {
        credential.end();
        if self.entries.get(hash).is_some_and(|cached| Arc::ptr_eq(cached, credential)) {
            self.entries.remove(hash);
        }
    }

    /// Ends the credential of a secret, and keeps refusing the secret.
    pub(super) fn refuse(&mut self, hash: SecretHash) {
        self.remove(&hash);
        self.refused.insert(hash);
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// All entries. Those that are referenced elsewhere, as by open streams, are in use.
    pub(super) fn all(&self) -> Vec<Cached> {
        let held = self.entries.values().filter(|credential| Arc::strong_count(credential) > 1);
        held.for_each(|credential| credential.touch());
        let cached = |(hash, credential): (&SecretHash, &Arc<Credential>)| Cached {
            hash: *hash,
            id: credential.caller().credential(),
            credential: Arc::downgrade(credential),
        };
        self.entries.iter().map(cached).collect()
    }

    /// Removes credentials that were not used for this long, and ends expired ones.
    pub(super) fn drop_idle(&mut self, idle: Duration) {
        self.entries.retain(|hash, credential| {
            let valid = credential.is_valid();
            if !valid {
                credential.end();
                self.refused.insert(*hash);
            }
            valid && !credential.is_idle(idle)
        });
    }

    /// Removes, of the entries without another reference, the half that was used longest
    /// ago: half of them, so that the work is rare.
    fn make_room(&mut self) -> Result<()> {
        let free = |credential: &Arc<Credential>| Arc::strong_count(credential) == 1;
        let mut used: Vec<Moment> =
            self.entries.values().filter(|credential| free(credential)).map(|c| c.used_at()).collect();
        used.sort_unstable();
        let retry_after = Duration::from_secs(1);
        let no_room = Error::Overloaded { what: "credentials in use", retry_after };
        let median = *used.get(used.len() / 2).ok_or(no_room)?;
        self.entries.retain(|_, credential| !free(credential) || credential.used_at() > median);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        models::caller::tests::caller,
        secret::{Secret, SecretKind},
    };

    fn hash() -> SecretHash {
        Secret::generate(SecretKind::Session).expect("randomness").hash()
    }

    fn credential(user_id: Uuid, id: CredentialId) -> Credential {
        Credential::new(caller(user_id, id), None, Moment::now())
    }

    /// The result of a look-up that began at `mark`.
    fn look_up(
        cache: &mut Cache,
        hash: SecretHash,
        credential: Credential,
        mark: u64,
    ) -> Option<Arc<Credential>> {
        match cache.insert(hash, credential, mark).expect("room") {
            Inserted::Valid(credential) => Some(credential),
            Inserted::Outdated => None,
        }
    }

    #[test]
    fn a_credential_that_was_revoked_during_its_look_up_is_not_cached() {
        let (mut cache, hash, user) = (Cache::default(), hash(), Uuid::now_v7());
        let (session, other) = (CredentialId::Session(Uuid::now_v7()), CredentialId::Session(Uuid::now_v7()));
        let mark = cache.mark();
        cache.revoke(Revocation::Credential(other));
        assert!(
            look_up(&mut cache, hash, credential(user, session), mark).is_some(),
            "another credential was revoked"
        );
        cache.remove(&hash);
        for revocation in [
            Revocation::Credential(session),
            Revocation::OtherSessions { user_id: user, kept: Uuid::now_v7() },
        ] {
            let mark = cache.mark();
            cache.revoke(revocation);
            assert!(look_up(&mut cache, hash, credential(user, session), mark).is_none(), "{revocation:?}");
            let mark = cache.mark();
            assert!(look_up(&mut cache, hash, credential(user, session), mark).is_some(), "asked again");
            cache.remove(&hash);
        }
        let mark = cache.mark();
        for _ in 0..=REVOCATIONS {
            cache.revoke(Revocation::Credential(other));
        }
        assert!(
            look_up(&mut cache, hash, credential(user, session), mark).is_none(),
            "more revocations than are kept"
        );
    }

    #[test]
    fn a_credential_whose_end_is_moved_during_its_look_up_is_looked_up_again() {
        let (mut cache, hash, user) = (Cache::default(), hash(), Uuid::now_v7());
        let [key, other] = [(); 2].map(|()| CredentialId::ApiKey(Uuid::now_v7()));
        let mark = cache.mark();
        let cached = look_up(&mut cache, hash, credential(user, key), mark).expect("no revocation");
        let others = look_up(&mut cache, super::tests::hash(), credential(user, other), mark);
        cache.end_at(key, Moment::now());
        assert!(!cached.is_valid() && others.is_some_and(|other| other.is_valid()));
        assert!(
            look_up(&mut cache, hash, credential(user, key), mark).is_none(),
            "asked before the revocation"
        );
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
        let credentials = ids
            .map(|(user, id)| look_up(&mut cache, hash(), credential(user, id), 0).expect("no revocation"));
        cache.revoke(Revocation::OtherSessions { user_id: user, kept });
        assert_eq!(credentials.map(|credential| credential.is_valid()), [true, false, true, true]);
        assert_eq!(cache.entries.len(), 3);
    }

    #[test]
    fn concurrent_look_ups_share_one_entry() {
        let (mut cache, hash, user) = (Cache::default(), hash(), Uuid::now_v7());
        let id = CredentialId::ApiKey(Uuid::now_v7());
        let first = look_up(&mut cache, hash, credential(user, id), 0).expect("a credential");
        let second = look_up(&mut cache, hash, credential(user, id), 0).expect("a credential");
        assert!(Arc::ptr_eq(&first, &second));
        first.end();
        cache.remove(&hash);
        let third = look_up(&mut cache, hash, credential(user, id), 0).expect("a credential");
        assert!(third.is_valid() && !Arc::ptr_eq(&first, &third));
        cache.remove_ended(&hash, &first);
        assert!(cache.get(&hash).is_ok_and(|cached| cached.is_some()), "the entry of the other credential");
    }

    #[test]
    fn an_ended_credential_stays_refused_whatever_the_database_says_later() {
        let id = CredentialId::ApiKey(Uuid::now_v7());
        let ends: [fn(&mut Cache, SecretHash, &Credential); 4] = [
            |cache, _, cached| cache.revoke(Revocation::Credential(cached.caller().credential())),
            |cache, hash, _| cache.refuse(hash),
            |_, _, cached| cached.end_at(Moment::now()),
            |cache, hash, cached| {
                cache.remove(&hash);
                let expired = Credential::new(cached.caller().clone(), Some(Duration::ZERO), Moment::now());
                assert!(cache.insert(hash, expired, 0).is_err());
            },
        ];
        for end in ends {
            let (mut cache, hash) = (Cache::default(), hash());
            let cached = look_up(&mut cache, hash, credential(Uuid::nil(), id), 0).expect("a credential");
            end(&mut cache, hash, &cached);
            let mark = cache.mark();
            let again = cache.insert(hash, credential(Uuid::nil(), id), mark);
            assert!(matches!(again, Err(Error::CredentialInvalid)), "{again:?}");
            assert!(matches!(cache.get(&hash), Err(Error::CredentialInvalid)));
        }
    }

    #[test]
    fn refused_secrets_are_bounded_and_the_oldest_is_dropped_first() {
        let mut refused = Refused::default();
        let [oldest, next] = [hash(), hash()];
        refused.insert(oldest);
        refused.insert(next);
        refused.insert(oldest);
        (2..=CREDENTIALS).for_each(|_| refused.insert(hash()));
        assert_eq!((refused.hashes.len(), refused.oldest_first.len()), (CREDENTIALS, CREDENTIALS));
        assert!(!refused.hashes.contains(&oldest) && refused.hashes.contains(&next));
    }

    #[test]
    fn only_credentials_without_a_reference_make_room() {
        let mut cache = Cache::default();
        let fill = |cache: &mut Cache| {
            let id = CredentialId::ApiKey(Uuid::now_v7());
            cache.insert(hash(), credential(Uuid::nil(), id), 0)
        };
        let held: Vec<_> = (0..4).map(|_| fill(&mut cache).expect("room")).collect();
        for _ in 4..CREDENTIALS {
            fill(&mut cache).expect("room");
        }
        // The references that a round of confirmation takes.
        let all = cache.all();
        let last = fill(&mut cache).expect("room");
        assert!(cache.entries.len() < CREDENTIALS);
        assert!(all.iter().any(|cached| cached.credential.upgrade().is_none()));
        for inserted in held.iter().chain([&last]) {
            let Inserted::Valid(credential) = inserted else { panic!("outdated") };
            assert!(cache.entries.values().any(|cached| Arc::ptr_eq(cached, credential)));
        }
        let all: Vec<_> = cache.entries.values().cloned().collect();
        while cache.entries.len() < CREDENTIALS {
            cache.entries.insert(hash(), all[0].clone());
        }
        assert!(matches!(fill(&mut cache), Err(Error::Overloaded { .. })), "all are referenced");
    }

    #[test]
    fn idle_and_expired_credentials_are_removed() {
        let mut cache = Cache::default();
        let id = CredentialId::ApiKey(Uuid::now_v7());
        let (secret, lifetime) = (hash(), Duration::from_secs(60));
        let expired = Credential::new(caller(Uuid::nil(), id), Some(lifetime), Moment::now());
        look_up(&mut cache, secret, expired, 0).expect("a credential").end_at(Moment::now());
        look_up(&mut cache, hash(), credential(Uuid::nil(), id), 0);
        cache.drop_idle(Duration::from_secs(60));
        assert_eq!(cache.entries.len(), 1);
        assert!(cache.get(&secret).is_err(), "the expired one");
        cache.drop_idle(Duration::ZERO);
        assert_eq!(cache.entries.len(), 0);
    }
}
