//! What the schema promises, asked of Postgres itself.

use milepost::db::migrations;

use crate::support::TestDatabase;

/// They hold one row about the schema or the log, not entities.
const BOOKKEEPING: &str = "('schema_compatibility', 'event_log', '__diesel_schema_migrations')";

async fn texts(sql: &str) -> Vec<String> {
    TestDatabase::migrated().await.texts(sql).await
}

fn none() -> Vec<String> {
    Vec::new()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_foreign_key_has_an_index() {
    // The further columns of a key that also binds a role are constants.
    let without = texts(
        "SELECT conname::text AS text FROM pg_constraint
         WHERE contype = 'f' AND connamespace = 'public'::regnamespace AND NOT EXISTS (
             SELECT FROM pg_index WHERE indrelid = conrelid AND indkey[0] = conkey[1])",
    )
    .await;
    assert_eq!(without, none());
    let all = texts("SELECT conname::text AS text FROM pg_constraint WHERE contype = 'f'").await;
    assert!(all.len() > 5, "the question finds foreign keys at all: {all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_entity_has_id_created_at_and_updated_at() {
    let missing = texts(&format!(
        "SELECT relname || '.' || wanted.name AS text
         FROM pg_class, (VALUES ('id', 'uuid'), ('created_at', 'timestamptz'), ('updated_at', 'timestamptz'))
             AS wanted (name, type)
         WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname NOT IN {BOOKKEEPING}
         AND NOT EXISTS (
             SELECT FROM pg_attribute
             WHERE attrelid = pg_class.oid AND attname = wanted.name AND attnotnull
             AND atttypid = wanted.type::regtype)",
    ))
    .await;
    assert_eq!(missing, none());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_constraint_and_index_is_named_by_the_pattern() {
    let odd = texts(
        "SELECT conrelid::regclass || ': ' || conname AS text FROM pg_constraint
         WHERE connamespace = 'public'::regnamespace AND contype IN ('p', 'f', 'u', 'c')
         AND conrelid <> '__diesel_schema_migrations'::regclass
         AND conname !~ ('^' || conrelid::regclass || CASE contype
             WHEN 'p' THEN '_pkey$' WHEN 'f' THEN '_.+_fkey$' WHEN 'u' THEN '_.+_key$' ELSE '_.+_check$' END)
         UNION ALL
         SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
         WHERE relnamespace = 'public'::regnamespace AND relname <> '__diesel_schema_migrations'
         AND indexrelid::regclass::text !~ ('^' || relname || CASE
             WHEN indisprimary THEN '_pkey$' WHEN indisunique THEN '_.+_key$' ELSE '_.+_idx$' END)",
    )
    .await;
    assert_eq!(odd, none());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_never_change_cannot_be_changed() {
    let unguarded = texts(
        "SELECT relname::text AS text FROM pg_class
         WHERE relname IN ('job_configurations', 'step_configurations', 'metadata_configurations', 'events')
         AND NOT EXISTS (
             SELECT FROM pg_trigger
             WHERE tgrelid = pg_class.oid AND tgfoid = 'refuse_update'::regproc AND tgenabled = 'O')",
    )
    .await;
    assert_eq!(unguarded, none());
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_go_down_to_nothing_and_up_again() {
    const SHAPE: &str = "
        SELECT format('%s.%s %s %s', table_name, column_name, data_type, is_nullable) AS text
        FROM information_schema.columns WHERE table_schema = 'public'
        UNION ALL SELECT format('%s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid)) FROM pg_constraint
            WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace
        ORDER BY 1";
    let database = TestDatabase::empty().await;
    let applied = migrations::migrate(&database.url).await.unwrap();
    let up = database.texts(SHAPE).await;
    assert_eq!(up, texts(SHAPE).await);

    let mut reverted = migrations::revert(&database.url, applied.len()).await.unwrap();
    reverted.reverse();
    assert_eq!(reverted, applied);
    let mut left = database.texts(SHAPE).await;
    left.retain(|text| !text.contains("__diesel_schema_migrations"));
    assert_eq!(left, none());

    migrations::migrate(&database.url).await.unwrap();
    assert_eq!(database.texts(SHAPE).await, up);
}
