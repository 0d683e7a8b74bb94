//! Connections that write what is said to them at about the same time in one
//! go.
//!
//! tokio runs a connection's task right after the stream that has something for
//! it, so that each of a thousand watchers' messages would be a write of its
//! own, which costs more than all the rest of its way. Here the connection's
//! task goes to the end of the queue once before it writes: what the streams in
//! between have to say goes along. Where nobody else is in the queue, it writes
//! at once.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// A connection that waits for a turn before it writes.
#[derive(Debug)]
pub(super) struct Unhurried<C> {
    connection: C,
    /// It has let the others go first.
    waited: bool,
    /// The last write was one that needs no company.
    large: bool,
}

/// What is worth a write of its own, in bytes: a replay is made of such.
const LARGE: usize = 4 * 1024;

impl<C> Unhurried<C> {
    pub(super) fn new(connection: C) -> Self {
        Self { connection, waited: false, large: false }
    }
}

impl<C: Connected> Connected for Unhurried<C> {
    type ConnectInfo = C::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.connection.connect_info()
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Unhurried<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(cx, buf)
    }
}

/// Not vectored: h2 then gathers small frames in a buffer of its own.
impl<C: AsyncWrite + Unpin> AsyncWrite for Unhurried<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if !std::mem::replace(&mut self.waited, true) {
            // A task that wakes itself goes to the end of the queue.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let written = ready!(Pin::new(&mut self.connection).poll_write(cx, buf))?;
        self.large = written >= LARGE;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.connection).poll_flush(cx))?;
        self.waited = self.large;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}
