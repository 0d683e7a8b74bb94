//! Who calls is asked before what they say is read: a stranger's message takes no
//! more room than what the connection holds back.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use tonic::{Status, body::Body, service::Routes};
use tower::Service;

use crate::services::App;

/// Our methods, and those of them for whoever has no credential yet. Health and
/// reflection ask for none.
const OURS: &str = "/milepost.";
const OPEN: [&str; 2] = ["/milepost.v1.AuthService/SignUp", "/milepost.v1.AuthService/LogIn"];

/// All services, and the credential in front of them.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    routes: Routes,
    app: App,
}

impl Gate {
    pub(super) fn new(routes: Routes, app: App) -> Self {
        Self { routes, app }
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
        let Self { mut routes, app } = self.clone();
        Box::pin(async move {
            let path = request.uri().path();
            if path.starts_with(OURS) && !OPEN.contains(&path) {
                match app.authenticate(request.headers()).await {
                    Ok(credential) => drop(request.extensions_mut().insert(credential)),
                    Err(error) => return Ok(Status::from(error).into_http()),
                }
            }
            routes.call(request).await
        })
    }
}
