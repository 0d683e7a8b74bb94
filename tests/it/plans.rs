//! How things are looked up: along an index, and within a bound.

use milepost::pb::{self, append_events_request, list_events_request, watch_events_request::Scope};
use serde_json::Value;

use crate::{
    access::{World, call, methods},
    support::{TestDatabase, TestServer, User},
};

/// Jobs of the provider asked, and of another one; a hundredth of them are open.
const JOBS: u64 = 30_000;
/// Events of the one long job.
const EVENTS: u64 = 20_000;
const PAGE: f64 = 20.0;
/// Of one range of an index, for a page by filters that combine.
const LOOKED_AT: f64 = 10_000.0;
/// Sequences that a page of events of some kinds looks through.
const WINDOW: f64 = 5_000.0;

struct Scene {
    database: TestDatabase,
    /// Serves the users.
    _server: TestServer,
    provider: User,
    customer: User,
    long_job: String,
}

async fn scene() -> Scene {
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
                               provider_job_id, provider_job_name, points_total, status, last_sequence,
                               percent, closed_at, created_at)
             SELECT gen_random_uuid(), provider_id, customer_id, job_configuration_id, configuration_tag,
                    'scan-' || lpad(n::text, 6, '0'), 'patient-' || n, points_total,
                    CASE WHEN n % 100 = 0 THEN 'running' ELSE 'complete' END::job_status, 1,
                    CASE WHEN n % 100 = 0 THEN 0 ELSE 100 END,
                    CASE WHEN n % 100 > 0 THEN now() END, now() - n * interval '1 s'
             FROM jobs, generate_series(1, {JOBS}) AS n"
        ))
        .await;
    let long_job = format!("scan-{JOBS:06}");
    database
        .execute(&format!(
            "INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
                                 points_done, percent, created_at)
             SELECT id, n, row_number() OVER (), gen_random_uuid(), 'info', '', '', 'running', 0, 0, now()
             FROM jobs, generate_series(1, {EVENTS}) AS n WHERE provider_job_id = '{long_job}';
             UPDATE jobs SET last_sequence = {EVENTS} WHERE provider_job_id = '{long_job}';
             UPDATE event_log SET position = (SELECT count(*) FROM events);
             ANALYZE"
        ))
        .await;
    database.log_plans().await;
    // Its connections are new.
    let server = server.replica().await;
    let (provider, customer) = (server.same(&provider), server.same(&customer));
    Scene { database, _server: server, provider, customer, long_job }
}

/// A plan's node, and all below it.
fn nodes(node: &Value) -> Vec<&Value> {
    let below = node["Plans"].as_array().into_iter().flatten().flat_map(nodes);
    std::iter::once(node).chain(below).collect()
}

/// Rows that a plan took from these tables: (from which, by which way, how
/// many, how many of them for nothing).
fn reads(plan: &Value) -> Vec<(String, String, f64)> {
    let mut reads = Vec::new();
    for node in nodes(&plan["Plan"]) {
        let number = |key: &str| node[key].as_f64().unwrap_or_default();
        let way = node["Node Type"].as_str().unwrap();
        if let Some(table) = node["Relation Name"].as_str().filter(|table| ["jobs", "events"].contains(table))
            && way.ends_with("Scan")
        {
            let rows = number("Actual Rows") + number("Rows Removed by Filter");
            let rows = rows * number("Actual Loops");
            reads.push((table.to_owned(), way.to_owned(), rows));
        }
    }
    reads
}

