//! Connections, as the server holds them.
//!
//! **They write together what is said at about the same time.** tokio runs a
//! connection's task right after the stream that has something for it, so that
//! each of a thousand watchers' messages would be a write of its own, which
//! costs more than all the rest of its way. Here the connection's task goes to
//! the end of the queue once before it writes: what the streams in between have
//! to say goes along. Where nobody else is in the queue, it writes at once.
//!
//! **They can be cut**, where a stream does not take its end, and all of them
//! at the end of the drain.
//!
//! **They are counted**, and who connects and says nothing is let go: HTTP/2
//! looks after a connection only once the client has greeted.

use std::{
    io,
    net::SocketAddr,
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
use tonic::transport::server::Connected;

use crate::services::Peer;

/// What is worth a write of its own, in bytes: a replay is made of such.
const LARGE: usize = 4 * 1024;
/// What a client says first (RFC 9113, 3.4), in bytes.
const PREFACE: usize = 24;

/// All connections of a server.
#[derive(Clone, Debug)]
pub(super) struct Connections {
    cut: CancellationToken,
    /// How often something was read from one of them or written to it.
    moved: Arc<AtomicUsize>,
    room: Arc<Semaphore>,
    preface: Duration,
}

impl Connections {
    /// At most so many, of which each client has so long to greet.
    pub(super) fn new(most: usize, preface: Duration) -> Self {
        let room = Arc::new(Semaphore::new(most));
        Self { cut: CancellationToken::new(), moved: Arc::default(), room, preface }
    }

    /// Nothing if there are as many as may be.
    pub(super) fn plain(&self, stream: TcpStream) -> Option<Connection> {
        let address = stream.peer_addr().ok();
        self.open(Either::Left(stream), address)
    }

    /// What is written together is also encrypted together.
    pub(super) fn encrypted(&self, stream: TlsStream<TcpStream>) -> Option<Connection> {
        let address = stream.get_ref().0.peer_addr().ok();
        self.open(Either::Right(Box::new(stream)), address)
    }

    fn open(
        &self,
        stream: Either<TcpStream, Box<TlsStream<TcpStream>>>,
        address: Option<SocketAddr>,
    ) -> Option<Connection> {
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            tracing::warn!("too many connections: one more is closed");
            return None;
        };
        let cut = self.cut.child_token();
        let is_cut = Box::pin(cut.clone().cancelled_owned());
        let moved = Arc::clone(&self.moved);
        let preface = Some(Preface { missing: PREFACE, until: Box::pin(sleep(self.preface)) });
        Some(Connection {
            stream,
            address,
            moved,
            waited: false,
            large: false,
            preface,
            cut,
            is_cut,
            _room: room,
        })
    }

    /// Cuts them all.
    pub(super) fn cut(&self) {
        self.cut.cancel();
    }

    /// A number that stays the same as long as all of them are silent.
    pub(super) fn moved(&self) -> usize {
        self.moved.load(Relaxed)
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Either<TcpStream, Box<TlsStream<TcpStream>>>,
    address: Option<SocketAddr>,
    moved: Arc<AtomicUsize>,
    /// It has let the others go first.
    waited: bool,
    /// The last write was one that needs no company.
    large: bool,
    /// Until the client has said what it says first.
    preface: Option<Preface>,
    cut: CancellationToken,
    is_cut: Pin<Box<WaitForCancellationFutureOwned>>,
    _room: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Preface {
    /// Bytes.
    missing: usize,
    until: Pin<Box<Sleep>>,
}

impl Connection {
    /// Whoever waits for the client to read does not read meanwhile, and would not
    /// hear of a cut there.
    fn wait_unless_cut<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        ready!(self.is_cut.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer { address: self.address, cut: self.cut.clone() }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Some(preface) = &mut self.preface {
            preface.missing = preface.missing.saturating_sub(buf.filled().len() - before);
            if preface.missing == 0 {
                self.preface = None;
            } else if preface.until.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        ready!(read)?;
        self.moved.fetch_add(1, Relaxed);
        Poll::Ready(Ok(()))
    }
}

/// Not vectored: h2 then gathers small frames in a buffer of its own.
impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if !std::mem::replace(&mut self.waited, true) {
            // A task that wakes itself goes to the end of the queue.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Poll::Ready(written) = Pin::new(&mut self.stream).poll_write(cx, buf)? else {
            return self.wait_unless_cut(cx);
        };
        self.large = written >= LARGE;
        self.moved.fetch_add(1, Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if Pin::new(&mut self.stream).poll_flush(cx)?.is_pending() {
            return self.wait_unless_cut(cx);
        }
        self.waited = self.large;
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
    async fn a_connection_whose_client_reads_nothing_is_cut_all_the_same() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let _client = TcpStream::connect(listener.local_addr().expect("it listens")).await.expect("a client");
        let (stream, _) = listener.accept().await.expect("a client");
        let connections = Connections::new(1, Duration::from_secs(60));
        let mut connection = connections.plain(stream).expect("there is room");
        let chunk = vec![0; 64 * 1024];
        let written = Arc::clone(&connection.moved);
        let writing = async { while connection.write_all(&chunk).await.is_ok() {} };
        let cutting = async {
            // Until nothing goes any more.
            let mut last = (0, Instant::now());
            while last.1.elapsed() < Duration::from_millis(200) {
                sleep(Duration::from_millis(10)).await;
                let now = written.load(Relaxed);
                if now != last.0 {
                    last = (now, Instant::now());
                }
            }
            connections.cut();
        };
        timeout(Duration::from_secs(10), async { tokio::join!(writing, cutting) }).await.expect("the end");
    }
}
