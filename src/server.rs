//! The server: connections, TLS, limits, authentication and routing of calls, health,
//! reflection, the drain at the shutdown, and the listener for metrics. Shared by the
//! binary and the tests.

mod authentication;
mod calls;
mod connect;
mod connection;
mod http;
mod in_flight;
mod incoming;
mod metrics;
mod origins;
mod page;
mod plain;
mod reflection;
mod tls;
mod unread;

use std::{convert::Infallible, error::Error as StdError, pin::pin, sync::Arc, time::Duration};

use ::http::{Request, Response};
use futures_util::future::BoxFuture;
use prost_reflect::DescriptorPool;
use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{body::Body, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::Service;

use self::{
    authentication::Authentication,
    calls::Calls,
    connect::{Connect, Methods, Transcoder},
    connection::{Connections, Http1Limits},
    incoming::incoming,
    origins::Origins,
    page::Page,
    reflection::{Budgeted, Budgets},
};
pub use self::{metrics::serve_metrics, tls::Tls};
use crate::{
    config::ServerSettings,
    error::{Error, Result},
    json::DESCRIPTORS,
    limits,
    pb::{
        self, auth_service_server::AuthServiceServer,
        configuration_service_server::ConfigurationServiceServer, event_service_server::EventServiceServer,
        job_service_server::JobServiceServer,
    },
    services::{App, auth::AuthApi, configurations::ConfigurationApi, events::EventApi, jobs::JobApi},
    telemetry::{Telemetry, metrics::Metrics},
};

/// The answer of a service to a request.
type Answering = BoxFuture<'static, Result<Response<Body>, Infallible>>;

/// The health service name that reports on the process rather than on its database.
const LIVENESS: &str = "liveness";
/// The health service names that report readiness.
const READINESS: [&str; 5] = [
    "",
    pb::auth_service_server::SERVICE_NAME,
    pb::configuration_service_server::SERVICE_NAME,
    pb::job_service_server::SERVICE_NAME,
    pb::event_service_server::SERVICE_NAME,
];
/// How long the log may not have been read to its end before the server is not ready, and how
/// often this is checked.
const TAIL_LATE: Duration = Duration::from_secs(5);
const CHECK_TAIL: Duration = Duration::from_millis(500);
/// How long the connections of a draining server must be idle before it stops: calls
/// may still arrive, and clients may still read the last responses.
const DRAIN_IDLE: Duration = Duration::from_secs(1);

/// A generated service that takes messages of at most so many bytes, as they are or
/// compressed by gzip; the bytes are those of the decompressed message. Answers are not
/// compressed: most are small, and compression would cost more than it saves.
macro_rules! accepting {
    ($service:expr, $bytes:expr) => {
        $service.accept_compressed(tonic::codec::CompressionEncoding::Gzip).max_decoding_message_size($bytes)
    };
}
use accepting;

/// Serves until `shutdown` completes, then drains: readiness ends, the listener
/// closes, watches end with DRAINING, calls in progress finish and connections are
/// closed, all of it within the drain deadline. Without `tls`, connections are
/// unencrypted. An error only if serving itself fails.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    app: App,
    settings: &ServerSettings,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let (draining, usage) = (app.draining.clone(), app.log.usage.clone());
    let connections = Connections::new(limits::CONNECTIONS, limits::HANDSHAKE, http1_limits(settings));
    let calls = TaskTracker::new();
    let stopping = CancellationToken::new();
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status(LIVENESS, ServingStatus::Serving).await;
    report(&reporter, false).await;
    let telemetry = app.telemetry.clone();
    let metrics = Arc::clone(&telemetry.metrics);
    let readiness = tokio::spawn(report_readiness(reporter, app.clone(), metrics, stopping.clone()));

    let question = limits::REFLECTION_REQUEST_BYTES;
    let reflection_v1 = accepting!(reflection().build_v1().map_err(Error::internal)?, question);
    let reflection_v1alpha = accepting!(reflection().build_v1alpha().map_err(Error::internal)?, question);
    let budgets = Budgets::new();
    // Only requests have a limit: pages of responses are cut to fit, and a single item
    // may be larger than a page.
    let limit = limits::MESSAGE_BYTES;
    let routes = Routes::new(accepting!(AuthServiceServer::new(AuthApi(app.clone())), limit))
        .add_service(accepting!(ConfigurationServiceServer::new(ConfigurationApi(app.clone())), limit))
        .add_service(accepting!(JobServiceServer::new(JobApi(app.clone())), limit))
        .add_service(accepting!(EventServiceServer::new(EventApi(app.clone())), limit))
        .add_service(accepting!(health, limits::UNAUTHENTICATED_CALL_BYTES))
        .add_service(Budgeted::new(reflection_v1, app.clone(), budgets.clone()))
        .add_service(Budgeted::new(reflection_v1alpha, app.clone(), budgets))
        .prepare();
    let services = Authentication::new(routes, app);
    let services = Calls::new(services, settings.request_timeout, draining.clone(), calls.clone(), telemetry);
    let services = Page::new(every_protocol(services, &DESCRIPTORS), &settings.frame_ancestors)?;
    let services = Origins::new(services, &settings.allowed_origins);
    let incoming = incoming(listener, tls, connections.clone());
    let mut serving = pin!(http::serve(incoming, services, settings, draining.clone()));

    tokio::select! {
        () = &mut serving => return Err(Error::internal("no more connections are accepted")),
        () = shutdown => {}
    }
    tracing::info!("draining: waiting for calls in progress to finish");
    stopping.cancel();
    // Health reports NOT_SERVING before the first call is refused.
    readiness.await.map_err(Error::internal)?;
    draining.cancel();
    let drained = async {
        tokio::select! {
            // All clients have closed their connections.
            () = serving => {}
            () = all_idle(&calls, &connections) => {}
        }
    };
    let drained = timeout(settings.drain_deadline, drained).await;
    connections.cut();
    // Bounded by the time-outs of the database.
    if let Err(error) = usage.write_rest().await {
        tracing::warn!(
            error = &error as &dyn StdError,
            "what was appended in the last second is not counted"
        );
    }
    if drained.is_err() {
        tracing::warn!("the drain deadline passed with calls in progress: cutting their connections");
    }
    Ok(())
}

