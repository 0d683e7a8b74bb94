//! HTTP on accepted connections: the version, its limits, and a task for each stream.
//!
//! **A stream can be reset alone.** A proxy carries many users over one connection, and a
//! client that leaves its stream unread must cost nobody else theirs. hyper does not poll
//! a response that has no flow-control window, so that its body cannot end the stream. But
//! hyper gives the future of each stream, its service and then its body, to an executor
//! (hyper 1.12, `proto/h2/server.rs`, `poll_server`), and when that future is dropped, h2
//! discards what it has buffered of the stream and sends RST_STREAM (h2 0.4,
//! `proto/streams/streams.rs`, `maybe_cancel`). [`StreamTasks`] is this executor. The
//! service finds the reset of its own stream in the task that polls it, so that no other
//! stream's can be taken for it.
//!
//! **HTTP/1.1** is recognised by its first bytes. Its connections are tasks in the same way:
//! a reset closes the connection, which carries one request at a time.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http::{Request, Response, Version};
use http_body::{Body as _, Frame, SizeHint};
use hyper::{body::Incoming, rt::Executor, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Status, body::Body};
use tower::ServiceExt as _;

use super::{
    Answering,
    connection::{Connection, Exchange, UnderWay},
    unread::ReadOn,
};
use crate::{auth::StreamReset, config::ServerSettings, limits, services::Peer};

/// Longest head of an HTTP/1.1 request, in bytes: as long as hyper's limit of the headers of
/// an HTTP/2 request.
const HEAD_BYTES: usize = 16 * 1024;
/// The largest flow-control window that HTTP/2 has (RFC 9113, 6.9.1).
const LARGEST_WINDOW_BYTES: u32 = (1 << 31) - 1;
tokio::task_local! {
    /// The reset of the stream whose task this is.
    static RESET: StreamReset;
}

/// Serves connections until `draining` is cancelled, and then those that are open until their
/// calls have ended. An end of `incoming` ends it in the same way.
pub(super) async fn serve<S: Serves>(
    incoming: impl Stream<Item = Connection>,
    services: S,
    settings: &ServerSettings,
    draining: CancellationToken,
) {
    let builder = Arc::new(builder(settings));
    let connections = TaskTracker::new();
    {
        // Dropped before the wait for the connections, which closes the listener.
        let mut incoming = pin!(incoming.take_until(draining.cancelled()));
        while let Some(connection) = incoming.next().await {
            let (address, exchange) = (connection.address(), connection.exchange());
            let requests = Requests { services: services.clone(), address, exchange };
            let (builder, draining) = (Arc::clone(&builder), draining.child_token());
            connections.spawn(serve_connection(builder, connection, requests, draining));
        }
    }
    connections.close();
    connections.wait().await;
}

fn builder(settings: &ServerSettings) -> auto::Builder<StreamTasks> {
    let mut builder = auto::Builder::new(StreamTasks);
    builder
        .http1()
        .timer(TokioTimer::new())
        // From the end of the answer before: most of it is the time of an idle connection. The
        // time from the first byte of a head on is limited by the connection.
        .header_read_timeout(limits::IDLE)
        .max_buf_size(HEAD_BYTES);
    let streams = settings.streams_per_connection;
    let connection_window = limits::STREAM_WINDOW_BYTES.saturating_mul(streams).min(LARGEST_WINDOW_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(connection_window)
        .max_concurrent_streams(streams)
        .max_pending_accept_reset_streams(limits::PENDING_RESET_STREAMS)
        .max_local_error_reset_streams(limits::FAULTY_STREAMS)
        .keep_alive_interval(settings.keepalive_interval)
        .keep_alive_timeout(settings.keepalive_timeout);
    builder
}

async fn serve_connection<S: Serves>(
    builder: Arc<auto::Builder<StreamTasks>>,
    connection: Connection,
    requests: Requests<S>,
    draining: CancellationToken,
) {
    let serving = async {
        let mut serving = pin!(builder.serve_connection(TokioIo::new(connection), requests));
        tokio::select! {
            served = &mut serving => served,
            () = draining.cancelled() => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        }
    };
    // Only a request over HTTP/1.1 is polled by this task.
    let (serving, reset) = StreamReset::of(serving);
    if let Ok(Err(error)) = RESET.scope(reset, serving).await {
        // Of level debug: every client can cause these.
        tracing::debug!(%error, "a connection failed");
    }
}

/// Runs each stream of a connection in a task of its own, which its reset ends.
#[derive(Clone, Copy, Debug)]
struct StreamTasks;

impl<F> Executor<F> for StreamTasks
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        let (stream, reset) = StreamReset::of(stream);
        tokio::spawn(RESET.scope(reset, stream));
    }
}

/// All services, behind their layers.
pub(super) trait Serves:
    tower::Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
    + Clone
    + Send
    + 'static
{
}

impl<S> Serves for S where
    S: tower::Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static
{
}

/// The requests of one connection.
#[derive(Clone, Debug)]
struct Requests<S> {
    services: S,
    address: Option<SocketAddr>,
    exchange: Exchange,
}

impl<S: Serves> Service<Request<Incoming>> for Requests<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    /// In a box, since hyper keeps room for it as long as the stream is open.
    type Future = Answering;

    fn call(&self, request: Request<Incoming>) -> Answering {
        let http1 = request.version() < Version::HTTP_2;
        let under_way = http1.then(|| self.exchange.begin());
        let Self { services, address, .. } = self.clone();
        Box::pin(async move {
            let mut request = request.map(|body| {
                let read_on = http1 || body.size_hint().exact().is_some();
                if read_on { Body::new(ReadOn::new(body)) } else { Body::new(body) }
            });
            // This is polled by the stream's task alone.
            let reset = RESET.with(StreamReset::clone);
            request.extensions_mut().insert(Peer { address, reset });
            let response = services.oneshot(request).await?;
            Ok(match under_way {
                None => response,
                Some(under_way) => {
                    response.map(|inner| Body::new(Http1Body { inner, _under_way: under_way }))
                }
            })
        })
    }
}

/// The body of an answer over HTTP/1.1, with which its request ends.
#[derive(Debug)]
struct Http1Body {
    inner: Body,
    _under_way: UnderWay,
}

impl http_body::Body for Http1Body {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
