//! Who calls is asked before what they say is read: a stranger's message takes no
//! more room than what the connection holds back.
//!
//! Where nobody is asked, which is to sign up, to log in, and what health and
//! reflection answer, so many calls may be open and each may say so much. Sign-ups
//! and log-ins, which take no longer than any call, do not share their places with
//! streams, which anybody can keep open for good.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tokio::sync::Semaphore;
use tonic::{Status, body::Body, service::Routes};
use tower::Service;

use crate::{error::Error, limits::UNAUTHENTICATED_CALL_BYTES, services::App};

/// Our methods, and those of them for whoever has no credential yet. Health and
/// reflection ask for none.
const OURS: &str = "/milepost.";
const OPEN: [&str; 2] = ["/milepost.v1.AuthService/SignUp", "/milepost.v1.AuthService/LogIn"];
/// Never refused: a server that strangers keep busy is not ill, and whoever looks
/// after it must not be told so.
const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// All services, and the credential in front of them.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    routes: Routes,
    app: App,
    strangers: Strangers,
}

/// Places of those who are not asked.
#[derive(Clone, Debug)]
pub(super) struct Strangers {
    /// Of sign-ups and log-ins.
    calls: Arc<Semaphore>,
    /// Of all else.
    streams: Arc<Semaphore>,
}

impl Strangers {
    /// So many of each.
    pub(super) fn new(most: usize) -> Self {
        Self { calls: Arc::new(Semaphore::new(most)), streams: Arc::new(Semaphore::new(most)) }
    }
}

impl Gate {
    pub(super) fn new(routes: Routes, app: App, strangers: Strangers) -> Self {
        Self { routes, app, strangers }
    }
}

impl Service<Request<Body>> for Gate {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.routes, cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let Self { mut routes, app, strangers } = self.clone();
        Box::pin(async move {
            let path = request.uri().path();
            let ours = path.starts_with(OURS);
            if ours && !OPEN.contains(&path) {
                return match app.authenticate(request.headers()).await {
                    Ok(credential) => {
                        request.extensions_mut().insert(credential);
                        routes.call(request).await
                    }
                    Err(error) => Ok(Status::from(error).into_http()),
                };
            }
            let places = if ours { strangers.calls } else { strangers.streams };
            let place = match places.try_acquire_owned() {
                Ok(place) => Some(place),
                Err(_) if path == HEALTH => None,
                Err(_) => {
                    let retry_after = Duration::from_secs(1);
                    let full = Error::Overloaded { what: "calls without a credential", retry_after };
                    return Ok(Status::from(full).into_http());
                }
            };
            let request = request
                .map(|body| Body::new(Limited::new(body, UNAUTHENTICATED_CALL_BYTES).map_err(too_large)));
            let response = routes.call(request).await?;
            if ours {
                return Ok(response);
            }
            // Until the last of the answer was taken.
            let until_the_end = |body: Body| {
                Body::new(body.map_frame(move |frame| {
                    let _place = &place;
                    frame
                }))
            };
            Ok(response.map(until_the_end))
        })
    }
}

/// As gRPC has it where a message is larger than is read.
fn too_large(error: Box<dyn std::error::Error + Send + Sync>) -> Status {
    if error.is::<LengthLimitError>() {
        Status::out_of_range(format!(
            "a call without a credential has at most {UNAUTHENTICATED_CALL_BYTES} bytes"
        ))
    } else {
        Status::from_error(error)
    }
}
