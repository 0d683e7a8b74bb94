//! The schema's migrations, and whether this server may serve a database.

use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, Instant},
};

use diesel::{
    ConnectionError, ExpressionMethods as _, QueryDsl as _, QueryableByName,
    migration::MigrationSource,
    pg::Pg,
    result::Error as DieselError,
    sql_query,
    sql_types::{Bool, Integer, Text},
};
use diesel_async::{AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl as _, SimpleAsyncConnection as _};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness as _, embed_migrations};

use super::{Database, KEEPALIVES, connect::establish, embedded::OLDEST_MAJOR};
use crate::{error::BoxError, schema::schema_compatibility};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");
/// Key of the advisory lock that lets one replica at a time migrate: any
/// number that nobody else would choose.
const LOCK_KEY: i64 = 0x6d69_6c65_706f_7374;
/// Longest wait for another replica's migrations.
const TURN_TIMEOUT: &str = "10min";
/// Longest that a migration may stop half-way: whoever holds tables locked and is
/// gone is not waited for.
const IDLE_TIMEOUT: &str = "10s";
/// Longest wait for a table's lock at a time: whoever appends meanwhile queues up
/// behind it, and must not for long.
const TABLE_LOCK_TIMEOUT: &str = "1s";
/// How long those who queued up have before the lock is asked for again, and for
/// how long it is.
const TABLE_LOCK_PAUSE: Duration = Duration::from_secs(1);
const TABLE_LOCK_RETRY_FOR: Duration = Duration::from_secs(60);

