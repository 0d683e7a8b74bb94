//! Authenticates a call before its message is read, so that an unauthenticated caller's
//! message takes no more memory than HTTP/2's flow control allows. Then the call and its bytes
//! are counted to its user, see [`Tenants`](crate::auth::Tenants).
//!
//! SignUp, LogIn, health and reflection need no credential. How many of these calls are
//! open at once is limited by [`Admission`](crate::auth::Admission), and how many bytes
//! each may send by [`UNAUTHENTICATED_CALL_BYTES`], also decompressed.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tonic::{Code, Status, body::Body, service::Routes};
use tower::Service;

use super::{
    accepting,
    connect::Transcoder,
    in_flight::{CountedBody, NoRoom, count_answer},
};
use crate::{
    auth::{Credential, HeldMessages},
    limits::UNAUTHENTICATED_CALL_BYTES,
    pb::auth_service_server::AuthServiceServer,
    services::{App, auth::AuthApi},
};

/// The methods that need a credential, except for the two below.
const MILEPOST: &str = "/milepost.";
const OPEN: [&str; 2] = ["/milepost.v1.AuthService/SignUp", "/milepost.v1.AuthService/LogIn"];
/// The methods whose answers are streams; the requests of the first one are, too.
const STREAMS: [&str; 4] = [
    PUBLISH,
    "/milepost.v1.EventService/WatchEvents",
    "/milepost.v1.EventService/ExportEvents",
    "/milepost.v1.JobService/ExportJobs",
];
const PUBLISH: &str = "/milepost.v1.EventService/PublishEvents";
/// A method whose answer is about as large as its message.
const APPEND: &str = "/milepost.v1.EventService/AppendEvents";
/// Never refused: an orchestrator must not take a server that is busy for one that fails.
const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// All services, behind the check of the credential.
#[derive(Clone, Debug)]
pub(super) struct Authentication {
    routes: Transcoder<Routes>,
    /// For SignUp and LogIn, whose messages have a lower limit than those of other methods.
    open: Arc<Transcoder<AuthServiceServer<AuthApi>>>,
    app: Arc<App>,
}

impl Authentication {
    pub(super) fn new(routes: Routes, app: App) -> Self {
        let open = AuthServiceServer::new(AuthApi(app.clone()));
        let open = Transcoder::new(accepting!(open, UNAUTHENTICATED_CALL_BYTES));
        Self { routes: Transcoder::new(routes), open: Arc::new(open), app: Arc::new(app) }
    }
}

impl Service<Request<Body>> for Authentication {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.routes, cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Self { mut routes, open, app } = self.clone();
        Box::pin(async move {
            let path = request.uri().path();
            let milepost = path.starts_with(MILEPOST);
            if milepost && !OPEN.contains(&path) {
                return match app.authenticate(request.headers()).await {
                    Ok(credential) => call_of_user(routes, &app, request, credential).await,
                    Err(error) => Ok(Status::from(error).into_http()),
                };
            }
            let admission = app.auth.admission();
            let permit = match if milepost { admission.call() } else { admission.stream() } {
                Ok(permit) => Some(permit),
                Err(_) if path == HEALTH => None,
                Err(error) => return Ok(Status::from(error).into_http()),
            };
            let limited = |body| Body::new(Limited::new(body, UNAUTHENTICATED_CALL_BYTES).map_err(too_large));
            let request = request.map(limited);
            if milepost {
                return (*open).clone().call(request).await;
            }
            let response = routes.call(request).await?;
            // A stream keeps its permit until the last of its answer was sent.
            let until_the_end = |body: Body| {
                Body::new(body.map_frame(move |frame| {
                    let _permit = &permit;
                    frame
                }))
            };
            Ok(response.map(until_the_end))
        })
    }
}

/// Counts a call to its user and calls the service.
async fn call_of_user(
    mut routes: Transcoder<Routes>,
    app: &App,
    mut request: Request<Body>,
    credential: Arc<Credential>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path();
    let (streams, publishes, appends) = (STREAMS.contains(&path), path == PUBLISH, path == APPEND);
    let (tenants, tenant) = (app.auth.tenants(), credential.caller().tenant());
    let opened = if streams {
        tenants.open_stream(tenant).map(|()| None)
    } else {
        tenants.open_call(tenant).map(Some)
    };
    let call = match opened {
        Ok(call) => call,
        Err(error) => return Ok(Status::from(error).into_http()),
    };
    let messages = HeldMessages::default();
    let encoding = request.extensions().get().copied().unwrap_or_default();
    request.extensions_mut().insert(Arc::clone(&credential));
    request.extensions_mut().insert(messages.clone());
    let no_room = if publishes { NoRoom::Wait } else { NoRoom::Refuse };
    let held = (messages.clone(), encoding);
    let request =
        request.map(|body| Body::new(CountedBody::new(body, tenants.clone(), tenant, no_room, held)));
    let response = routes.call(request).await?;
    let status = Status::from_header_map(response.headers());
    if status.is_some_and(|status| status.code() == Code::Unauthenticated) {
        // The database does not have the credential any more, perhaps after a failover that lost
        // it. In the cache it would be accepted by calls that read nothing of it.
        credential.end();
    }
    // The messages of a publish stream are counted by its handler, and those of a watch no more.
    let Some(call) = call else { return Ok(response) };
    Ok(count_answer(response, !appends, (tenants, tenant), (call, messages)).await)
}

/// gRPC's status for a message that is larger than the server reads.
fn too_large(error: Box<dyn std::error::Error + Send + Sync>) -> Status {
    if error.is::<LengthLimitError>() {
        Status::out_of_range(format!(
            "a call without a credential has at most {UNAUTHENTICATED_CALL_BYTES} bytes"
        ))
    } else {
        Status::from_error(error)
    }
}
