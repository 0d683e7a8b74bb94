//! The Connect protocol (<https://connectrpc.com/docs/protocol>) for every method, in front of
//! the gRPC services and without code for a method.
//!
//! A call by Connect becomes one by gRPC before anything else sees it, and its answer becomes
//! one by Connect at last. So authentication, limits, deadlines and the drain are those of
//! gRPC, in the same order. This is done in two places:
//!
//! - [`Connect`], outside of all other layers, translates heads, the ends of answers, and how
//!   messages are framed. It reads no message.
//! - [`Transcoder`], behind authentication, translates the messages themselves: JSON and gzip.
//!   Between the two a message has its length before it, as in gRPC, so that it is counted
//!   before it is read.
//!
//! Requests by gRPC pass both unchanged.

mod answer;
mod error;
mod get;
mod methods;
mod request;
mod transcode;

use std::{
    convert::Infallible,
    future::ready,
    sync::Arc,
    task::{Context, Poll},
};

use http::{
    HeaderValue, Method as Verb, Request, Response, StatusCode, Version,
    header::{ALLOW, CONTENT_TYPE},
};
use tonic::body::Body;
use tower::Service;

use self::{methods::Method, request::Format};
pub(super) use self::{methods::Methods, transcode::Transcoder};
use super::{Answering, plain::plain};

/// The answer to a request over HTTP/1.1 that needs HTTP/2.
const NEEDS_HTTP2: &str = "gRPC, and streams of requests, need HTTP/2: use a client or a proxy that speaks it, \
                           or call by the Connect protocol\n";
const NO_METHOD: &str = "there is no method at this path\n";

/// Serves calls by Connect, and passes all others on.
#[derive(Clone, Debug)]
pub(super) struct Connect<S> {
    services: S,
    methods: Arc<Methods>,
}

impl<S> Connect<S> {
    /// Methods that `methods` lacks can be called by gRPC alone.
    pub(super) fn new(services: S, methods: Arc<Methods>) -> Self {
        Self { services, methods }
    }
}

impl<S> Service<Request<Body>> for Connect<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.services.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Answering {
        let over_http2 = request.version() >= Version::HTTP_2;
        if is_grpc(&request) {
            return if over_http2 {
                Box::pin(self.services.call(request))
            } else {
                answered(plain(StatusCode::HTTP_VERSION_NOT_SUPPORTED, NEEDS_HTTP2))
            };
        }
        let Some(method) = self.methods.get(request.uri().path()) else {
            return answered(plain(StatusCode::NOT_FOUND, NO_METHOD));
        };
        if method.is_bidirectional() && !over_http2 {
            return answered(plain(StatusCode::HTTP_VERSION_NOT_SUPPORTED, NEEDS_HTTP2));
        }
        let read = match *request.method() {
            Verb::POST => Format::read(&method, request),
            Verb::GET if method.is_safe() => get::read(&method, request),
            _ => return answered(not_allowed(&method)),
        };
        match read {
            Ok((format, request)) => {
                let answer = self.services.call(request);
                Box::pin(async move {
                    let Ok(answer) = answer.await;
                    Ok(format.answer(answer).await)
                })
            }
            Err(refused) => answered(*refused),
        }
    }
}

fn answered(response: Response<Body>) -> Answering {
    Box::pin(ready(Ok(response)))
}

fn is_grpc(request: &Request<Body>) -> bool {
    let kind = request.headers().get(CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

fn not_allowed(method: &Method) -> Response<Body> {
    let (allowed, text) =
        if method.is_safe() { ("GET, POST", "call by GET or POST\n") } else { ("POST", "call by POST\n") };
    let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, text);
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    response
}
