//! The gRPC services. A request, authenticated before it was read, is parsed once into a
//! valid value, which a model or the event log takes.

pub mod auth;
mod client_address;
pub mod configurations;
pub mod events;
mod export;
mod filter;
pub mod jobs;
mod page;
mod parse;
pub mod status;
mod summary;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{Extensions, HeaderMap};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use self::{client_address::client_address, summary::TimeZones};
use crate::{
    auth::{Auth, AuthSettings, Credential, HeldBytes, HeldMessages, StreamReset},
    config::QuotaSettings,
    db::{
        Database,
        notifier::{Notification, Notifier},
    },
    error::{Error, Result},
    event_log::{EventLog, EventLogSettings},
    models::audit_entry::Origin,
    telemetry::{Telemetry, metrics::gauge_value},
    usage::EventUsage,
};

/// What a method returns.
type Answer<T> = Result<Response<T>, Status>;

/// The client's end of a call.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// The address that the connection comes from.
    pub address: Option<SocketAddr>,
    /// Resets the stream of the call.
    pub reset: StreamReset,
}

impl Peer {
    pub(crate) fn of<T>(request: &Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }
}

/// How the messages of a call travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    #[default]
    Protobuf,
    /// By the Connect protocol alone. What the services send may then have elements that are
    /// JSON already: see `src/json`.
    Json,
}

impl Encoding {
    fn of<T>(request: &Request<T>) -> Self {
        request.extensions().get().copied().unwrap_or_default()
    }
}

/// A call's id, as in its answer and in the log.
#[derive(Clone, Copy, Debug)]
pub struct RequestId(pub Uuid);

impl RequestId {
    fn of<T>(request: &Request<T>) -> Option<Uuid> {
        request.extensions().get::<Self>().map(|id| id.0)
    }
}

/// The credential that the call was authenticated with, which is checked again, since
/// reading the message may take a while. [`Error::CredentialInvalid`] if the call was not
/// authenticated.
fn credential_of<T>(request: &Request<T>) -> Result<Arc<Credential>> {
    let credential = request.extensions().get::<Arc<Credential>>().ok_or(Error::CredentialInvalid)?;
    credential.check_valid()?;
    Ok(Arc::clone(credential))
}

/// What the messages of a call hold of its user's bytes in flight.
fn held_messages<T>(request: &Request<T>) -> HeldMessages {
    request.extensions().get().cloned().unwrap_or_default()
}

/// As [`held_messages`], of a unary call.
fn held_bytes<T>(request: &Request<T>) -> Option<HeldBytes> {
    request.extensions().get::<HeldMessages>()?.first()
}

/// What every service works with.
#[derive(Clone, Debug)]
pub struct App {
    pub database: Database,
    pub auth: Auth,
    pub log: EventLog,
    /// The most that each user may have.
    pub quotas: QuotaSettings,
    /// Cancelled when this server drains.
    pub draining: CancellationToken,
    pub telemetry: Telemetry,
    time_zones: Arc<TimeZones>,
}

impl App {
    /// Starts the background tasks, on a database that is migrated and available. They end
    /// when the last clone is dropped.
    pub async fn start(
        database: Database,
        auth: AuthSettings,
        log: EventLogSettings,
        quotas: QuotaSettings,
        telemetry: Telemetry,
    ) -> Result<Self> {
        database.watch_availability();
        let notifier = Notifier::start(database.clone());
        let auth = Auth::start(database.clone(), notifier.clone(), auth, quotas.sessions_per_user);
        let usage = EventUsage::start(database.clone(), quotas);
        let log = EventLog::start(database.clone(), notifier.clone(), log, usage, telemetry.clone()).await?;
        let (wake_tail, confirming) = (log.waker(), auth.clone());
        notifier.listen(move |notification| match notification {
            Notification::Log => wake_tail(),
            Notification::Credentials => confirming.confirm_now(),
        });
        let draining = CancellationToken::new();
        Ok(Self { database, auth, log, quotas, draining, telemetry, time_zones: Arc::default() })
    }

    /// The metrics as text, with the gauges set to their present values. It makes no query.
    pub(crate) fn measure(&self) -> String {
        let metrics = &self.telemetry.metrics;
        let (state, pool) = (&metrics.state, self.database.status());
        state.draining.set(self.draining.is_cancelled().into());
        state.watch_lag.set(self.log.watch_lag().as_secs_f64());
        state.tail_lag.set(self.log.tail_lag().as_secs_f64());
        state.connections_idle.set(gauge_value(pool.available));
        state.connections_in_use.set(gauge_value(pool.size.saturating_sub(pool.available)));
        state.connections_max.set(gauge_value(pool.max_size));
        state.connections_waiting.set(gauge_value(pool.waiting));
        let (cached, age) = self.auth.cached();
        state.credentials.set(gauge_value(cached));
        state.credentials_age.set(age.as_secs_f64());
        metrics.text()
    }

    /// Authenticates a call by its header `authorization: Bearer SECRET`.
    pub(crate) async fn authenticate(&self, headers: &HeaderMap) -> Result<Arc<Credential>> {
        let secret = headers
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, secret)| secret.trim())
            .ok_or(Error::CredentialInvalid)?;
        self.auth.authenticate(secret).await
    }

    /// The origin of a call for the audit.
    fn origin<T>(&self, request: &Request<T>, credential: &Credential) -> Origin {
        Origin::of_caller(credential.caller(), self.address(request), RequestId::of(request))
    }

    /// The origin of a call without a credential.
    fn anonymous_origin<T>(&self, request: &Request<T>) -> Origin {
        Origin::anonymous(self.address(request), RequestId::of(request))
    }

    /// The client's address; behind a trusted proxy, the address that the proxy names.
    fn address<T>(&self, request: &Request<T>) -> Option<IpAddr> {
        self.address_of(request.extensions(), request.metadata().as_ref())
    }

    /// As [`Self::address`], of a request that no service has taken yet.
    pub(crate) fn address_of(&self, extensions: &Extensions, headers: &HeaderMap) -> Option<IpAddr> {
        let connection = extensions.get::<Peer>()?.address?.ip();
        Some(client_address(connection, headers, &self.auth.settings().trusted_proxies))
    }
}
