//! Invariants of the schema, read from the catalogs of Postgres.

use std::collections::BTreeMap;

use milepost::db::migrations;
use milepost_client::pb::{self, create_watch_token_request::Job};

use crate::support::{TestDatabase, TestServer, complete, error, info, registration, step};

/// Tables that hold no entities.
const BOOKKEEPING: &str = "('schema_compatibility', 'job_states', 'job_labels', 'job_texts', 'job_silences', 'step_times', 'untimed_jobs', 'server_times', 'event_log', 'retention', 'removed_logs', 'log_in_attempts', 'sign_up_windows', 'histories', 'user_usage', 'usage_changes', 'event_usage', 'credential_removal', '__diesel_schema_migrations')";

async fn texts(sql: &str) -> Vec<String> {
    TestDatabase::migrated().await.texts(sql).await
}

fn no_rows() -> Vec<String> {
    Vec::new()
}

/// The columns of `src/schema.rs`, each as `table.column Type`.
fn declared_columns() -> Vec<String> {
    let mut table = "";
    let lines = include_str!("../../../src/schema.rs").lines().map(str::trim);
    lines
        .filter_map(|line| {
            if let Some((name, _)) = line.strip_suffix(") {").and_then(|line| line.split_once(" (")) {
                table = name;
            }
            let (column, kind) = line.strip_suffix(',')?.split_once(" -> ")?;
            Some(format!("{table}.{column} {kind}"))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_rs_declares_the_columns_of_the_migrated_database() {
    let stored = texts(
        "WITH types AS (SELECT oid, typname, typelem, replace(initcap(replace(typname, '_', ' ')), ' ', '') AS name
                        FROM pg_type)
         SELECT relname || '.' || attname || ' ' || CASE WHEN attnotnull THEN type ELSE 'Nullable<' || type || '>' END
             AS text
         FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid JOIN types ON types.oid = atttypid
         LEFT JOIN types AS element ON element.oid = types.typelem AND types.typname = '_' || element.typname,
         LATERAL (SELECT coalesce('Array<Nullable<' || element.name || '>>', types.name) AS type) AS named
         WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
         AND relname <> '__diesel_schema_migrations' AND attnum > 0 AND NOT attisdropped
         ORDER BY relname COLLATE \"C\", attnum",
    )
    .await;
    assert_eq!(declared_columns(), stored, "`diesel migration run` writes src/schema.rs");
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
    assert_eq!(without, no_rows());
    let all = texts("SELECT conname::text AS text FROM pg_constraint WHERE contype = 'f'").await;
    assert!(all.len() > 5, "the query finds foreign keys: {all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_entity_has_id_created_at_and_updated_at() {
    // That of a job is in job_states.
    let missing = texts(&format!(
        "SELECT relname || '.' || wanted.name AS text
         FROM pg_class, (VALUES ('id', 'uuid'), ('created_at', 'timestamptz'), ('updated_at', 'timestamptz'))
             AS wanted (name, type)
         WHERE (relname, wanted.name) <> ('jobs', 'updated_at') AND relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname NOT IN {BOOKKEEPING}
         AND NOT EXISTS (
             SELECT FROM pg_attribute
             WHERE attrelid = pg_class.oid AND attname = wanted.name AND attnotnull
             AND atttypid = wanted.type::regtype)",
    ))
    .await;
    assert_eq!(missing, no_rows());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_sets_updated_at_of_every_entity() {
    // append_events sets that of a job, in job_states.
    let unset = texts(&format!(
        "SELECT relname::text AS text FROM pg_class
         WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
         AND relname NOT IN {BOOKKEEPING} AND relname <> 'jobs'
         AND NOT EXISTS (
             SELECT FROM pg_trigger
             WHERE tgrelid = pg_class.oid AND tgfoid = 'set_updated_at'::regproc AND tgenabled = 'O')
         AND NOT EXISTS (
             SELECT FROM pg_attribute
             WHERE attrelid = pg_class.oid AND attname = 'updated_at' AND attgenerated = 's')",
    ))
    .await;
    assert_eq!(unset, no_rows());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_times_that_one_transaction_sets_in_a_row_are_equal() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let mut request = registration("1.0.0", &[("load", 1)]);
    request.steps[0].metadata =
        vec![pb::MetadataConfiguration { name: "mean".to_owned(), ..Default::default() }];
    provider.register(request).await;
    let job = Some(Job::JobId(provider.job(&customer).await.id));
    let create = pb::CreateWatchTokenRequest { job, ..Default::default() };
    let token = provider.auth.create_watch_token(create).await.unwrap().into_inner().watch_token.unwrap();

    let rows = async |table: &str, condition: &str| server.count(&format!("{table} WHERE {condition}")).await;
    let credentials = ["sessions", "api_keys", "watch_tokens"];
    for table in credentials {
        // Use is no change.
        server.database.execute(&format!("UPDATE {table} SET last_used_at = clock_timestamp()")).await;
    }
    let jobs = "jobs JOIN job_states ON job_id = id";
    let others = ["users", "job_configurations", "step_configurations", "metadata_configurations", jobs];
    for table in credentials.into_iter().chain(others) {
        assert_eq!(rows(table, "created_at <> updated_at").await, 0, "{table}");
        assert!(rows(table, "true").await > 0, "{table}");
    }

    let keys = &mut provider.session.auth;
    let listed = keys.list_api_keys(pb::ListApiKeysRequest::default()).await.unwrap().into_inner().api_keys;
    keys.expire_watch_token(pb::ExpireWatchTokenRequest { watch_token_id: token.id }).await.unwrap();
    keys.expire_api_key(pb::ExpireApiKeyRequest { api_key_id: listed[0].id.clone() }).await.unwrap();
    keys.log_out(pb::LogOutRequest {}).await.unwrap();
    for table in credentials {
        assert_eq!(rows(table, "revoked_at = updated_at AND updated_at > created_at").await, 1, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_of_every_constraint_and_index_follows_the_pattern() {
    let misnamed = texts(
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
    assert_eq!(misnamed, no_rows());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_immutable_tables_cannot_be_updated() {
    let unguarded = texts(
        "SELECT relname::text AS text FROM pg_class
         WHERE relname IN (
             'job_configurations', 'step_configurations', 'metadata_configurations', 'events', 'audit_entries',
             'histories')
         AND NOT EXISTS (
             SELECT FROM pg_trigger
             WHERE tgrelid = pg_class.oid AND tgfoid = 'refuse_update'::regproc AND tgenabled = 'O')",
    )
    .await;
    assert_eq!(unguarded, no_rows());
}

/// Each rule of `is_job_state`, broken by a row that follows all others where that is possible.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_job_states_follows_its_rules() {
    const FAULTS: [&str; 20] = [
        "points_done = points_total + 1",
        "points_done = -1",
        "percent = -1",
        "percent = 101",
        "percent = 100",
        "status = 'complete', closed = true",
        "steps = decode(repeat('00', 201), 'hex')",
        "status = 'pending', last_sequence = -1",
        "last_sequence = 0, last_event_id = NULL",
        "last_step_sequence = -1",
        "last_step_sequence = 2",
        "status = 'pending', last_sequence = 0, last_event_id = NULL, silent = true",
        "status = 'failed', closed = true, silent = true",
        "status = 'stalled'",
        "status = 'pending', last_sequence = 0, last_event_id = NULL, cancellation_requested_at = now()",
        "last_event_id = NULL",
        "closed = true",
        "status = 'pending', closed = true",
        "status = 'complete', percent = 100",
        "status = 'cancelled'",
    ];
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [info("here")]).await;
    let set = |change: &str| format!("UPDATE job_states SET {change} WHERE job_id = '{}'", job.id);
    for fault in FAULTS {
        let violated = server.database.violated_by(&set(fault)).await;
        assert_eq!(violated.as_deref(), Some("job_states_rules_check"), "{fault}");
    }
    for allowed in ["percent = 99", "status = 'stalled', silent = true", "status = 'failed', silent = false"]
    {
        assert_eq!(server.database.violated_by(&set(allowed)).await, None, "{allowed}");
    }
}

/// Each rule of `is_event`.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_events_follows_its_rules() {
    const STATUSES: [&str; 6] = ["pending", "running", "stalled", "failed", "complete", "cancelled"];
    const ALLOWED: [(&str, &[&str]); 8] = [
        ("step", &["running"]),
        ("progress", &["running"]),
        ("info", &["running", "failed"]),
        ("error", &["failed"]),
        ("complete", &["complete"]),
        ("close", &["failed", "cancelled"]),
        ("cancellation_requested", &["pending", "running", "stalled", "failed"]),
        ("silent", &["stalled", "failed"]),
    ];
    const PROGRESS: (&str, &str) = ("kind", "'progress'");
    const STEP: (&str, &str) = ("step_configuration_id", "gen_random_uuid()");
    const FAULTS: [&[(&str, &str)]; 10] = [
        &[("sequence", "0")],
        &[("name", "repeat('x', 257)")],
        &[PROGRESS, ("step_percent", "5")],
        &[("step_percent", "5")],
        &[PROGRESS, STEP, ("step_percent", "-1")],
        &[PROGRESS, STEP, ("step_percent", "100")],
        &[("event_metadata", "decode(repeat('00', 16385), 'hex')")],
        &[("percent", "-1")],
        &[("percent", "101")],
        &[("percent", "100")],
    ];
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [info("here")]).await;
    let mut position = 1;
    let mut violated_by = async |changes: &[(&str, &str)]| {
        position += 1;
        let number = position.to_string();
        let mut row = BTreeMap::from([
            ("sequence", &*number),
            ("position", &*number),
            ("id", "gen_random_uuid()"),
            ("kind", "'info'"),
            ("name", "''"),
            ("step_configuration_id", "NULL"),
            ("step_percent", "NULL"),
            ("event_metadata", "''"),
            ("status", "'running'"),
            ("points_done", "0"),
            ("percent", "0"),
            ("created_at", "now()"),
        ]);
        row.extend(changes.iter().copied());
        let (columns, values): (Vec<_>, Vec<_>) = row.into_iter().unzip();
        let (columns, values) = (columns.join(", "), values.join(", "));
        let insert = format!("INSERT INTO events (job_id, {columns}) VALUES ('{}', {values})", job.id);
        server.database.violated_by(&insert).await
    };
    for fault in FAULTS {
        assert_eq!(violated_by(fault).await.as_deref(), Some("events_rules_check"), "{fault:?}");
    }
    for (kind, allowed) in ALLOWED {
        for status in STATUSES {
            let (kind, quoted_status) = (format!("'{kind}'"), format!("'{status}'"));
            let percent = if status == "complete" { "100" } else { "0" };
            let row = [STEP, ("kind", &*kind), ("status", &*quoted_status), ("percent", percent)];
            let expected = (!allowed.contains(&status)).then_some("events_rules_check");
            assert_eq!(violated_by(&row).await.as_deref(), expected, "{row:?}");
        }
    }
}

/// SQL that appends an event to a job as a caller does who takes `last_event_id` for its last
/// one, and returns the outcome.
fn append(job_id: &str, last_event_id: &str, step_id: &str, points: i64, percent: i16) -> String {
    format!(
        "SELECT (append_events(ARRAY[{job_id}]::uuid[], ARRAY[coalesce(last_sequence, 0)],
            ARRAY[{last_event_id}]::uuid[], ARRAY[1], ARRAY[new_id], ARRAY['running']::job_status[],
            ARRAY[{points}]::bigint[], ARRAY[{percent}]::smallint[], ARRAY[coalesce(steps, '')],
            ARRAY[0]::bigint[], ARRAY[false], ARRAY[true], ARRAY[false], ARRAY[false], ARRAY[false],
            ARRAY[1], ARRAY[new_id], ARRAY[false],
            ARRAY[coalesce(last_sequence, 0) + 1], ARRAY['info']::event_kind[], ARRAY[''],
            ARRAY[{step_id}]::uuid[], ARRAY[NULL]::smallint[], ARRAY['']::bytea[], ARRAY[NULL]::timestamptz[],
            ARRAY['running']::job_status[], ARRAY[{points}]::bigint[],
            ARRAY[{percent}]::smallint[])).outcomes[1]::text AS text
         FROM gen_random_uuid() AS new_id LEFT JOIN job_states ON job_id = {job_id}"
    )
}

/// append_events and the triggers `jobs_refuse_delete` and `step_configurations_refuse_delete`
/// do what foreign keys would do.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_references_an_existing_job_and_a_step_of_it() {
    const OWNED: &str = "
        WITH provider AS (
            INSERT INTO users (id, role, email, email_key, password_hash, first_name, last_name)
            VALUES (gen_random_uuid(), 'provider', 'p@example.com', 'p@example.com', '$2b$04$' || repeat('x', 53), '', '') RETURNING id),
        customer AS (
            INSERT INTO users (id, role, email, email_key, password_hash, first_name, last_name, customer_code)
            VALUES (gen_random_uuid(), 'customer', 'c@example.com', 'c@example.com', '$2b$04$' || repeat('x', 53), '', '', '0123456789') RETURNING id),
        configuration AS (
            INSERT INTO job_configurations (id, provider_id, tag, name, version, precedence, release)
            SELECT gen_random_uuid(), id, tag, tag, '1.0.0', '\\x00', true
            FROM provider, (VALUES ('own'), ('other')) AS given (tag) RETURNING id, provider_id, tag),
        step AS (
            INSERT INTO step_configurations (id, job_configuration_id, position, tag, name, points)
            SELECT gen_random_uuid(), id, 0, tag, tag, 0 FROM configuration)
        INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                          provider_job_id, provider_job_name, points_total)
        SELECT gen_random_uuid(), provider_id, customer.id, configuration.id, tag, tag, '', 0
        FROM configuration, customer";
    let database = TestDatabase::migrated().await;
    database.execute(OWNED).await;
    let job = |name: &str| format!("(SELECT id FROM jobs WHERE provider_job_id = '{name}')");
    let step = |tag: &str| format!("(SELECT id FROM step_configurations WHERE tag = '{tag}')");

    let unknown_job = append("gen_random_uuid()", "NULL", "NULL", 0, 0);
    assert_eq!(database.texts(&unknown_job).await, ["1"]);
    for step in [step("other"), "gen_random_uuid()".to_owned()] {
        let violated = database.violated_by(&append(&job("own"), "NULL", &step, 0, 0)).await;
        assert_eq!(violated.as_deref(), Some("events_references"), "{step}");
    }
    let position = "SELECT position::text AS text FROM event_log";
    assert_eq!(database.texts(position).await, ["0"]);
    assert_eq!(database.texts(&append(&job("own"), "NULL", &step("own"), 0, 0)).await, ["0"]);
    assert_eq!(database.texts(position).await, ["1"]);

    for delete in ["DELETE FROM jobs", "DELETE FROM step_configurations"] {
        let violated = database.violated_by(delete).await;
        assert_eq!(violated.as_deref(), Some("events_references"), "{delete}");
    }
    let without_events = "DELETE FROM jobs WHERE provider_job_id = 'other'";
    assert_eq!(database.violated_by(without_events).await, None);
    let left = database.texts("SELECT provider_job_id AS text FROM jobs").await;
    assert_eq!(left, ["own"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_appended_to_a_job_that_is_not_as_the_caller_knows_it() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("a", 1), ("b", 1)]).await;
    let mut jobs = Vec::new();
    for last in [step("a"), complete()] {
        let job = provider.job(&customer).await;
        provider.append(&job, [last]).await;
        jobs.push(job.id);
    }
    let outcome = |job: &str, last_event_id: &str, points: i64, percent: i16| {
        let sql = append(&format!("'{job}'"), last_event_id, "NULL", points, percent);
        let database = &server.database;
        async move { database.texts(&sql).await }
    };
    let (open, closed) = (&jobs[0], &jobs[1]);
    for (job, last_event_id, points, percent) in [
        (open, "new_id", 1, 50),
        (open, "NULL", 1, 50),
        (open, "last_event_id", 0, 50),
        (open, "last_event_id", 1, 49),
        (closed, "last_event_id", 2, 99),
    ] {
        let refused = outcome(job, last_event_id, points, percent).await;
        assert_eq!(refused, ["1"], "{last_event_id} {points} {percent}");
    }
    assert_eq!(server.count("events").await, 2);
    assert_eq!(outcome(open, "last_event_id", 1, 50).await, ["0"]);
}

/// The filters of `ListJobs` read the columns of `jobs`, appends those of `job_states`.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_has_the_same_status_in_both_of_its_rows() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("a", 1)]).await;
    let logs = [
        vec![],
        vec![step("a")],
        vec![info("x"), error("x")],
        vec![error("x"), step("a"), info("x")],
        vec![step("a"), complete()],
    ];
    for closes in [false, true] {
        for log in &logs {
            let job = provider.job(&customer).await;
            // One by one, since a batch has only one effect on the status.
            for event in log {
                provider.append(&job, [event.clone()]).await;
            }
            if closes && log.last().is_none_or(|last| last.kind() != pb::EventKind::Complete) {
                provider.close(&job).await.unwrap();
            }
        }
    }
    let found = "SELECT format('%s %s', jobs.status, closed) AS text FROM jobs JOIN job_states ON job_id = id
                 WHERE jobs.status = job_states.status AND (closed_at IS NOT NULL) = closed
                 AND (closed_at = updated_at OR NOT closed) ORDER BY created_at";
    let expected = ["pending f", "running f", "failed f", "running f", "complete t"];
    let closed = ["cancelled t", "cancelled t", "failed t", "cancelled t", "complete t"];
    assert_eq!(server.database.texts(found).await, [expected, closed].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn all_migrations_can_be_reverted_and_applied_again() {
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
    let applied = migrations::migrate(&database.url, None).await.unwrap();
    let up = database.texts(SHAPE).await;
    assert_eq!(up, texts(SHAPE).await);

    let mut reverted = migrations::revert(&database.url, None, applied.len(), false).await.unwrap();
    reverted.reverse();
    assert_eq!(reverted, applied);
    let mut left = database.texts(SHAPE).await;
    left.retain(|text| !text.contains("__diesel_schema_migrations"));
    assert_eq!(left, no_rows());

    migrations::migrate(&database.url, None).await.unwrap();
    assert_eq!(database.texts(SHAPE).await, up);
}
