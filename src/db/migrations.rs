//! Applies and reverts the migrations of `migrations/`, and checks whether this
//! server may serve a database.

mod revert;

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
    sql_types::{BigInt, Bool, Text},
};
use diesel_async::{AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl as _, SimpleAsyncConnection as _};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness as _, embed_migrations};

pub use self::revert::revert;
use super::{Database, Payer, SESSION, connect::establish};
use crate::{error::BoxError, schema::schema_compatibility};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");
/// Key of the advisory lock that lets one process at a time migrate: `milepost`
/// in ASCII, which no other application is likely to use.
const LOCK_KEY: i64 = 0x6d69_6c65_706f_7374;
/// Longest wait for the migrations of another process.
const MIGRATION_LOCK_TIMEOUT: &str = "10min";
/// Longest idle time within a migration's transaction: Postgres then ends the
/// session, so that a process that hangs does not keep tables locked.
const IDLE_TIMEOUT: &str = "10s";
/// Longest wait for the lock of a table, each time: appends queue behind that
/// wait.
const TABLE_LOCK_TIMEOUT: &str = "1s";
/// Pause before the next wait for the lock of a table, in which queued appends run.
const TABLE_LOCK_PAUSE: Duration = Duration::from_secs(1);
/// Time after which a migration gives up waiting for the lock of a table.
const TABLE_LOCK_RETRY_FOR: Duration = Duration::from_secs(60);

/// Why a database cannot be migrated or served, in words for the operator.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// No connection for migrations.
    #[error("cannot connect to the database: {0}")]
    Connect(#[from] ConnectionError),
    /// No connection from the pool.
    #[error("cannot connect to the database")]
    Unavailable(#[source] crate::error::Error),
    #[error("the database refused a query: {0}")]
    Query(#[from] DieselError),
    /// Another session holds the lock of migrations.
    #[error("waited for the lock of migrations, held by {holder}: {error}")]
    Locked {
        /// The session, as Postgres lists it.
        holder: String,
        error: DieselError,
    },
    /// A migration failed, and its transaction was rolled back.
    #[error("a migration failed: {0}")]
    Migration(BoxError),
    /// The database lacks migrations of this server; holds how many.
    #[error("the database's schema lacks {0} of this server's migrations: run `milepost migrate`")]
    Older(usize),
    /// The database lacks migrations of this server and has others in their place:
    /// a version of milepost before the first release made it. Holds the first of
    /// the others.
    #[error(
        "the database was made by an unreleased version of milepost (migration {0} is not known here): make a new \
         database, or for the embedded one choose an empty --data-dir"
    )]
    Unreleased(String),
    /// The schema no longer supports servers as old as this one.
    #[error("the database's schema needs a server that knows migration {needed}; this one knows {known}")]
    Newer {
        /// The newest migration that a server must know.
        needed: String,
        /// The newest migration of this server.
        known: String,
    },
    /// Fewer migrations are applied than are to be reverted.
    #[error(
        "{count} migrations cannot be reverted: the database has {applied}, and all of them stay applied"
    )]
    Count { count: usize, applied: usize },
    /// A migration that is to be reverted is one of a newer version; holds it.
    #[error(
        "nothing was reverted: migration {0} is not known to this version of milepost, and only a version that \
         knows it can revert it"
    )]
    Unknown(String),
    /// A revert that was not confirmed would lose data, or servers would fail; holds why.
    #[error("nothing was reverted: {0}. With --yes it is reverted all the same")]
    Loss(String),
    /// Acknowledged events could be lost in a crash; holds the name of the setting.
    #[error(
        "the database has {0}=off: a crash could lose acknowledged events or the whole database; set it to on, or \
         serve all the same with --unsafe-database"
    )]
    Unsafe(&'static str),
}

/// Applies every migration that the database lacks, each in a transaction of its
/// own, and returns their versions. Processes that migrate at the same time wait
/// for each other. Needs tokio's multi-thread runtime.
pub async fn migrate(url: &str, ca: Option<&Path>) -> Result<Vec<String>, SchemaError> {
    let mut harness = lock(url, ca).await?;
    let mut applied = Vec::new();
    while harness.has_pending_migration(MIGRATIONS).map_err(SchemaError::Migration)? {
        applied.push(
            retry_locked_tables(|| harness.run_next_migration(MIGRATIONS).map(|v| v.to_string())).await?,
        );
    }
    Ok(applied)
}

/// Runs `step` again, for a limited time, while another transaction has locked a
/// table that it needs.
async fn retry_locked_tables(
    mut step: impl FnMut() -> Result<String, BoxError>,
) -> Result<String, SchemaError> {
    let started = Instant::now();
    loop {
        let done = step();
        // The step blocks its thread on the connection. If the caller awaits it in a
        // select!, that consumes the wake-up of another branch, such as a signal:
        // this has the other branches polled before the next step.
        tokio::task::yield_now().await;
        match done {
            // Diesel keeps the error's text but not its code. The text of a Postgres
            // server with other messages than English ones is not recognised.
            Err(error)
                if error.to_string().contains("lock timeout") && started.elapsed() < TABLE_LOCK_RETRY_FOR =>
            {
                tracing::info!("a migration waits for a table that another transaction has locked");
                tokio::time::sleep(TABLE_LOCK_PAUSE).await;
            }
            done => return done.map_err(SchemaError::Migration),
        }
    }
}

