//! `milepost serve`, and the server that `milepost demo` runs in its own process.

use std::{convert::Infallible, env, net::SocketAddr, process::ExitCode, time::Duration};

use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    database::{OpenDatabase, data_dir, migrate},
    print_line,
};
use crate::{
    auth::AuthSettings,
    config::{Config, MonitoringConfig, ServerConfig},
    db::{Database, migrations},
    error::{BoxError, Result},
    event_log::EventLogSettings,
    server::{ServerSettings, Tls, serve, serve_metrics},
    services::App,
    telemetry::{
        Telemetry,
        traces::{TraceSettings, Traces},
    },
};

/// Serves until SIGTERM or SIGINT.
pub(super) async fn run(config: &Config) -> Result<ExitCode, BoxError> {
    // From here on a signal no longer ends the process at once, so that every
    // started part is also stopped.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let settings = server_settings(&config.server).await?;
    // The listener opens only after this wait: until then the server is not ready.
    tokio::select! {
        ready = OpenDatabase::ready(config) => ready?,
        _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
        _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
    }
    let listener = bind(&config.server).await?;
    let server = Server::start(config, settings, listener).await?;
    let data = match &config.database.database_url {
        Some(_) => "DATABASE_URL".to_owned(),
        None => data_dir(&config.database).await?.display().to_string(),
    };
    // The server also runs with a closed stdout.
    let _closed = print_line(&format!("milepost listens on {}, with its data in {data}", server.address));
    server.run_until_stopped(&mut terminate, &mut interrupt).await;
    server.stop().await?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn bind(config: &ServerConfig) -> Result<TcpListener, BoxError> {
    TcpListener::bind(config.listen)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", config.listen).into())
}

/// The settings of the server. An error if it would listen beyond loopback without
/// TLS and without `--insecure-listen`.
pub(super) async fn server_settings(config: &ServerConfig) -> Result<ServerSettings, BoxError> {
    config.check()?;
    if !config.listen.ip().is_loopback() && !config.insecure_listen && !config.tls.is_on()? {
        return Err(format!(
            "--listen {} is not loopback, and connections would not be encrypted: set --tls-cert and \
             --tls-key, or allow unencrypted connections with --insecure-listen",
            config.listen
        )
        .into());
    }
    Ok(ServerSettings {
        request_timeout: Duration::from_secs(config.request_timeout_s),
        drain_deadline: Duration::from_secs(config.drain_deadline_s),
        streams_per_connection: config.streams_per_connection,
        keepalive_interval: Duration::from_secs(config.keepalive_interval_s),
        keepalive_timeout: Duration::from_secs(config.keepalive_timeout_s),
        tls: Tls::start(&config.tls).await?,
    })
}

/// The listener for metrics, if `--metrics-listen` is set. An error for an address
/// beyond loopback without `--insecure-metrics-listen`.
async fn bind_metrics(config: &MonitoringConfig) -> Result<Option<TcpListener>, BoxError> {
    let Some(address) = config.metrics_listen else { return Ok(None) };
    if !address.ip().is_loopback() && !config.insecure_metrics_listen {
        return Err(format!(
            "--metrics-listen {address} is not loopback, and every client that reaches it could read the \
             metrics: allow that with --insecure-metrics-listen"
        )
        .into());
    }
    let bound = TcpListener::bind(address).await;
    let listener = bound.map_err(|error| format!("cannot serve metrics on {address}: {error}"))?;
    tracing::info!(address = %listener.local_addr()?, "serving metrics");
    Ok(Some(listener))
}

/// The exporter of traces; disabled if neither `--otlp-endpoint` nor OpenTelemetry's
/// own variables name an endpoint.
fn traces(config: &MonitoringConfig) -> Result<Traces, BoxError> {
    let standard_variables = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    let endpoint = config
        .otlp_endpoint
        .clone()
        .or_else(|| standard_variables.into_iter().find_map(|name| env::var(name).ok()))
        .filter(|endpoint| !endpoint.is_empty());
    let Some(endpoint) = endpoint else { return Ok(Traces::default()) };
    let settings = TraceSettings { endpoint, sampled: config.trace_share };
    Traces::start(&settings).map_err(|error| format!("cannot export traces: {error}").into())
}

/// A server that runs in this process.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: SocketAddr,
    database: OpenDatabase,
    stop: CancellationToken,
    serving: JoinHandle<Result<()>>,
    /// Cancelled when `serving` has ended.
    ended: CancellationToken,
    telemetry: Telemetry,
    /// Dropped last, so that metrics are served while the server drains.
    metrics: Option<AbortOnDropHandle<Infallible>>,
}

