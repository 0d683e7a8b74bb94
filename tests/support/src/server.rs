//! A server that runs in the test process.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Deref,
    time::Duration,
};

use milepost::{
    config::{
        AuthSettings, BcryptSettings, DatabaseSettings, EventLogSettings, QuotaSettings, ServerSettings,
        SynchronousCommit, TenantSettings, TlsSettings,
    },
    db::Database,
    server::{self, Tls},
    services::App,
    telemetry::{Telemetry, traces::Traces},
};
use tokio::net::TcpListener;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

use crate::{Authority, Clients, Proxy, TestDatabase};

/// The only address whose `x-forwarded-for` the server trusts. Other clients do
/// not call from it.
pub const TRUSTED_PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));
/// Most sign-ups in an hour from one address other than loopback.
pub const SIGN_UPS_PER_HOUR: i32 = 4;
/// Connections in the pool of one server.
pub const CONNECTIONS: usize = 8;
/// Most open streams of one user on one server.
pub const STREAMS_PER_USER: usize = 40;
/// Most open streams of one provider's watch tokens on one server.
pub const TOKEN_STREAMS_PER_USER: usize = 60;
/// The only origin beside the server's own whose pages may call it.
pub const ALLOWED_ORIGIN: &str = "https://app.example.com";
/// Most open streams of one connection.
pub const STREAMS_PER_CONNECTION: u32 = 1000;

/// A server, alone on its database or a replica of another server. It drains when
/// it is dropped.
#[derive(Debug)]
pub struct TestServer {
    pub address: SocketAddr,
    pub metrics_address: SocketAddr,
    pub database: TestDatabase,
    /// What the server works with, for states that no call can bring about.
    pub app: App,
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
    /// Starts a server on a new database.
    pub async fn start() -> Self {
        Self::on(TestDatabase::migrated().await).await
    }

    /// Starts another server that shares nothing but the database.
    pub async fn replica(&self) -> Self {
        Self::on(self.database.clone()).await
    }

    pub async fn on(database: TestDatabase) -> Self {
        Self::with_retention(database, None).await
    }

    /// Starts a server that removes the events of a job this long after it closed;
    /// `None` keeps them.
    pub async fn with_retention(database: TestDatabase, retention: Option<Duration>) -> Self {
        Setup { retention, ..Setup::of(database) }.serve(Clients::of).await
    }

    /// Starts a server with these quotas.
    pub async fn with_quotas(database: TestDatabase, quotas: QuotaSettings) -> Self {
        Setup { quotas, ..Setup::of(database) }.serve(Clients::of).await
    }

    /// Starts a server on a new database that allows each user this.
    pub async fn with_tenants(change: impl FnOnce(&mut TenantSettings)) -> Self {
        let mut setup = Setup::of(TestDatabase::migrated().await);
        change(&mut setup.tenants);
        setup.serve(Clients::of).await
    }

    /// Starts a server that reaches its new database through a proxy.
    pub async fn through_proxy() -> (Self, Proxy) {
        let database = TestDatabase::migrated().await;
        let proxy = Proxy::to(&database.url).await;
        let setup = Setup { url: proxy.url.clone(), ..Setup::of(database) };
        (setup.serve(Clients::of).await, proxy)
    }

    /// Starts a server with TLS on a new database; its clients trust `authority`.
    pub async fn with_tls(tls: &TlsSettings, authority: &Authority) -> Self {
        let clients = |address| Clients::over_tls(address, authority.client_tls());
        let tls = Tls::start(tls).await.unwrap();
        Setup { tls, ..Setup::of(TestDatabase::migrated().await) }.serve(clients).await
    }

    /// Starts a server on a new database; it exports its traces through `traces`.
    pub async fn with_traces(traces: Traces) -> Self {
        let telemetry = Telemetry { traces, ..Telemetry::default() };
        Setup { telemetry, ..Setup::of(TestDatabase::migrated().await) }.serve(Clients::of).await
    }

    /// Starts the drain, as SIGTERM does.
    pub fn stop(&mut self) {
        self.stop = None;
    }

    /// The number of rows of a table.
    pub async fn count(&self, table: &str) -> usize {
        let sql = format!("SELECT count(*)::text AS text FROM {table}");
        self.database.texts(&sql).await[0].parse().unwrap()
    }

