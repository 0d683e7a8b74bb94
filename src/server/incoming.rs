//! Accepts connections, and performs the TLS handshake if TLS is on.
//!
//! Handshakes run concurrently, beside the accepting of further connections. Each has
//! a timeout, and their number is limited: one more ends the oldest. An honest client
//! has finished its handshake long before that, and silent clients must not keep
//! others out.

use std::{collections::VecDeque, pin::pin, time::Duration};

use futures_util::{
    Stream, StreamExt as _,
    future::{Either, ready},
    stream,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use super::{
    connection::{self, Connection, Connections},
    tls::Tls,
};
use crate::limits;

/// Pause after a failed accept: the process may have no file descriptors left, and an
/// immediate retry would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An endless stream of connections. Dropping it stops accepting and ends the
/// handshakes in progress.
pub(super) fn incoming(
    listener: TcpListener,
    tls: Option<Tls>,
    connections: Connections,
) -> impl Stream<Item = Connection> {
    let accepted = accepted(listener);
    let Some(tls) = tls else {
        let open = move |stream| ready(connections.open(connection::Stream::Left(stream)));
        return Either::Left(accepted.filter_map(open));
    };
    let (ready, connections_ready) = mpsc::channel(1);
    let handshakes = AbortOnDropHandle::new(tokio::spawn(run_handshakes(
        accepted,
        move || tls.acceptor(),
        connections,
        ready,
        limits::HANDSHAKES,
    )));
    Either::Right(stream::unfold((connections_ready, handshakes), async |(mut ready, handshakes)| {
        let connection = ready.recv().await?;
        Some((connection, (ready, handshakes)))
    }))
}

/// An endless stream of TCP connections.
fn accepted(listener: TcpListener) -> impl Stream<Item = TcpStream> {
    stream::unfold(listener, async |listener| {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    // Small messages are not held back to fill a packet.
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(%error, "an accepted connection has failed");
                        continue;
                    }
                    return Some((stream, listener));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

/// Runs at most `most` handshakes at once, each with the certificate that `acceptor`
/// returns at its start.
async fn run_handshakes(
    accepted: impl Stream<Item = TcpStream>,
    acceptor: impl Fn() -> TlsAcceptor,
    connections: Connections,
    ready: mpsc::Sender<Connection>,
    most: usize,
) {
    let mut accepted = pin!(accepted);
    let mut under_way: VecDeque<AbortOnDropHandle<()>> = VecDeque::new();
    while let Some(stream) = accepted.next().await {
        under_way.retain(|handshake| !handshake.is_finished());
        if under_way.len() >= most {
            tracing::debug!("the limit of concurrent TLS handshakes is reached: ending the oldest");
            under_way.pop_front();
        }
        let handshake = acceptor().accept(stream);
        let (ready, connections) = (ready.clone(), connections.clone());
        under_way.push_back(AbortOnDropHandle::new(tokio::spawn(async move {
            match timeout(limits::HANDSHAKE, handshake).await {
                // The send fails only when the server is shutting down.
                Ok(Ok(stream)) => {
                    if let Some(connection) = connections.open(connection::Stream::Right(Box::new(stream))) {
                        drop(ready.send(connection).await);
                    }
                }
                // Of level debug: every client can cause these.
                Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                Err(_) => tracing::debug!("a TLS handshake timed out"),
            }
        })));
    }
}

#[cfg(test)]
mod tests {
    use std::{io, net::SocketAddr, sync::Arc};

    use tokio::io::AsyncReadExt as _;
    use tokio_rustls::rustls::{ServerConfig, server::ResolvesServerCertUsingSni};

    use super::*;
    use crate::{server::connection::Http1Limits, tls::provider};

    #[tokio::test]
    async fn one_handshake_too_many_ends_the_oldest() {
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("ring supports them")
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address: SocketAddr = listener.local_addr().expect("an address");
        let (ready, _connections) = mpsc::channel(1);
        let _handshakes = AbortOnDropHandle::new(tokio::spawn(run_handshakes(
            accepted(listener),
            move || acceptor.clone(),
            Connections::new(2, limits::HANDSHAKE, Http1Limits::of_a_test()),
            ready,
            2,
        )));

        let mut silent = Vec::new();
        for _ in 0..3 {
            silent.push(TcpStream::connect(address).await.expect("the server listens"));
        }
        // Well before the timeout of a handshake.
        let end =
            timeout(limits::HANDSHAKE / 2, silent[0].read(&mut [0])).await.expect("a closed connection");
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        for stream in &silent[1..] {
            let read = stream.try_read(&mut [0]);
            assert!(read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock));
        }
    }

    #[tokio::test]
    async fn a_connection_beyond_the_limit_is_closed_and_a_missing_preface_times_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address: SocketAddr = listener.local_addr().expect("an address");
        let connections = Connections::new(1, Duration::from_millis(50), Http1Limits::of_a_test());
        let mut incoming = pin!(incoming(listener, None, connections));
        let connect = move || async move { TcpStream::connect(address).await.expect("the server listens") };
        let mut first = connect().await;
        let mut accepted = incoming.next().await.expect("a connection");
        let mut refused = connect().await;
        let mut byte = [0];
        tokio::select! {
            _ = incoming.next() => panic!("no permit is free"),
            end = refused.read(&mut byte) => assert!(matches!(end, Ok(0) | Err(_)), "{end:?}"),
        }

        tokio::io::AsyncWriteExt::write_all(&mut first, b"PRI * HTTP/2.0").await.expect("an open connection");
        let mut preface = [0; 64];
        assert_eq!(accepted.read(&mut preface).await.expect("the bytes sent"), 14);
        let end = accepted.read(&mut preface).await;
        assert_eq!(end.expect_err("a timeout").kind(), io::ErrorKind::TimedOut);
    }
}
