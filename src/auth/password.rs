//! bcrypt, off the runtime's threads and never more of it at once than the
//! operator allows.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};

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
    wait: Duration,
}

impl Passwords {
    /// With bcrypt's `cost`, 4 to 31, and at most `parallel` at work.
    pub fn new(cost: u32, parallel: usize) -> Self {
        let turns = Arc::new(Semaphore::new(parallel.clamp(1, Semaphore::MAX_PERMITS)));
        Self { cost, turns, wait: PASSWORD_WAIT }
    }

    /// A hash to store. [`Error::Overloaded`] where no turn comes within
    /// [`PASSWORD_WAIT`].
    pub async fn hash(&self, password: Password) -> Result<PasswordHash> {
        let cost = self.cost;
        self.work(move || bcrypt::non_truncating_hash(password.as_bytes(), cost)).await.map(PasswordHash::new)
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
        let turn = timeout(self.wait, self.turns.clone().acquire_owned())
            .await
            .map_err(|_| Error::Overloaded { what: "password checks", retry_after: Duration::from_secs(1) })?
            .map_err(Error::internal)?;
        // The turn goes along: the work does not end when its caller leaves.
        spawn_blocking(move || {
            let _turn = turn;
            work()
        })
        .await
        .map_err(Error::internal)?
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
}