/// That what was just asked was read by ranges of indexes, none of which had
/// more rows than that.
async fn assert_read_by_ranges(database: &TestDatabase, asked: &str, before: usize, most: f64) {
    let plans = database.plans().await;
    let read: Vec<_> = plans[before..].iter().flat_map(reads).collect();
    assert!(!read.is_empty(), "{asked}: nothing was read");
    for (table, way, rows) in &read {
        let by_index = ["Index Scan", "Index Only Scan", "Bitmap Heap Scan"].contains(&way.as_str());
        assert!(by_index && *rows <= most, "{asked}: {rows} rows of {table} by {way}: {read:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_jobs_is_a_range_of_an_index() {
    let Scene { database, _server, mut provider, mut customer, .. } = scene().await;
    let base = || pb::ListJobsRequest { page_size: 20, ..Default::default() };
    let text = str::to_owned;
    let running = i32::from(pb::JobStatus::Running);
    let complete = i32::from(pb::JobStatus::Complete);
    let (open, closed) = (pb::JobOpenness::Open.into(), pb::JobOpenness::Closed.into());
    let hours_ago = |hours: i64| {
        let seconds = chrono::Utc::now().timestamp() - hours * 3_600;
        Some(prost_types::Timestamp { seconds, nanos: 0 })
    };
    let singles = [
        ("nothing", base()),
        ("running", pb::ListJobsRequest { statuses: vec![running], ..base() }),
        ("complete", pb::ListJobsRequest { statuses: vec![complete], ..base() }),
        ("running or complete", pb::ListJobsRequest { statuses: vec![running, complete], ..base() }),
        ("open", pb::ListJobsRequest { openness: open, ..base() }),
        ("closed", pb::ListJobsRequest { openness: closed, ..base() }),
        ("tag", pb::ListJobsRequest { configuration_tag: text("analysis"), ..base() }),
        ("from", pb::ListJobsRequest { created_from: hours_ago(6), ..base() }),
        ("before", pb::ListJobsRequest { created_before: hours_ago(6), ..base() }),
        ("id", pb::ListJobsRequest { provider_job_id_prefix: text("scan-00001"), ..base() }),
        ("name", pb::ListJobsRequest { provider_job_name_prefix: text("patient-2999"), ..base() }),
    ];
    let counterparts = [provider.id.clone(), customer.id.clone()];
    for (user, other) in [(&mut provider, &counterparts[1]), (&mut customer, &counterparts[0])] {
        let with = ("counterpart", pb::ListJobsRequest { counterpart_id: other.clone(), ..base() });
        for (asked, request) in singles.iter().cloned().chain([with]) {
            let before = database.plans().await.len();
            user.jobs.list_jobs(request).await.unwrap();
            // A filter that most jobs pass may be left to the range of all.
            assert_read_by_ranges(&database, asked, before, 3.0 * PAGE).await;
        }
        let combined = [
            (
                "running scans",
                pb::ListJobsRequest {
                    statuses: vec![running],
                    provider_job_id_prefix: text("scan-0"),
                    ..base()
                },
            ),
            (
                "closed and running",
                pb::ListJobsRequest { statuses: vec![running], openness: closed, ..base() },
            ),
            (
                "closed with somebody, by name",
                pb::ListJobsRequest {
                    openness: closed,
                    counterpart_id: other.clone(),
                    provider_job_name_prefix: text("patient-"),
                    ..base()
                },
            ),
        ];
        for (asked, request) in combined {
            let before = database.plans().await.len();
            user.jobs.list_jobs(request).await.unwrap();
            // The range may be one that holds as many of somebody else's.
            assert_read_by_ranges(&database, asked, before, 3.0 * LOOKED_AT).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_events_is_a_range_of_an_index() {
    let Scene { database, _server, mut provider, long_job, .. } = scene().await;
    let page = |after_sequence, kinds| pb::ListEventsRequest {
        job: Some(list_events_request::Job::ProviderJobId(long_job.clone())),
        after_sequence,
        kinds,
        page_size: 20,
        ..Default::default()
    };
    let (info, error) = (i32::from(pb::EventKind::Info), i32::from(pb::EventKind::Error));
    for (asked, request, most) in [
        ("the first", page(0, vec![]), PAGE),
        ("the middle", page(10_000, vec![]), PAGE),
        ("a kind", page(10_000, vec![info]), PAGE),
        ("a kind that there is none of", page(0, vec![error]), WINDOW),
    ] {
        let before = database.plans().await.len();
        provider.events.list_events(request).await.unwrap();
        assert_read_by_ranges(&database, asked, before, most).await;
    }
}

/// Jobs of a customer with two providers, of 20 events each: interleaved, as in
/// life; and nothing is analysed.
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
                               provider_job_id, provider_job_name, points_total, status, last_sequence)
             SELECT gen_random_uuid(), provider_id, customer_id, job_configuration_id, configuration_tag,
                    'scan-' || n, '', points_total, 'running', 20
             FROM jobs, generate_series(1, {JOBS}) AS n;
             INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
                                 points_done, percent, created_at)
             SELECT id, n, row_number() OVER (ORDER BY n, id), gen_random_uuid(), 'info', '', '', 'running',
                    0, 0, now()
             FROM jobs, generate_series(1, 20) AS n WHERE last_sequence = 20;
             UPDATE event_log SET position = (SELECT count(*) FROM events)"
        ))
        .await;
    let [provider, _] = providers;
    (provider, customer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_a_watch_is_a_range_of_the_log_whatever_is_known_of_the_tables() {
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
async fn events_that_are_sent_again_are_looked_up_one_by_one_however_long_their_job_has_grown() {
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
             UPDATE jobs SET last_sequence = {EVENTS}
             WHERE provider_job_id = 'scan-7' AND provider_id = '{0}';
             UPDATE event_log SET position = (SELECT max(position) FROM events)",
            provider.id
        ))
        .await;
    let ids = format!(
        "SELECT events.id::text AS text FROM events JOIN jobs ON jobs.id = job_id
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
async fn what_has_expired_is_removed_by_ranges_whatever_is_known_of_the_tables() {
    const KEPT: u64 = 20_000;
    const EXPIRED: u64 = 3;
    const STEP: f64 = 1_000.0;
    let database = TestDatabase::migrated().await;
    let server = TestServer::on(database.clone()).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    provider.job(&customer).await;
    // Nothing is analysed.
    database
        .execute(&format!(
            "INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                               provider_job_id, provider_job_name, points_total, status, last_sequence,
                               percent, closed_at)
             SELECT gen_random_uuid(), provider_id, customer_id, job_configuration_id, configuration_tag,
                    'scan-' || n, '', points_total, 'complete', CASE WHEN n > {KEPT} THEN 4000 ELSE 1 END, 100,
                    now() - CASE WHEN n > {KEPT} THEN interval '2 h' ELSE interval '0' END
             FROM jobs, generate_series(1, {KEPT} + {EXPIRED}) AS n;
             INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
                                 points_done, percent, created_at)
             SELECT id, n, row_number() OVER (), gen_random_uuid(), 'info', '', '', 'running', 0, 0, now()
             FROM jobs, generate_series(1, last_sequence) AS n;
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
    assert_read_by_ranges(&database, "what has expired", 0, STEP).await;
    assert_eq!(database.texts("SELECT count(*)::text AS text FROM events").await, [KEPT.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_reads_a_whole_table_however_small_it_is() {
    let database = TestDatabase::migrated().await;
    database.log_plans().await;
    for method in methods() {
        let mut world = World::new(TestServer::on(database.clone()).await).await;
        database.execute("ANALYZE").await;
        for caller in ["nobody", "a watch token of the job", "the customer", "the provider"] {
            let secret = world.secret(caller, &method).await;
            let message = world.request(caller, &method).await;
            call(world.server.channel.clone(), secret, &method, message).await;
        }
    }
    let plans = database.plans().await;
    assert!(plans.len() > 100, "{} plans", plans.len());
    for plan in plans {
        let whole = nodes(&plan["Plan"]).into_iter().filter(|node| node["Node Type"] == "Seq Scan");
        let whole = whole.map(|node| node["Relation Name"].as_str().unwrap());
        // They have one row.
        let whole: Vec<_> = whole.filter(|table| !["event_log", "retention"].contains(table)).collect();
        assert!(whole.is_empty(), "{whole:?} by {}", plan["Query Text"]);
    }
}
