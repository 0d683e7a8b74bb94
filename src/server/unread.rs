//! Request bodies that are read on, for a while, if the request is answered before they were
//! read.
//!
//! HTTP/1.1 cannot tell a client to stop sending: if the connection is closed while the client
//! writes, the answer is lost. HTTP/2 can, by RST_STREAM after the answer, but HAProxy (2.6)
//! resets the client's stream then, and the answer may be lost as well. So over HTTP/2 a body
//! is read on whose request says its length, as those of browsers and curl do.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::timeout;
use tonic::{Status, body::Body};

/// How much of a body is read on, in bytes, and for how long.
const READ_ON_BYTES: usize = 4 * 1024 * 1024;
const READ_ON: Duration = Duration::from_secs(5);

/// A body that is read on when it is dropped.
pub(super) struct ReadOn {
    inner: Body,
    ended: bool,
}

impl ReadOn {
    pub(super) fn new(inner: Incoming) -> Self {
        Self { inner: Body::new(inner), ended: false }
    }
}

impl http_body::Body for ReadOn {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        self.ended = !matches!(frame, Some(Ok(_)));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for ReadOn {
    fn drop(&mut self) {
        if self.ended || self.inner.is_end_stream() {
            return;
        }
        let mut rest = std::mem::take(&mut self.inner);
        tokio::spawn(timeout(READ_ON, async move {
            let mut left = READ_ON_BYTES;
            while let Some(Ok(frame)) = rest.frame().await {
                left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                if left == 0 {
                    return;
                }
            }
        }));
    }
}
