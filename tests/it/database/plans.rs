//! Query plans: reads use ranges of indexes, and the number of rows is bounded.

use milepost_client::pb::{self, append_events_request, list_events_request, watch_events_request::Scope};
use serde_json::Value;

use crate::{
    accounts::access::{World, call, methods},
    support::{TestDatabase, TestServer, User, error, info},
};

/// Jobs of each of the two providers; one in a hundred is open.
const JOBS: u64 = 30_000;
/// Events of the long job.
const EVENTS: u64 = 20_000;
const PAGE: f64 = 20.0;
/// Most rows that a page with combined filters reads of one range of an index.
const FILTERED_ROWS: f64 = 10_000.0;
/// Most sequences that a page filtered by kind reads.
const WINDOW: f64 = 5_000.0;

struct Fixture {
    database: TestDatabase,
    /// Serves the calls of both users.
    _server: TestServer,
    provider: User,
    customer: User,
    long_job: String,
}

async fn fixture() -> Fixture {
    let database = TestDatabase::migrated().await;
    let server = TestServer::on(database.clone()).await;
    let (mut provider, mut other, customer) =
        (server.provider().await, server.provider().await, server.customer().await);
    for provider in [&mut provider, &mut other] {
        provider.configuration(&[("load", 1)]).await;
        provider.job(&customer).await;
    }
    database
        .execute(&format!(
            "INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                               provider_job_id, provider_job_name, points_total, labels, created_at)
             SELECT gen_random_uuid(), provider_id, customer_id, job_configuration_id, configuration_tag,
                    'scan-' || lpad(n::text, 6, '0'), 'patient-' || n, points_total,
                    ARRAY['number', n::text, 'parity', CASE n % 2 WHEN 0 THEN 'even' ELSE 'odd' END,
                          'third', (n % 3)::text],
                    now() - n * interval '1 s'
             FROM jobs, generate_series(1, {JOBS}) AS n;
             INSERT INTO job_texts SELECT id, provider_id, customer_id, provider_job_id, provider_job_name FROM jobs
             WHERE provider_job_id LIKE 'scan-%';
             UPDATE job_states AS state SET last_sequence = 1, last_event_id = gen_random_uuid(),
                 status = (CASE WHEN is_open THEN 'running' ELSE 'complete' END)::job_status,
                 closed = NOT is_open, percent = CASE WHEN is_open THEN 0 ELSE 100 END
             FROM jobs, LATERAL (SELECT provider_job_id LIKE '%00' AS is_open) AS given
             WHERE jobs.id = state.job_id AND provider_job_id LIKE 'scan-%';
             UPDATE jobs SET status = state.status, closed_at = CASE WHEN closed THEN now() END
             FROM job_states AS state WHERE state.job_id = jobs.id"
        ))
        .await;
    let long_job = format!("scan-{JOBS:06}");
    database
        .execute(&format!(
            "INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
                                 points_done, percent, created_at)
             SELECT id, n, row_number() OVER (), gen_random_uuid(), 'info', '', '', 'running', 0, 0, now()
             FROM jobs, generate_series(1, {EVENTS}) AS n WHERE provider_job_id = '{long_job}';
             UPDATE job_states SET last_sequence = {EVENTS}
             FROM jobs WHERE jobs.id = job_id AND provider_job_id = '{long_job}';
             UPDATE event_log SET position = (SELECT count(*) FROM events);
             ANALYZE"
        ))
        .await;
    database.log_plans().await;
    // Plans are logged on new connections only, such as those of a new replica.
    let server = server.replica().await;
    let (provider, customer) = (server.same(&provider), server.same(&customer));
    Fixture { database, _server: server, provider, customer, long_job }
}

/// A node of a plan and all its descendants.
fn nodes(node: &Value) -> Vec<&Value> {
    let below = node["Plans"].as_array().into_iter().flatten().flat_map(nodes);
    std::iter::once(node).chain(below).collect()
}

/// Tables that grow without bound.
const READ: [&str; 9] = [
    "jobs",
    "job_states",
    "job_labels",
    "events",
    "sessions",
    "api_keys",
    "watch_tokens",
    "usage_changes",
    "user_usage",
];

