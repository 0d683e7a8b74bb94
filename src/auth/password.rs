//! bcrypt, off the runtime's threads and never more of it at once than the
//! operator allows.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::timeout,
};

use crate::{
    error::{Error, Result},
    limits::PASSWORD_WAIT,
    secret::{Password, PasswordHash},
};

/// Salt of the work that is done where there is no password to compare with.
const NO_SALT: [u8; 16] = [0; 16];

/// Makes and verifies password hashes.
#[derive(Clone, Debug)]
pub struct Passwords {
    cost: u32,
    turns: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    wait: Duration,
}

impl Passwords {
    /// With bcrypt's `cost`, 4 to 31, and at most `parallel` at work; for
    /// strangers at most half as many, and at least one.
    pub fn new(cost: u32, parallel: usize) -> Self {
        let turns = |count: usize| Arc::new(Semaphore::new(count.clamp(1, Semaphore::MAX_PERMITS)));
        Self { cost, turns: turns(parallel), strangers: turns(parallel / 2), wait: PASSWORD_WAIT }
    }

    /// A stranger's place, to be held until the work is done: for those who sign
    /// up and those whose log-in is in doubt, of whom there may be any number. Only
    /// who has one waits for a turn, so that log-ins have the other half of the
    /// turns, or every second where there is only one. Overloaded as
    /// [`Self::hash`].
    pub async fn stranger(&self) -> Result<OwnedSemaphorePermit> {
        self.wait_for(&self.strangers).await
    }

    /// A hash to store. [`Error::Overloaded`] where no turn comes within
    /// [`PASSWORD_WAIT`].
    pub async fn hash(&self, password: Password) -> Result<PasswordHash> {
        self.hash_holding((), password).await
    }

    /// The same for a stranger, who has left their place only when it is done,
    /// even if the caller leaves before.
    pub async fn hash_for(&self, stranger: OwnedSemaphorePermit, password: Password) -> Result<PasswordHash> {
        self.hash_holding(stranger, password).await
    }

    async fn hash_holding(&self, held: impl Send + 'static, password: Password) -> Result<PasswordHash> {
        let cost = self.cost;
        let hash = move || {
            let _held = held;
            bcrypt::non_truncating_hash(password.as_bytes(), cost)
        };
        self.work(hash).await.map(PasswordHash::new)
    }

    /// Whether the password is that of the hash. Without the one or the other
    /// it is not, after the same work: how long a refusal takes tells nobody
    /// whether there is such a user. Overloaded as above.
    pub async fn verify(&self, password: Option<Password>, hash: Option<PasswordHash>) -> Result<bool> {
        let cost = self.cost;
        self.work(move || match (password, hash) {
            (Some(password), Some(hash)) => {
                let good = bcrypt::non_truncating_verify(password.as_bytes(), hash.as_str())?;
                level(hash.as_str().parse::<bcrypt::HashParts>()?.get_cost(), cost)?;
                Ok(good)
            }
            _ => {
                bcrypt::non_truncating_hash_with_salt("", cost, NO_SALT)?;
                Ok(false)
            }
        })
        .await
    }

    /// Whether the hash was made at another cost than today's.
    pub fn is_outdated(&self, hash: &PasswordHash) -> bool {
        hash.as_str().parse::<bcrypt::HashParts>().is_ok_and(|parts| parts.get_cost() != self.cost)
    }

    async fn work<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> bcrypt::BcryptResult<T> + Send + 'static,
    {
        let turn = self.wait_for(&self.turns).await?;
        // The turn goes along: the work does not end when its caller leaves.
        spawn_blocking(move || {
            let _turn = turn;
            work()
        })
        .await
        .map_err(Error::internal)?
        .map_err(Error::internal)
    }

    async fn wait_for(&self, turns: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit> {
        timeout(self.wait, Arc::clone(turns).acquire_owned())
            .await
            .map_err(|_| Error::Overloaded { what: "password checks", retry_after: Duration::from_secs(1) })?
            .map_err(Error::internal)
    }
}

/// Makes up for the work of a hash that was made at a lower cost than today's:
/// 2^made + 2^made + 2^(made+1) + ... + 2^(cost-1) is 2^cost.
fn level(made: u32, cost: u32) -> bcrypt::BcryptResult<()> {
    for cost in made..cost {
        bcrypt::non_truncating_hash_with_salt("", cost, NO_SALT)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(text: &str) -> Password {
        Password::new(text.to_owned()).expect("a password")
    }

    #[tokio::test]
    async fn a_password_is_verified_whole() {
        let passwords = Passwords::new(4, 2);
        let longest = "x".repeat(71);
        let hash = passwords.hash(password(&longest)).await.expect("a hash");
        assert!(hash.as_str().starts_with("$2b$04$"));
        let verify = async |text: &str| {
            passwords.verify(Some(password(text)), Some(hash.clone())).await.expect("an answer")
        };
        assert!(verify(&longest).await);
        assert!(!verify(&longest[1..]).await);
        assert!(!verify(&format!("{}y", &longest[1..])).await);
    }

    #[tokio::test]
    async fn without_password_or_hash_it_is_wrong() {
        let passwords = Passwords::new(5, 2);
        let older = Passwords::new(4, 2).hash(password("12345678")).await.expect("a hash");
        let given = Some(password("12345678"));
        assert!(passwords.verify(given.clone(), Some(older.clone())).await.expect("an answer"));
        assert!(!passwords.verify(given, None).await.expect("an answer"));
        assert!(!passwords.verify(None, Some(older)).await.expect("an answer"));
        assert!(!passwords.verify(None, None).await.expect("an answer"));
    }

    #[tokio::test]
    async fn the_wait_for_a_turn_is_bounded() {
        let passwords = Passwords { wait: Duration::from_millis(1), ..Passwords::new(4, 1) };
        let _turn = passwords.turns.clone().acquire_owned().await.expect("a turn");
        let refused = passwords.hash(password("12345678")).await;
        assert!(matches!(refused, Err(Error::Overloaded { .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn strangers_have_at_most_half_of_the_turns() {
        for (parallel, strangers) in [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4)] {
            assert_eq!(Passwords::new(4, parallel).strangers.available_permits(), strangers, "{parallel}");
        }
        let passwords = Passwords { wait: Duration::from_millis(1), ..Passwords::new(4, 2) };
        let _stranger = passwords.stranger().await.expect("a place");
        let refused = passwords.stranger().await;
        assert!(matches!(refused, Err(Error::Overloaded { .. })), "{refused:?}");
        passwords.hash(password("12345678")).await.expect("a turn of the others");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stranger_who_leaves_makes_room_when_the_work_is_done() {
        let passwords = Passwords::new(12, 2);
        let stranger = passwords.stranger().await.expect("a place");
        let leaving = passwords.clone();
        let hash = tokio::spawn(async move { leaving.hash_for(stranger, password("12345678")).await });
        while passwords.turns.available_permits() == 2 {
            tokio::task::yield_now().await;
        }
        hash.abort();
        assert!(hash.await.is_err_and(|error| error.is_cancelled()));
        assert_eq!((passwords.turns.available_permits(), passwords.strangers.available_permits()), (1, 0));
        drop(passwords.stranger().await.expect("a place, in the end"));
    }
}