/// Serves other services with the same connections and protocols, until `draining` is cancelled
/// and all connections are closed: for the conformance suite of Connect. `descriptors` are those
/// of the services.
#[doc(hidden)]
pub async fn serve_others<S>(
    listener: TcpListener,
    tls: Option<Tls>,
    services: S,
    descriptors: &DescriptorPool,
    settings: &ServerSettings,
    draining: CancellationToken,
) where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + 'static,
{
    let connections = Connections::new(limits::CONNECTIONS, limits::HANDSHAKE, http1_limits(settings));
    let (services, calls, telemetry) = (Transcoder::new(services), TaskTracker::new(), Telemetry::default());
    let services = Calls::new(services, settings.request_timeout, draining.clone(), calls, telemetry);
    let services = Origins::new(every_protocol(services, descriptors), &settings.allowed_origins);
    http::serve(incoming(listener, tls, connections), services, settings, draining).await;
}

/// Lets services that speak gRPC be called by Connect too.
fn every_protocol<S>(services: S, descriptors: &DescriptorPool) -> Connect<S> {
    Connect::new(services, Arc::new(Methods::of(descriptors)))
}

/// HTTP/1.1 has no PING, so that the system's time limit takes its place.
fn http1_limits(settings: &ServerSettings) -> Http1Limits {
    Http1Limits {
        head: limits::HANDSHAKE,
        silence: settings.keepalive_interval + settings.keepalive_timeout,
        per_address: limits::HTTP1_CONNECTIONS_PER_ADDRESS,
        trusted_proxies: settings.auth.trusted_proxies.clone(),
    }
}

/// Returns once no call is in progress and no connection has read or written a byte
/// for [`DRAIN_IDLE`].
async fn all_idle(calls: &TaskTracker, connections: &Connections) {
    calls.close();
    loop {
        calls.wait().await;
        let activity = connections.activity();
        sleep(DRAIN_IDLE).await;
        if calls.is_empty() && connections.activity() == activity {
            return;
        }
    }
}

/// Reports the server as ready while the database answers and the log is read to its end.
/// From `stopping` on, reports it as not ready.
async fn report_readiness(
    reporter: HealthReporter,
    app: App,
    metrics: Arc<Metrics>,
    stopping: CancellationToken,
) {
    let mut available = app.database.available();
    let follow = async {
        let mut reported = false;
        loop {
            let ready = available.borrow_and_update().unwrap_or(false) && app.log.tail_lag() < TAIL_LATE;
            // Each report is sent to those who watch the health, a repeated one too.
            if std::mem::replace(&mut reported, ready) != ready {
                report(&reporter, ready).await;
                metrics.state.ready.set(ready.into());
            }
            tokio::select! {
                changed = available.changed() => if changed.is_err() { return },
                () = sleep(CHECK_TAIL) => {}
            }
        }
    };
    stopping.run_until_cancelled(follow).await;
    metrics.state.ready.set(0);
    report(&reporter, false).await;
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // Clients such as grpcurl need these to show the details of errors.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}

async fn report(reporter: &HealthReporter, ready: bool) {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in READINESS {
        reporter.set_service_status(service, status).await;
    }
}
