//! The metrics endpoint, as Prometheus scrapes it.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use milepost_client::pb::{self, ErrorReason, EventKind, watch_events_request::Scope};
use prost_types::{Value, value::Kind};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::Command,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::support::{
    PASSWORD, TestDatabase, TestServer, assert_refused, complete, http, info, step, with_metadata,
    within_timeout,
};

/// The samples of one scrape. The keys are names with labels as scraped.
pub type Samples = BTreeMap<String, f64>;

/// The head and the body of the response to GET.
pub async fn get(address: SocketAddr, path: &str) -> (String, String) {
    within_timeout("the whole response", http(address, &format!("GET {path}"), "")).await.unwrap()
}

async fn scrape(server: &TestServer) -> Samples {
    let (head, body) = get(server.metrics_address, "/metrics").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0;"), "{head}");
    parse(&body)
}

/// Scrapes until a sample satisfies `wanted`. A call is counted a moment after its
/// answer.
pub async fn wait_for_sample(server: &TestServer, series: &str, wanted: impl Fn(f64) -> bool) -> Samples {
    let mut last = None;
    let found = async {
        loop {
            let samples = scrape(server).await;
            last = samples.get(series).copied();
            if last.is_some_and(&wanted) {
                return samples;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    match tokio::time::timeout(crate::support::TIMEOUT, found).await {
        Ok(samples) => samples,
        Err(_) => panic!("{series} stays at {last:?}"),
    }
}

/// Parses OpenMetrics 1.0 strictly. Each family is contiguous and described before its
/// samples. Names, labels and values are well formed, no series occurs twice, and the
/// counts of each histogram add up.
fn parse(text: &str) -> Samples {
    let body = text.strip_suffix("# EOF\n").expect("the text ends with # EOF");
    let mut samples = Samples::new();
    let mut kinds = BTreeMap::new();
    let mut family = (String::new(), String::new());
    for line in body.lines() {
        if let Some(meta) = line.strip_prefix("# ") {
            let [keyword, name, rest] = meta.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
            let is_known = ["milepost_", "process_"].iter().any(|prefix| name.starts_with(prefix));
            assert!(is_name(name) && is_known, "{line}");
            match keyword {
                "HELP" => assert!(!rest.is_empty() && !kinds.contains_key(name), "{line}"),
                "TYPE" => {
                    assert!(["counter", "gauge", "histogram", "info"].contains(&rest), "{line}");
                    assert_eq!(kinds.insert(name.to_owned(), rest.to_owned()), None, "{line}");
                    family = (name.to_owned(), rest.to_owned());
                }
                "UNIT" => assert!(name == family.0 && name.ends_with(&format!("_{rest}")), "{line}"),
                _ => panic!("{line}"),
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let name = series.split('{').next().unwrap();
        let suffix = name.strip_prefix(family.0.as_str()).unwrap_or_else(|| panic!("{line}"));
        let suffixes: &[&str] = match family.1.as_str() {
            "counter" => &["_total"],
            "info" => &["_info"],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        assert!(suffixes.contains(&suffix), "{line}");
        if let Some(labels) = series.strip_prefix(name).unwrap().strip_prefix('{') {
            for label in labels.strip_suffix('}').unwrap().split(',') {
                let (name, value) = label.split_once('=').unwrap();
                let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap();
                assert!(is_name(name) && !value.is_empty() && !value.contains(['"', '\\', '\n']), "{line}");
            }
        }
        let value: f64 = value.parse().unwrap();
        assert!(value.is_finite() && value >= 0.0, "{line}");
        assert_eq!(samples.insert(series.to_owned(), value), None, "duplicate series: {line}");
    }
    assert_histograms_add_up(body, &samples);
    samples
}

fn is_name(name: &str) -> bool {
    name.chars().all(|c| c.is_ascii_lowercase() || c == '_') && !name.is_empty()
}

fn assert_histograms_add_up(body: &str, samples: &Samples) {
    let mut below = 0.0;
    for line in body.lines().filter(|line| line.contains("_bucket{")) {
        let (series, count) = line.rsplit_once(' ').unwrap();
        let count: f64 = count.parse().unwrap();
        assert!(count >= below, "bucket counts are cumulative: {line}");
        below = count;
        if series.contains("le=\"+Inf\"") {
            let total = series.replace("_bucket", "_count").replace("le=\"+Inf\"", "");
            let total = total.replace("{,", "{").replace(",}", "}").replace("{}", "");
            assert_eq!(samples[&total], count, "{line}");
            below = 0.0;
        }
    }
}

fn publish(batch_id: &str, job: &pb::Job, events: Vec<pb::NewEvent>) -> pb::PublishEventsRequest {
    pb::PublishEventsRequest {
        batch_id: batch_id.to_owned(),
        job: Some(pb::publish_events_request::Job::JobId(job.id.clone())),
        expected_sequence: None,
        events,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn appends_transactions_and_watches_are_measured() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let before = scrape(&server).await;
    assert_eq!(before["milepost_append_duration_seconds_count"], 0.0);
    assert_eq!(before["milepost_watches{scope=\"job\"}"], 0.0);

    let (mut one, mut all) = (customer.watch(&job).await, customer.watch_all().await);
    one.caught_up().await;
    all.caught_up().await;
    provider.append(&job, [step("load"), info("two")]).await;
    one.events(2).await;
    all.events(2).await;
    let samples =
        wait_for_sample(&server, "milepost_append_duration_seconds_count", |count| count == 1.0).await;
    assert!(samples["milepost_append_duration_seconds_sum"] > 0.0);
    assert_eq!(samples["milepost_transaction_duration_seconds_count"], 1.0);
    assert!(
        samples["milepost_transaction_duration_seconds_sum"]
            <= samples["milepost_append_duration_seconds_sum"]
    );
    assert_eq!(samples["milepost_transaction_events_count"], 1.0);
    assert_eq!(samples["milepost_transaction_events_sum"], 2.0);
    assert_eq!(samples["milepost_transaction_batches_sum"], 1.0);
    assert_eq!(samples["milepost_watches{scope=\"job\"}"], 1.0);
    assert_eq!(samples["milepost_watches{scope=\"all_jobs\"}"], 1.0);
    // At least one live message per watch; replayed events are not measured.
    assert!(samples["milepost_send_delay_seconds_count{commit=\"own\"}"] >= 2.0);
    assert_eq!(samples["milepost_send_delay_seconds_count{commit=\"other\"}"], 0.0);

    // On the replica, the event was committed by another process.
    let replica = server.replica().await;
    let mut replica_watch = replica.same(&customer).watch(&job).await;
    replica_watch.caught_up().await;
    assert_eq!(scrape(&replica).await["milepost_send_delay_seconds_count{commit=\"other\"}"], 0.0);
    provider.append(&job, [info("three")]).await;
    replica_watch.events(1).await;
    let other = scrape(&replica).await;
    assert_eq!(other["milepost_send_delay_seconds_count{commit=\"other\"}"], 1.0);
    assert_eq!(other["milepost_send_delay_seconds_count{commit=\"own\"}"], 0.0);
    assert_eq!(other["milepost_transaction_events_count"], 0.0);

    drop((one, all));
    wait_for_sample(&server, "milepost_watches{scope=\"job\"}", |open| open == 0.0).await;
    wait_for_sample(&server, "milepost_watches{scope=\"all_jobs\"}", |open| open == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_batch_of_a_shared_transaction_is_counted() {
    let server = TestServer::start().await;
    let (provider, _, job) = server.job(&[]).await;
    let callers = (0..64).map(|n| {
        let (mut provider, job) = (provider.clone(), job.clone());
        async move { provider.append(&job, [info(&format!("{n}"))]).await }
    });
    futures_util::future::join_all(callers).await;
    let samples =
        wait_for_sample(&server, "milepost_append_duration_seconds_count", |count| count == 64.0).await;
    assert_eq!(samples["milepost_transaction_events_sum"], 64.0);
    assert_eq!(samples["milepost_transaction_batches_sum"], 64.0);
    assert!(samples["milepost_transaction_batches_count"] < 64.0, "some callers share a transaction");
    assert_eq!(
        samples["milepost_transaction_batches_count"],
        samples["milepost_transaction_duration_seconds_count"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_refusals_are_counted_by_method() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    provider.append(&job, [info("one")]).await;
    let refused = customer.clone().try_append(&job, [info("not mine")]).await;
    assert_refused(refused, Code::PermissionDenied, ErrorReason::RoleRequired);
    let method = "method=\"milepost.v1.EventService/AppendEvents\"";
    let samples = wait_for_sample(
        &server,
        &format!("milepost_calls_total{{{method},code=\"PERMISSION_DENIED\",protocol=\"grpc\"}}"),
        |n| n == 1.0,
    )
    .await;
    assert_eq!(samples[&format!("milepost_calls_total{{{method},code=\"OK\",protocol=\"grpc\"}}")], 1.0);
    assert_eq!(samples[&format!("milepost_refusals_total{{{method},reason=\"ROLE_REQUIRED\"}}")], 1.0);
    assert_eq!(samples[&format!("milepost_call_duration_seconds_count{{{method}}}")], 2.0);
    assert!(samples[&format!("milepost_call_duration_seconds_sum{{{method}}}")] > 0.0);

    let credentials =
        pb::LogInRequest { email: customer.email.clone(), password: "certainly not it".to_owned() };
    for _ in 0..5 {
        let wrong = server.anonymous().auth.log_in(credentials.clone()).await;
        assert_refused(wrong, Code::Unauthenticated, ErrorReason::LogInFailed);
    }
    server.database.block_log_ins_for(30).await;
    let slow = server.anonymous().auth.log_in(credentials).await;
    assert_refused(slow, Code::ResourceExhausted, ErrorReason::LogInThrottled);
    let log_in = |reason| {
        format!("milepost_refusals_total{{method=\"milepost.v1.AuthService/LogIn\",reason=\"{reason}\"}}")
    };
    let samples = wait_for_sample(&server, &log_in("LOG_IN_THROTTLED"), |count| count == 1.0).await;
    assert_eq!(samples[&log_in("LOG_IN_FAILED")], 5.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_refused_on_a_publish_stream_count_as_refusals() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let (batches, stream) = mpsc::channel(1);
    let mut answers = provider.events.publish_events(ReceiverStream::new(stream)).await.unwrap().into_inner();
    batches.send(publish("valid", &job, vec![complete()])).await.unwrap();
    answers.message().await.unwrap().unwrap();
    batches.send(publish("late", &job, vec![info("after the end")])).await.unwrap();
    answers.message().await.unwrap().unwrap();
    let method = "method=\"milepost.v1.EventService/PublishEvents\"";
    let refused = format!("milepost_refusals_total{{{method},reason=\"JOB_CLOSED\"}}");
    let samples = wait_for_sample(&server, &refused, |count| count == 1.0).await;
    assert_eq!(samples["milepost_publish_streams"], 1.0);
    assert_eq!(samples["milepost_append_duration_seconds_count"], 1.0, "a refused batch is not an append");
    let ended_ok = format!("milepost_calls_total{{{method},code=\"OK\",protocol=\"grpc\"}}");
    assert!(!samples.contains_key(&ended_ok), "the stream is still open");
    drop(batches);
    assert_eq!(answers.message().await.unwrap(), None);
    let samples = wait_for_sample(&server, &ended_ok, |count| count == 1.0).await;
    assert_eq!(samples["milepost_publish_streams"], 0.0);
    assert!(!samples.keys().any(|name| name.starts_with("milepost_call_duration") && name.contains(method)));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_to_unknown_paths_add_no_series() {
    let server = TestServer::start().await;
    // Authentication comes before the look-up of the method.
    let bearer = format!("Bearer {}", server.provider().await.key_secret);
    let call_unknown = async |path: String| {
        let mut grpc = tonic::client::Grpc::new(server.channel.clone());
        grpc.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let path = path.parse().unwrap();
        let mut request = tonic::Request::new(());
        request.metadata_mut().insert("authorization", bearer.parse().unwrap());
        grpc.unary(request, path, codec).await.unwrap_err().code()
    };
    assert_eq!(call_unknown("/secret/path".to_owned()).await, Code::Unimplemented);
    let series = "milepost_calls_total{method=\"other\",code=\"UNIMPLEMENTED\",protocol=\"grpc\"}";
    let before = wait_for_sample(&server, series, |count| count == 1.0).await;
    for n in 0..20 {
        for path in [format!("/secret/path{n}"), format!("/milepost.v1.EventService/Append{n}")] {
            call_unknown(path).await;
        }
    }
    let after = wait_for_sample(&server, series, |count| count == 41.0).await;
    let names = |samples: &Samples| samples.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lag_of_a_slow_watch_is_exported_until_it_has_caught_up() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    let mut slow = server.other_clients().same(&customer).watch(&job).await;
    slow.caught_up().await;
    let lag = "milepost_watch_lag_seconds";
    assert_eq!(scrape(&server).await[lag], 0.0);
    let text = Value { kind: Some(Kind::StringValue("x".repeat(12_000))) };
    let mut samples = Samples::new();
    while samples.get("milepost_watch_overflows_total").is_none_or(|count| *count == 0.0) {
        let events = (0..100).map(|n| with_metadata(info(&format!("{n}")), [("text", text.clone())]));
        for event in events {
            provider.append(&job, [event]).await;
        }
        samples = scrape(&server).await;
        // The overflow may be counted only when the watch reads its mailbox.
        if samples[lag] > 0.5 {
            break;
        }
    }
    let earlier = wait_for_sample(&server, lag, |lag| lag > 0.0).await[lag];
    wait_for_sample(&server, lag, |lag| lag > earlier).await;
    provider.append(&job, [complete()]).await;
    slow.read_to_end().await;
    let samples = wait_for_sample(&server, lag, |lag| lag == 0.0).await;
    assert!(samples["milepost_watch_overflows_total"] >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_outside_the_filter_do_not_overflow_a_mailbox() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let (job, other_job) = (provider.job(&customer).await, provider.job(&server.customer().await).await);
    let of_kinds = |scope, kinds: &[EventKind]| pb::WatchEventsRequest {
        scope: Some(scope),
        kinds: kinds.iter().map(|kind| (*kind).into()).collect(),
        ..Default::default()
    };
    let all = pb::AllJobs { counterpart_id: customer.id.clone(), ..Default::default() };
    let mut watches = [
        customer.watch_by(of_kinds(Scope::JobId(job.id.clone()), &[EventKind::Error])).await.unwrap(),
        provider.watch_by(of_kinds(Scope::AllJobs(all), &[EventKind::Error])).await.unwrap(),
    ];
    for watch in &mut watches {
        watch.caught_up().await;
    }
    // Each batch has more events than a mailbox holds.
    for name in ["first", "second"] {
        for job in [&job, &other_job] {
            provider.append(job, (0..500).map(|_| info("passes"))).await;
        }
        provider.append(&job, [pb::NewEvent { kind: EventKind::Error.into(), ..info(name) }]).await;
        provider.append(&other_job, (0..500).map(|_| info("passes"))).await;
        for watch in &mut watches {
            let [event] = watch.events(1).await.try_into().unwrap();
            assert_eq!(event.name, name);
        }
    }
    assert_eq!(scrape(&server).await["milepost_watch_overflows_total"], 0.0);
    // The last sequence at the end of the watch includes the filtered events.
    provider.append(&job, (0..500).map(|_| info("passes"))).await;
    provider.append(&job, [complete()]).await;
    let [of_one, _] = watches;
    let watched = of_one.read_to_end().await;
    assert_eq!((watched.events, watched.end.job.unwrap().last_sequence), (vec![], 1_503));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_notifications_are_counted() {
    let database = TestDatabase::migrated().await;
    // Shadows Postgres's own pg_notify, so that no notification is sent.
    database.execute("CREATE FUNCTION pg_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT'").await;
    let url = format!("{}?options=-c%20search_path%3Dpublic,pg_catalog", database.url);
    let server = TestServer::on(database.through(url)).await;
    let replica = server.replica().await;
    let (mut provider, _, job) = server.job(&[]).await;
    assert_eq!(scrape(&replica).await["milepost_sweep_finds_total"], 0.0);
    provider.append(&job, [info("not notified")]).await;
    wait_for_sample(&replica, "milepost_sweep_finds_total", |count| count == 1.0).await;
    // A process needs no notification of its own commits.
    assert_eq!(scrape(&server).await["milepost_sweep_finds_total"], 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_served_during_an_outage_and_while_the_server_drains() {
    let mut server = TestServer::start().await;
    let customer = server.customer().await;
    let samples = wait_for_sample(&server, "milepost_ready", |ready| ready == 1.0).await;
    assert_eq!(samples["milepost_draining"], 0.0);
    assert_eq!(samples["milepost_database_connections_max"], 8.0);
    assert_eq!(samples["milepost_database_connections_waiting"], 0.0);
    let open = |state| samples[&format!("milepost_database_connections{{state=\"{state}\"}}")];
    assert!((1.0..=8.0).contains(&(open("idle") + open("in_use"))));
    // The session; the API key has not been used yet.
    assert_eq!(samples["milepost_credentials_cached"], 1.0);
    assert!(samples["milepost_credentials_confirmed_age_seconds"] < 5.0);
    let version = format!("milepost_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    assert_eq!(samples[&version], 1.0);

    server.database.make_unavailable().await;
    wait_for_sample(&server, "milepost_ready", |ready| ready == 0.0).await;
    // Older than confirmations get while the database is available.
    wait_for_sample(&server, "milepost_credentials_confirmed_age_seconds", |age| age > 3.0).await;
    let refused = customer.clone().session.current_user().await;
    assert_refused(refused, Code::Unavailable, ErrorReason::DatabaseUnavailable);
    server.database.make_available().await;
    wait_for_sample(&server, "milepost_ready", |ready| ready == 1.0).await;
    wait_for_sample(&server, "milepost_credentials_confirmed_age_seconds", |age| age < 3.0).await;

    server.stop();
    let samples = wait_for_sample(&server, "milepost_draining", |draining| draining == 1.0).await;
    assert_eq!(samples["milepost_ready"], 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn head_is_answered_like_get_without_a_body() {
    let server = TestServer::start().await;
    let (head, body) = http(server.metrics_address, "HEAD /metrics", "").await.unwrap();
    assert!(
        head.starts_with("HTTP/1.1 200 ") && head.contains("content-type: application/openmetrics"),
        "{head}"
    );
    assert_eq!(body, "");
    let (head, body) = http(server.metrics_address, "HEAD /", "").await.unwrap();
    assert!(head.starts_with("HTTP/1.1 404 ") && body.is_empty(), "{head}");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_contain_no_secrets_and_no_personal_data() {
    let server = TestServer::start().await;
    let customer = server.customer().await;
    let credentials = pb::LogInRequest { email: customer.email.clone(), password: PASSWORD.to_owned() };
    server.anonymous().auth.log_in(credentials).await.unwrap();
    let (_, text) = get(server.metrics_address, "/metrics").await;
    for secret in [&customer.email, &customer.key_secret, &customer.id, "@", PASSWORD, "Lovelace"] {
        assert!(!text.contains(secret), "{secret}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_are_closed_and_do_not_delay_scrapes() {
    let server = TestServer::start().await;
    let mut silent = TcpStream::connect(server.metrics_address).await.unwrap();
    let mut slow = TcpStream::connect(server.metrics_address).await.unwrap();
    slow.write_all(b"GET /metrics HTTP/1.1\r\nhost:").await.unwrap();
    scrape(&server).await;
    for stream in [&mut silent, &mut slow] {
        let mut rest = Vec::new();
        // The server may also reset the connection.
        let _closed =
            within_timeout("the server to close the connection", stream.read_to_end(&mut rest)).await;
        assert_eq!(rest, b"");
    }
    let (head, _) = get(server.metrics_address, "/").await;
    assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_metrics_listener_beyond_loopback_requires_insecure_metrics_listen() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--metrics-listen", "0.0.0.0:0"]).kill_on_drop(true);
    let output = within_timeout("a refusal", command.output()).await.unwrap();
    assert!(!output.status.success());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("--insecure-metrics-listen"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusal_series_start_at_zero_so_that_the_first_refusal_is_an_increase() {
    let samples = scrape(&TestServer::start().await).await;
    for method in ["EventService/AppendEvents", "AuthService/LogIn"] {
        for reason in ["INTERNAL", "DATABASE_UNAVAILABLE"] {
            let series =
                format!("milepost_refusals_total{{method=\"milepost.v1.{method}\",reason=\"{reason}\"}}");
            assert_eq!(samples.get(&series), Some(&0.0), "{series}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_is_measured_by_the_standard_metrics() {
    // The number in a line of a file of this process.
    let number = |file: &str, begins: &str| -> f64 {
        let text = fs::read_to_string(format!("/proc/self/{file}")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(begins)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let server = TestServer::start().await;
    let first = scrape(&server).await;
    // Other tests of this process run at the same time.
    for (metric, line) in
        [("process_resident_memory_bytes", "VmRSS:"), ("process_virtual_memory_bytes", "VmSize:")]
    {
        let ratio = first[metric] / (number("status", line) * 1024.0);
        assert!((0.5..2.0).contains(&ratio), "{metric} is {ratio} times {line}");
    }
    assert_eq!(first["process_max_fds"], number("limits", "Max open files"));
    assert!(first["process_open_fds"] >= 3.0 && first["process_open_fds"] <= first["process_max_fds"]);

    let second = scrape(&server).await;
    assert!(first["process_cpu_seconds_total"] > 0.0);
    assert!(first["process_cpu_seconds_total"] <= second["process_cpu_seconds_total"]);
    let started = first["process_start_time_seconds"];
    assert_eq!(started, second["process_start_time_seconds"]);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let uptime: f64 = uptime.split_whitespace().next().unwrap().parse().unwrap();
    // The start of the system is known to the second.
    assert!((now - uptime - 2.0..now + 1.0).contains(&started), "{started} at {now}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_retention_removes_is_counted() {
    let retention = Some(Duration::from_secs(1));
    let server = TestServer::with_retention(TestDatabase::migrated().await, retention).await;
    let (mut provider, _, job) = server.job(&[]).await;
    assert_eq!(scrape(&server).await["milepost_removed_events_total"], 0.0);
    provider.append(&job, [info("one"), complete()]).await;
    let samples = wait_for_sample(&server, "milepost_removed_events_total", |removed| removed == 2.0).await;
    assert_eq!(samples["milepost_removals_total"], 1.0);
}
