//! What every call passes on its way in and out: an id, a span, a limit of
//! time, a net under panics, and one line in the log when it is over.

use std::{
    any::Any,
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Frame, SizeHint};
use opentelemetry::trace::FutureExt as _;
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tonic::{Code, Status, body::Body, service::Routes};
use tower::Service;
use tracing::{Instrument as _, Span, field};
use uuid::Uuid;

use crate::{
    error::Error,
    services::{RequestId, status::reason_of},
    telemetry::{Telemetry, metrics::Method, traces::CallSpan},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest path that is logged; ours are shorter.
const METHOD_BYTES: usize = 128;

/// All services, within what every call passes.
#[derive(Clone, Debug)]
pub(super) struct Calls {
    routes: Routes,
    request_timeout: Duration,
    draining: CancellationToken,
    under_way: TaskTracker,
    telemetry: Telemetry,
}

impl Calls {
    /// Each call is counted in `under_way` until the last of its answer was
    /// taken.
    pub(super) fn new(
        routes: Routes,
        request_timeout: Duration,
        draining: CancellationToken,
        under_way: TaskTracker,
        telemetry: Telemetry,
    ) -> Self {
        Self { routes, request_timeout, draining, under_way, telemetry }
    }
}

impl Service<Request<Body>> for Calls {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.routes, cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let id = Uuid::now_v7();
        request.extensions_mut().insert(RequestId(id));
        let call = Call::new(id, &request, &self.telemetry, self.under_way.token());
        let (span, trace) = (call.span.clone(), call.trace.clone());
        let request_timeout = self.request_timeout;
        let draining = self.draining.clone();
        let response = self.routes.call(request);
        let answer = async move {
            let response = tokio::time::timeout(request_timeout, AssertUnwindSafe(response).catch_unwind());
            let response = match response.await {
                Ok(Ok(Ok(response))) => response,
                Ok(Ok(Err(never))) => match never {},
                Ok(Err(panic)) => panicked(panic.as_ref()).into_http(),
                Err(_elapsed) => Status::from(Error::DeadlineExceeded).into_http(),
            };
            Ok(call.answer(response, id, draining))
        };
        let answer = answer.instrument(span);
        match trace {
            None => Box::pin(answer),
            Some(trace) => Box::pin(answer.with_context(trace.context())),
        }
    }
}

/// A call under way; logs one line when it is dropped.
#[derive(Debug)]
struct Call {
    span: Span,
    started: Instant,
    /// Not ours but the infrastructure's: health and reflection.
    infrastructure: bool,
    status: Option<Code>,
    method: Arc<Method>,
    trace: Option<CallSpan>,
    _under_way: TaskTrackerToken,
}

impl Call {
    fn new(id: Uuid, request: &Request<Body>, telemetry: &Telemetry, under_way: TaskTrackerToken) -> Self {
        let path = request.uri().path();
        let known = telemetry.metrics.method(path);
        let trace = telemetry.traces.call(request.headers(), known.name());
        let method = path.get(..METHOD_BYTES).unwrap_or(path).trim_start_matches('/');
        // Of the highest level, so that whatever is logged has its id.
        let span = tracing::error_span!("call", request_id = %id, method, trace_id = field::Empty);
        if let Some(trace) = &trace {
            span.record("trace_id", field::display(trace.trace_id()));
        }
        Self {
            span,
            started: Instant::now(),
            infrastructure: method.starts_with("grpc."),
            status: None,
            method: Arc::clone(known),
            trace,
            _under_way: under_way,
        }
    }

    fn note(&mut self, headers: &HeaderMap) {
        if let Some(status) = headers.get("grpc-status") {
            self.status = Some(Code::from_bytes(status.as_bytes()));
            if let Some(reason) = headers
                .contains_key("grpc-status-details-bin")
                .then(|| Status::from_header_map(headers).as_ref().and_then(reason_of))
                .flatten()
            {
                self.method.refused(reason);
            }
        }
    }

    fn answer(
        mut self,
        mut response: Response<Body>,
        id: Uuid,
        draining: CancellationToken,
    ) -> Response<Body> {
        self.note(response.headers());
        if let Ok(mut id) = HeaderValue::try_from(id.to_string()) {
            // Never seen again: it must not push others out of the connection's
            // table of headers (RFC 7541).
            id.set_sensitive(true);
            response.headers_mut().insert(REQUEST_ID, id);
        }
        // Ours end by themselves when the server drains; these would hold it
        // up.
        let end = self.infrastructure.then(|| Box::pin(draining.cancelled_owned()));
        response.map(|inner| Body::new(CallBody { inner, call: self, end }))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // Whoever is gone before the status is, has cancelled.
        let status = self.status.unwrap_or(Code::Cancelled);
        self.method.over(status, self.started);
        if let Some(trace) = &self.trace {
            trace.end(status);
        }
        let duration_us = self.started.elapsed().as_micros();
        self.span.in_scope(|| {
            if self.infrastructure {
                tracing::debug!(?status, duration_us, "finished");
            } else {
                tracing::info!(?status, duration_us, "finished");
            }
        });
    }
}

