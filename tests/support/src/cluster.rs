//! The Postgres that all tests of this process share, and one database for each
//! test.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use diesel::sql_types::Text;
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl as _, SimpleAsyncConnection as _};
use milepost::{
    config::{DatabaseSettings, SynchronousCommit},
    db::{
        Database,
        embedded::{Embedded, EmbeddedSettings},
        migrations,
    },
};
use milepost_client::pb;
use tokio::{sync::OnceCell, time::sleep};
use uuid::Uuid;

use crate::{TemporaryDir, within_timeout};

const TEMPLATE: &str = "template_milepost";

/// Settings without waits for the disk. Tests that kill a process run a server
/// process with an embedded, durable Postgres instead.
const FAST: [(&str, &str); 6] = [
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "off"),
    ("max_connections", "500"),
    ("autovacuum", "off"),
    ("log_line_prefix", "%d "),
];

struct Cluster {
    postgres: Embedded,
    /// Never dropped, since it is in a static: the watchdog removes it when this
    /// process exits.
    dir: TemporaryDir,
}

static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();

async fn cluster() -> &'static Cluster {
    CLUSTER.get_or_init(start).await
}

async fn start() -> Cluster {
    let dir = TemporaryDir::new();
    let extra_options = FAST.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let settings = EmbeddedSettings { data_dir: dir.path().to_owned(), extra_options };
    let postgres = Embedded::start(settings).await.unwrap();
    let mut admin = connect(&postgres.url("postgres")).await;
    admin.batch_execute(&format!("CREATE DATABASE {TEMPLATE}")).await.unwrap();
    migrations::migrate(&postgres.url(TEMPLATE), None).await.unwrap();
    Cluster { postgres, dir }
}

/// A database as a server uses it.
pub fn database(url: &str, ca: Option<&Path>) -> Database {
    let settings = DatabaseSettings {
        ca: ca.map(Path::to_owned),
        connections: 4,
        connect_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(5),
        synchronous_commit: SynchronousCommit::On,
    };
    Database::new(url.to_owned().into(), settings).unwrap()
}

async fn connect(url: &str) -> AsyncPgConnection {
    AsyncPgConnection::establish(url).await.unwrap()
}

/// The database of one test.
#[derive(Clone, Debug)]
pub struct TestDatabase {
    name: String,
    pub url: String,
    pub ca: Option<PathBuf>,
}

impl TestDatabase {
    /// A new database with the current schema.
    pub async fn migrated() -> Self {
        Self::copy_of(TEMPLATE).await
    }

    /// A new database without tables.
    pub async fn empty() -> Self {
        Self::copy_of("template0").await
    }

    /// A new database with the current schema and this locale, as in `LOCALE 'C'`.
    pub async fn with_locale(locale: &str) -> Self {
        let database = Self::copy_of(&format!("template0 {locale}")).await;
        migrations::migrate(&database.url, None).await.unwrap();
        database
    }

    /// The embedded database of a server process.
    pub fn served(url: String) -> Self {
        Self { name: "milepost".to_owned(), url, ca: None }
    }

    /// The same database by another URL, such as a proxy's.
    pub fn through(&self, url: String) -> Self {
        Self { url, ..self.clone() }
    }

    async fn copy_of(template: &str) -> Self {
        let name = format!("test_{}", Uuid::now_v7().simple());
        admin(&format!("CREATE DATABASE {name} TEMPLATE {template}")).await;
        let url = cluster().await.postgres.url(&name);
        Self { name, url, ca: None }
    }

    /// A database of another Postgres, whose certificate the authority in `ca` signed.
    pub fn at(url: String, ca: PathBuf) -> Self {
        Self { name: String::new(), url, ca: Some(ca) }
    }

    pub async fn connect(&self) -> AsyncPgConnection {
        connect(&self.url).await
    }

    /// Runs one or more statements.
    pub async fn execute(&self, sql: &str) {
        self.connect().await.batch_execute(sql).await.unwrap();
    }

