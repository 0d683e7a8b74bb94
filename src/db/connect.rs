//! Makes every connection to the database.
//!
//! `sslmode` in the URL decides about TLS. `require` encrypts and verifies the
//! certificate and the host name, as libpq's `verify-full` does, which is thus the same
//! here; so is `verify-ca`. `prefer`, the default, encrypts if the database supports TLS
//! and verifies nothing: an attacker on the network could as well claim that the database
//! does not support TLS. With a `ca` file, `prefer` becomes `require`. Unix sockets are
//! never encrypted.
//!
//! All hosts of the URL are tried at once, and the first that is a primary is used: a host
//! that accepts and then says nothing keeps no caller from the others, and a hot standby,
//! which answers queries, is never taken for the database.

use std::{
    error::Error as _,
    future::poll_fn,
    path::Path,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use diesel::{ConnectionError, ConnectionResult};
use diesel_async::AsyncPgConnection;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio_postgres::{
    Client, Connection, SimpleQueryMessage, Socket,
    config::{Config, Host, SslMode},
    error::SqlState,
    tls::MakeTlsConnect,
};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use super::{
    embedded::OLDEST_MAJOR,
    identity::{self, Identity},
    url,
};
use crate::tls::{TlsError, provider, trusted};

/// Longest that sent bytes may stay unacknowledged before the connection is closed.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(5);
/// Silence before the first TCP keepalive probe, the interval of further probes, and
/// the number of unanswered probes after which the connection is closed.
const KEEPALIVES_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVES_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVES_RETRIES: u32 = 3;
/// tokio-postgres's value if the URL has none.
const KEEPALIVES_IDLE_BY_DEFAULT: Duration = Duration::from_secs(2 * 60 * 60);

/// The future that performs a connection's input and output.
pub(super) type Driver = Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>;

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The URL, the `ca` file or their combination cannot be used.
    #[error("{0}")]
    Settings(String),
    /// A host, and why it cannot be used.
    #[error("{0}: {1}")]
    Host(String, #[source] Box<DialError>),
    /// The server is a standby. It may be promoted, or another host may be the primary.
    #[error("the server is a standby, and milepost needs the primary")]
    Standby,
    /// The server is a former primary: another one was promoted after it.
    #[error("the server is a former primary: another one was promoted after it")]
    Superseded,
    /// A connection has no session of its own; holds what was seen.
    #[error(
        "the database is behind a pooler in transaction or statement mode ({0}), which loses LISTEN and SET: \
         connect to Postgres directly, or set the pooler to session mode (pool_mode=session in pgbouncer)"
    )]
    Pooler(String),
    #[error("the database does not answer")]
    Silent,
    /// Several hosts, none of which could be used.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Hosts(Vec<DialError>),
    /// Postgres refused the connection, or the network failed.
    #[error("{}", text(.0))]
    Postgres(tokio_postgres::Error),
}

impl DialError {
    /// Whether a retry is useless: the settings cannot be used, Postgres refused the user,
    /// the password or the database, or a pooler gives connections no sessions of their own.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Settings(_) | Self::Pooler(_) => true,
            Self::Standby | Self::Superseded | Self::Silent => false,
            Self::Host(_, error) => error.is_final(),
            Self::Hosts(errors) => errors.iter().all(Self::is_final),
            Self::Postgres(error) => {
                unmet_demand(error).is_some()
                    || error.code().is_some_and(|code| {
                        [
                            SqlState::INVALID_PASSWORD,
                            SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
                            SqlState::INVALID_CATALOG_NAME,
                            SqlState::INSUFFICIENT_PRIVILEGE,
                        ]
                        .contains(code)
                    })
            }
        }
    }
}

/// What to do if the server does not offer what the URL demands, or demands what the URL
/// lacks. tokio-postgres has no codes for these errors.
fn unmet_demand(error: &tokio_postgres::Error) -> Option<&'static str> {
    match error.source()?.to_string().as_str() {
        "server does not support TLS" => Some("sslmode, sslrootcert or --database-ca demands it"),
        "server did not use channel binding" => Some("channel_binding=require demands it"),
        "password missing" => Some("the server demands one: add it to DATABASE_URL"),
        _ => None,
    }
}

