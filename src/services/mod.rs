//! The gRPC services. A request is authenticated, parsed once into a valid
//! value and handed to a model or to the event log.

pub mod auth;
pub mod configurations;
pub mod events;
pub mod jobs;
mod page;
mod parse;
pub mod status;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;

use crate::{
    auth::{Auth, AuthSettings, Credential, Ending},
    db::Database,
    error::{Error, Result},
    event_log::{EventLog, EventLogSettings},
};

/// What every service works with.
#[derive(Clone, Debug)]
pub struct App {
    /// The database.
    pub database: Database,
    /// Who calls.
    pub auth: Auth,
    /// The heart.
    pub log: EventLog,
    /// Cancelled when this server shuts down.
    pub draining: CancellationToken,
}

impl App {
    /// Starts what works in the background, on a database that is migrated and
    /// answers. Everything ends when the last clone is dropped.
    pub async fn start(database: Database, auth: AuthSettings, log: EventLogSettings) -> Result<Self> {
        let auth = Auth::start(database.clone(), auth);
        let confirm = auth.clone();
        let log = EventLog::start(database.clone(), log, move || confirm.reconfirm_now()).await?;
        Ok(Self { database, auth, log, draining: CancellationToken::new() })
    }

    /// Whose call this is, by `authorization: Bearer SECRET`.
    pub(crate) async fn authenticate(&self, metadata: &MetadataMap) -> Result<Arc<Credential>> {
        let secret = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, secret)| secret.trim())
            .ok_or(Error::CredentialInvalid)?;
        self.auth.authenticate(secret).await
    }

    /// Ends credentials: here at once, on other replicas as soon as they hear.
    /// The database was told before.
    pub(crate) fn end(&self, ending: Ending) {
        self.auth.end(ending);
        self.log.ring_credentials();
    }
}
