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
//! **HTTP/1.1** is recognised by its first bytes. A request over it is refused, because gRPC
//! needs HTTP/2.

use std::{convert::Infallible, net::SocketAddr, pin::Pin, pin::pin, sync::Arc};

use futures_util::{Stream, StreamExt as _};
use http::{
    HeaderValue, Request, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{body::Incoming, rt::Executor, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::body::Body;
use tower::ServiceExt as _;

use super::{authentication::Authentication, calls::Calls, connection::Connection};
use crate::{auth::StreamReset, config::ServerSettings, limits, services::Peer};

/// Longest head of an HTTP/1.1 request, in bytes: as long as hyper's limit of the headers of
/// an HTTP/2 request.
const HEAD_BYTES: usize = 16 * 1024;
/// The largest flow-control window that HTTP/2 has (RFC 9113, 6.9.1).
const LARGEST_WINDOW_BYTES: u32 = (1 << 31) - 1;
/// The answer to a request over HTTP/1.1.
const NEEDS_HTTP2: &str = "milepost speaks gRPC, which needs HTTP/2: use a gRPC client, or a proxy that speaks \
                           HTTP/2 to milepost\n";

/// All services, behind their layers.
pub(super) type Services = Calls<Authentication>;

tokio::task_local! {
    /// The reset of the stream whose task this is.
    static RESET: StreamReset;
}

/// Serves connections until `draining` is cancelled, and then those that are open until their
/// calls have ended. An end of `incoming` ends it in the same way.
pub(super) async fn serve(
    incoming: impl Stream<Item = Connection>,
    services: Services,
    settings: &ServerSettings,
    draining: CancellationToken,
) {
    let builder = Arc::new(builder(settings));
    let connections = TaskTracker::new();
    {
        // Dropped before the wait for the connections, which closes the listener.
        let mut incoming = pin!(incoming.take_until(draining.cancelled()));
        while let Some(connection) = incoming.next().await {
            let requests = Requests { services: services.clone(), address: connection.address() };
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
        // It also ends a connection that is idle between two requests.
        .header_read_timeout(limits::HANDSHAKE)
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

async fn serve_connection(
    builder: Arc<auto::Builder<StreamTasks>>,
    connection: Connection,
    requests: Requests,
    draining: CancellationToken,
) {
    let mut serving = pin!(builder.serve_connection(TokioIo::new(connection), requests));
    let served = tokio::select! {
        served = &mut serving => served,
        () = draining.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
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

/// The requests of one connection.
#[derive(Clone, Debug)]
struct Requests {
    services: Services,
    address: Option<SocketAddr>,
}

/// In a box, since hyper keeps room for it as long as the stream is open.
type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl Service<Request<Incoming>> for Requests {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn call(&self, request: Request<Incoming>) -> Answering {
        if request.version() != Version::HTTP_2 {
            return Box::pin(std::future::ready(Ok(needs_http2())));
        }
        let Self { services, address } = self.clone();
        Box::pin(async move {
            let mut request = request.map(Body::new);
            // This is polled by the stream's task alone.
            let reset = RESET.with(StreamReset::clone);
            request.extensions_mut().insert(Peer { address, reset });
            services.oneshot(request).await
        })
    }
}

/// Closes the connection too: nothing else can be had over it.
fn needs_http2() -> Response<Body> {
    let mut response = Response::new(Body::new(Full::from(NEEDS_HTTP2)));
    *response.status_mut() = StatusCode::HTTP_VERSION_NOT_SUPPORTED;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}
