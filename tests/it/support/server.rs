//! A server in this process.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Deref,
    time::Duration,
};

use milepost::{
    auth::AuthSettings,
    db::{Database, DatabaseSettings},
    event_log::EventLogSettings,
    server::{self, ServerSettings},
    services::App,
};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Clients, cluster::TestDatabase};

/// Whose word is taken for where a call comes from; nobody else calls from it.
pub const TRUSTED_PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));
/// Most streams of one user at once.
pub const STREAMS_PER_USER: usize = 40;

/// Most streams of one connection at once.
pub const STREAMS_PER_CONNECTION: u32 = 1000;

/// A server on a database of its own, or a replica of another. It stops when
/// it is dropped.
#[derive(Debug)]
pub struct TestServer {
    pub address: SocketAddr,
    pub database: TestDatabase,
    clients: Clients,
    _stop: DropGuard,
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
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let app = app(&database.url, retention).await;
        let stopped = stop.clone().cancelled_owned();
        tokio::spawn(async move { server::serve(listener, app, &settings(), stopped).await.unwrap() });
        Self { address, database, clients: Clients::of(address), _stop: stop.drop_guard() }
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

fn settings() -> ServerSettings {
    ServerSettings {
        request_timeout: Duration::from_secs(10),
        drain_deadline: Duration::from_secs(5),
        streams_per_connection: STREAMS_PER_CONNECTION,
        keepalive_interval: Duration::from_secs(20),
        keepalive_timeout: Duration::from_secs(20),
    }
}

async fn app(url: &str, retention: Option<Duration>) -> App {
    let database = Database::new(DatabaseSettings {
        url: url.to_owned(),
        connections: 8,
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
    App::start(database, auth, EventLogSettings { publish_window: 8, retention }).await.unwrap()
}
