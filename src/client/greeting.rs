//! How a server begins a connection: an error that says what it speaks if that is not what the
//! client speaks, and what to do about it.

use std::{future::Future, io, sync::Arc};

use http::{Uri, uri::Scheme};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{self, CertificateError, ClientConfig, pki_types::ServerName},
};

use super::{CONNECT_TIMEOUT, ClientError};
use crate::{
    config::ClientTls,
    tls::{self, TlsError},
};

/// What a client of HTTP/2 sends first, with empty SETTINGS.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// Length of the header of a frame of HTTP/2.
const FRAME_HEADER_BYTES: usize = 9;
const NO_HANDSHAKE: &str =
    "closes the connection during the TLS handshake: write http://SERVER if it does not speak TLS";

/// An error unless the server begins with HTTP/2, and for `https` with a certificate that is
/// trusted. It opens a connection of its own: a client of tonic counts as connected before it
/// has received a byte of HTTP/2, and its calls then fail without a cause.
pub(super) async fn expect_http2(server: &str, url: &Uri, tls: &ClientTls) -> Result<(), ClientError> {
    let encrypted = url.scheme() == Some(&Scheme::HTTPS);
    let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let failed = |error: io::Error| ClientError::Connect(server.to_owned(), error.into());
    let answer = |answer: String| {
        let authority = url.authority().map(ToString::to_string).unwrap_or_default();
        ClientError::Answer { server: server.to_owned(), answer: answer.replace("SERVER", &authority) }
    };
    let port = url.port_u16().unwrap_or(if encrypted { 443 } else { 80 });
    let stream = in_time(TcpStream::connect((host, port))).await.map_err(failed)?;
    let first = if encrypted {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| TlsError(format!("{host} cannot be verified: {error}")))?;
        let connector = TlsConnector::from(Arc::new(config(tls).await?));
        match in_time(connector.connect(name, stream)).await {
            Ok(stream) => first_bytes(stream).await,
            Err(error) if is_closed(&error) => return Err(answer(NO_HANDSHAKE.to_owned())),
            Err(error) => return Err(refusal(&error).map_or_else(|| failed(error), answer)),
        }
    } else {
        first_bytes(stream).await
    };
    let first = first.map_err(|error| refusal(&error).map_or_else(|| failed(error), answer))?;
    match unexpected(&first, encrypted) {
        None => Ok(()),
        Some(text) => Err(answer(text.to_owned())),
    }
}

/// Whether the server has closed the connection, with or without a reset.
fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

/// The result, or an error after [`CONNECT_TIMEOUT`].
async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, "it does not answer");
    timeout(CONNECT_TIMEOUT, work).await.map_err(|_| late())?
}

/// What the server sends first; less than a frame's header if it closes the connection.
async fn first_bytes(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<Vec<u8>> {
    let mut first = Vec::new();
    in_time(async {
        // What a server has sent before it closes the connection can still be read.
        let sending = async {
            stream.write_all(PREFACE).await?;
            stream.flush().await
        };
        match sending.await {
            Err(error) if !is_closed(&error) => return Err(error),
            Ok(()) | Err(_) => {}
        }
        while first.len() < FRAME_HEADER_BYTES {
            match stream.read_buf(&mut first).await {
                Ok(1..) => {}
                Err(error) if !is_closed(&error) => return Err(error),
                Ok(0) | Err(_) => break,
            }
        }
        Ok(())
    })
    .await?;
    Ok(first)
}

/// TLS as tonic does it.
async fn config(files: &ClientTls) -> Result<ClientConfig, TlsError> {
    let unusable = |error: rustls::Error| TlsError(format!("cannot use TLS: {error}"));
    let builder = ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(tls::trusted(files.tls_ca.as_deref()).await?);
    let mut config = match (&files.tls_client_cert, &files.tls_client_key) {
        (Some(certificate), Some(key)) => {
            let chain = tls::certificates(certificate, &tls::read(certificate).await?)?;
            let key = tls::private_key(key, &tls::read(key).await?)?;
            builder.with_client_auth_cert(chain, key).map_err(unusable)?
        }
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
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

/// Why TLS failed, and what to do about it; none for an error of the network.
#[expect(clippy::wildcard_enum_match_arm, reason = "the enum of rustls is not exhaustive")]
fn refusal(error: &io::Error) -> Option<String> {
    use CertificateError::{NotValidForName, NotValidForNameContext, UnknownIssuer};
    Some(match error.get_ref()?.downcast_ref()? {
        rustls::Error::InvalidMessage(_) => {
            "does not speak TLS: write http://SERVER for an unencrypted connection".to_owned()
        }
        rustls::Error::InvalidCertificate(UnknownIssuer) => {
            "has a certificate of an unknown authority: name the PEM file of the authority with --tls-ca"
                .to_owned()
        }
        rustls::Error::InvalidCertificate(why @ (NotValidForName | NotValidForNameContext { .. })) => {
            format!("has a certificate for other names ({why}): write one of them in the server's address")
        }
        rustls::Error::InvalidCertificate(why) => format!("has a certificate that is not trusted: {why}"),
        rustls::Error::AlertReceived(alert) => format!(
            "ends the TLS handshake ({alert:?}): if it asks for a client certificate, set --tls-client-cert and \
             --tls-client-key to one of an authority that it trusts"
        ),
        other => format!("cannot be reached over TLS: {other}"),
    })
}
