//! bcrypt, off the threads of the runtime, and never more hashes at once than the
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

/// Salt of the hash that is made where there is no password or no hash to compare.
const NO_SALT: [u8; 16] = [0; 16];

/// Makes and verifies password hashes.
#[derive(Clone, Debug)]
pub struct Passwords {
    cost: u32,
    permits: Arc<Semaphore>,
    wait: Duration,
}

impl Passwords {
    /// With bcrypt's `cost`, 4 to 31, and at most `parallel` hashes at once.
    pub fn new(cost: u32, parallel: usize) -> Self {
        let permits = Arc::new(Semaphore::new(parallel.clamp(1, Semaphore::MAX_PERMITS)));
        Self { cost, permits, wait: PASSWORD_WAIT }
    }

    /// A hash to store. [`Error::Overloaded`] if no hash may be made within
    /// [`PASSWORD_WAIT`].
    pub async fn hash(&self, password: Password) -> Result<PasswordHash> {
        self.hash_holding((), password).await
    }

    /// As [`Self::hash`]. The permit is dropped when the hash is made, even if the caller
    /// leaves before.
    pub async fn hash_with(&self, permit: OwnedSemaphorePermit, password: Password) -> Result<PasswordHash> {
        self.hash_holding(permit, password).await
    }

    async fn hash_holding(&self, held: impl Send + 'static, password: Password) -> Result<PasswordHash> {
        let cost = self.cost;
        let hash = move || {
            let _held = held;
            bcrypt::non_truncating_hash(password.as_bytes(), cost)
        };
        self.work(hash).await.map(PasswordHash::new)
    }

    /// Whether the password has this hash. If either is missing it has not, after the same
    /// work, so that the time of a refusal does not reveal whether there is such a user.
    /// [`Error::Overloaded`] as for [`Self::hash`].
    pub async fn verify(&self, password: Option<Password>, hash: Option<PasswordHash>) -> Result<bool> {
        let cost = self.cost;
        self.work(move || match (password, hash) {
            (Some(password), Some(hash)) => {
                let right = bcrypt::non_truncating_verify(password.as_bytes(), hash.as_str())?;
                level(hash.as_str().parse::<bcrypt::HashParts>()?.get_cost(), cost)?;
                Ok(right)
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
        let permit = wait_for_permit(&self.permits, self.wait).await?;
        // The work keeps the permit, since it does not end when its caller leaves.
        spawn_blocking(move || {
            let _permit = permit;
            work()
        })
        .await
        .map_err(Error::internal)?
        .map_err(Error::internal)
    }
}

/// A permit to hash; [`Error::Overloaded`] after this wait.
pub(super) async fn wait_for_permit(
    permits: &Arc<Semaphore>,
    wait: Duration,
) -> Result<OwnedSemaphorePermit> {
    timeout(wait, Arc::clone(permits).acquire_owned())
        .await
        .map_err(|_| Error::Overloaded { what: "password checks", retry_after: Duration::from_secs(1) })?
        .map_err(Error::internal)
}

/// Makes up for the work of a hash that was made with a lower cost than the setting:
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
    async fn the_wait_for_a_permit_to_hash_is_bounded() {
        let passwords = Passwords { wait: Duration::from_millis(1), ..Passwords::new(4, 1) };
        let _permit = passwords.permits.clone().acquire_owned().await.expect("a permit");
        let refused = passwords.hash(password("12345678")).await;
        assert!(matches!(refused, Err(Error::Overloaded { .. })), "{refused:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_permit_is_kept_until_the_hash_is_made_even_if_the_caller_leaves() {
        let passwords = Passwords::new(12, 2);
        let unauthenticated = Arc::new(Semaphore::new(1));
        let permit = unauthenticated.clone().acquire_owned().await.expect("a permit");
        let leaving = passwords.clone();
        let hash = tokio::spawn(async move { leaving.hash_with(permit, password("12345678")).await });
        while passwords.permits.available_permits() == 2 {
            tokio::task::yield_now().await;
        }
        hash.abort();
        assert!(hash.await.is_err_and(|error| error.is_cancelled()));
        assert_eq!((passwords.permits.available_permits(), unauthenticated.available_permits()), (1, 0));
        drop(unauthenticated.acquire_owned().await.expect("the permit, in the end"));
    }
}
