//! Admission of unauthenticated callers, of whom there may be any number.
//!
//! | permits | how many | for | if none is left |
//! |---|---|---|---|
//! | `calls` | [`UNAUTHENTICATED_CALLS`] | SignUp and LogIn | the call is refused |
//! | `streams` | [`UNAUTHENTICATED_CALLS`] | health and reflection | refused, except a health Check |
//! | `look_ups` | [`UNAUTHENTICATED_CALLS`] | calls whose secret is looked up | the call is refused |
//! | `secrets` | a quarter of the pool | queries that look a secret up | wait for the connect timeout |
//! | `passwords` | a quarter of the pool | queries of SignUp and LogIn | wait for the connect timeout |
//! | `hashes` | half of `--bcrypt-parallel` | hashes of sign-ups and restricted log-ins | wait for [`PASSWORD_WAIT`] |
//!
//! Sign-ups and log-ins end with the call's time limit, so they share no permits with
//! streams, which a client can keep open for good.

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::password::wait_for_permit;
use crate::{
    db::{Authority, Payer, Share},
    error::{Error, Result},
    limits::{PASSWORD_WAIT, UNAUTHENTICATED_CALLS},
};

/// The permits of unauthenticated callers.
#[derive(Clone, Debug)]
pub struct Admission {
    calls: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    look_ups: Arc<Semaphore>,
    pub(super) secrets: Share,
    pub(super) passwords: Share,
    hashes: Arc<Semaphore>,
    hash_wait: Duration,
}

impl Admission {
    /// For a pool of `connections`, with `hashes` bcrypt hashes in parallel.
    pub(super) fn new(connections: usize, hashes: usize) -> Self {
        let permits = |count: usize| Arc::new(Semaphore::new(count));
        let quarter = (connections / 4).max(1);
        Self {
            calls: permits(UNAUTHENTICATED_CALLS),
            streams: permits(UNAUTHENTICATED_CALLS),
            look_ups: permits(UNAUTHENTICATED_CALLS),
            secrets: Share::new(quarter, "secrets to look up"),
            passwords: Share::new(quarter, "sign-ups and log-ins"),
            hashes: permits((hashes / 2).clamp(1, Semaphore::MAX_PERMITS)),
            hash_wait: PASSWORD_WAIT,
        }
    }

    /// For a SignUp or LogIn, until it ends.
    pub(crate) fn call(&self) -> Result<OwnedSemaphorePermit> {
        permit(&self.calls, "calls without a credential")
    }

    /// For a call of health or reflection, until its last message was sent.
    pub(crate) fn stream(&self) -> Result<OwnedSemaphorePermit> {
        permit(&self.streams, "calls without a credential")
    }

    /// For a call whose secret is looked up, until it is authenticated.
    pub(super) fn look_up(&self) -> Result<OwnedSemaphorePermit> {
        permit(&self.look_ups, "secrets to look up")
    }

    /// For a sign-up or a restricted log-in, until its hash is made: all other log-ins have
    /// the other half of the hashes, or every second hash if only one is made at once.
    pub(super) async fn hash(&self) -> Result<OwnedSemaphorePermit> {
        wait_for_permit(&self.hashes, self.hash_wait).await
    }
}

fn permit(permits: &Arc<Semaphore>, what: &'static str) -> Result<OwnedSemaphorePermit> {
    let refused = |_| Error::Overloaded { what, retry_after: Duration::from_secs(1) };
    Arc::clone(permits).try_acquire_owned().map_err(refused)
}

/// The authority of a caller that signs up or logs in: there is no credential to check.
#[derive(Clone, Debug)]
pub(super) struct Unauthenticated(pub(super) Share);

impl Authority for Unauthenticated {
    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn payer(&self) -> Payer {
        Payer::Share(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn unauthenticated_callers_use_at_most_half_of_the_hashes() {
        for (parallel, hashes) in [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4)] {
            assert_eq!(Admission::new(16, parallel).hashes.available_permits(), hashes, "{parallel}");
        }
        let admission = Admission { hash_wait: Duration::from_millis(1), ..Admission::new(16, 2) };
        let permit = admission.hash().await.expect("a permit");
        let refused = admission.hash().await;
        assert!(matches!(refused, Err(Error::Overloaded { .. })), "{refused:?}");
        drop(permit);
        assert!(admission.hash().await.is_ok(), "the permit is free again");
    }
}