/// Connects and takes the advisory lock of migrations, which is released when the
/// connection closes. A lock that nobody will release, such as that of a session which
/// another program keeps open, is recognised by its holder in the log and in the error.
/// Refuses a database of an unreleased version.
async fn lock(url: &str, ca: Option<&Path>) -> Result<AsyncMigrationHarness<AsyncPgConnection>, SchemaError> {
    let mut connection = establish(url, ca, SESSION).await?;
    connection
        .batch_execute(&format!(
            "SET application_name = 'milepost migrate'; SET client_min_messages = warning; \
             SET idle_in_transaction_session_timeout = '{IDLE_TIMEOUT}'; \
             SET lock_timeout = '{MIGRATION_LOCK_TIMEOUT}'"
        ))
        .await?;
    let Lock { taken, holder } =
        sql_query(TRY_LOCK).bind::<BigInt, _>(LOCK_KEY).get_result(&mut connection).await?;
    if !taken {
        tracing::warn!(holder, "waiting for the lock of migrations");
        let locked = connection.batch_execute(&format!("SELECT pg_advisory_lock({LOCK_KEY})")).await;
        locked.map_err(|error| SchemaError::Locked { holder, error })?;
    }
    connection.batch_execute(&format!("SET lock_timeout = '{TABLE_LOCK_TIMEOUT}'")).await?;
    let mut harness = AsyncMigrationHarness::new(connection);
    refuse_unreleased(&known_versions()?, &applied_versions(&mut harness)?)?;
    Ok(harness)
}

/// Takes the lock if it is free, and otherwise names its holder. `pg_locks` has the upper
/// half of the key in `classid`. Whether the state is shown depends on the role.
const TRY_LOCK: &str = "SELECT pg_try_advisory_lock($1) AS taken, coalesce((
    SELECT concat_ws(' ', 'the session of pid', pid, '(' || nullif(application_name, '') || ')', state,
                     'since', state_change)
    FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND locktype = 'advisory' AND granted AND objsubid = 1 AND pid <> pg_backend_pid() AND (classid::bigint << 32 | objid::bigint) = $1
    LIMIT 1), 'a session that has ended') AS holder";

#[derive(QueryableByName)]
struct Lock {
    #[diesel(sql_type = Bool)]
    taken: bool,
    #[diesel(sql_type = Text)]
    holder: String,
}

fn applied_versions(
    harness: &mut AsyncMigrationHarness<AsyncPgConnection>,
) -> Result<BTreeSet<String>, SchemaError> {
    let applied = harness.applied_migrations().map_err(SchemaError::Migration)?;
    Ok(applied.iter().map(ToString::to_string).collect())
}

/// Checks that this server may serve the database: its Postgres is durable (unless
/// `unsafe_database`), and its schema is neither older than this server's nor too new for it.
pub async fn check(database: &Database, unsafe_database: bool) -> Result<(), SchemaError> {
    let mut connection = database.get(Payer::Server).await.map_err(SchemaError::Unavailable)?;
    let postgres: Postgres = sql_query(
        "SELECT current_setting('fsync')::boolean AS fsync, \
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

/// Settings of Postgres, and whether the database was ever migrated.
#[derive(QueryableByName)]
struct Postgres {
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

/// A newer server has applied all migrations of an older one. Unknown migrations in
/// place of known ones are therefore those of a version before the first release.
fn refuse_unreleased(known: &BTreeSet<String>, applied: &BTreeSet<String>) -> Result<(), SchemaError> {
    match applied.difference(known).next() {
        Some(unknown) if !known.is_subset(applied) => Err(SchemaError::Unreleased(unknown.clone())),
        _ => Ok(()),
    }
}

/// Versions have 14 digits each, so that they compare as text.
fn check_versions(
    known: &BTreeSet<String>,
    applied: &BTreeSet<String>,
    oldest_server: &str,
) -> Result<(), SchemaError> {
    refuse_unreleased(known, applied)?;
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
    fn a_server_serves_its_own_schema_and_newer_schemas_that_allow_it() {
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
    fn unknown_migrations_in_place_of_known_ones_are_those_of_an_unreleased_version() {
        let known = set(&["20260201000001", "20260201000002"]);
        for applied in [
            &["20260101000001", "20260101000002"][..],
            &["20260101000001", "20260101000002", "20260201000001"],
            &["20260201000001", "20260101000001"],
        ] {
            assert!(matches!(
                check_versions(&known, &set(applied), "20260101000001"),
                Err(SchemaError::Unreleased(unknown)) if unknown == "20260101000001"
            ));
        }
        for applied in [&[][..], &["20260201000001"], &["20260101000001", "20260201000001", "20260201000002"]]
        {
            assert!(refuse_unreleased(&known, &set(applied)).is_ok(), "{applied:?}");
        }
    }

    #[test]
    fn a_database_that_could_lose_events_is_refused_by_default() {
        let postgres = Postgres { fsync: true, full_page_writes: true, migrated: true };
        assert!(postgres.check(false).is_ok());
        let lossy = Postgres { fsync: false, ..postgres };
        assert!(matches!(lossy.check(false), Err(SchemaError::Unsafe("fsync"))));
        assert!(lossy.check(true).is_ok());
        let torn = Postgres { fsync: true, full_page_writes: false, ..lossy };
        assert!(matches!(torn.check(false), Err(SchemaError::Unsafe("full_page_writes"))));
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