    /// Row counts and hashes of the tables that the services write, without users
    /// and credentials.
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

/// The defaults of `serve`.
const TENANTS: TenantSettings = TenantSettings {
    calls_per_second: 5_000,
    calls_in_flight: 1_024,
    events_per_second: 50_000,
    bytes_in_flight_mib: 16,
    total_bytes_in_flight_mib: 256,
};

fn settings(retention: Option<Duration>, tenants: TenantSettings) -> ServerSettings {
    ServerSettings {
        request_timeout: Duration::from_secs(10),
        drain_deadline: Duration::from_secs(5),
        streams_per_connection: STREAMS_PER_CONNECTION,
        allowed_origins: vec![ALLOWED_ORIGIN.to_owned()],
        frame_ancestors: Vec::new(),
        auth: AuthSettings {
            sign_up_open: true,
            streams_per_user: STREAMS_PER_USER,
            token_streams_per_user: TOKEN_STREAMS_PER_USER,
            tenants,
            trusted_proxies: vec![TRUSTED_PROXY.into()],
            session_lifetime: Duration::from_secs(60 * 60),
            sign_ups_per_hour: SIGN_UPS_PER_HOUR,
            // bcrypt's lowest cost, since almost every test signs up users.
            bcrypt: BcryptSettings { bcrypt_cost: 4, bcrypt_parallel: 2 },
        },
        keepalive_interval: Duration::from_secs(20),
        keepalive_timeout: Duration::from_secs(20),
        log: EventLogSettings { publish_window: 8, cache_mib: 16, retention },
        quotas: QUOTAS,
    }
}

/// The quotas of test servers: those of `milepost serve`.
pub const QUOTAS: QuotaSettings = QuotaSettings {
    configurations_per_user: 10_000,
    open_jobs_per_user: 1_000_000,
    api_keys_per_user: 1_000,
    sessions_per_user: 1_000,
    watch_tokens_per_user: 1_000_000,
    stored_mib_per_user: 1_048_576,
    events_per_user_day: 1_000_000_000,
};

/// The settings in which test servers differ.
struct Setup {
    database: TestDatabase,
    /// The URL by which the server reaches `database`.
    url: String,
    retention: Option<Duration>,
    quotas: QuotaSettings,
    tenants: TenantSettings,
    tls: Option<Tls>,
    telemetry: Telemetry,
}

impl Setup {
    fn of(database: TestDatabase) -> Self {
        let url = database.url.clone();
        Self {
            database,
            url,
            retention: None,
            quotas: QUOTAS,
            tenants: TENANTS,
            tls: None,
            telemetry: Telemetry::default(),
        }
    }

    async fn serve(self, clients: impl FnOnce(SocketAddr) -> Clients) -> TestServer {
        let [listener, metrics] = [bind().await, bind().await];
        let (address, metrics_address) = (listener.local_addr().unwrap(), metrics.local_addr().unwrap());
        let settings = ServerSettings { quotas: self.quotas, ..settings(self.retention, self.tenants) };
        let app = self.app(&settings).await;
        let serving_metrics = tokio::spawn(server::serve_metrics(metrics, app.clone()));
        let stop = CancellationToken::new();
        let (stopped, served) = (stop.clone().cancelled_owned(), app.clone());
        tokio::spawn(async move {
            server::serve(listener, self.tls, served, &settings, stopped).await.unwrap();
        });
        TestServer {
            address,
            metrics_address,
            database: self.database,
            app,
            clients: clients(address),
            stop: Some(stop.drop_guard()),
            _metrics: AbortOnDropHandle::new(serving_metrics),
        }
    }

    async fn app(&self, ServerSettings { auth, log, quotas, .. }: &ServerSettings) -> App {
        let settings = DatabaseSettings {
            ca: self.database.ca.clone(),
            connections: CONNECTIONS,
            connect_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(5),
            synchronous_commit: SynchronousCommit::On,
        };
        let database = Database::new(self.url.clone().into(), settings).unwrap();
        App::start(database, auth.clone(), log.clone(), *quotas, self.telemetry.clone()).await.unwrap()
    }
}

async fn bind() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}
