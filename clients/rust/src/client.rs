//! A client in Rust: the generated clients over one connection and with one
//! credential, and a watch that resumes after interruptions.

use std::{error::Error as _, fmt, net::IpAddr, time::Duration};

use http::{
    Uri,
    uri::{Authority, Scheme},
};
use tokio_rustls::rustls::ClientConfig;
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::{
    connection::connect,
    pb::{
        WatchEndReason, WatchEventsRequest, WatchEventsResponse, auth_service_client::AuthServiceClient,
        configuration_service_client::ConfigurationServiceClient, event_service_client::EventServiceClient,
        job_service_client::JobServiceClient, watch_events_request::Start, watch_events_response::Message,
    },
};

/// Pause before an interrupted watch is resumed; it doubles with each further
/// failure.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why a client cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server's address cannot be parsed.
    #[error("{0:?} is not a server address: write HOST:PORT, https://HOST:PORT or http://HOST:PORT")]
    Address(String),
    /// TLS cannot be set up.
    #[error("cannot use TLS: {0}")]
    Tls(String),
    /// The connection failed.
    #[error("cannot connect to the server at {0}")]
    Connect(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server speaks another protocol than the client, or its certificate is not trusted.
    #[error("the server at {server} {answer}")]
    Answer {
        /// The server's address, as it was given.
        server: String,
        /// What the server does, and what to do about it.
        answer: String,
    },
    /// The secret contains characters that gRPC metadata cannot carry.
    #[error("the credential contains characters that no milepost credential has: copy it again")]
    Credential,
}

/// A connection to a server, and the credential of its calls. A broken connection
/// is made again by the next call. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    bearer: Bearer,
}

/// Adds the credential to each call. `Debug` shows no value that is marked as sensitive.
#[derive(Clone, Debug, Default)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// The URL of a server's address, as [`Client::connect`] understands it; none if the address
/// cannot be parsed. An address without a scheme is encrypted, except for a loopback address
/// unless the client `has_tls_settings`.
pub fn server_url(server: &str, has_tls_settings: bool) -> Option<Uri> {
    if server.contains("://") {
        let url: Uri = server.parse().ok()?;
        let known = url.scheme() == Some(&Scheme::HTTP) || url.scheme() == Some(&Scheme::HTTPS);
        return known.then_some(url);
    }
    let authority: Authority = server.parse().ok()?;
    authority.port()?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let loopback = host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
    let scheme = if loopback && !has_tls_settings { Scheme::HTTP } else { Scheme::HTTPS };
    Uri::builder().scheme(scheme).authority(authority).path_and_query("/").build().ok()
}

type OnInterruption = dyn FnMut(&Status, Duration) + Send;
/// A connection that adds a credential to each call.
pub type Service = InterceptedService<Channel, Bearer>;

impl Client {
    /// Connects without a credential. Connecting, the TLS handshake and the server's first
    /// answer may each take 5 s. `server` is `https://HOST:PORT`, encrypted; `http://HOST:PORT`,
    /// unencrypted, so that the network can read the credential; or `HOST:PORT`,
    /// encrypted unless the host is loopback. The server is verified by the
    /// authorities of this system.
    pub async fn connect(server: &str) -> Result<Self, ClientError> {
        Self::connect_by(server, None).await
    }

    /// Connects as [`Client::connect`] does, but verifies the server by these
    /// settings, and encrypts each address except for `http://HOST:PORT`.
    pub async fn connect_with_tls(server: &str, tls: ClientConfig) -> Result<Self, ClientError> {
        Self::connect_by(server, Some(tls)).await
    }

    async fn connect_by(server: &str, tls: Option<ClientConfig>) -> Result<Self, ClientError> {
        let url = server_url(server, tls.is_some()).ok_or_else(|| ClientError::Address(server.to_owned()))?;
        Ok(Self::new(connect(server, &url, tls).await?))
    }

    /// A client without a credential over a channel that is set up otherwise than
    /// [`Client::connect`] does it.
    pub fn new(channel: Channel) -> Self {
        Self { channel, bearer: Bearer::default() }
    }

    /// The same connection with the secret of a session, an API key or a watch
    /// token. An error if the secret cannot be sent as metadata.
    pub fn with_credential(&self, secret: &str) -> Result<Self, ClientError> {
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {secret}").parse().map_err(|_| ClientError::Credential)?;
        value.set_sensitive(true);
        Ok(Self { channel: self.channel.clone(), bearer: Bearer(Some(value)) })
    }

    /// The connection with the credential, for any other generated client, such as that
    /// of the health service.
    pub fn service(&self) -> Service {
        Service::new(self.channel.clone(), self.bearer.clone())
    }

    /// The generated client for users, sessions, API keys and watch tokens.
    pub fn auth(&self) -> AuthServiceClient<Service> {
        AuthServiceClient::new(self.service())
    }

    /// The generated client for job configurations.
    pub fn configurations(&self) -> ConfigurationServiceClient<Service> {
        ConfigurationServiceClient::new(self.service())
    }

    /// The generated client for jobs.
    pub fn jobs(&self) -> JobServiceClient<Service> {
        JobServiceClient::new(self.service())
    }

    /// The generated client for events.
    pub fn events(&self) -> EventServiceClient<Service> {
        EventServiceClient::new(self.service())
    }

    /// A watch that starts as the request says and goes on until its job is
    /// closed. After a broken connection or a draining server it resumes.
    pub fn watch(&self, request: WatchEventsRequest) -> Watch {
        Watch {
            events: self.events(),
            request,
            stream: None,
            failures: 0,
            ended: false,
            on_interruption: Box::new(|_, _| {}),
        }
    }
}

