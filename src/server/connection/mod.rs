//! The server's side of a connection, below HTTP/2.
//!
//! **Writes are batched.** tokio runs a connection's task right after the stream that
//! wrote to it, so that each message of a thousand watches would be a system call of
//! its own, which costs more than all other work on the message. Here the connection's
//! task goes to the end of tokio's queue once before it writes, and the messages of
//! the streams before it in the queue share the write. With an empty queue it writes
//! at once.
//!
//! **Connections can be cut**, all of them at the end of the drain.
//!
//! **Connections are limited** in number, and in the time until their version of HTTP is
//! known: HTTP/2's keepalive watches a connection only from the preface on, and the limits of
//! [`http1`] begin with the first byte that is not of the preface.

mod http1;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tokio_rustls::server::TlsStream;
use tokio_util::{
    either::Either,
    sync::{CancellationToken, WaitForCancellationFutureOwned},
};

use self::http1::{Addresses, Http1};
pub(super) use self::http1::{Exchange, Http1Limits, UnderWay};

/// Size of a write, in bytes, from which the next one is not delayed for batching, as
/// in the replay of a log.
const LARGE_WRITE_BYTES: usize = 4 * 1024;
/// The client's HTTP/2 preface (RFC 9113, 3.4), without SETTINGS.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Without TLS, or over TLS, where batched messages are also encrypted together.
pub(super) type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Limits, counts and cuts the connections of a server.
#[derive(Clone, Debug)]
pub(super) struct Connections {
    cut: CancellationToken,
    /// Number of reads and writes on all connections.
    activity: Arc<AtomicUsize>,
    permits: Arc<Semaphore>,
    preface_timeout: Duration,
    http1: Addresses,
}

impl Connections {
    /// At most `most` connections; each must send its preface, or begin with another
    /// version of HTTP, within `preface_timeout`.
    pub(super) fn new(most: usize, preface_timeout: Duration, http1: Http1Limits) -> Self {
        let permits = Arc::new(Semaphore::new(most));
        let http1 = Addresses::new(http1);
        Self { cut: CancellationToken::new(), activity: Arc::default(), permits, preface_timeout, http1 }
    }

    /// A connection over this stream, or none if the limit is reached.
    pub(super) fn open(&self, stream: Stream) -> Option<Connection> {
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            tracing::warn!("the limit of open connections is reached: closing a new connection");
            return None;
        };
        let address = tcp(&stream).peer_addr();
        let timeout = Box::pin(sleep(self.preface_timeout));
        Some(Connection {
            stream,
            address: address.ok(),
            activity: Arc::clone(&self.activity),
            yielded: false,
            large: false,
            version: Version::Unknown(Preface { missing: PREFACE, timeout }),
            exchange: Exchange::default(),
            addresses: self.http1.clone(),
            cancelled: Box::pin(self.cut.child_token().cancelled_owned()),
            _permit: permit,
        })
    }

    pub(super) fn cut(&self) {
        self.cut.cancel();
    }

    /// A number that changes with each read and write on a connection.
    pub(super) fn activity(&self) -> usize {
        self.activity.load(Relaxed)
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    address: Option<SocketAddr>,
    activity: Arc<AtomicUsize>,
    /// The next write is not delayed: the task has already gone to the end of the
    /// queue, or the last write was large.
    yielded: bool,
    /// The last write had at least [`LARGE_WRITE_BYTES`].
    large: bool,
    version: Version,
    /// The request of HTTP/1.1 that is under way.
    exchange: Exchange,
    addresses: Addresses,
    /// Completes when the connection is cut.
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    _permit: OwnedSemaphorePermit,
}

/// The version of HTTP, as far as it is known.
#[derive(Debug)]
enum Version {
    /// So far, the client has sent the beginning of the preface of HTTP/2.
    Unknown(Preface),
    Http1(Http1),
    Http2,
}

#[derive(Debug)]
struct Preface {
    /// The part that the client has not sent yet.
    missing: &'static [u8],
    timeout: Pin<Box<Sleep>>,
}

impl Preface {
    /// Whether the client goes on with the preface.
    fn goes_on(&mut self, bytes: &[u8]) -> bool {
        let expected = bytes.len().min(self.missing.len());
        let (expected, missing) = self.missing.split_at(expected);
        self.missing = missing;
        bytes.starts_with(expected)
    }
}

fn tcp(stream: &Stream) -> &TcpStream {
    match stream {
        Either::Left(plain) => plain,
        Either::Right(encrypted) => encrypted.get_ref().0,
    }
}

impl Connection {
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    pub(super) fn exchange(&self) -> Exchange {
        self.exchange.clone()
    }

    /// Takes note of what was read; an error if the client takes too long or may not connect.
    fn note(&mut self, bytes: &[u8], cx: &mut Context<'_>) -> io::Result<()> {
        if let Version::Unknown(preface) = &mut self.version {
            if !preface.goes_on(bytes) {
                let address: Option<IpAddr> = self.address.map(|address| address.ip());
                let exchange = self.exchange.clone();
                self.version =
                    Version::Http1(self.addresses.connected(tcp(&self.stream), address, exchange)?);
            } else if preface.missing.is_empty() {
                self.version = Version::Http2;
            } else if preface.timeout.as_mut().poll(cx).is_ready() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        match &mut self.version {
            Version::Http1(http1) => http1.read(!bytes.is_empty(), cx),
            Version::Unknown(_) | Version::Http2 => Ok(()),
        }
    }

    /// Pending, or an error once the connection is cut. A task that waits for a write
    /// does not poll reads, where a cut is also noticed.
    fn pending_unless_cut<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        ready!(self.cancelled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cancelled.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.note(&buf.filled()[before..], cx)?;
        ready!(read)?;
        self.activity.fetch_add(1, Relaxed);
        Poll::Ready(Ok(()))
    }
}

/// Without vectored writes, so that h2 gathers small frames in its own buffer.
impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if !std::mem::replace(&mut self.yielded, true) {
            // A task that wakes itself goes to the end of tokio's queue.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Poll::Ready(written) = Pin::new(&mut self.stream).poll_write(cx, buf)? else {
            return self.pending_unless_cut(cx);
        };
        self.large = written >= LARGE_WRITE_BYTES;
        self.activity.fetch_add(1, Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if Pin::new(&mut self.stream).poll_flush(cx)?.is_pending() {
            return self.pending_unless_cut(cx);
        }
        self.yielded = self.large;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::AsyncWriteExt as _,
        net::TcpListener,
        time::{Instant, timeout},
    };

    use super::*;

    #[tokio::test]
    async fn a_connection_whose_client_does_not_read_can_be_cut() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let _client =
            TcpStream::connect(listener.local_addr().expect("an address")).await.expect("a connection");
        let (stream, _) = listener.accept().await.expect("a connection");
        let connections = Connections::new(1, Duration::from_secs(60), Http1Limits::of_a_test());
        let mut connection = connections.open(Either::Left(stream)).expect("a free permit");
        let chunk = vec![0; 64 * 1024];
        let activity = Arc::clone(&connection.activity);
        let writing = async { while connection.write_all(&chunk).await.is_ok() {} };
        let cutting = async {
            // Until no more bytes can be written.
            let mut last = (0, Instant::now());
            while last.1.elapsed() < Duration::from_millis(200) {
                sleep(Duration::from_millis(10)).await;
                let now = activity.load(Relaxed);
                if now != last.0 {
                    last = (now, Instant::now());
                }
            }
            connections.cut();
        };
        timeout(Duration::from_secs(10), async { tokio::join!(writing, cutting) })
            .await
            .expect("the write ends");
    }
}