/// A failure of tokio-postgres with its cause, and with what to do about it if that is known.
fn text(error: &tokio_postgres::Error) -> String {
    let cause = error.source().map(|cause| format!(": {cause}"));
    let demand = unmet_demand(error).map(|demand| format!(" ({demand})"));
    format!("{error}{}{}", cause.unwrap_or_default(), demand.unwrap_or_default())
}

/// [`ConnectionError::InvalidConnectionUrl`] if a retry is useless, so that the exit code of a
/// command tells it from an outage.
impl From<DialError> for ConnectionError {
    fn from(error: DialError) -> Self {
        let text = error.to_string();
        if error.is_final() { Self::InvalidConnectionUrl(text) } else { Self::BadConnection(text) }
    }
}

/// Connects, and gives diesel the driver too, so that notifications and the end of
/// the connection reach it.
pub(super) async fn establish(
    url: &str,
    ca: Option<&Path>,
    session: &str,
) -> ConnectionResult<AsyncPgConnection> {
    let Dialled { client, driver, .. } = dial(url, ca, session).await?;
    AsyncPgConnection::try_from_client_and_connection(client, driver).await
}

/// A new connection to a primary.
pub(super) struct Dialled {
    pub(super) client: Client,
    pub(super) driver: Driver,
    pub(super) identity: Identity,
}

/// As [`dial_to`], to whatever primary answers first.
pub(super) async fn dial(url: &str, ca: Option<&Path>, session: &str) -> Result<Dialled, DialError> {
    Ok(dial_to(url, ca, session, |_| Ok(())).await?.0)
}

/// Connects to the primary, and runs the statements `session` on the connection. The
/// database is verified by the authorities of the PEM file `ca`, or without one by those
/// of this system. `ca` is read for each connection, so that the file can be replaced.
///
/// A host whose database `enter` refuses is not used. Returns what `enter` returned, too.
pub(super) async fn dial_to<T>(
    url: &str,
    ca: Option<&Path>,
    session: &str,
    enter: impl Fn(Identity) -> Result<T, DialError>,
) -> Result<(Dialled, T), DialError> {
    let url::Target { mut config, ca } = url::read(url, ca).map_err(DialError::Settings)?;
    set_tcp_timeouts(&mut config);
    let tls = tls(config.get_ssl_mode(), ca.as_deref())
        .await
        .map_err(|error| DialError::Settings(error.to_string()))?;
    let tls = MakeRustlsConnect::new(tls);
    let hosts = (0..config.get_hosts().len()).map(async |index| {
        let config = of_host(&config, index);
        let name = name_of_host(&config);
        let dialled = dial_host(config, tls.clone(), session).await;
        let entered = dialled.and_then(|dialled| Ok((enter(dialled.identity)?, dialled)));
        entered.map_err(|error| DialError::Host(name, Box::new(error)))
    });
    let mut hosts: FuturesUnordered<_> = hosts.collect();
    let mut errors = Vec::new();
    while let Some(dialled) = hosts.next().await {
        match dialled {
            Ok((entered, dialled)) => return Ok((dialled, entered)),
            Err(error) => errors.push(error),
        }
    }
    match errors.len() {
        1 => Err(errors.remove(0)),
        _ => Err(DialError::Hosts(errors)),
    }
}

/// The configuration with one of its hosts alone.
fn of_host(config: &Config, index: usize) -> Config {
    let mut one = Config::new();
    match &config.get_hosts()[index] {
        Host::Tcp(host) => one.host(host),
        Host::Unix(directory) => one.host_path(directory),
    };
    // One port may stand for all hosts.
    if let Some(port) = config.get_ports().get(index).or(config.get_ports().first()) {
        one.port(*port);
    }
    if let Some(address) = config.get_hostaddrs().get(index) {
        one.hostaddr(*address);
    }
    if let Some(user) = config.get_user() {
        one.user(user);
    }
    if let Some(password) = config.get_password() {
        one.password(password);
    }
    if let Some(database) = config.get_dbname() {
        one.dbname(database);
    }
    if let Some(options) = config.get_options() {
        one.options(options);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        one.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        one.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        one.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        one.keepalives_retries(retries);
    }
    one.keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .channel_binding(config.get_channel_binding());
    one
}

