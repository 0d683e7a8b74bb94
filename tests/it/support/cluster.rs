//! The one Postgres of this process, and a database for whoever asks.

use diesel::sql_types::Text;
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl as _, SimpleAsyncConnection as _};
use milepost::db::{
    embedded::{Embedded, EmbeddedSettings},
    migrations,
};
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::temporary::TemporaryFolder;

const TEMPLATE: &str = "template_milepost";

/// Tests measure no durability here (those that do run a server of their own),
/// so nothing waits for the disk.
const FAST: [(&str, &str); 5] = [
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "off"),
    ("max_connections", "500"),
    ("autovacuum", "off"),
];

struct Cluster {
    postgres: Embedded,
    /// Statics are never dropped: its watchdog sees us die.
    _folder: TemporaryFolder,
}

static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();

async fn cluster() -> &'static Cluster {
    CLUSTER.get_or_init(start).await
}

async fn start() -> Cluster {
    let folder = TemporaryFolder::new();
    let extra_options = FAST.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let settings = EmbeddedSettings { data_dir: folder.path().to_owned(), extra_options };
    let postgres = Embedded::start(settings).await.unwrap();
    let mut admin = connect(&postgres.url("postgres")).await;
    admin.batch_execute(&format!("CREATE DATABASE {TEMPLATE}")).await.unwrap();
    migrations::migrate(&postgres.url(TEMPLATE)).await.unwrap();
    Cluster { postgres, _folder: folder }
}

async fn connect(url: &str) -> AsyncPgConnection {
    AsyncPgConnection::establish(url).await.unwrap()
}

/// A database of one test's own.
#[derive(Clone, Debug)]
pub struct TestDatabase {
    name: String,
    pub url: String,
}

impl TestDatabase {
    /// With the schema as it is served.
    pub async fn migrated() -> Self {
        Self::copy_of(TEMPLATE).await
    }

    /// With nothing in it.
    pub async fn empty() -> Self {
        Self::copy_of("template0").await
    }

    async fn copy_of(template: &str) -> Self {
        let name = format!("test_{}", Uuid::now_v7().simple());
        admin(&format!("CREATE DATABASE {name} TEMPLATE {template}")).await;
        let url = cluster().await.postgres.url(&name);
        Self { name, url }
    }

    pub async fn connect(&self) -> AsyncPgConnection {
        connect(&self.url).await
    }

    /// Runs a statement.
    pub async fn execute(&self, sql: &str) {
        self.connect().await.batch_execute(sql).await.unwrap();
    }

    /// The column `text` of each row.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        let rows: Vec<Row> = diesel::sql_query(sql).load(&mut self.connect().await).await.unwrap();
        rows.into_iter().map(|row| row.text).collect()
    }

    /// Ends everybody's connections to it and refuses new ones.
    pub async fn take_away(&self) {
        let name = &self.name;
        admin(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false")).await;
        admin(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))
            .await;
    }

    pub async fn bring_back(&self) {
        admin(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", self.name)).await;
    }
}

#[derive(diesel::QueryableByName)]
struct Row {
    #[diesel(sql_type = Text)]
    text: String,
}

async fn admin(sql: &str) {
    connect(&cluster().await.postgres.url("postgres")).await.batch_execute(sql).await.unwrap();
}