/// What a handler that panicked is answered with. Where it did is in the
/// process's own message on stderr.
fn panicked(panic: &(dyn Any + Send)) -> Status {
    let words = panic.downcast_ref::<&str>().copied();
    let words = words.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Status::from(Error::internal(format!("panicked: {}", words.unwrap_or("without words"))))
}

/// The body of an answer, watched until its end.
#[derive(Debug)]
struct CallBody {
    inner: Body,
    call: Call,
    end: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl CallBody {
    /// Ends the body with this status.
    fn end_with(&mut self, status: &Status) -> Frame<Bytes> {
        self.inner = Body::empty();
        self.end = None;
        self.call.status = Some(status.code());
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            trailers.insert("grpc-status", HeaderValue::from_static("13"));
        }
        Frame::trailers(trailers)
    }
}

impl http_body::Body for CallBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let body = self.get_mut();
        let (inner, span) = (&mut body.inner, &body.call.span);
        let polled = catch_unwind(AssertUnwindSafe(|| span.in_scope(|| Pin::new(inner).poll_frame(cx))));
        match polled {
            Err(panic) => {
                let status = body.call.span.in_scope(|| panicked(panic.as_ref()));
                Poll::Ready(Some(Ok(body.end_with(&status))))
            }
            Ok(Poll::Pending) => {
                if body.end.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready()) {
                    let status = Status::from(Error::Draining);
                    return Poll::Ready(Some(Ok(body.end_with(&status))));
                }
                Poll::Pending
            }
            Ok(Poll::Ready(frame)) => {
                match &frame {
                    Some(Ok(frame)) => {
                        if let Some(trailers) = frame.trailers_ref() {
                            body.call.note(trailers);
                        }
                    }
                    Some(Err(status)) => body.call.status = Some(status.code()),
                    None => {}
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use tonic::server::NamedService;
    use tower::ServiceExt as _;

    use super::*;

    /// Does what its request's path says.
    #[derive(Clone)]
    struct Fake;

    impl NamedService for Fake {
        const NAME: &'static str = "grpc.Fake";
    }

    impl Service<Request<Body>> for Fake {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Body>) -> Self::Future {
            Box::pin(async move {
                match request.uri().path() {
                    "/grpc.Fake/Panic" => panic!("in the handler"),
                    "/grpc.Fake/Hang" => std::future::pending().await,
                    path => {
                        Ok(Response::new(Body::new(FakeBody { panics: path == "/grpc.Fake/PanicLater" })))
                    }
                }
            })
        }
    }

    /// Never ends, unless it panics.
    struct FakeBody {
        panics: bool,
    }

    impl http_body::Body for FakeBody {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            assert!(!self.panics, "in the stream");
            Poll::Pending
        }
    }

    async fn call(path: &str, draining: &CancellationToken) -> Response<Body> {
        let calls = Calls::new(
            Routes::new(Fake),
            Duration::from_millis(50),
            draining.clone(),
            TaskTracker::new(),
            Telemetry::default(),
        );
        let request = Request::builder().uri(path).body(Body::empty()).unwrap();
        calls.oneshot(request).await.unwrap()
    }

    async fn trailers_code(mut response: Response<Body>) -> Code {
        let body = response.body_mut();
        let frame = std::future::poll_fn(|cx| http_body::Body::poll_frame(Pin::new(&mut *body), cx)).await;
        Status::from_header_map(frame.unwrap().unwrap().trailers_ref().unwrap()).unwrap().code()
    }

    #[tokio::test]
    async fn a_handler_that_panics_is_an_internal_error() {
        let response = call("/grpc.Fake/Panic", &CancellationToken::new()).await;
        assert_eq!(Status::from_header_map(response.headers()).unwrap().code(), Code::Internal);
        assert!(response.headers().contains_key("x-request-id"));
    }

    #[tokio::test]
    async fn a_handler_that_takes_too_long_is_past_its_deadline() {
        let response = call("/grpc.Fake/Hang", &CancellationToken::new()).await;
        assert_eq!(Status::from_header_map(response.headers()).unwrap().code(), Code::DeadlineExceeded);
    }

    #[tokio::test]
    async fn a_stream_that_panics_ends_with_an_internal_error() {
        let response = call("/grpc.Fake/PanicLater", &CancellationToken::new()).await;
        assert_eq!(trailers_code(response).await, Code::Internal);
    }

    #[tokio::test]
    async fn a_stream_of_the_infrastructure_ends_when_the_server_drains() {
        let draining = CancellationToken::new();
        let response = call("/grpc.Fake/Watch", &draining).await;
        draining.cancel();
        assert_eq!(trailers_code(response).await, Code::Unavailable);
    }
}
