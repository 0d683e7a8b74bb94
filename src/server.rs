//! The router and what every call passes: encryption, limits, keepalive,
//! health, reflection, and the drain at the end; and beside it the metrics.
//! Shared by the binary and by tests.

mod calls;
mod connection;
mod gate;
mod incoming;
mod metrics;
mod tls;

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::layer::layer_fn;

use self::{
    calls::Calls,
    connection::Connections,
    gate::{Gate, Strangers},
    incoming::incoming,
};
pub use self::{metrics::serve_metrics, tls::Tls};
use crate::{
    error::{Error, Result},
    limits,
    pb::{
        self, auth_service_server::AuthServiceServer,
        configuration_service_server::ConfigurationServiceServer, event_service_server::EventServiceServer,
        job_service_server::JobServiceServer,
    },
    services::{App, auth::AuthApi, configurations::ConfigurationApi, events::EventApi, jobs::JobApi},
    telemetry::metrics::Metrics,
};

/// The name under which health answers for the process rather than for its
/// database.
const LIVENESS: &str = "liveness";
/// What answers for readiness.
const READINESS: [&str; 5] = [
    "",
    pb::auth_service_server::SERVICE_NAME,
    pb::configuration_service_server::SERVICE_NAME,
    pb::job_service_server::SERVICE_NAME,
    pb::event_service_server::SERVICE_NAME,
];
/// How long a draining server without calls listens for what is on its way to it,
/// or lets a client take the last of its answers.
const QUIET: Duration = Duration::from_secs(1);

/// How a server treats connections and calls.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Longest that a call may take; streams until they start. A client's
    /// deadline may be earlier, and covers all of a stream.
    pub request_timeout: Duration,
    /// Longest that calls under way may take to finish when the server stops.
    pub drain_deadline: Duration,
    /// Most calls and streams at once on one connection.
    pub streams_per_connection: u32,
    /// After how long a silence a connection is asked whether it lives.
    pub keepalive_interval: Duration,
    /// How long it may take to answer that.
    pub keepalive_timeout: Duration,
    /// What encrypts; nothing is without it.
    pub tls: Option<Tls>,
}

/// Serves until `shutdown` and then drains: not ready at once, nothing new
/// accepted, watchers told, calls under way finished, connections closed, all of
/// it within the drain deadline. An error only if serving itself fails.
pub async fn serve(
    listener: TcpListener,
    app: App,
    settings: &ServerSettings,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let draining = app.draining.clone();
    let connections = Connections::new(limits::CONNECTIONS, limits::HANDSHAKE);
    let calls = TaskTracker::new();
    let stopping = CancellationToken::new();
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status(LIVENESS, ServingStatus::Serving).await;
    report(&reporter, false).await;
    let telemetry = app.telemetry.clone();
    let metrics = Arc::clone(&telemetry.metrics);
    let readiness =
        tokio::spawn(report_readiness(reporter, app.database.answers(), metrics, stopping.clone()));

    let layer = {
        let (draining, request_timeout) = (draining.clone(), settings.request_timeout);
        let (app, calls) = (app.clone(), calls.clone());
        let strangers = Strangers::new(limits::STRANGERS);
        layer_fn(move |routes| {
            let gate = Gate::new(routes, app.clone(), strangers.clone());
            Calls::new(gate, request_timeout, draining.clone(), calls.clone(), telemetry.clone())
        })
    };
    // Pages are made to fit; a single item may be larger than any page.
    let limit = limits::MESSAGE_BYTES;
    let router = Server::builder()
        .max_concurrent_streams(settings.streams_per_connection)
        .http2_max_pending_accept_reset_streams(Some(limits::PENDING_RESET_STREAMS))
        .http2_max_local_error_reset_streams(Some(limits::FAULTY_STREAMS))
        .http2_keepalive_interval(Some(settings.keepalive_interval))
        .http2_keepalive_timeout(Some(settings.keepalive_timeout))
        .layer(layer)
        .add_service(AuthServiceServer::new(AuthApi(app.clone())).max_decoding_message_size(limit))
        .add_service(
            ConfigurationServiceServer::new(ConfigurationApi(app.clone())).max_decoding_message_size(limit),
        )
        .add_service(JobServiceServer::new(JobApi(app.clone())).max_decoding_message_size(limit))
        .add_service(EventServiceServer::new(EventApi(app)).max_decoding_message_size(limit))
        .add_service(health)
        .add_service(reflection().build_v1().map_err(Error::internal)?)
        .add_service(reflection().build_v1alpha().map_err(Error::internal)?);
    let incoming = incoming(listener, settings.tls.clone(), connections.clone());
    let mut serving = pin!(router.serve_with_incoming_shutdown(incoming, draining.clone().cancelled_owned()));

    tokio::select! {
        result = &mut serving => return result.map_err(Error::internal),
        () = shutdown => {}
    }
    tracing::info!("draining");
    stopping.cancel();
    // Not serving, before anything is refused.
    readiness.await.map_err(Error::internal)?;
    draining.cancel();
    let drained = async {
        tokio::select! {
            // All clients have closed.
            result = serving => result.map_err(Error::internal),
            () = all_quiet(&calls, &connections) => Ok(()),
        }
    };
    let drained = timeout(settings.drain_deadline, drained).await;
    connections.cut();
    drained.unwrap_or_else(|_| {
        tracing::warn!("the drain deadline passed with calls left");
        Ok(())
    })
}

/// Returns once no call is under way and no connection has said or taken
/// anything for a while: those that are left never spoke, or never will again.
async fn all_quiet(calls: &TaskTracker, connections: &Connections) {
    calls.close();
    loop {
        calls.wait().await;
        let moved = connections.moved();
        sleep(QUIET).await;
        if calls.is_empty() && connections.moved() == moved {
            return;
        }
    }
}

/// Reports readiness, which is that the database answers, until `stopping`;
/// then that there is none.
async fn report_readiness(
    reporter: HealthReporter,
    mut answers: watch::Receiver<Option<bool>>,
    metrics: Arc<Metrics>,
    stopping: CancellationToken,
) {
    let follow = async {
        loop {
            let ready = answers.borrow_and_update().unwrap_or(false);
            report(&reporter, ready).await;
            metrics.state.ready.set(ready.into());
            if answers.changed().await.is_err() {
                return;
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
        // So that clients such as grpcurl can show the details of errors.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}

async fn report(reporter: &HealthReporter, ready: bool) {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in READINESS {
        reporter.set_service_status(service, status).await;
    }
}