/// See [`Client::watch`].
pub struct Watch {
    events: EventServiceClient<Service>,
    request: WatchEventsRequest,
    stream: Option<Streaming<WatchEventsResponse>>,
    /// Consecutive failures, without a message between them.
    failures: u32,
    ended: bool,
    on_interruption: Box<OnInterruption>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("request", &self.request)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Watch {
    /// Calls `on_interruption` whenever the watch is interrupted, with the cause and
    /// with the pause before the watch is resumed.
    #[must_use]
    pub fn on_interruption(
        mut self,
        on_interruption: impl FnMut(&Status, Duration) + Send + 'static,
    ) -> Self {
        self.on_interruption = Box::new(on_interruption);
        self
    }

    /// The next message; none after the `end` of a closed job. Every event arrives
    /// exactly once; `caught_up` is sent again after each interruption.
    ///
    /// An error is one that no retry cures, such as UNAUTHENTICATED or NOT_FOUND,
    /// and ends the watch. Dropping the future loses no message.
    pub async fn next(&mut self) -> Result<Option<WatchEventsResponse>, Status> {
        while !self.ended {
            let interruption = match self.receive().await {
                Ok(Some(message)) => {
                    self.failures = 0;
                    self.request.start = Some(Start::ResumeToken(message.resume_token.clone()));
                    let body = &message.message;
                    let ends_by = |reason| matches!(body, Some(Message::End(end)) if end.reason() == reason);
                    if !ends_by(WatchEndReason::Draining) {
                        self.ended = ends_by(WatchEndReason::JobClosed);
                        return Ok(Some(message));
                    }
                    Status::unavailable("the server is shutting down")
                }
                Ok(None) => Status::unavailable("the stream ended without an end message"),
                Err(status) if is_transient(&status) => status,
                Err(status) => {
                    self.ended = true;
                    return Err(status);
                }
            };
            self.stream = None;
            let pause = pause(self.failures);
            self.failures = self.failures.saturating_add(1);
            (self.on_interruption)(&interruption, pause);
            tokio::time::sleep(pause).await;
        }
        Ok(None)
    }

    async fn receive(&mut self) -> Result<Option<WatchEventsResponse>, Status> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let stream = self.events.watch_events(self.request.clone()).await?.into_inner();
                self.stream.insert(stream)
            }
        };
        stream.message().await
    }
}

/// Whether the same call may succeed later: the server is unavailable or
/// overloaded, or the connection broke. A broken connection is a status with an
/// error source, which no status sent by a server has.
pub fn is_transient(status: &Status) -> bool {
    let code = status.code();
    let broken = status.source().is_some();
    matches!(code, Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded)
        || (broken && matches!(code, Code::Unknown | Code::Internal | Code::Cancelled))
}

/// Half of it certain and half by chance, so that all watchers of a server
/// that restarts do not come back in one instant.
fn pause(failures: u32) -> Duration {
    let whole = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures)).min(LONGEST_PAUSE);
    let chance = getrandom::u32().map_or(1.0, |random| f64::from(random) / f64::from(u32::MAX));
    whole.mul_f64(0.5 + 0.5 * chance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit() {
        for (failures, shortest_ms, longest_ms) in
            [(0, 50, 100), (3, 400, 800), (6, 2500, 5000), (99, 2500, 5000)]
        {
            let pause = pause(failures);
            assert!(
                pause >= Duration::from_millis(shortest_ms) && pause <= Duration::from_millis(longest_ms)
            );
        }
    }

    #[test]
    fn only_loopback_and_explicit_http_addresses_are_unencrypted() {
        for (server, is_encrypted, expected) in [
            ("127.0.0.1:50051", false, Some("http://127.0.0.1:50051/")),
            ("127.9.9.9:1", false, Some("http://127.9.9.9:1/")),
            ("[::1]:50051", false, Some("http://[::1]:50051/")),
            ("localhost:50051", false, Some("http://localhost:50051/")),
            ("localhost:50051", true, Some("https://localhost:50051/")),
            ("localhost.example.com:50051", false, Some("https://localhost.example.com:50051/")),
            ("127.0.0.1.example.com:50051", false, Some("https://127.0.0.1.example.com:50051/")),
            ("10.0.0.1:50051", false, Some("https://10.0.0.1:50051/")),
            ("[2001:db8::1]:50051", false, Some("https://[2001:db8::1]:50051/")),
            ("http://10.0.0.1:50051", true, Some("http://10.0.0.1:50051/")),
            ("https://127.0.0.1:50051", false, Some("https://127.0.0.1:50051/")),
            ("HTTPS://a:1", false, Some("https://a:1/")),
            ("localhost", false, None),
            ("ftp://a:1", false, None),
            ("unix:///a", false, None),
            ("a b", false, None),
            ("", false, None),
        ] {
            let url = server_url(server, is_encrypted).map(|url| url.to_string());
            assert_eq!(url.as_deref(), expected, "{server}");
        }
    }

    #[test]
    fn internal_and_unauthenticated_are_permanent_but_a_broken_connection_is_transient() {
        assert!(is_transient(&Status::unavailable("")));
        assert!(!is_transient(&Status::internal("")));
        assert!(!is_transient(&Status::unauthenticated("")));
        let broken = Status::from_error(Box::new(std::io::Error::other("connection reset")));
        assert!(is_transient(&broken));
    }
}
