//! The gRPC services. A request is authenticated, parsed once into a valid
//! value and handed to a model or to the event log.

pub mod auth;
pub mod events;
mod page;
mod parse;
pub mod status;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;

use crate::{
    auth::{Auth, Credential},
    db::Database,
    error::{Error, Result},
    event_log::EventLog,
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
}
