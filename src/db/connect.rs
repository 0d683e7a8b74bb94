//! How every connection to the database is made.
//!
//! `sslmode` in the URL decides. `require` encrypts and verifies certificate and
//! host name, as `verify-full` does elsewhere. `prefer`, the default, encrypts
//! where the database can and verifies nothing, since who is in between could
//! as well say that it cannot; with an authority of its own it is `require`.
//! Sockets are never encrypted.

use std::{error::Error as _, fmt, path::Path, sync::Arc, time::Duration};

use diesel::{ConnectionError, ConnectionResult};
use diesel_async::AsyncPgConnection;
use tokio_postgres::{
    Client, Connection, Socket,
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

use crate::tls::{TlsError, provider, trusted};

/// Longest that bytes may be on their way without an acknowledgement.
const UNACKNOWLEDGED: Duration = Duration::from_secs(5);
/// After how long a silence a connection is asked whether it lives, how often
/// then, and how many times in vain.
const KEEPALIVES_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVES_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVES_RETRIES: u32 = 3;
/// tokio-postgres's, where the URL says nothing.
const KEEPALIVES_IDLE_BY_DEFAULT: Duration = Duration::from_secs(2 * 60 * 60);

/// What moves a connection's bytes.
type Driver = Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>;

/// Why there is no connection.
#[derive(Debug)]
pub enum DialError {
    /// What was asked for cannot be done.
    Settings(String),
    /// What Postgres or the way to it has against it.
    Postgres(tokio_postgres::Error),
}

impl DialError {
    /// Whether waiting will not cure it: the database answered that this user,
    /// this password or this database will not do, or it was never asked.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Settings(_) => true,
            Self::Postgres(error) => error.code().is_some_and(|code| {
                [
                    SqlState::INVALID_PASSWORD,
                    SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
                    SqlState::INVALID_CATALOG_NAME,
                    SqlState::INSUFFICIENT_PRIVILEGE,
                ]
                .contains(code)
            }),
        }
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Settings(why) => f.write_str(why),
            Self::Postgres(error) => {
                let words = error.to_string();
                f.write_str(&words)?;
                match error.source().map(ToString::to_string) {
                    Some(cause) if !words.contains(&cause) => write!(f, ": {cause}"),
                    _ => Ok(()),
                }
            }
        }
    }
}

impl std::error::Error for DialError {}

impl From<DialError> for ConnectionError {
    fn from(error: DialError) -> Self {
        Self::BadConnection(error.to_string())
    }
}

/// Connects, so that notifications and the connection's end are heard of.
pub(super) async fn establish(url: &str, ca: Option<&Path>) -> ConnectionResult<AsyncPgConnection> {
    let (client, driver) = dial(url, ca).await?;
    AsyncPgConnection::try_from_client_and_connection(client, driver).await
}

/// Connects; `ca` is a file of authorities instead of this system's. It is read
/// each time, so that it may be replaced.
pub(super) async fn dial(url: &str, ca: Option<&Path>) -> Result<(Client, Driver), DialError> {
    let mut config: Config =
        url.parse().map_err(|error: tokio_postgres::Error| DialError::Settings(error.to_string()))?;
    if config.get_hosts().is_empty() {
        // The name that a certificate is for.
        for address in config.get_hostaddrs().to_vec() {
            config.host(address.to_string());
        }
    }
    if config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_))) {
        config.ssl_mode(SslMode::Disable);
    } else if ca.is_some() {
        if config.get_ssl_mode() == SslMode::Disable {
            let why = "sslmode=disable and an authority of the database contradict each other";
            return Err(DialError::Settings(why.to_owned()));
        }
        config.ssl_mode(SslMode::Require);
    }
    notice_silence(&mut config);
    let tls = tls(config.get_ssl_mode(), ca).await.map_err(|error| DialError::Settings(error.to_string()))?;
    config.connect(MakeRustlsConnect::new(tls)).await.map_err(DialError::Postgres)
}

/// Where the way to the database is lost, nobody says so: what is sent and not
/// acknowledged, and who is silent, ends the connection soon, unless the URL says
/// otherwise.
fn notice_silence(config: &mut Config) {
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(UNACKNOWLEDGED);
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
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody))
    } else {
        builder.with_root_certificates(trusted(ca).await?)
    };
    Ok(builder.with_no_client_auth())
}

/// Whoever it is, as long as they have the key of the certificate that they
/// show.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
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
