//! A server in this process.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Deref,
    time::Duration,
};

use milepost::{
    auth::AuthSettings,
    config::TlsConfig,
    db::{Database, DatabaseSettings},
    event_log::EventLogSettings,
    server::{self, ServerSettings, Tls},
    services::App,
    telemetry::{Telemetry, traces::Traces},
};
use tokio::net::TcpListener;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

use super::{Authority, Clients, Proxy, cluster::TestDatabase};

/// Whose word is taken for where a call comes from; nobody else calls from it.
pub const TRUSTED_PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));
/// Most connections to the database at once.
pub const CONNECTIONS: usize = 8;
/// Most streams of one user at once.
pub const STREAMS_PER_USER: usize = 40;

/// Most streams of one connection at once.
pub const STREAMS_PER_CONNECTION: u32 = 1000;

/// A server on a database of its own, or a replica of another. It stops when
/// it is dropped.
#[derive(Debug)]
pub struct TestServer {
    pub address: SocketAddr,
    pub metrics_address: SocketAddr,
    pub database: TestDatabase,
    clients: Clients,
    stop: Option<DropGuard>,
    _metrics: AbortOnDropHandle<Infallible>,
}

impl Deref for TestServer {
    type Target = Clients;

    fn deref(&self) -> &Clients {
        &self.clients
    }
}

impl TestServer {
    /// On a fresh database.
    pub async fn start() -> Self {
        Self::on(TestDatabase::migrated().await).await
    }

    /// Another server, with nothing in common but the database.
    pub async fn replica(&self) -> Self {
        Self::on(self.database.clone()).await
    }

    pub async fn on(database: TestDatabase) -> Self {
        Self::that_keeps(database, None).await
    }

    /// One that removes the events of jobs that closed so long ago.
    pub async fn that_keeps(database: TestDatabase, retention: Option<Duration>) -> Self {
        Setup { retention, ..Setup::of(database) }.serve(Clients::of).await
    }

    /// On a fresh database that it reaches through a proxy.
    pub async fn through_proxy() -> (Self, Proxy) {
        let database = TestDatabase::migrated().await;
        let proxy = Proxy::to(&database.url).await;
        let setup = Setup { url: proxy.url.clone(), ..Setup::of(database) };
        (setup.serve(Clients::of).await, proxy)
    }

    /// On a fresh database, encrypted; called by those who believe the authority.
    pub async fn encrypted(tls: &TlsConfig, authority: &Authority) -> Self {
        let clients = |address| Clients::over_tls(address, authority.believer());
        let tls = Tls::start(tls).await.unwrap();
        Setup { tls, ..Setup::of(TestDatabase::migrated().await) }.serve(clients).await
    }

    /// On a fresh database, sending its traces there.
    pub async fn traced(traces: Traces) -> Self {
        let telemetry = Telemetry { traces, ..Telemetry::default() };
        Setup { telemetry, ..Setup::of(TestDatabase::migrated().await) }.serve(Clients::of).await
    }

    /// Drains it, as a signal would.
    pub fn stop(&mut self) {
        self.stop = None;
    }

    /// How many rows a table has.
    pub async fn count(&self, table: &str) -> usize {
        let sql = format!("SELECT count(*)::text AS text FROM {table}");
        self.database.texts(&sql).await[0].parse().unwrap()
    }

    /// A fingerprint of all that the services store but for credentials.
    pub async fn stored(&self) -> Vec<String> {
        let tables =
            ["job_configurations", "step_configurations", "metadata_configurations", "jobs", "events"];
        let hashes = tables.map(|table| {
            format!(
                "SELECT '{table}: ' || count(*) || ' ' || coalesce(md5(string_agg(t::text, ',' ORDER BY t::text)), '') AS text
                 FROM {table} AS t"
            )
        });
        self.database.texts(&hashes.join(" UNION ALL ")).await
    }
}

fn settings(tls: Option<Tls>) -> ServerSettings {
    ServerSettings {
        request_timeout: Duration::from_secs(10),
        drain_deadline: Duration::from_secs(5),
        streams_per_connection: STREAMS_PER_CONNECTION,
        keepalive_interval: Duration::from_secs(20),
        keepalive_timeout: Duration::from_secs(20),
        tls,
    }
}

/// How a server differs from others.
struct Setup {
    database: TestDatabase,
    /// How it reaches that.
    url: String,
    retention: Option<Duration>,
    tls: Option<Tls>,
    telemetry: Telemetry,
}

impl Setup {
    fn of(database: TestDatabase) -> Self {
        let url = database.url.clone();
        Self { database, url, retention: None, tls: None, telemetry: Telemetry::default() }
    }

    async fn serve(self, clients: impl FnOnce(SocketAddr) -> Clients) -> TestServer {
        let [listener, metrics] = [bind().await, bind().await];
        let (address, metrics_address) = (listener.local_addr().unwrap(), metrics.local_addr().unwrap());
        let app = self.app().await;
        let serving_metrics = tokio::spawn(server::serve_metrics(metrics, app.clone()));
        let stop = CancellationToken::new();
        let (stopped, settings) = (stop.clone().cancelled_owned(), settings(self.tls));
        tokio::spawn(async move { server::serve(listener, app, &settings, stopped).await.unwrap() });
        TestServer {
            address,
            metrics_address,
            database: self.database,
            clients: clients(address),
            stop: Some(stop.drop_guard()),
            _metrics: AbortOnDropHandle::new(serving_metrics),
        }
    }

    async fn app(&self) -> App {
        let database = Database::new(DatabaseSettings {
            url: self.url.clone(),
            ca: self.database.ca.clone(),
            connections: CONNECTIONS,
            statement_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            synchronous_commit: "on".to_owned(),
        })
        .unwrap();
        let auth = AuthSettings {
            session_lifetime: Duration::from_secs(60 * 60),
            // The cheapest that bcrypt knows: tests sign up all the time.
            bcrypt_cost: 4,
            bcrypt_parallel: 2,
            sign_up_open: true,
            streams_per_user: STREAMS_PER_USER,
            trusted_proxies: vec![TRUSTED_PROXY],
        };
        let log = EventLogSettings { publish_window: 8, retention: self.retention };
        App::start(database, auth, log, self.telemetry.clone()).await.unwrap()
    }
}

async fn bind() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}