    /// The column `text` of each row.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        let rows: Vec<Row> = diesel::sql_query(sql).load(&mut self.connect().await).await.unwrap();
        rows.into_iter().map(|row| row.text).collect()
    }

    /// Locks a table. Statements that read it wait until the returned connection is dropped.
    pub async fn lock(&self, table: &str) -> AsyncPgConnection {
        let mut locker = self.connect().await;
        let lock = format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
        locker.batch_execute(&lock).await.unwrap();
        locker
    }

    /// Locks the rows of a job. Appends to it wait until the returned connection is dropped.
    pub async fn lock_job(&self, job: &pb::Job) -> AsyncPgConnection {
        let mut locker = self.connect().await;
        let lock = format!(
            "BEGIN; SELECT 1 FROM job_states JOIN jobs ON jobs.id = job_id WHERE job_id = '{}' FOR UPDATE",
            job.id
        );
        locker.batch_execute(&lock).await.unwrap();
        locker
    }

    /// Waits until so many backends wait for locks. Returns their process ids.
    pub async fn wait_for_locks(&self, count: usize) -> Vec<String> {
        within_timeout(format!("{count} backends that wait for locks"), async {
            loop {
                let pids = self.waiting_for_locks().await;
                if pids.len() >= count {
                    return pids;
                }
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    }

    /// Process ids of the backends that wait for a lock.
    pub async fn waiting_for_locks(&self) -> Vec<String> {
        let sql = "SELECT pid::text AS text FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event_type = 'Lock'";
        self.texts(sql).await
    }

    /// The constraint that the statement violates. Without a violation the
    /// statement takes effect.
    pub async fn violated_by(&self, sql: &str) -> Option<String> {
        let done = diesel::sql_query(sql).execute(&mut self.connect().await).await;
        milepost::error::violated(&done.err()?).map(str::to_owned)
    }

    /// Lets every present block of log-ins end this many seconds from now. The
    /// first block lasts one second only, which may pass on a busy machine before
    /// the test's next log-in.
    pub async fn block_log_ins_for(&self, seconds: u32) {
        let sql = format!(
            "UPDATE log_in_attempts SET blocked_until = clock_timestamp() + interval '{seconds} seconds'
             WHERE blocked_until IS NOT NULL"
        );
        self.execute(&sql).await;
    }

    /// Returns once the step times of all completed jobs are kept, for which retention waits.
    pub async fn keep_step_times(&self) {
        while !self.texts("SELECT job_id::text AS text FROM untimed_jobs").await.is_empty() {
            // A job that a server is at is passed over.
            self.execute("SELECT keep_step_times(1000000)").await;
        }
    }

    /// Makes Postgres log the plan of each statement with its actual row counts
    /// and times. Holds for connections opened from now on.
    pub async fn log_plans(&self) {
        let settings = [
            ("session_preload_libraries", "auto_explain"),
            ("auto_explain.log_min_duration", "0"),
            ("auto_explain.log_analyze", "on"),
            ("auto_explain.log_nested_statements", "on"),
            ("auto_explain.log_settings", "on"),
            ("auto_explain.log_format", "json"),
        ];
        for (name, value) in settings {
            admin(&format!("ALTER DATABASE {} SET {name} = '{value}'", self.name)).await;
        }
    }

    /// The process id of the tests' shared Postgres.
    pub async fn postmaster() -> u32 {
        let file = cluster().await.dir.path().join("cluster/data/postmaster.pid");
        std::fs::read_to_string(file).unwrap().lines().next().unwrap().parse().unwrap()
    }

    /// The plans logged since [`Self::log_plans`].
    pub async fn plans(&self) -> Vec<serde_json::Value> {
        let log = cluster().await.dir.path().join("cluster/postgres.log");
        let log = std::fs::read_to_string(log).unwrap();
        let prefix = format!("{} LOG:  duration:", self.name);
        let mut lines = log.lines();
        let mut plans = Vec::new();
        while lines.any(|line| line.starts_with(&prefix)) {
            let mut plan = String::new();
            let end = lines.by_ref().find(|line| {
                plan.push_str(line);
                line.ends_with('}') && !line.starts_with("\t ")
            });
            // Without its end, Postgres is still writing this plan.
            if end.is_none() {
                break;
            }
            plans.push(serde_json::from_str(&plan).unwrap());
        }
        plans
    }

    /// Makes Postgres refuse new connections to this database and terminates the
    /// open ones.
    pub async fn make_unavailable(&self) {
        let name = &self.name;
        admin(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false")).await;
        admin(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))
            .await;
    }

    pub async fn make_available(&self) {
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
