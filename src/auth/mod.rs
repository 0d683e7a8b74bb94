//! A secret becomes a caller, and a signal of its end.

use std::{sync::Arc, time::Duration};

use crate::{db::Database, error::Result, models::caller::Caller};

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
}

/// Looks credentials up, and keeps those in use confirmed.
#[derive(Clone, Debug)]
pub struct Auth {}

/// A credential that was good when it was last confirmed.
#[derive(Debug)]
pub struct Credential {
    caller: Caller,
}

impl Auth {
    /// Starts the task that keeps credentials confirmed.
    pub fn start(_database: Database, _settings: AuthSettings) -> Self {
        unimplemented!()
    }

    /// The credential that this secret is, if it is good now.
    pub async fn authenticate(&self, _secret: &str) -> Result<Arc<Credential>> {
        unimplemented!()
    }
}

impl Credential {
    /// Who.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Returns once the credential has expired or was revoked.
    pub async fn ended(&self) {
        unimplemented!()
    }

    /// Returns at once if the credential was confirmed within
    /// [`crate::limits::CREDENTIAL_CONFIRMED_WITHIN`], otherwise as soon as it
    /// is again; an error if it has ended.
    pub async fn confirmed(&self) -> Result<()> {
        unimplemented!()
    }
}
