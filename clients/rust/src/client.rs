//! A client in Rust: the generated clients over one connection and with one
//! credential.

use std::net::IpAddr;

use http::{
    Uri,
    uri::{Authority, Scheme},
};
use tokio_rustls::rustls::ClientConfig;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::{
    PublisherBuilder, Watch,
    connection::{connect, connect_lazy},
    pb::{
        WatchEventsRequest, auth_service_client::AuthServiceClient,
        configuration_service_client::ConfigurationServiceClient, event_service_client::EventServiceClient,
        job_service_client::JobServiceClient,
    },
};

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

    /// A client that connects with its first call, and whose calls fail while there is no
    /// server: for a publisher with a spool, which needs none. The address is as for
    /// [`Client::connect`], or with TLS settings as for [`Client::connect_with_tls`].
    pub async fn connect_lazy(server: &str, tls: Option<ClientConfig>) -> Result<Self, ClientError> {
        let url = server_url(server, tls.is_some()).ok_or_else(|| ClientError::Address(server.to_owned()))?;
        Ok(Self::new(connect_lazy(server, &url, tls).await?))
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
        Watch::new(self.events(), request)
    }

    /// Appends events to jobs in the background: each once, and those of a job in order.
    /// The settings come first; [`PublisherBuilder::start`] starts the publisher.
    pub fn publisher(&self) -> PublisherBuilder {
        PublisherBuilder::new(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