/// The configuration's only host, as errors name it.
fn name_of_host(config: &Config) -> String {
    match (config.get_hosts(), config.get_ports()) {
        ([Host::Tcp(host), ..], [port, ..]) => format!("{host}:{port}"),
        ([Host::Tcp(host), ..], []) => host.clone(),
        ([Host::Unix(directory), ..], _) => directory.display().to_string(),
        ([], _) => String::new(),
    }
}

/// Connects to the one host, checks that it is a primary of a supported version with the
/// encoding UTF8, and runs `session` there.
async fn dial_host(config: Config, tls: MakeRustlsConnect, session: &str) -> Result<Dialled, DialError> {
    let (client, mut driver) = config.connect(tls).await.map_err(DialError::Postgres)?;
    // milepost's tables are in the schema `public`, unless the URL itself names another one.
    let named = config.get_options().is_some_and(|options| options.contains("search_path"));
    let search_path = if named { "" } else { "SET search_path = public" };
    let identity = identity::COLUMNS;
    let facts = format!(
        "{search_path}; {session}; SELECT pg_is_in_recovery(), \
         current_setting('server_version_num')::integer / 10000, current_setting('server_encoding'), {identity}"
    );
    let facts = {
        let mut facts = pin!(client.simple_query(&facts));
        // The driver performs the query's input and output; it ends only with an error.
        poll_fn(|context| match facts.as_mut().poll(context) {
            Poll::Ready(facts) => Poll::Ready(facts),
            Poll::Pending => match Pin::new(&mut driver).poll(context) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                // Polled once more: the driver may have brought the answer.
                Poll::Ready(Ok(())) | Poll::Pending => facts.as_mut().poll(context),
            },
        })
        .await
    };
    let facts = facts.map_err(DialError::Postgres)?;
    let row = facts
        .iter()
        .find_map(|message| if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None });
    let column = |index| row.and_then(|row| row.get(index));
    if column(0) != Some("f") {
        return Err(DialError::Standby);
    }
    let major = column(1).unwrap_or("of an unknown version");
    if !major.parse().is_ok_and(|major: u32| major >= OLDEST_MAJOR) {
        return Err(DialError::Settings(format!(
            "the database is Postgres {major}, and milepost needs {OLDEST_MAJOR} or later"
        )));
    }
    match column(2) {
        Some("UTF8") => {}
        encoding => {
            return Err(DialError::Settings(format!(
                "the database has the encoding {}, and milepost needs UTF8: create it with ENCODING 'UTF8'",
                encoding.unwrap_or("unknown")
            )));
        }
    }
    let identity = Identity::parse(std::array::from_fn(|index| column(index + 3)));
    let unidentified = || DialError::Settings("the server does not tell which database it is".to_owned());
    Ok(Dialled { identity: identity.ok_or_else(unidentified)?, client, driver })
}

/// A broken network path reports no error. These timeouts close a connection with
/// unacknowledged bytes, or without answers to keepalive probes, unless the URL sets
/// its own timeouts.
fn set_tcp_timeouts(config: &mut Config) {
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(TCP_USER_TIMEOUT);
    }
    if config.get_keepalives_idle() == KEEPALIVES_IDLE_BY_DEFAULT {
        config.keepalives_idle(KEEPALIVES_IDLE);
    }
    if config.get_keepalives_interval().is_none() && config.get_keepalives_retries().is_none() {
        config.keepalives_interval(KEEPALIVES_INTERVAL).keepalives_retries(KEEPALIVES_RETRIES);
    }
}

async fn tls(mode: SslMode, ca: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError(error.to_string()))?;
    let builder = if matches!(mode, SslMode::Disable | SslMode::Prefer) {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate))
    } else {
        builder.with_root_certificates(trusted(ca).await?)
    };
    Ok(builder.with_no_client_auth())
}

/// Accepts every certificate, but verifies that the server has its private key.
#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
