//! The layer around every call. It gives the call a request id, a span in the log and
//! one in its trace, limits its time and turns a panic into INTERNAL. A finished call
//! is one line in the log and is counted in the metrics.
//!
//! **Time.** The server's limit holds until the response starts. A client's deadline
//! holds until the response ends, as gRPC demands: it also ends a watch.
//!
//! **Slices.** hyper hands a frame of a response to h2 as a whole, as soon as one byte of it
//! may be sent. If the client reads no further, h2 keeps the frame, and a response whose
//! last frame it has is no longer bound by a deadline or the credential's end. So a message
//! is handed over in slices, and only the last one can be left in this way.

use std::{
    any::Any,
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Frame, SizeHint};
use opentelemetry::trace::FutureExt as _;
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tonic::{Code, Status, body::Body};
use tower::Service;
use tracing::{Instrument as _, Span, field};
use uuid::Uuid;

use super::in_flight::InFlight;
use crate::{
    error::Error,
    services::{
        RequestId,
        status::{reason_of, refused_quota},
    },
    telemetry::{
        Telemetry,
        metrics::{Method, Metrics, Protocol},
        traces::CallSpan,
    },
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// Most digits of a `grpc-timeout` (gRPC over HTTP/2, "Timeout").
const TIMEOUT_DIGITS: usize = 8;
/// Largest slice of a message, in bytes: as large as a DATA frame of HTTP/2 unless the client
/// allows more.
pub(super) const SLICE_BYTES: usize = 16 * 1024;
/// Longest part of a path that is logged, in bytes; milepost's paths are shorter.
const METHOD_BYTES: usize = 128;

/// The service that wraps all others in this layer.
#[derive(Clone, Debug)]
pub(super) struct Calls<S> {
    services: S,
    request_timeout: Duration,
    draining: CancellationToken,
    in_progress: TaskTracker,
    telemetry: Telemetry,
}

impl<S> Calls<S> {
    /// `in_progress` counts each call until the end of its response has been taken.
    pub(super) fn new(
        services: S,
        request_timeout: Duration,
        draining: CancellationToken,
        in_progress: TaskTracker,
        telemetry: Telemetry,
    ) -> Self {
        Self { services, request_timeout, draining, in_progress, telemetry }
    }
}

impl<S> Service<Request<Body>> for Calls<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.services.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let id = Uuid::now_v7();
        request.extensions_mut().insert(RequestId(id));
        let call = Call::new(id, &request, &self.telemetry, self.in_progress.token());
        let (span, trace) = (call.span.clone(), call.trace.clone());
        let now = Instant::now();
        let limit = now + self.request_timeout;
        let deadline = timeout(request.headers()).and_then(|timeout| now.checked_add(timeout));
        let draining = self.draining.clone();
        let response = self.services.call(request);
        let answer = async move {
            let until = deadline.map_or(limit, |deadline| deadline.min(limit));
            let response = match timeout_at(until, AssertUnwindSafe(response).catch_unwind()).await {
                Ok(Ok(Ok(response))) => response,
                Ok(Ok(Err(never))) => match never {},
                Ok(Err(panic)) => panic_status(panic.as_ref()).into_http(),
                Err(_) => Status::from(Error::DeadlineExceeded).into_http(),
            };
            Ok(call.respond(response, id, deadline, draining))
        };
        let answer = answer.instrument(span);
        match trace {
            None => Box::pin(answer),
            Some(trace) => Box::pin(answer.with_context(trace.context())),
        }
    }
}

/// The client's `grpc-timeout`: up to eight digits and a unit. A malformed timeout
/// counts as none, as in tonic.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT)?.to_str().ok()?;
    let (unit, digits) = (text.chars().next_back()?, text.get(..text.len() - 1)?);
    if digits.len() > TIMEOUT_DIGITS {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(count * 60 * 60)),
        'M' => Some(Duration::from_secs(count * 60)),
        'S' => Some(Duration::from_secs(count)),
        'm' => Some(Duration::from_millis(count)),
        'u' => Some(Duration::from_micros(count)),
        'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// A call in progress. Dropping it logs and counts the call as finished.
