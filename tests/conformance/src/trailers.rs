//! What the suite asks of its service and tonic's services cannot do: trailers of a unary answer,
//! and the query of a call by GET.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use http::{HeaderMap, HeaderName, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, Empty};
use tonic::body::Body;
use tower::Service;

/// The prefix of the names of headers that are to become trailers.
pub const TRAILER: &str = "trailer-";

/// The query of a call by GET; an extension of its request.
#[derive(Clone)]
pub struct Query(pub String);

/// Moves what a service puts into headers as `trailer-NAME` to the trailers.
#[derive(Clone)]
pub struct WithTrailers<S>(pub S);

impl<S> Service<Request<Body>> for WithTrailers<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Some(query) = request.uri().query().map(str::to_owned) {
            request.extensions_mut().insert(Query(query));
        }
        let answer = self.0.call(request);
        Box::pin(async move {
            let Ok(answer) = answer.await;
            Ok(with_trailers(answer))
        })
    }
}

fn with_trailers(answer: Response<Body>) -> Response<Body> {
    let (mut parts, body) = answer.into_parts();
    let (mut headers, mut trailers) = (HeaderMap::new(), HeaderMap::new());
    for (name, value) in &parts.headers {
        match name.as_str().strip_prefix(TRAILER) {
            Some(name) => {
                trailers.append(HeaderName::try_from(name).unwrap(), value.clone());
            }
            None => {
                headers.append(name.clone(), value.clone());
            }
        }
    }
    if trailers.is_empty() {
        return Response::from_parts(parts, body);
    }
    let body = if headers.contains_key("grpc-status") {
        // An answer that ends with its head has no trailers apart.
        for name in ["grpc-status", "grpc-message", "grpc-status-details-bin"] {
            trailers.extend(headers.remove(name).map(|value| (HeaderName::from_static(name), value)));
        }
        let empty = Empty::new().map_err(|never| match never {});
        Body::new(empty.with_trailers(std::future::ready(Some(Ok::<_, tonic::Status>(trailers)))))
    } else {
        Body::new(body.map_frame(move |frame| match frame.into_trailers() {
            Ok(mut own) => {
                own.extend(trailers.clone());
                Frame::trailers(own)
            }
            Err(frame) => frame,
        }))
    };
    parts.headers = headers;
    Response::from_parts(parts, body)
}
