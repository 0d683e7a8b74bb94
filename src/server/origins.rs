//! Which web pages may call the server from a browser: those of its own origin, and those of
//! the origins that `--allow-origin` names. A browser says in the header `origin` which page
//! calls; clients that are no browsers do not send it.
//!
//! The server's own origin is recognised by the host alone: a proxy that encrypts changes the
//! scheme.

use std::{
    convert::Infallible,
    future::ready,
    sync::Arc,
    task::{Context, Poll},
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, HOST, ORIGIN,
        VARY,
    },
};
use tonic::body::Body;
use tower::Service;

use super::{Answering, plain::plain};

const REFUSED: &str = "pages of this origin may not call this server: --allow-origin names those that may\n";
/// What the answer to a preflight says.
const PREFLIGHT: [(HeaderName, &str); 3] = [
    (ACCESS_CONTROL_ALLOW_METHODS, "GET, POST"),
    (
        ACCESS_CONTROL_ALLOW_HEADERS,
        "authorization, connect-accept-encoding, connect-content-encoding, connect-protocol-version, \
         connect-timeout-ms, content-encoding, content-type, traceparent, tracestate",
    ),
    // Two hours, the most that browsers keep it.
    (ACCESS_CONTROL_MAX_AGE, "7200"),
];

/// Refuses requests of pages of other origins, and answers preflights.
#[derive(Clone, Debug)]
pub(super) struct Origins<S> {
    services: S,
    allowed: Arc<[String]>,
}

impl<S> Origins<S> {
    pub(super) fn new(services: S, allowed: &[String]) -> Self {
        Self { services, allowed: allowed.into() }
    }

    /// The origin that the answer must name; none for a page of our own.
    fn check(&self, request: &Request<Body>, origin: &HeaderValue) -> Result<Option<HeaderValue>, Refused> {
        if self.allowed.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()) {
            return Ok(Some(origin.clone()));
        }
        let of_page = origin.to_str().ok().and_then(|origin| origin.split_once("://")).ok_or(Refused)?.1;
        let own = request.uri().authority().map(http::uri::Authority::as_str);
        let own = own.or_else(|| request.headers().get(HOST)?.to_str().ok()).ok_or(Refused)?;
        if own.eq_ignore_ascii_case(of_page) { Ok(None) } else { Err(Refused) }
    }
}

struct Refused;

impl<S> Service<Request<Body>> for Origins<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.services.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Answering {
        let Some(origin) = request.headers().get(ORIGIN) else {
            return Box::pin(self.services.call(request));
        };
        let Ok(named) = self.check(&request, origin) else {
            return Box::pin(ready(Ok(plain(StatusCode::FORBIDDEN, REFUSED))));
        };
        let is_preflight = request.method() == Method::OPTIONS
            && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD);
        if is_preflight {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            let headers = PREFLIGHT.map(|(name, value)| (name, HeaderValue::from_static(value)));
            response.headers_mut().extend(headers);
            allow(response.headers_mut(), named);
            return Box::pin(ready(Ok(response)));
        }
        let answer = self.services.call(request);
        Box::pin(async move {
            let Ok(mut response) = answer.await;
            allow(response.headers_mut(), named);
            Ok(response)
        })
    }
}

/// Lets a page of a named origin read the answer.
fn allow(headers: &mut HeaderMap, named: Option<HeaderValue>) {
    if let Some(origin) = named {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("x-request-id"));
        headers.append(VARY, HeaderValue::from_static("origin"));
    }
}
