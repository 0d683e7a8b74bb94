//! The gRPC services. A request, authenticated before it was read, is parsed once
//! into a valid value and handed to a model or to the event log.

pub mod auth;
pub mod configurations;
pub mod events;
pub mod jobs;
mod page;
mod parse;
pub mod status;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::HeaderMap;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tracing::Instrument as _;
use uuid::Uuid;

use crate::{
    auth::{Auth, AuthSettings, Credential, Ending},
    db::{Connection, Database},
    error::{Error, Result},
    event_log::{EventLog, EventLogSettings},
    models::{audit_entry::Origin, caller::Caller},
    telemetry::{Telemetry, metrics::whole},
};

/// Who is at the other end of a connection.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Where from.
    pub address: Option<SocketAddr>,
    /// Cancelled, it cuts the connection.
    pub cut: CancellationToken,
}

impl Peer {
    /// Whose request this is.
    pub(crate) fn of<T>(request: &Request<T>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }
}

/// A call's id, as its answer and the log have it.
#[derive(Clone, Copy, Debug)]
pub struct RequestId(pub Uuid);

impl RequestId {
    fn of<T>(request: &Request<T>) -> Option<Uuid> {
        request.extensions().get::<Self>().map(|id| id.0)
    }
}

/// Whose call this is. It was asked before the message was read, which may take a
/// while; [`Error::CredentialInvalid`] where it was not asked.
fn credential_of<T>(request: &Request<T>) -> Result<Arc<Credential>> {
    let credential = request.extensions().get::<Arc<Credential>>().ok_or(Error::CredentialInvalid)?;
    credential.still_good()?;
    Ok(Arc::clone(credential))
}

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
    /// What is counted and traced.
    pub telemetry: Telemetry,
}

impl App {
    /// Starts what works in the background, on a database that is migrated and
    /// answers. Everything ends when the last clone is dropped.
    pub async fn start(
        database: Database,
        auth: AuthSettings,
        log: EventLogSettings,
        telemetry: Telemetry,
    ) -> Result<Self> {
        database.keep_asking();
        let auth = Auth::start(database.clone(), auth);
        let confirm = auth.clone();
        let log = EventLog::start(database.clone(), log, &telemetry, move || confirm.reconfirm_now()).await?;
        Ok(Self { database, auth, log, draining: CancellationToken::new(), telemetry })
    }

    /// Runs `work` to its end, see [`Database::detached`], unless the credential has
    /// ended by the time that there is a connection for it.
    async fn detached<T, W, F>(&self, credential: Arc<Credential>, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(Connection) -> F + Send + 'static,
        F: Future<Output = Result<T>> + Send,
    {
        let work = async move |connection| {
            credential.still_good()?;
            work(connection).await
        };
        self.database.detached(work).await
    }

    /// What Prometheus is told, as things stand now. Asks nobody but this
    /// process.
    pub(crate) fn measure(&self) -> String {
        let metrics = &self.telemetry.metrics;
        let (state, pool) = (&metrics.state, self.database.status());
        state.draining.set(self.draining.is_cancelled().into());
        state.watch_lag.set(self.log.watch_lag().as_secs_f64());
        state.connections_idle.set(whole(pool.available));
        state.connections_in_use.set(whole(pool.size.saturating_sub(pool.available)));
        state.connections_most.set(whole(pool.max_size));
        state.connections_waited_for.set(whole(pool.waiting));
        let (cached, age) = self.auth.cached();
        state.credentials.set(whole(cached));
        state.credentials_age.set(age.as_secs_f64());
        metrics.text()
    }

    /// Whose call this is, by `authorization: Bearer SECRET`.
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

    /// What the audit says of a call by this caller.
    pub(crate) fn origin<T>(&self, request: &Request<T>, caller: &Caller) -> Origin {
        Origin::of_caller(caller, self.address(request), RequestId::of(request))
    }

    /// The same where there is no credential.
    pub(crate) fn stranger<T>(&self, request: &Request<T>) -> Origin {
        Origin::anonymous(self.address(request), RequestId::of(request))
    }

    /// Where a request comes from: behind a proxy that is trusted, as that says.
    fn address<T>(&self, request: &Request<T>) -> Option<IpAddr> {
        // A socket for both IPv6 and IPv4 has IPv4's addresses as IPv6's.
        let direct = Peer::of(request).address?.ip().to_canonical();
        let trusted = &self.auth.settings().trusted_proxies;
        if !trusted.contains(&direct) {
            return Some(direct);
        }
        // Each hop adds whom it heard from; what comes before the last that is
        // not ours may be anybody's invention.
        let hops = request.metadata().get_all("x-forwarded-for").iter();
        let hops: Vec<Option<IpAddr>> = hops
            .flat_map(|hops| hops.to_str().unwrap_or("?").split(','))
            .map(|hop| hop.trim().parse().ok().map(|hop: IpAddr| hop.to_canonical()))
            .collect();
        let last = hops.into_iter().rev().find(|hop| hop.is_none_or(|hop| !trusted.contains(&hop)));
        // What cannot be read is nobody's address, and what is before it nobody's
        // word.
        last.flatten().or(Some(direct))
    }

    /// Does work to its end, even if the caller leaves meanwhile.
    async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        tokio::spawn(work.in_current_span()).await.map_err(Error::internal)?
    }

    /// Ends credentials: here at once, on other replicas as soon as they hear.
    /// The database was told before.
    pub(crate) fn end(&self, ending: Ending) {
        self.auth.end(ending);
        self.log.notify_credentials();
    }
}
