//! Connects to a server. If it is no server of milepost, an error says what it speaks and what
//! to do about it.

use std::{
    borrow::Cow,
    error::Error,
    io, iter,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{
    Uri,
    uri::{Authority, Scheme},
};
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{self, CertificateError, ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName},
};
use tonic::transport::{Channel, Endpoint};
use tower::{ServiceExt as _, service_fn};

use crate::ClientError;

/// Longest that connecting, the TLS handshake and the server's first answer may each take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Silence after which the client sends an HTTP/2 PING, and the longest that the
/// server may take to answer it.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Receive window of a connection. h2 closes a connection in which too many small
/// messages wait unread. That limit grows with the window: it is some 60,000 messages
/// at this size.
const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
/// Length of the header of a frame of HTTP/2.
const FRAME_HEADER_BYTES: usize = 9;

type BoxError = Box<dyn Error + Send + Sync>;

/// What a server does that is no server of milepost, as the end of a sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unexpected(Cow<'static, str>);

/// Connects to `url`, over TLS if its scheme is `https`. `tls` is how the server is verified;
/// without it, by the authorities of this system.
pub(crate) async fn connect(
    server: &str,
    url: &Uri,
    tls: Option<ClientConfig>,
) -> Result<Channel, ClientError> {
    let tls = Tls::of(url, tls).await?;
    greeted(url, tls).await.map_err(|error| {
        let sources = iter::successors(Some(error.as_ref() as &dyn Error), |&error| error.source());
        let unexpected = sources.filter_map(|error| error.downcast_ref()).next();
        match unexpected.map(|Unexpected(answer)| answer.to_string()) {
            Some(answer) => ClientError::Answer {
                server: server.to_owned(),
                answer: answer.replace("SERVER", url.authority().map_or("", Authority::as_str)),
            },
            None => ClientError::Connect(server.to_owned(), error),
        }
    })
}

/// A channel that connects with its first call. See [`connect`].
pub(crate) async fn connect_lazy(
    server: &str,
    url: &Uri,
    tls: Option<ClientConfig>,
) -> Result<Channel, ClientError> {
    let tls = Tls::of(url, tls).await?;
    let endpoint = endpoint(url).map_err(|error| ClientError::Connect(server.to_owned(), error))?;
    let dial = move |address| dial(address, tls.clone(), None);
    Ok(endpoint.connect_with_connector_lazy(service_fn(dial)))
}

/// Connects and waits for the server's first frame. Before it, tonic counts a channel as
/// connected, and the calls of one that breaks then fail without a cause.
async fn greeted(url: &Uri, tls: Option<Tls>) -> Result<Channel, BoxError> {
    let (greeting, greeted) = oneshot::channel();
    // Later connections of the same channel have no greeting.
    let greeting = Mutex::new(Some(greeting));
    let dial = move |address| {
        dial(address, tls.clone(), greeting.lock().unwrap_or_else(PoisonError::into_inner).take())
    };
    let channel = endpoint(url)?.connect_with_connector(service_fn(dial)).await?;
    in_time(async { greeted.await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionReset).into()) })
        .await??;
    Ok(channel)
}

fn endpoint(url: &Uri) -> Result<Endpoint, BoxError> {
    Ok(Endpoint::from(address(url)?)
        .origin(url.clone())
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES))
}

/// The URL without its encryption and with its port, so that tonic leaves TLS to [`dial`].
fn address(url: &Uri) -> Result<Uri, BoxError> {
    let port = url.port_u16().unwrap_or(if url.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 });
    let authority = format!("{}:{port}", url.host().unwrap_or_default());
    Ok(Uri::builder().scheme(Scheme::HTTP).authority(authority).path_and_query("/").build()?)
}

/// How connections are encrypted, and the name that the server's certificate must have.
#[derive(Clone)]
struct Tls(TlsConnector, ServerName<'static>);

impl Tls {
    /// None if the scheme of the URL is not `https`.
    async fn of(url: &Uri, config: Option<ClientConfig>) -> Result<Option<Self>, ClientError> {
        if url.scheme() != Some(&Scheme::HTTPS) {
            return Ok(None);
        }
        let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| ClientError::Tls(format!("{host} cannot be verified: {error}")))?;
        let mut config = match config {
            Some(config) => config,
            None => system_authorities().await?,
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Some(Self(TlsConnector::from(Arc::new(config)), name)))
    }
}

/// Trusts the authorities of this system.
async fn system_authorities() -> Result<ClientConfig, ClientError> {
    let unusable = |error: &dyn Error| ClientError::Tls(error.to_string());
    let found = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs).await;
    let found = found.map_err(|error| unusable(&error))?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
        return Err(ClientError::Tls(format!("this system has no root certificates{why}")));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions();
    Ok(builder.map_err(|error| unusable(&error))?.with_root_certificates(roots).with_no_client_auth())
}

async fn dial(
    address: Uri,
    tls: Option<Tls>,
    greeting: Option<oneshot::Sender<Result<(), BoxError>>>,
) -> Result<TokioIo<Stream>, BoxError> {
    let mut tcp = HttpConnector::new();
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(TIMEOUT));
    let stream = tcp.oneshot(address).await?.into_inner();
    let encrypted = tls.is_some();
    let io: Box<dyn Io> = match tls {
        None => Box::new(stream),
        Some(Tls(connector, name)) => {
            let handshake = async { connector.connect(name, stream).await.map_err(no_handshake) };
            Box::new(in_time(handshake).await?)
        }
    };
    let greeting = greeting.map(|tell| Greeting { first: Vec::new(), encrypted, tell: Some(tell) });
    Ok(TokioIo::new(Stream { io, greeting }))
}

