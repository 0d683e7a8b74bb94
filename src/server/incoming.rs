//! Connections as they come in, over TLS once both sides have shaken hands.
//!
//! Handshakes go on beside each other and beside the accepting of others, each
//! within a time, and not too many at once: one more ends the oldest, since an
//! honest client is long done by then and those who say nothing must not keep
//! others out.

use std::{collections::VecDeque, io, pin::pin, time::Duration};

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
use tonic::transport::server::TcpIncoming;

use super::{
    connection::{Connection, Connections},
    tls::Tls,
};
use crate::limits;

/// Pause after a connection could not be accepted: there may be no file
/// descriptors left, and the next attempt would fail just so.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections, without end. Dropping it stops accepting and ends the
/// handshakes that are under way.
pub(super) fn incoming(
    listener: TcpListener,
    tls: Option<Tls>,
    connections: Connections,
) -> impl Stream<Item = io::Result<Connection>> {
    let accepted = TcpIncoming::from(listener).with_nodelay(Some(true)).filter_map(async |accepted| {
        if let Err(error) = &accepted {
            tracing::warn!(%error, "cannot accept a connection");
            sleep(ACCEPT_PAUSE).await;
        }
        accepted.ok()
    });
    let Some(tls) = tls else {
        return Either::Left(accepted.filter_map(move |stream| ready(connections.plain(stream).map(Ok))));
    };
    let (ready, shaken) = mpsc::channel(1);
    let shaking = AbortOnDropHandle::new(tokio::spawn(shake_hands(
        accepted,
        move || tls.acceptor(),
        connections,
        ready,
        limits::HANDSHAKES,
    )));
    Either::Right(stream::unfold((shaken, shaking), async |(mut shaken, shaking)| {
        let connection = shaken.recv().await?;
        Some((Ok(connection), (shaken, shaking)))
    }))
}

/// At most `most` handshakes at once, each with what `acceptor` says then.
async fn shake_hands(
    accepted: impl Stream<Item = TcpStream>,
    acceptor: impl Fn() -> TlsAcceptor,
    connections: Connections,
    ready: mpsc::Sender<Connection>,
    most: usize,
) {
    let mut accepted = pin!(accepted);
    let mut under_way: VecDeque<AbortOnDropHandle<()>> = VecDeque::new();
    while let Some(stream) = accepted.next().await {
        while under_way.front().is_some_and(AbortOnDropHandle::is_finished) {
            under_way.pop_front();
        }
        if under_way.len() >= most {
            under_way.retain(|handshake| !handshake.is_finished());
        }
        if under_way.len() >= most {
            tracing::debug!("too many handshakes at once: ending the oldest");
            under_way.pop_front();
        }
        let handshake = acceptor().accept(stream);
        let (shaken, connections) = (ready.clone(), connections.clone());
        under_way.push_back(AbortOnDropHandle::new(tokio::spawn(async move {
            match timeout(limits::HANDSHAKE, handshake).await {
                // Where nobody takes it any more, the server shuts down.
                Ok(Ok(stream)) => {
                    if let Some(connection) = connections.encrypted(stream) {
                        drop(shaken.send(connection).await);
                    }
                }
                // Anybody can make these.
                Ok(Err(error)) => tracing::debug!(%error, "a handshake failed"),
                Err(_) => tracing::debug!("a handshake took too long"),
            }
        })));
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use tokio::io::AsyncReadExt as _;
    use tokio_rustls::rustls::{ServerConfig, server::ResolvesServerCertUsingSni};

    use super::*;
    use crate::tls::provider;

    #[tokio::test]
    async fn where_too_many_shake_hands_the_oldest_is_let_go() {
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("ring has them")
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address: SocketAddr = listener.local_addr().expect("its address");
        let accepted = TcpIncoming::from(listener).filter_map(async |accepted| accepted.ok());
        let (ready, _connections) = mpsc::channel(1);
        let _shaking = AbortOnDropHandle::new(tokio::spawn(shake_hands(
            accepted,
            move || acceptor.clone(),
            Connections::new(2, limits::HANDSHAKE),
            ready,
            2,
        )));

        let mut silent = Vec::new();
        for _ in 0..3 {
            silent.push(TcpStream::connect(address).await.expect("it listens"));
        }
        // Long before its time is over.
        let end = timeout(limits::HANDSHAKE / 2, silent[0].read(&mut [0])).await.expect("its end");
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        for stream in &silent[1..] {
            let read = stream.try_read(&mut [0]);
            assert!(read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock));
        }
    }
    #[tokio::test]
    async fn who_connects_when_there_are_too_many_is_closed_and_who_says_nothing_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address: SocketAddr = listener.local_addr().expect("its address");
        let mut incoming = pin!(incoming(listener, None, Connections::new(1, Duration::from_millis(50))));
        let connect = move || async move { TcpStream::connect(address).await.expect("it listens") };
        let mut first = connect().await;
        let mut accepted = incoming.next().await.expect("a connection").expect("no error");
        let mut refused = connect().await;
        let mut byte = [0];
        tokio::select! {
            _ = incoming.next() => panic!("there is no room"),
            end = refused.read(&mut byte) => assert!(matches!(end, Ok(0) | Err(_)), "{end:?}"),
        }

        tokio::io::AsyncWriteExt::write_all(&mut first, b"PRI * HTTP/2.0").await.expect("it is open");
        let mut preface = [0; 64];
        assert_eq!(accepted.read(&mut preface).await.expect("what was said"), 14);
        let end = accepted.read(&mut preface).await;
        assert_eq!(end.expect_err("too late").kind(), io::ErrorKind::TimedOut);
    }
}