/// What the scans of a plan read of these tables: the table, the node type and
/// the number of rows, including those that a filter removed.
pub fn reads(plan: &Value) -> Vec<(String, String, f64)> {
    let mut reads = Vec::new();
    for node in nodes(&plan["Plan"]) {
        let number = |key: &str| node[key].as_f64().unwrap_or_default();
        let node_type = node["Node Type"].as_str().unwrap();
        if let Some(table) = node["Relation Name"].as_str().filter(|table| READ.contains(table))
            && node_type.ends_with("Scan")
        {
            let rows = number("Actual Rows") + number("Rows Removed by Filter");
            let rows = rows * number("Actual Loops");
            reads.push((table.to_owned(), node_type.to_owned(), rows));
        }
    }
    reads
}

/// Asserts that every statement since the first `before` plans read ranges of indexes
/// only, of at most `most` rows each.
async fn assert_read_by_ranges(database: &TestDatabase, label: &str, before: usize, most: f64) {
    let plans = database.plans().await;
    let read: Vec<_> = plans[before..].iter().flat_map(reads).collect();
    assert!(!read.is_empty(), "{label}: nothing was read");
    for (table, node_type, rows) in &read {
        let by_index = ["Index Scan", "Index Only Scan", "Bitmap Heap Scan"].contains(&node_type.as_str());
        assert!(by_index && *rows <= most, "{label}: {rows} rows of {table} by {node_type}: {read:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn list_jobs_reads_ranges_of_indexes() {
    let Fixture { database, _server, mut provider, mut customer, .. } = fixture().await;
    let base = pb::JobFilter::default;
    let page = |filter| pb::ListJobsRequest { filter: Some(filter), page_size: 20, ..Default::default() };
    let labels = |given: &[(&str, &str)]| {
        given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let text = str::to_owned;
    let running = i32::from(pb::JobStatus::Running);
    let complete = i32::from(pb::JobStatus::Complete);
    let (open, closed) = (pb::JobOpenness::Open.into(), pb::JobOpenness::Closed.into());
    let hours_ago = |hours: i64| {
        let seconds = chrono::Utc::now().timestamp() - hours * 3_600;
        Some(prost_types::Timestamp { seconds, nanos: 0 })
    };
    let singles = [
        ("no filter", base()),
        ("running", pb::JobFilter { statuses: vec![running], ..base() }),
        ("complete", pb::JobFilter { statuses: vec![complete], ..base() }),
        ("running or complete", pb::JobFilter { statuses: vec![running, complete], ..base() }),
        ("open", pb::JobFilter { openness: open, ..base() }),
        ("closed", pb::JobFilter { openness: closed, ..base() }),
        ("tag", pb::JobFilter { configuration_tag: text("analysis"), ..base() }),
        ("from", pb::JobFilter { created_from: hours_ago(6), ..base() }),
        ("before", pb::JobFilter { created_before: hours_ago(6), ..base() }),
        ("id", pb::JobFilter { provider_job_id_prefix: text("scan-00001"), ..base() }),
        ("name", pb::JobFilter { provider_job_name_prefix: text("patient-2999"), ..base() }),
        ("common label", pb::JobFilter { labels: labels(&[("parity", "even")]), ..base() }),
        ("rare label", pb::JobFilter { labels: labels(&[("number", "29999")]), ..base() }),
    ];
    let counterparts = [provider.id.clone(), customer.id.clone()];
    for (user, other) in [(&mut provider, &counterparts[1]), (&mut customer, &counterparts[0])] {
        let with = ("counterpart", pb::JobFilter { counterpart_id: other.clone(), ..base() });
        for (label, filter) in singles.iter().cloned().chain([with]) {
            let before = database.plans().await.len();
            user.jobs.list_jobs(page(filter)).await.unwrap();
            // For a filter that most jobs pass, Postgres may read the range of all jobs.
            assert_read_by_ranges(&database, label, before, 3.0 * PAGE).await;
        }
        let combined = [
            (
                "running scans",
                pb::JobFilter { statuses: vec![running], provider_job_id_prefix: text("scan-0"), ..base() },
            ),
            ("closed and running", pb::JobFilter { statuses: vec![running], openness: closed, ..base() }),
            (
                "closed, by counterpart and name",
                pb::JobFilter {
                    openness: closed,
                    counterpart_id: other.clone(),
                    provider_job_name_prefix: text("patient-"),
                    ..base()
                },
            ),
            (
                "common labels",
                pb::JobFilter { labels: labels(&[("parity", "even"), ("third", "0")]), ..base() },
            ),
            ("labels", pb::JobFilter { labels: labels(&[("parity", "odd"), ("number", "29999")]), ..base() }),
            ("common text", pb::JobFilter { text: text("patient"), ..base() }),
            ("rare text", pb::JobFilter { text: text("ient-2999"), ..base() }),
            (
                "closed, by label",
                pb::JobFilter { openness: closed, labels: labels(&[("parity", "even")]), ..base() },
            ),
        ];
        for (label, filter) in combined {
            let before = database.plans().await.len();
            user.jobs.list_jobs(page(filter)).await.unwrap();
            // The range may contain as many jobs of the other provider.
            assert_read_by_ranges(&database, label, before, 3.0 * FILTERED_ROWS).await;
        }
    }
}

/// The newest jobs do not match; where the index of trigrams does not help, pages are short.
#[tokio::test(flavor = "multi_thread")]
async fn a_search_finds_old_jobs_among_many() {
    let Fixture { _server, mut provider, mut customer, .. } = fixture().await;
    let search = async |user: &mut User, text: &str| {
        let filter = Some(pb::JobFilter { text: text.to_owned(), ..Default::default() });
        let mut request = pb::ListJobsRequest { filter, ..Default::default() };
        let (mut pages, mut found) = (0, Vec::new());
        loop {
            let page = user.jobs.list_jobs(request.clone()).await.unwrap().into_inner();
            pages += 1;
            found.extend(page.jobs.into_iter().map(|job| job.provider_job_name));
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                return (found, pages);
            }
        }
    };
    let old = ["patient-2999", "patient-29990", "patient-29991", "patient-29992"];
    let (found, pages) = search(&mut provider, "TIENT-2999").await;
    assert_eq!((&found[..4], found.len(), pages), (&old.map(str::to_owned)[..], 11, 1));
    // Of two providers, so that more of them are newer.
    let (found, pages) = search(&mut customer, "TIENT-2999").await;
    assert_eq!((found.len(), pages), (22, 1));
    // Three characters in a row, of which none is a letter or a digit.
    let (found, pages) = search(&mut provider, "---").await;
    assert_eq!((found.len(), pages), (0, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn list_events_reads_ranges_of_indexes() {
    let Fixture { database, _server, mut provider, long_job, .. } = fixture().await;
    let page = |after_sequence, kinds| pb::ListEventsRequest {
        job: Some(list_events_request::Job::ProviderJobId(long_job.clone())),
        after_sequence,
        kinds,
        page_size: 20,
        ..Default::default()
    };
    let (info, error) = (i32::from(pb::EventKind::Info), i32::from(pb::EventKind::Error));
    for (label, request, most) in [
        ("the first", page(0, vec![]), PAGE),
        ("the middle", page(10_000, vec![]), PAGE),
        ("a kind", page(10_000, vec![info]), PAGE),
        ("a kind without events", page(0, vec![error]), WINDOW),
    ] {
        let before = database.plans().await.len();
        provider.events.list_events(request).await.unwrap();
        assert_read_by_ranges(&database, label, before, most).await;
    }
}

/// Jobs of one customer with two providers. Each has 20 events, which interleave in the
/// log. The tables have no statistics, because ANALYZE does not run.
async fn small_jobs(server: &TestServer) -> (User, User) {
    const JOBS: u64 = 2_000;
    let customer = server.customer().await;
    let providers = [server.provider().await, server.provider().await];
    for mut provider in providers.clone() {
        provider.configuration(&[]).await;
        provider.job(&customer).await;
    }
    server
        .database
        .execute(&format!(
            "INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                               provider_job_id, provider_job_name, points_total)
             SELECT gen_random_uuid(), provider_id, customer_id, job_configuration_id, configuration_tag,
                    'scan-' || n, '', points_total
             FROM jobs, generate_series(1, {JOBS}) AS n;
             UPDATE job_states SET last_sequence = 20, last_event_id = gen_random_uuid(), status = 'running'
             FROM jobs WHERE jobs.id = job_id AND provider_job_id LIKE 'scan-%';
             UPDATE jobs SET status = 'running' WHERE provider_job_id LIKE 'scan-%';
             INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
                                 points_done, percent, created_at)
             SELECT job_id, n, row_number() OVER (ORDER BY n, job_id), gen_random_uuid(), 'info', '', '',
                    'running', 0, 0, now()
             FROM job_states, generate_series(1, 20) AS n WHERE last_sequence = 20;
             UPDATE event_log SET position = (SELECT count(*) FROM events)"
        ))
        .await;
    let [provider, _] = providers;
    (provider, customer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_reads_ranges_of_the_log_even_without_table_statistics() {
    const PAGE: f64 = 200.0;
    let server = TestServer::on(TestDatabase::migrated().await).await;
    let (provider, customer) = small_jobs(&server).await;
    let database = &server.database;
    database.log_plans().await;
    let server = server.replica().await;
    for counterpart_id in [String::new(), provider.id] {
        let before = database.plans().await.len();
        let scope = pb::AllJobs { counterpart_id, ..Default::default() };
        let request = pb::WatchEventsRequest { scope: Some(Scope::AllJobs(scope)), ..Default::default() };
        let mut watch = server.same(&customer).watch_by(request).await.unwrap();
        watch.events(2_000).await;
        for plan in &database.plans().await[before..] {
            let read = reads(plan);
            let of_the_log = read.iter().any(|(table, ..)| table == "events");
            assert!(!of_the_log || read.iter().all(|(.., rows)| *rows <= 3.0 * PAGE), "{read:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_events_are_looked_up_one_by_one_however_long_the_log_of_their_job_is() {
    const SENT: u16 = 300;
    let server = TestServer::on(TestDatabase::migrated().await).await;
    let (provider, _) = small_jobs(&server).await;
    let database = &server.database;
    database
        .execute(&format!(
            "ANALYZE;
             INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
                                 points_done, percent, created_at)
             SELECT jobs.id, n, position + n, gen_random_uuid(), 'info', '', '', 'running', 0, 0, now()
             FROM jobs, event_log, generate_series(21, {EVENTS}) AS n
             WHERE provider_job_id = 'scan-7' AND provider_id = '{0}';
             UPDATE job_states SET last_sequence = {EVENTS}
             FROM jobs WHERE jobs.id = job_id AND provider_job_id = 'scan-7' AND provider_id = '{0}';
             UPDATE event_log SET position = (SELECT max(position) FROM events)",
            provider.id
        ))
        .await;
    let ids = format!(
        "SELECT events.id::text AS text FROM events JOIN job_states USING (job_id)
         WHERE last_sequence = {EVENTS} AND sequence % 50 = 0 LIMIT {SENT}"
    );
    let kind = pb::EventKind::Info.into();
    let events = database.texts(&ids).await.into_iter();
    let events = events.map(|id| pb::NewEvent { id, kind, ..Default::default() }).collect();
    let job = Some(append_events_request::Job::ProviderJobId("scan-7".to_owned()));
    let request = pb::AppendEventsRequest { job, events, ..Default::default() };
    database.log_plans().await;
    let server = server.replica().await;
    let before = database.plans().await.len();
    let appended = server.same(&provider).events.append_events(request).await.unwrap().into_inner();
    assert_eq!(appended.events.iter().filter(|event| event.existed).count(), usize::from(SENT));
    assert_read_by_ranges(database, "events sent again", before, f64::from(SENT)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_append_runs_is_planned_once_for_tables_of_any_size() {
    let server = TestServer::on(TestDatabase::migrated().await).await;
    let (provider, _, job) = server.job(&[("load", 1)]).await;
    let database = &server.database;
    database.log_plans().await;
    let server = server.replica().await;
    let mut provider = server.same(&provider);
    provider.append(&job, [info("opens the connection")]).await;
    let before = database.plans().await.len();
    provider.append(&job, [info("changes no status")]).await;
    provider.append(&job, [error("changes the status")]).await;

    let plans = &database.plans().await[before..];
    // The statement that writes jobs also sets the time of a job that is closed in job_states.
    for (written, times) in [("event_log", 2), ("events", 2), ("job_states", 3), ("jobs", 1)] {
        let writes = |plan: &&Value| {
            let mut nodes = nodes(&plan["Plan"]).into_iter();
            nodes.any(|node| node["Node Type"] == "ModifyTable" && node["Relation Name"] == written)
        };
        let plans: Vec<_> = plans.iter().filter(writes).collect();
        assert_eq!(plans.len(), times, "{written}");
        for plan in plans {
            let settings = &plan["Settings"];
            assert_eq!(settings["plan_cache_mode"], "force_generic_plan", "{written}");
            for off in ["jit", "enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin"] {
                assert_eq!(settings[off], "off", "{written}: {off}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_reads_ranges_of_indexes_even_without_table_statistics() {
    const KEPT: u64 = 20_000;
    const EXPIRED: u64 = 3;
    const STEP: f64 = 1_000.0;
    let database = TestDatabase::migrated().await;
    let server = TestServer::on(database.clone()).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    provider.job(&customer).await;
    // Without ANALYZE, the tables have no statistics.
    database
        .execute(&format!(
            "INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                               provider_job_id, provider_job_name, points_total)
             SELECT gen_random_uuid(), provider_id, customer_id, job_configuration_id, configuration_tag,
                    n, '', points_total
             FROM jobs, generate_series(1, {KEPT} + {EXPIRED}) AS n;
             UPDATE job_states SET status = 'complete', closed = true, percent = 100,
                 last_sequence = CASE WHEN provider_job_id::integer > {KEPT} THEN 4000 ELSE 1 END,
                 last_event_id = gen_random_uuid()
             FROM jobs WHERE jobs.id = job_id AND provider_job_id ~ '^[0-9]+$';
             UPDATE jobs SET status = 'complete',
                 closed_at = now() - CASE WHEN last_sequence > 1 THEN interval '2 h' ELSE interval '0' END
             FROM job_states WHERE jobs.id = job_id AND closed;
             INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
                                 points_done, percent, created_at)
             SELECT job_id, n, row_number() OVER (), gen_random_uuid(), 'info', '', '', 'running', 0, 0, now()
             FROM job_states, generate_series(1, last_sequence) AS n;
             UPDATE event_log SET position = (SELECT count(*) FROM events)"
        ))
        .await;
    database.log_plans().await;
    let steps = EXPIRED * 4 + 1;
    database
        .execute(&format!(
            "DO $$ BEGIN
                 FOR step IN 1..{steps} LOOP PERFORM remove_expired_events(interval '1 h', 100, 1000); END LOOP;
             END $$"
        ))
        .await;
    assert_read_by_ranges(&database, "expired events", 0, STEP).await;
    assert_eq!(database.texts("SELECT count(*)::text AS text FROM events").await, [KEPT.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_removal_of_ended_credentials_reads_ranges_of_indexes_even_without_table_statistics() {
    const KEPT: u64 = 20_000;
    const STEP: f64 = 100.0;
    let server = TestServer::start().await;
    server.provider().await;
    // The server removes ended credentials itself.
    server.app.database.stop_tasks();
    let database = &server.database;
    // Without ANALYZE, the tables have no statistics.
    database
        .execute(&format!(
            "INSERT INTO sessions (id, user_id, secret_hash, expires_at)
             SELECT gen_random_uuid(), id, sha256(n::text::bytea),
                 now() - CASE WHEN n > {KEPT} THEN interval '31 days' ELSE interval '1 day' END
             FROM users, generate_series(1, {KEPT} + 250) AS n;
             INSERT INTO api_keys (id, user_id, key_hash, key_prefix, note, scopes, revoked_at)
             SELECT gen_random_uuid(), id, sha256(n::text::bytea), 'mpk_1234', '', '{{read}}',
                 CASE WHEN n > {KEPT} THEN now() - interval '31 days' END
             FROM users, generate_series(1, {KEPT} + 250) AS n"
        ))
        .await;
    database.log_plans().await;
    let step = format!("SELECT remove_ended_credentials(interval '30 days', {STEP})::text AS text");
    for removed in ["200", "200", "100", "0"] {
        assert_eq!(database.texts(&step).await, [removed]);
    }
    assert_read_by_ranges(database, "ended credentials", 0, STEP).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_scans_a_table_sequentially_however_small_it_is() {
    let database = TestDatabase::migrated().await;
    database.log_plans().await;
    for method in methods() {
        let mut world = World::new(TestServer::on(database.clone()).await).await;
        database.execute("ANALYZE").await;
        for caller in ["no credential", "a watch token of the job", "the customer", "the provider"] {
            let secret = world.secret(caller, &method).await;
            let message = world.request(caller, &method).await;
            call(world.server.channel.clone(), secret, &method, message).await;
        }
    }
    let plans = database.plans().await;
    assert!(plans.len() > 100, "{} plans", plans.len());
    for plan in plans {
        let scanned = nodes(&plan["Plan"]).into_iter().filter(|node| node["Node Type"] == "Seq Scan");
        let scanned = scanned.map(|node| node["Relation Name"].as_str().unwrap());
        // These tables have one row each.
        let scanned: Vec<_> = scanned.filter(|table| !["event_log", "retention"].contains(table)).collect();
        assert!(scanned.is_empty(), "{scanned:?} by {}", plan["Query Text"]);
    }
}