/// Why a database is not migrated or not served; for the operator.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// No connection.
    #[error("cannot connect to the database: {0}")]
    Connect(#[from] ConnectionError),
    /// No connection out of the pool.
    #[error("cannot connect to the database")]
    Unavailable(#[source] crate::error::Error),
    /// A query failed.
    #[error("the database refuses: {0}")]
    Query(#[from] DieselError),
    /// A migration failed; nothing of it is left.
    #[error("a migration failed: {0}")]
    Migration(BoxError),
    /// Migrations are missing.
    #[error("the database's schema lacks {0} of this server's migrations: run `milepost migrate`")]
    Older(usize),
    /// The schema has moved on too far.
    #[error("the database's schema needs a server that knows migration {needed}; this one knows {known}")]
    Newer {
        /// The newest migration that a server must know.
        needed: String,
        /// The newest one here.
        known: String,
    },
    /// Postgres itself is too old.
    #[error("the database is Postgres {0}; milepost needs {OLDEST_MAJOR} or later")]
    OldPostgres(i32),
    /// Acknowledged events could be lost.
    #[error(
        "the database has {0}=off: a crash could lose acknowledged events or the whole database; set it to on, or \
         serve all the same with --unsafe-database"
    )]
    Unsafe(&'static str),
}

/// Applies every migration that the database lacks, each in a transaction, one
/// replica at a time. The versions that were applied. Needs tokio's
/// multi-thread runtime.
pub async fn migrate(url: &str, ca: Option<&Path>) -> Result<Vec<String>, SchemaError> {
    let mut harness = AsyncMigrationHarness::new(lock(url, ca).await?);
    let mut applied = Vec::new();
    while harness.has_pending_migration(MIGRATIONS).map_err(SchemaError::Migration)? {
        applied.push(
            retry_locked_tables(|| harness.run_next_migration(MIGRATIONS).map(|v| v.to_string())).await?,
        );
    }
    Ok(applied)
}

/// Reverts the newest migrations, as many as said or as there are. The
/// versions that were reverted, newest first. Needs tokio's multi-thread
/// runtime.
pub async fn revert(url: &str, ca: Option<&Path>, count: usize) -> Result<Vec<String>, SchemaError> {
    let mut harness = AsyncMigrationHarness::new(lock(url, ca).await?);
    let applied = harness.applied_migrations().map_err(SchemaError::Migration)?.len();
    let mut reverted = Vec::new();
    for _ in 0..count.min(applied) {
        reverted.push(
            retry_locked_tables(|| harness.revert_last_migration(MIGRATIONS).map(|v| v.to_string())).await?,
        );
    }
    Ok(reverted)
}

/// Tries again for a while where a table is locked by somebody else's
/// transaction.
async fn retry_locked_tables(
    mut step: impl FnMut() -> Result<String, BoxError>,
) -> Result<String, SchemaError> {
    let started = Instant::now();
    loop {
        match step() {
            // Diesel keeps the words alone, not the code. Those of a server that
            // speaks another language are an error like others.
            Err(error)
                if error.to_string().contains("lock timeout") && started.elapsed() < TABLE_LOCK_RETRY_FOR =>
            {
                tracing::info!("a table is in use, so a migration waits");
                tokio::time::sleep(TABLE_LOCK_PAUSE).await;
            }
            done => return done.map_err(SchemaError::Migration),
        }
    }
}

/// A connection that holds the migrations' lock until it is closed.
async fn lock(url: &str, ca: Option<&Path>) -> Result<AsyncPgConnection, SchemaError> {
    let mut connection = establish(url, ca).await?;
    connection
        .batch_execute(&format!(
            "SET application_name = 'milepost migrate'; SET client_min_messages = warning; \
             {KEEPALIVES}; SET idle_in_transaction_session_timeout = '{IDLE_TIMEOUT}'; \
             SET lock_timeout = '{TURN_TIMEOUT}'; SELECT pg_advisory_lock({LOCK_KEY}); \
             SET lock_timeout = '{TABLE_LOCK_TIMEOUT}'"
        ))
        .await?;
    Ok(connection)
}

/// Whether this server may serve that database: its Postgres is new enough and
/// durable (unless `unsafe_database`), and its schema is not older than this
/// server's and not too new for it.
pub async fn check(database: &Database, unsafe_database: bool) -> Result<(), SchemaError> {
    let mut connection = database.get().await.map_err(SchemaError::Unavailable)?;
    let postgres: Postgres = sql_query(
        "SELECT current_setting('server_version_num')::integer / 10000 AS major, \
                current_setting('fsync')::boolean AS fsync, \
                current_setting('full_page_writes')::boolean AS full_page_writes, \
                to_regclass('__diesel_schema_migrations') IS NOT NULL \
                    AND to_regclass('schema_compatibility') IS NOT NULL AS migrated",
    )
    .get_result(&mut connection)
    .await?;
    postgres.check(unsafe_database)?;

    let known = known_versions()?;
    if !postgres.migrated {
        return Err(SchemaError::Older(known.len()));
    }
    let applied: Vec<Applied> =
        sql_query("SELECT version FROM __diesel_schema_migrations").load(&mut connection).await?;
    let oldest_server: String = schema_compatibility::table
        .filter(schema_compatibility::id.eq(1))
        .select(schema_compatibility::oldest_server)
        .first(&mut connection)
        .await?;
    check_versions(&known, &applied.into_iter().map(|row| row.version).collect(), &oldest_server)
}

/// How the database server is set.
#[derive(QueryableByName)]
struct Postgres {
    #[diesel(sql_type = Integer)]
    major: i32,
    #[diesel(sql_type = Bool)]
    fsync: bool,
    #[diesel(sql_type = Bool)]
    full_page_writes: bool,
    #[diesel(sql_type = Bool)]
    migrated: bool,
}

#[derive(QueryableByName)]
struct Applied {
    #[diesel(sql_type = Text)]
    version: String,
}

impl Postgres {
    fn check(&self, unsafe_database: bool) -> Result<(), SchemaError> {
        if !u32::try_from(self.major).is_ok_and(|major| major >= OLDEST_MAJOR) {
            return Err(SchemaError::OldPostgres(self.major));
        }
        match (self.fsync, self.full_page_writes) {
            (true, true) => Ok(()),
            _ if unsafe_database => Ok(()),
            (false, _) => Err(SchemaError::Unsafe("fsync")),
            (true, false) => Err(SchemaError::Unsafe("full_page_writes")),
        }
    }
}

fn known_versions() -> Result<BTreeSet<String>, SchemaError> {
    let migrations = MigrationSource::<Pg>::migrations(&MIGRATIONS).map_err(SchemaError::Migration)?;
    Ok(migrations.iter().map(|migration| migration.name().version().to_string()).collect())
}

/// Versions are digits of one length, so their order is that of text.
fn check_versions(
    known: &BTreeSet<String>,
    applied: &BTreeSet<String>,
    oldest_server: &str,
) -> Result<(), SchemaError> {
    let missing = known.difference(applied).count();
    if missing > 0 {
        return Err(SchemaError::Older(missing));
    }
    let newest = known.last().map_or("", String::as_str);
    if applied.len() > known.len() && oldest_server > newest {
        return Err(SchemaError::Newer { needed: oldest_server.to_owned(), known: newest.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(versions: &[&str]) -> BTreeSet<String> {
        versions.iter().map(|version| (*version).to_owned()).collect()
    }

    #[test]
    fn a_server_serves_its_own_schema_and_newer_ones_that_allow_it() {
        let known = set(&["20260101000001", "20260101000002"]);
        assert!(check_versions(&known, &known, "20260101000002").is_ok());

        let newer = set(&["20260101000001", "20260101000002", "20270101000001"]);
        assert!(check_versions(&known, &newer, "20260101000002").is_ok());
        assert!(matches!(
            check_versions(&known, &newer, "20270101000001"),
            Err(SchemaError::Newer { needed, .. }) if needed == "20270101000001"
        ));

        let older = set(&["20260101000001"]);
        assert!(matches!(check_versions(&known, &older, "20260101000001"), Err(SchemaError::Older(1))));
    }

    #[test]
    fn a_database_that_loses_events_is_refused_by_default() {
        let postgres = Postgres { major: 15, fsync: true, full_page_writes: true, migrated: true };
        assert!(postgres.check(false).is_ok());
        let lossy = Postgres { fsync: false, ..postgres };
        assert!(matches!(lossy.check(false), Err(SchemaError::Unsafe("fsync"))));
        assert!(lossy.check(true).is_ok());
        let torn = Postgres { fsync: true, full_page_writes: false, ..lossy };
        assert!(matches!(torn.check(false), Err(SchemaError::Unsafe("full_page_writes"))));
        let old = Postgres { major: 14, full_page_writes: true, ..torn };
        assert!(matches!(old.check(true), Err(SchemaError::OldPostgres(14))));
    }

    #[test]
    fn every_embedded_migration_has_a_version_that_sorts_as_text() {
        let versions = known_versions().expect("migrations");
        assert!(!versions.is_empty());
        assert!(
            versions.iter().all(|version| version.len() == 14 && version.bytes().all(|b| b.is_ascii_digit()))
        );
    }
}