fn no_handshake(error: io::Error) -> BoxError {
    if is_closed(&error) {
        let why =
            "closes the connection during the TLS handshake: write http://SERVER if it does not speak TLS";
        return Unexpected(why.into()).into();
    }
    refusal(error)
}

/// The result, or an error after [`TIMEOUT`].
async fn in_time<T>(work: impl Future<Output = Result<T, BoxError>>) -> Result<T, BoxError> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it does not answer").into();
    timeout(TIMEOUT, work).await.unwrap_or_else(|elapsed| Err(late(elapsed)))
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection, which tells once what the server sent first.
struct Stream {
    io: Box<dyn Io>,
    greeting: Option<Greeting>,
}

/// The server's first bytes. When it is dropped, it tells what they say.
struct Greeting {
    first: Vec<u8>,
    encrypted: bool,
    tell: Option<oneshot::Sender<Result<(), BoxError>>>,
}

impl Greeting {
    fn tell(&mut self, told: Result<(), BoxError>) {
        if let Some(tell) = self.tell.take() {
            // Nobody waits any more if the client was dropped.
            let _unheard = tell.send(told);
        }
    }
}

impl Drop for Greeting {
    fn drop(&mut self) {
        let unexpected = unexpected(&self.first, self.encrypted);
        self.tell(unexpected.map_or(Ok(()), |why| Err(Unexpected(why.into()).into())));
    }
}

impl Stream {
    /// Takes in what a read has brought, until the first frame's header is complete.
    fn received(&mut self, read: &mut io::Result<()>, bytes: &[u8]) {
        let Some(mut greeting) = self.greeting.take() else { return };
        greeting.first.extend_from_slice(bytes);
        match read {
            Ok(()) if !bytes.is_empty() && greeting.first.len() < FRAME_HEADER_BYTES => {
                self.greeting = Some(greeting);
            }
            Err(error) if !is_closed(error) => {
                greeting.tell(Err(refusal(std::mem::replace(error, error.kind().into()))));
            }
            Ok(()) | Err(_) => {}
        }
    }

    /// What a server has sent before it closed the connection can still be read, so that
    /// writing must not fail before the greeting.
    fn written(&self, written: io::Result<usize>, length: usize) -> io::Result<usize> {
        match written {
            Err(error) if self.greeting.is_some() && is_closed(&error) => Ok(length),
            written => written,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let mut read = ready!(Pin::new(&mut self.io).poll_read(cx, buf));
        self.received(&mut read, &buf.filled()[before..]);
        Poll::Ready(read)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf));
        Poll::Ready(self.written(written, buf.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs));
        Poll::Ready(self.written(written, bufs.iter().map(|buf| buf.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Whether the server has closed the connection, with or without a reset.
fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

/// What a server does that begins with these bytes; none if it speaks HTTP/2, of which the
/// first frame is SETTINGS on stream 0.
fn unexpected(first: &[u8], encrypted: bool) -> Option<&'static str> {
    match first {
        [_, _, _, 4, _, 0, 0, 0, 0, ..] => None,
        // An alert or a handshake, of any version.
        [0x15 | 0x16, 3, ..] => Some(
            "speaks TLS, and this connection would be unencrypted: write https://SERVER, and name the authority of \
             its certificate with --tls-ca unless this system trusts it",
        ),
        [b'H', b'T', b'T', b'P', ..] => Some(
            "speaks HTTP/1 and not gRPC: write the address of milepost's --listen, not the one of --metrics-listen or \
             of another service",
        ),
        [] if encrypted => Some(
            "closes the connection after the TLS handshake: if it asks for a client certificate, set \
             --tls-client-cert and --tls-client-key",
        ),
        [] => Some(
            "closes the connection and does not speak HTTP/2: write the address of milepost's --listen, not the one of \
             --metrics-listen or of another service",
        ),
        _ => Some("does not speak HTTP/2: write the address of milepost's --listen"),
    }
}

/// Why TLS failed, and what to do about it; other errors stay as they are.
#[expect(clippy::wildcard_enum_match_arm, reason = "the enum of rustls is not exhaustive")]
fn refusal(error: io::Error) -> BoxError {
    use CertificateError::{NotValidForName, NotValidForNameContext, UnknownIssuer};
    let Some(of_tls) = error.get_ref().and_then(|inner| inner.downcast_ref()) else { return error.into() };
    let why = match of_tls {
        rustls::Error::InvalidMessage(_) => {
            "does not speak TLS: write http://SERVER for an unencrypted connection".into()
        }
        rustls::Error::InvalidCertificate(UnknownIssuer) => {
            "has a certificate of an unknown authority: name the PEM file of the authority with --tls-ca".into()
        }
        rustls::Error::InvalidCertificate(why @ (NotValidForName | NotValidForNameContext { .. })) => {
            format!("has a certificate for other names ({why}): write one of them in the server's address").into()
        }
        rustls::Error::InvalidCertificate(why) => {
            format!("has a certificate that is not trusted: {why}").into()
        }
        rustls::Error::AlertReceived(alert) => format!(
            "ends the TLS handshake ({alert:?}): if it asks for a client certificate, set --tls-client-cert and \
             --tls-client-key to one of an authority that it trusts"
        )
        .into(),
        other => format!("cannot be reached over TLS: {other}").into(),
    };
    Unexpected(why).into()
}
