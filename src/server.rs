//! The router and what every call passes: limits, keepalive, health,
//! reflection, and the drain at the end. Shared by the binary and by tests.

mod calls;
mod connection;

use std::{pin::pin, time::Duration};

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};
use futures_util::TryStreamExt as _;
use tokio::{
    net::TcpListener,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, server::TcpIncoming};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::layer::layer_fn;

use self::{calls::Calls, connection::Connection};
use crate::{
    db::Database,
    error::{Error, Result},
    limits,
    pb::{
        self, auth_service_server::AuthServiceServer,
        configuration_service_server::ConfigurationServiceServer, event_service_server::EventServiceServer,
        job_service_server::JobServiceServer,
    },
    services::{App, auth::AuthApi, configurations::ConfigurationApi, events::EventApi, jobs::JobApi},
};

/// How often the database is asked whether it answers, and how long it has.
const READINESS_INTERVAL: Duration = Duration::from_secs(1);
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
}

/// Serves until `shutdown` and then drains: not ready at once, nothing new
/// accepted, watchers told, calls under way finished, all of it within the
/// drain deadline. An error only if serving itself fails.
pub async fn serve(
    listener: TcpListener,
    app: App,
    settings: &ServerSettings,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let draining = app.draining.clone();
    let stopping = CancellationToken::new();
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status(LIVENESS, ServingStatus::Serving).await;
    report(&reporter, false).await;
    let readiness = tokio::spawn(report_readiness(reporter, app.database.clone(), stopping.clone()));

    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that clients such as grpcurl can show the details of errors.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let layer = {
        let (draining, request_timeout) = (draining.clone(), settings.request_timeout);
        layer_fn(move |routes| Calls::new(routes, request_timeout, draining.clone()))
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
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).map_ok(Connection::new);
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
    match timeout(settings.drain_deadline, serving).await {
        Ok(result) => result.map_err(Error::internal),
        Err(_) => {
            tracing::warn!("the drain deadline passed with calls or silent connections left");
            Ok(())
        }
    }
}

/// Reports readiness, which is that the database answers, until `stopping`;
/// then that there is none.
async fn report_readiness(reporter: HealthReporter, database: Database, stopping: CancellationToken) {
    let mut connection = None;
    let mut ready = None;
    let mut ticks = interval(READINESS_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let watch = async {
        loop {
            ticks.tick().await;
            let answers = timeout(READINESS_INTERVAL, ping(&database, &mut connection)).await;
            let now = matches!(answers, Ok(Ok(())));
            if !now {
                // Half of an answer may be on its way.
                connection = None;
            }
            if ready != Some(now) {
                tracing::info!(
                    ready = now,
                    "the database {}",
                    if now { "answers" } else { "does not answer" }
                );
                report(&reporter, now).await;
                ready = Some(now);
            }
        }
    };
    stopping.run_until_cancelled(watch).await;
    report(&reporter, false).await;
}

/// Over a connection of its own: a pool that is busy is no database that is
/// away.
async fn ping(database: &Database, connection: &mut Option<AsyncPgConnection>) -> Result<()> {
    let connection = match connection {
        Some(connection) => connection,
        None => connection.insert(database.connect().await?),
    };
    Ok(connection.batch_execute("SELECT 1").await?)
}

async fn report(reporter: &HealthReporter, ready: bool) {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in READINESS {
        reporter.set_service_status(service, status).await;
    }
}