#[derive(Debug)]
struct Call {
    span: Span,
    started: Instant,
    /// A call of health or reflection rather than of a milepost service.
    infrastructure: bool,
    status: Option<Code>,
    method: Arc<Method>,
    protocol: Protocol,
    metrics: Arc<Metrics>,
    trace: Option<CallSpan>,
    in_flight: Option<InFlight>,
    _in_progress: TaskTrackerToken,
}

impl Call {
    fn new(id: Uuid, request: &Request<Body>, telemetry: &Telemetry, in_progress: TaskTrackerToken) -> Self {
        let path = request.uri().path();
        let known = telemetry.metrics.method(path);
        let protocol = request.extensions().get().copied().unwrap_or_default();
        let trace = telemetry.traces.call(request.headers(), known.name(), protocol);
        let method = path.get(..METHOD_BYTES).unwrap_or(path).trim_start_matches('/');
        // An error span is enabled at every log level, so that each line has a request id.
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
            protocol,
            metrics: Arc::clone(&telemetry.metrics),
            trace,
            in_flight: None,
            _in_progress: in_progress,
        }
    }

    fn record_status(&mut self, headers: &HeaderMap) {
        let Some(status) = headers.get("grpc-status") else { return };
        self.status = Some(Code::from_bytes(status.as_bytes()));
        if headers.contains_key("grpc-status-details-bin")
            && let Some(status) = Status::from_header_map(headers)
            && let Some(reason) = reason_of(&status)
        {
            self.method.refused(reason);
            refused_quota(&status).into_iter().for_each(|quota| self.metrics.quota_refusals.count(quota));
        }
    }

    fn respond(
        mut self,
        mut response: Response<Body>,
        id: Uuid,
        deadline: Option<Instant>,
        draining: CancellationToken,
    ) -> Response<Body> {
        self.record_status(response.headers());
        self.in_flight = response.extensions_mut().remove();
        if let Ok(mut id) = HeaderValue::try_from(id.to_string()) {
            // A sensitive value is not indexed (RFC 7541): a value that never recurs
            // would only evict others from the connection's header table.
            id.set_sensitive(true);
            response.headers_mut().insert(REQUEST_ID, id);
        }
        // Streams of milepost's services end by themselves when the server drains;
        // streams of health and reflection would not.
        let draining = self.infrastructure.then(|| Box::pin(draining.cancelled_owned()));
        let deadline = deadline.map(|deadline| Box::pin(sleep_until(deadline)));
        response
            .map(|inner| Body::new(CallBody { inner, rest: Bytes::new(), call: self, deadline, draining }))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // Without a status, the client cancelled the call.
        let status = self.status.unwrap_or(Code::Cancelled);
        self.method.finished(self.protocol, status, self.started.into_std());
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

/// The status for a handler that panicked. The panic hook prints the place of the
/// panic on stderr.
fn panic_status(panic: &(dyn Any + Send)) -> Status {
    let message = panic.downcast_ref::<&str>().copied();
    let message = message.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Status::from(Error::internal(format!("panicked: {}", message.unwrap_or("no message"))))
}

/// The body of a response. It enforces the client's deadline, catches panics, cuts messages
/// into slices and records the status in the trailers.
#[derive(Debug)]
struct CallBody {
    inner: Body,
    /// What is left of the message whose slices are being sent.
    rest: Bytes,
    call: Call,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Ends a stream of health or reflection when the server drains.
    draining: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl CallBody {
    /// Ends the body with trailers for `status`.
    fn end_with(&mut self, status: impl Into<Status>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.inner = Body::empty();
        self.rest = Bytes::new();
        self.deadline = None;
        self.draining = None;
        let mut trailers = HeaderMap::new();
        if status.into().add_header(&mut trailers).is_err() {
            trailers.insert("grpc-status", HeaderValue::from_static("13"));
        }
        self.call.record_status(&trailers);
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn next_slice(&mut self) -> Frame<Bytes> {
        Frame::data(self.rest.split_to(self.rest.len().min(SLICE_BYTES)))
    }
}

impl http_body::Body for CallBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let body = self.get_mut();
        if body.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            return body.end_with(Error::DeadlineExceeded);
        }
        if !body.rest.is_empty() {
            return Poll::Ready(Some(Ok(body.next_slice())));
        }
        let (inner, span) = (&mut body.inner, &body.call.span);
        let polled = catch_unwind(AssertUnwindSafe(|| span.in_scope(|| Pin::new(inner).poll_frame(cx))));
        match polled {
            Err(panic) => {
                let status = body.call.span.in_scope(|| panic_status(panic.as_ref()));
                body.end_with(status)
            }
            Ok(Poll::Pending) => {
                if body.draining.as_mut().is_some_and(|draining| draining.as_mut().poll(cx).is_ready()) {
                    return body.end_with(Error::Draining);
                }
                Poll::Pending
            }
            Ok(Poll::Ready(None)) => Poll::Ready(None),
            Ok(Poll::Ready(Some(Err(status)))) => {
                body.call.status = Some(status.code());
                Poll::Ready(Some(Err(status)))
            }
            Ok(Poll::Ready(Some(Ok(frame)))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    body.call.record_status(trailers);
                }
                Poll::Ready(Some(Ok(match frame.into_data() {
                    Ok(message) => {
                        body.rest = message;
                        body.next_slice()
                    }
                    Err(trailers) => trailers,
                })))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // `inner` does not know the length of `rest`.
        if self.rest.is_empty() { self.inner.size_hint() } else { SizeHint::default() }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{future::ready, stream};
    use http_body_util::{BodyExt as _, Full, StreamBody};
    use tower::ServiceExt as _;

    use super::*;

    /// A service whose behaviour depends on the path. The body of its answer never ends, or
    /// panics when it is polled.
    async fn fake(request: Request<Body>) -> Result<Response<Body>, Infallible> {
        let panics = match request.uri().path() {
            "/grpc.Fake/Panic" => panic!("in the handler"),
            "/grpc.Fake/Hang" => std::future::pending().await,
            path => path == "/grpc.Fake/PanicLater",
        };
        Ok(Response::new(Body::new(StreamBody::new(stream::poll_fn(move |_| {
            assert!(!panics, "in the stream");
            Poll::<Option<Result<Frame<Bytes>, Status>>>::Pending
        })))))
    }

    async fn call(path: &str, draining: &CancellationToken) -> Response<Body> {
        call_within(path, Duration::from_millis(50), "1H", draining).await
    }

    /// Calls with the server's limit `limit` and the client's `grpc-timeout`.
    async fn call_within(
        path: &str,
        limit: Duration,
        timeout: &str,
        draining: &CancellationToken,
    ) -> Response<Body> {
        let services = tower::service_fn(fake);
        let calls = Calls::new(services, limit, draining.clone(), TaskTracker::new(), Telemetry::default());
        let request = Request::builder().uri(path).header(TIMEOUT, timeout).body(Body::empty()).unwrap();
        calls.oneshot(request).await.unwrap()
    }

    async fn trailers_code(mut response: Response<Body>) -> Code {
        let frame = response.body_mut().frame().await;
        Status::from_header_map(frame.unwrap().unwrap().trailers_ref().unwrap()).unwrap().code()
    }

    #[tokio::test]
    async fn a_panicking_handler_is_answered_with_internal() {
        let response = call("/grpc.Fake/Panic", &CancellationToken::new()).await;
        assert_eq!(Status::from_header_map(response.headers()).unwrap().code(), Code::Internal);
        assert!(response.headers().contains_key("x-request-id"));
    }

    #[tokio::test]
    async fn a_handler_past_the_servers_limit_is_answered_with_deadline_exceeded() {
        let response = call("/grpc.Fake/Hang", &CancellationToken::new()).await;
        assert_eq!(Status::from_header_map(response.headers()).unwrap().code(), Code::DeadlineExceeded);
    }

    #[tokio::test]
    async fn the_clients_deadline_holds_if_it_is_before_the_servers_limit() {
        let hour = Duration::from_secs(60 * 60);
        for timeout in ["50m", "0S", "1n"] {
            let response = call_within("/grpc.Fake/Hang", hour, timeout, &CancellationToken::new()).await;
            let status = Status::from_header_map(response.headers()).unwrap();
            assert_eq!(status.code(), Code::DeadlineExceeded, "{timeout}");
            assert!(!status.details().is_empty());
        }
    }

    #[tokio::test]
    async fn a_stream_ends_at_the_clients_deadline() {
        let hour = Duration::from_secs(60 * 60);
        let response = call_within("/grpc.Fake/Watch", hour, "50m", &CancellationToken::new()).await;
        assert_eq!(trailers_code(response).await, Code::DeadlineExceeded);
    }

    #[test]
    fn a_grpc_timeout_is_up_to_eight_digits_and_a_unit() {
        let parsed =
            |text: &'static str| timeout(&HeaderMap::from_iter([(TIMEOUT, HeaderValue::from_static(text))]));
        for (text, duration) in [
            ("2H", Duration::from_secs(2 * 60 * 60)),
            ("3M", Duration::from_secs(3 * 60)),
            ("4S", Duration::from_secs(4)),
            ("5m", Duration::from_millis(5)),
            ("6u", Duration::from_micros(6)),
            ("7n", Duration::from_nanos(7)),
            ("0S", Duration::ZERO),
            ("99999999H", Duration::from_secs(99_999_999 * 60 * 60)),
        ] {
            assert_eq!(parsed(text), Some(duration), "{text}");
        }
        for text in ["", "S", "5", "5s", "-5S", "1.5S", " 5S", "5 S", "100000000S"] {
            assert_eq!(parsed(text), None, "{text}");
        }
        assert_eq!(timeout(&HeaderMap::new()), None);
    }

    #[tokio::test]
    async fn a_panicking_stream_ends_with_internal() {
        let response = call("/grpc.Fake/PanicLater", &CancellationToken::new()).await;
        assert_eq!(trailers_code(response).await, Code::Internal);
    }

    #[tokio::test]
    async fn a_message_is_handed_over_in_slices() {
        let message: Bytes = (0..=u8::MAX).cycle().take(2 * SLICE_BYTES + 1).collect();
        let sent = message.clone();
        let services = tower::service_fn(move |_: Request<Body>| {
            ready(Ok(Response::new(Body::new(Full::from(sent.clone())))))
        });
        let calls = Calls::new(
            services,
            Duration::from_secs(60),
            CancellationToken::new(),
            TaskTracker::new(),
            Telemetry::default(),
        );
        let mut body = calls.oneshot(Request::new(Body::empty())).await.unwrap().into_body();
        let mut slices = Vec::new();
        while let Some(frame) = body.frame().await {
            slices.push(frame.unwrap().into_data().unwrap());
        }
        assert_eq!(slices.iter().map(Bytes::len).collect::<Vec<_>>(), [SLICE_BYTES, SLICE_BYTES, 1]);
        assert_eq!(slices.concat(), message);
    }

    #[tokio::test]
    async fn a_stream_of_health_or_reflection_ends_when_the_server_drains() {
        let draining = CancellationToken::new();
        let response = call("/grpc.Fake/Watch", &draining).await;
        draining.cancel();
        assert_eq!(trailers_code(response).await, Code::Unavailable);
    }
}
