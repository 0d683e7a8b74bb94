//! `milepost serve`, and the server that `milepost demo` runs in its own process.

use std::{convert::Infallible, net::SocketAddr, process::ExitCode};

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
    config::{AuthSettings, Config, MonitoringSettings, ServerSettings},
    db::{Database, migrations},
    error::{BoxError, Result},
    server::{Tls, serve, serve_metrics},
    services::App,
    telemetry::{Telemetry, traces::Traces},
};

/// Serves until SIGTERM or SIGINT.
pub(super) async fn run(config: &Config) -> Result<ExitCode, BoxError> {
    // From here on a signal no longer ends the process at once, so that every
    // started part is also stopped.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let tls = start_tls(config).await?;
    // The listener opens only after this wait: until then the server is not ready.
    tokio::select! {
        ready = OpenDatabase::ready(config) => ready?,
        _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
        _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
    }
    let listener = bind(config.start.listen).await?;
    let server = Server::start(config, tls, listener).await?;
    let data = match config.database.url() {
        Some(_) => "DATABASE_URL".to_owned(),
        None => data_dir(&config.database).await?.display().to_string(),
    };
    // The server also runs with a closed stdout.
    let _closed = print_line(&format!("milepost listens on {}, with its data in {data}", server.address));
    server.run_until_stopped(&mut terminate, &mut interrupt).await;
    server.stop().await?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn bind(listen: SocketAddr) -> Result<TcpListener, BoxError> {
    TcpListener::bind(listen).await.map_err(|error| format!("cannot listen on {listen}: {error}").into())
}

/// Loads the TLS files. An error for settings that contradict each other, or if the
/// server would listen beyond loopback without TLS and without `--insecure-listen`.
pub(super) async fn start_tls(Config { start, server, .. }: &Config) -> Result<Option<Tls>, BoxError> {
    server.check()?;
    if !start.listen.ip().is_loopback() && !start.insecure_listen && !start.tls.is_on()? {
        return Err(format!(
            "--listen {} is not loopback, and connections would not be encrypted: set --tls-cert and \
             --tls-key, or allow unencrypted connections with --insecure-listen",
            start.listen
        )
        .into());
    }
    Ok(Tls::start(&start.tls).await?)
}

/// The listener for metrics, if `--metrics-listen` is set. An error for an address
/// beyond loopback without `--insecure-metrics-listen`.
async fn bind_metrics(config: &MonitoringSettings) -> Result<Option<TcpListener>, BoxError> {
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

/// A server that runs in this process.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: SocketAddr,
    database: OpenDatabase,
    /// What the server works with.
    connections: Database,
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
        tls: Option<Tls>,
        listener: TcpListener,
    ) -> Result<Self, BoxError> {
        let metrics = bind_metrics(&config.monitoring).await?;
        let traces = Traces::start(&config.monitoring.traces)
            .map_err(|error| format!("cannot export traces: {error}"))?;
        let telemetry = Telemetry { traces, ..Telemetry::default() };
        let database = OpenDatabase::to_serve(&config.database).await?;
        match Self::prepare(config, &listener, &database, telemetry.clone()).await {
            Ok((address, app)) => {
                let connections = app.database.clone();
                let metrics = metrics.map(|listener| {
                    AbortOnDropHandle::new(tokio::spawn(serve_metrics(listener, app.clone())))
                });
                let settings = config.server.clone();
                let stop = CancellationToken::new();
                let stopped = stop.clone().cancelled_owned();
                let ended = CancellationToken::new();
                let guard = ended.clone().drop_guard();
                let serving = tokio::spawn(async move {
                    let _guard = guard;
                    serve(listener, tls, app, &settings, stopped).await
                });
                Ok(Self { address, database, connections, stop, serving, ended, telemetry, metrics })
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
            migrate(&open.url, &config.database.settings).await?;
        }
        let database = Database::new(open.url.clone(), config.database.settings.clone())?;
        migrations::check(&database, config.start.unsafe_database).await?;
        database.warn_of_too_many_connections().await?;
        let ServerSettings { auth, log, quotas, .. } = config.server.clone();
        let auth = AuthSettings { sign_up_open: config.start.sign_up.is_open(address), ..auth };
        let app = App::start(database, auth, log, quotas, telemetry).await?;
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
        self.connections.stop_tasks();
        self.database.close().await?;
        Ok(served??)
    }
}