impl Server {
    /// Opens the database and serves. A database of DATABASE_URL must accept
    /// connections already, see [`OpenDatabase::ready`].
    pub(super) async fn start(
        config: &Config,
        settings: ServerSettings,
        listener: TcpListener,
    ) -> Result<Self, BoxError> {
        let metrics = bind_metrics(&config.monitoring).await?;
        let telemetry = Telemetry { traces: traces(&config.monitoring)?, ..Telemetry::default() };
        let database = OpenDatabase::to_serve(&config.database).await?;
        match Self::prepare(config, &listener, &database, telemetry.clone()).await {
            Ok((address, app)) => {
                let metrics = metrics.map(|listener| {
                    AbortOnDropHandle::new(tokio::spawn(serve_metrics(listener, app.clone())))
                });
                let stop = CancellationToken::new();
                let stopped = stop.clone().cancelled_owned();
                let ended = CancellationToken::new();
                let guard = ended.clone().drop_guard();
                let serving = tokio::spawn(async move {
                    let _guard = guard;
                    serve(listener, app, &settings, stopped).await
                });
                Ok(Self { address, database, stop, serving, ended, telemetry, metrics })
            }
            Err(error) => {
                database.close().await?;
                Err(error)
            }
        }
    }

    async fn prepare(
        config: &Config,
        listener: &TcpListener,
        open: &OpenDatabase,
        telemetry: Telemetry,
    ) -> Result<(SocketAddr, App), BoxError> {
        let address = listener.local_addr()?;
        if open.embedded.is_some() {
            migrate(&open.settings).await?;
        }
        let database = Database::new(open.settings.clone())?;
        migrations::check(&database, config.server.unsafe_database).await?;
        let auth = auth_settings(config, address);
        let app = App::start(database, auth, log_settings(&config.server), telemetry).await?;
        if let Some(embedded) = &open.embedded {
            embedded.announce(address)?;
        }
        Ok((address, app))
    }

    /// Returns at either signal, or when serving has failed.
    async fn run_until_stopped(&self, terminate: &mut Signal, interrupt: &mut Signal) {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = self.ended.cancelled() => {}
        }
    }

    /// Drains the server, then stops traces, metrics and the embedded Postgres.
    pub(super) async fn stop(self) -> Result<(), BoxError> {
        self.stop.cancel();
        let served = self.serving.await;
        self.telemetry.traces.stop().await;
        drop(self.metrics);
        self.database.close().await?;
        Ok(served??)
    }
}

fn log_settings(config: &ServerConfig) -> EventLogSettings {
    EventLogSettings {
        publish_window: usize::try_from(config.publish_window).unwrap_or(usize::MAX),
        retention: config.retention_s.map(Duration::from_secs),
    }
}

fn auth_settings(config: &Config, listen: SocketAddr) -> AuthSettings {
    let Config { auth: config, server, .. } = config;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let parallel = config.bcrypt.bcrypt_parallel.and_then(|count| usize::try_from(count).ok());
    AuthSettings {
        session_lifetime: Duration::from_secs(config.session_lifetime_s),
        bcrypt_cost: config.bcrypt.bcrypt_cost,
        bcrypt_parallel: parallel.unwrap_or_else(|| processors.div_ceil(2)),
        sign_up_open: config.sign_up.is_open(listen),
        streams_per_user: usize::try_from(server.streams_per_user).unwrap_or(usize::MAX),
        trusted_proxies: server.trusted_proxy.clone(),
    }
}
