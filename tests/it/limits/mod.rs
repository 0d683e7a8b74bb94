//! Every limit: a value at the limit passes, and a value one past it is refused
//! with an answer that names the limit.

mod pages;
mod rows;
mod texts;

use std::{collections::BTreeSet, fmt::Debug, time::Duration};

use bytes::Bytes;
use diesel_async::SimpleAsyncConnection as _;
use milepost::{
    config::{DatabaseSettings, SynchronousCommit},
    db::{Database, Payer},
    error::Error,
    limits::{
        MESSAGE_BYTES, PASSWORD_MIN_BYTES, TEXT_CHARS, UNAUTHENTICATED_CALL_BYTES, UNAUTHENTICATED_CALLS,
    },
    pb::{self, ErrorReason, EventKind},
    tenant::Tenant,
};
use prost::Message as _;
use prost_types::Value;
use tokio::task::JoinSet;
use tonic::{Code, Response, Status, Streaming};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};
use uuid::Uuid;

use crate::support::{
    Clients, PASSWORD, STREAMS_PER_CONNECTION, TestDatabase, TestServer, User, assert_refused,
    assert_violations, info, raw, registration, with_metadata, within_timeout,
};

/// Limits of `src/limits.rs` and `src/config.rs` without a row in `rows.rs`: the
/// limit, and the file and the name of its test.
const ELSEWHERE: [(&str, &str, &str); 60] = [
    ("TEXT_CHARS", "tests/it/limits/texts.rs", "every_text_has_at_most_256_characters"),
    ("MESSAGE_BYTES", "tests/it/limits/mod.rs", "a_message_has_at_most_one_mebibyte"),
    ("MESSAGE_BYTES", "tests/it/limits/pages.rs", "no_page_of_events_is_larger_than_one_mebibyte"),
    ("MESSAGE_BYTES", "tests/it/limits/pages.rs", "no_page_of_jobs_is_larger_than_one_mebibyte"),
    ("MESSAGE_BYTES", "tests/it/limits/pages.rs", "no_page_of_configurations_is_larger_than_one_mebibyte"),
    ("PASSWORD_WAIT", "src/auth/password.rs", "the_wait_for_a_permit_to_hash_is_bounded"),
    ("PAGE_DEFAULT", "tests/it/validation.rs", "a_large_page_size_is_cut_and_a_negative_one_is_refused"),
    ("PAGE_MAX", "tests/it/validation.rs", "a_large_page_size_is_cut_and_a_negative_one_is_refused"),
    ("TOKEN_BYTES", "tests/it/limits/pages.rs", "a_page_token_that_is_too_long_is_not_decoded"),
    (
        "ERROR_DETAILS_BYTES",
        "tests/it/validation.rs",
        "the_error_of_500_invalid_events_is_small_enough_to_arrive",
    ),
    ("ERROR_QUOTE_CHARS", "tests/it/errors.rs", "values_quoted_in_errors_are_truncated"),
    (
        "HEARTBEAT",
        "tests/it/watch.rs",
        "a_heartbeat_is_sent_after_an_interval_without_messages_of_at_least_5_seconds",
    ),
    ("HEARTBEAT", "src/services/events/requests.rs", "a_heartbeat_interval_is_cut_to_5_to_60_seconds"),
    (
        "STREAM_WINDOW_BYTES",
        "tests/it/shared_connections.rs",
        "a_publish_stream_that_the_server_does_not_read_holds_up_no_other_call",
    ),
    ("PENDING_RESET_STREAMS", "tests/it/http2.rs", "a_connection_that_resets_too_many_streams_is_closed"),
    ("FAULTY_STREAMS", "tests/it/http2.rs", "a_connection_that_sends_too_many_malformed_requests_is_closed"),
    (
        "CREDENTIAL_CONFIRMED_WITHIN",
        "tests/it/guarantees/confined.rs",
        "events_held_back_for_an_unconfirmed_credential_are_received_after_a_resume",
    ),
    ("CREDENTIALS", "src/auth/cache.rs", "only_credentials_without_a_reference_make_room"),
    (
        "PAIR_FREE",
        "tests/it/log_in.rs",
        "repeated_failures_are_throttled_on_every_replica_except_for_known_pairs",
    ),
    ("OTHER_FREE", "tests/it/log_in.rs", "failures_of_one_email_from_many_addresses_are_throttled"),
    ("bcrypt_parallel", "src/auth/password.rs", "the_wait_for_a_permit_to_hash_is_bounded"),
    (
        "bcrypt_parallel",
        "tests/it/settings.rs",
        "bcrypt_parallel_bounds_how_many_passwords_are_hashed_at_once",
    ),
    (
        "request_timeout",
        "src/server/calls.rs",
        "a_handler_past_the_servers_limit_is_answered_with_deadline_exceeded",
    ),
    (
        "drain_deadline",
        "tests/it/operations.rs",
        "on_sigterm_watches_end_with_draining_and_the_exit_code_is_0",
    ),
    (
        "streams_per_connection",
        "tests/it/http2.rs",
        "a_connection_announces_max_concurrent_streams_and_refuses_one_more",
    ),
    ("streams_per_user", "tests/it/watch.rs", "a_watch_beyond_the_limit_is_refused_until_another_one_closes"),
    (
        "streams_per_user",
        "tests/it/publish.rs",
        "a_publish_stream_beyond_the_limit_is_refused_until_another_one_closes",
    ),
    (
        "token_streams_per_user",
        "tests/it/watch_tokens.rs",
        "the_watch_tokens_of_all_jobs_of_a_provider_have_a_limit_of_streams",
    ),
    (
        "calls_per_second",
        "tests/it/in_flight.rs",
        "calls_beyond_the_rate_of_their_user_are_refused_until_the_time_in_the_refusal",
    ),
    (
        "calls_in_flight",
        "tests/it/in_flight.rs",
        "one_call_more_than_a_user_may_have_in_flight_is_refused_until_one_of_them_ends",
    ),
    (
        "events_per_second",
        "tests/it/in_flight.rs",
        "events_beyond_the_rate_are_refused_in_calls_and_read_more_slowly_from_streams",
    ),
    (
        "bytes_in_flight_mib",
        "tests/it/in_flight.rs",
        "a_batch_counts_until_the_log_does_not_hold_it_also_if_its_caller_has_left",
    ),
    ("total_bytes_in_flight_mib", "src/auth/tenants.rs", "bytes_are_held_by_tenant_and_in_all"),
    ("MESSAGE_CHARGE_BYTES", "src/auth/tenants.rs", "bytes_are_held_by_tenant_and_in_all"),
    ("ANSWER_BYTES", "src/server/in_flight.rs", "a_large_answer_counts_until_it_was_sent"),
    ("JOB_STATUSES", "src/services/jobs.rs", "unknown_statuses_are_refused_and_repeated_ones_are_kept_once"),
    ("UPDATE_MASK_PATHS", "tests/it/edges.rs", "every_invalid_path_of_an_update_mask_is_reported"),
    ("API_KEY_SCOPES", "tests/it/limits/mod.rs", "an_api_key_is_asked_for_with_each_scope_once"),
    (
        "EVENT_KINDS",
        "tests/it/limits/mod.rs",
        "a_kinds_filter_has_at_most_as_many_entries_as_there_are_kinds",
    ),
    ("publish_window", "tests/it/publish.rs", "a_publish_stream_is_not_read_while_its_window_is_full"),
    (
        "CONNECTIONS",
        "src/server/incoming.rs",
        "a_connection_beyond_the_limit_is_closed_and_a_missing_preface_times_out",
    ),
    ("UNAUTHENTICATED_CALLS", "tests/it/limits/mod.rs", "unauthenticated_streams_open_at_once_are_limited"),
    ("UNAUTHENTICATED_CALLS", "tests/it/limits/mod.rs", "unauthenticated_calls_in_flight_are_limited"),
    ("UNAUTHENTICATED_CALL_BYTES", "tests/it/limits/mod.rs", "an_unauthenticated_call_sends_at_most_64_kib"),
    (
        "UNAUTHENTICATED_CALL_BYTES",
        "tests/it/compression.rs",
        "a_message_that_decompresses_beyond_its_limit_is_refused_without_taking_memory",
    ),
    (
        "REFLECTION_STREAM_BYTES",
        "tests/it/reflection.rs",
        "a_stream_of_reflection_sends_four_times_as_much_as_it_may_receive",
    ),
    (
        "REFLECTION_BYTES",
        "tests/it/reflection.rs",
        "reflection_sends_each_address_and_each_user_no_more_than_a_budget",
    ),
    ("REFLECTION_REQUEST_BYTES", "tests/it/reflection.rs", "a_request_of_reflection_has_at_most_1_kib"),
    (
        "REFLECTION_BYTES_PER_SECOND",
        "src/server/reflection.rs",
        "a_budget_fills_up_again_with_time_and_refuses_more_than_it_has",
    ),
    ("HANDSHAKE", "tests/it/tls.rs", "silent_connections_delay_no_others_and_are_closed"),
    ("HANDSHAKE", "tests/it/http1.rs", "a_connection_is_closed_that_does_not_say_in_time_what_it_wants"),
    (
        "IDLE",
        "tests/it/http1.rs",
        "an_idle_connection_is_closed_after_a_minute_and_not_before_the_time_of_a_head",
    ),
    (
        "HTTP1_CONNECTIONS_PER_ADDRESS",
        "tests/it/http1.rs",
        "one_address_has_a_limited_number_of_connections_and_others_have_their_own",
    ),
    ("HANDSHAKES", "src/server/incoming.rs", "one_handshake_too_many_ends_the_oldest"),
    ("start_timeout", "tests/it/starts.rs", "a_start_waits_no_longer_than_its_timeout"),
    ("retention", "tests/it/retention.rs", "events_are_removed_a_set_time_after_their_job_closed"),
    ("session_lifetime", "tests/it/limits/mod.rs", "a_session_expires_after_its_lifetime"),
    (
        "statement_timeout",
        "tests/it/limits/mod.rs",
        "statements_locks_and_idle_transactions_end_after_the_statement_timeout",
    ),
    (
        "connect_timeout",
        "tests/it/limits/mod.rs",
        "a_user_waits_for_a_connection_no_longer_than_the_connect_timeout_and_keeps_nobody_waiting",
    ),
    (
        "connections",
        "tests/it/limits/mod.rs",
        "a_user_waits_for_a_connection_no_longer_than_the_connect_timeout_and_keeps_nobody_waiting",
    ),
];

/// A provider with a job, whose only step has a tag of the maximal length.
struct Scene {
    server: TestServer,
    provider: User,
    secret: String,
    customer_id: String,
    job: pb::Job,
    api_key_id: String,
}

impl Scene {
    async fn new() -> Self {
        let server = TestServer::start().await;
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        let mut request = registration("1.0.0", &[("load", 1)]);
        request.steps[0].tag = "ü".repeat(TEXT_CHARS);
        provider.register(request).await;
        let job = provider.job(&customer).await;
        let log_in = pb::LogInRequest { email: provider.email.clone(), password: PASSWORD.to_owned() };
        let session = server.anonymous().auth.log_in(log_in).await.unwrap().into_inner().session;
        let key = provider.session.auth.create_api_key(pb::CreateApiKeyRequest::default()).await.unwrap();
        Self {
            provider,
            secret: session.unwrap().secret,
            customer_id: customer.id,
            job,
            api_key_id: key.into_inner().api_key.unwrap().id,
            server,
        }
    }

    async fn call(&self, method: &str, message: Vec<u8>) -> Result<Bytes, Status> {
        let first = async {
            let channel = self.server.channel.clone();
            let mut answers = raw::open(channel, Some(&self.secret), method, [message]).await?;
            Ok::<_, Status>(answers.message().await?.expect("an answer"))
        };
        let answer = within_timeout("an answer", first).await?;
        if method == "EventService/PublishEvents" {
            let answer = pb::PublishEventsResponse::decode(answer.clone()).unwrap();
            if let Some(pb::publish_events_response::Outcome::Refused(status)) = answer.outcome {
                let details = status.encode_to_vec().into();
                return Err(Status::with_details(Code::from(status.code), status.message, details));
            }
        }
        Ok(answer)
    }

    fn batch(&self, events: Vec<pb::NewEvent>) -> pb::AppendEventsRequest {
        let job = Some(pb::append_events_request::Job::JobId(self.job.id.clone()));
        pb::AppendEventsRequest { job, expected_sequence: None, events }
    }

    fn token(&self, lifetime: prost_types::Duration) -> pb::CreateWatchTokenRequest {
        let job = Some(pb::create_watch_token_request::Job::JobId(self.job.id.clone()));
        pb::CreateWatchTokenRequest { job, note: String::new(), lifetime: Some(lifetime) }
    }
}

/// An event whose metadata has exactly this many bytes.
fn large(bytes: usize) -> pb::NewEvent {
    let mut sized =
        (0..64).map(|less| with_metadata(info("x"), [("text", Value::from("x".repeat(bytes - less)))]));
    sized.find(|event| event.metadata.as_ref().unwrap().encoded_len() == bytes).unwrap()
}

fn sign_up(password_bytes: usize) -> pb::SignUpRequest {
    pb::SignUpRequest {
        role: pb::UserRole::Customer.into(),
        email: format!("{}@example.com", Uuid::now_v7()),
        password: "x".repeat(password_bytes),
        ..Default::default()
    }
}

fn exactly(duration: Duration) -> prost_types::Duration {
    duration.try_into().unwrap()
}

/// Asserts that the value past the limit was refused: with this field alone, and
/// with a description that names the limit.
#[track_caller]
fn assert_limit_named(answer: Result<Bytes, Status>, case: &str, field: &str, limit: &str) {
    let Err(status) = answer else { panic!("{case}: {field} past its limit passed") };
    let refusal =
        assert_refused(Err::<(), _>(status.clone()), Code::InvalidArgument, ErrorReason::FieldInvalid);
    assert_eq!(refusal.fields, [field], "{case}: {status:?}");
    let description = &refusal.details.bad_request().unwrap().field_violations[0].description;
    let words: BTreeSet<&str> = description.split([' ', ',']).collect();
    assert!(words.contains(limit), "{case}: {description:?} does not name the limit {limit}");
}

#[test]
fn every_limit_has_its_test() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |file: &str| std::fs::read_to_string(root.join(file)).unwrap();
    let (limits, config) = (read("src/limits.rs"), read("src/config.rs"));
    for (limit, file, test) in ELSEWHERE {
        assert!(read(file).contains(&format!("fn {test}()")), "{limit}: {file} has no test {test}");
    }
    let rows = read("tests/it/limits/rows.rs");
    for limit in limits.lines().filter_map(|line| line.strip_prefix("pub const ")?.split(':').next()) {
        let elsewhere = ELSEWHERE.iter().any(|(name, ..)| *name == limit);
        assert!(elsewhere || rows.contains(&format!("&[\"{limit}\"]")), "{limit} has no test");
    }
    // Only the settings that are numbers or durations.
    let numbers = config.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.split_once(": "));
    let limited = |kind: &str| ["u32", "usize", "Duration"].iter().any(|number| kind.contains(number));
    for (setting, kind) in numbers.filter(|(_, kind)| limited(kind)) {
        let known = ELSEWHERE.iter().any(|(name, ..)| *name == setting);
        let no_limit = ["bcrypt_cost", "keepalive_interval", "keepalive_timeout"].contains(&setting);
        assert!(known || no_limit, "{setting}: {kind} has no test");
    }
}

/// The message, padded to exactly `bytes` bytes by an unknown field.
fn padded(mut message: Vec<u8>, bytes: usize) -> Vec<u8> {
    message.extend([0xFA, 0x7F]);
    // The length as a varint of three bytes, whatever its value.
    let rest = bytes - message.len() - 3;
    let groups = [rest & 0x7F | 0x80, rest >> 7 & 0x7F | 0x80, rest >> 14];
    message.extend(groups.map(|group| u8::try_from(group).unwrap()));
    message.resize(bytes, 0);
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_has_at_most_one_mebibyte() {
    let scene = Scene::new().await;
    let padded = |bytes| padded(Vec::new(), bytes);
    scene.call("AuthService/GetCurrentUser", padded(MESSAGE_BYTES)).await.unwrap();
    let status = scene.call("AuthService/GetCurrentUser", padded(MESSAGE_BYTES + 1)).await.unwrap_err();
    // tonic refuses such a message itself, with OUT_OF_RANGE.
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(status.message().contains(&MESSAGE_BYTES.to_string()), "{status:?}");

    // In a stream such a message ends the stream, after the batches before it are
    // answered.
    let batches = [scene.valid_request("EventService/PublishEvents"), padded(MESSAGE_BYTES + 1)];
    let channel = scene.server.channel.clone();
    let opened = raw::open(channel, Some(&scene.secret), "EventService/PublishEvents", batches);
    let mut answers = opened.await.unwrap();
    assert!(within_timeout("an answer", answers.message()).await.unwrap().is_some());
    let status = within_timeout("the end", answers.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unauthenticated_call_sends_at_most_64_kib() {
    let server = TestServer::start().await;
    // The limit includes the five bytes of the prefix of each gRPC message.
    let at = HealthCheckRequest { service: "x".repeat(UNAUTHENTICATED_CALL_BYTES - 5 - 4) };
    assert_eq!(at.encoded_len(), UNAUTHENTICATED_CALL_BYTES - 5);
    let mut past = at.clone();
    past.service.push('x');
    let mut health = HealthClient::new(server.channel.clone());
    assert_eq!(health.check(at).await.unwrap_err().code(), Code::NotFound);
    let sign_up = async |bytes| {
        let message = padded(sign_up(PASSWORD_MIN_BYTES).encode_to_vec(), bytes - 5);
        let mut answers = raw::open(server.channel.clone(), None, "AuthService/SignUp", [message]).await?;
        within_timeout("an answer", answers.message()).await
    };
    assert!(sign_up(UNAUTHENTICATED_CALL_BYTES).await.unwrap().is_some());
    for refused in
        [sign_up(UNAUTHENTICATED_CALL_BYTES + 1).await.map(drop), health.check(past).await.map(drop)]
    {
        let status = refused.unwrap_err();
        assert_eq!(status.code(), Code::OutOfRange);
        assert!(status.message().contains(&UNAUTHENTICATED_CALL_BYTES.to_string()), "{status:?}");
    }
}

async fn watch_health(clients: &Clients) -> Result<Streaming<HealthCheckResponse>, Status> {
    let mut health = HealthClient::new(clients.channel.clone());
    health.watch(HealthCheckRequest::default()).await.map(Response::into_inner)
}

#[track_caller]
fn assert_overloaded<T: Debug>(refused: Result<T, Status>) {
    let refusal = assert_refused(refused, Code::ResourceExhausted, ErrorReason::Overloaded);
    assert!(refusal.details.retry_info().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_streams_open_at_once_are_limited() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let (mut connections, mut watching) = (Vec::new(), Vec::new());
    for n in 0..UNAUTHENTICATED_CALLS {
        if n % STREAMS_PER_CONNECTION as usize == 0 {
            connections.push(server.other_clients());
        }
        watching.push(watch_health(connections.last().unwrap()).await.unwrap());
    }
    assert_overloaded(watch_health(&server).await);
    // Other calls still pass, with and without a credential.
    let check = HealthCheckRequest::default();
    HealthClient::new(server.channel.clone()).check(check).await.unwrap();
    user.clone().session.auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap();
    let log_in = pb::LogInRequest { email: user.email.clone(), password: PASSWORD.to_owned() };
    server.anonymous().auth.log_in(log_in).await.unwrap();

    watching.pop();
    within_timeout("a free permit", async { while watch_health(&server).await.is_err() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_calls_in_flight_are_limited() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let log_in = async || {
        let request = pb::LogInRequest { email: user.email.clone(), password: PASSWORD.to_owned() };
        server.anonymous().auth.log_in(request).await
    };
    let mut unfinished = JoinSet::new();
    let mut connection = server.other_clients();
    for n in 0..=UNAUTHENTICATED_CALLS {
        if n % STREAMS_PER_CONNECTION as usize == 0 {
            connection = server.other_clients();
        }
        let channel = connection.channel.clone();
        unfinished.spawn(raw::begin(channel, "AuthService/LogIn"));
    }
    let one_more = within_timeout("a refusal", unfinished.join_next()).await;
    assert_overloaded(one_more.unwrap().unwrap());
    assert_overloaded(log_in().await);
    let answer = user.clone().session.auth.get_current_user(pb::GetCurrentUserRequest {}).await;
    answer.unwrap();
    watch_health(&server).await.unwrap();
    drop(unfinished);
    within_timeout("a free permit", async { while log_in().await.is_err() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_expires_after_its_lifetime() {
    let scene = Scene::new().await;
    let lifetime =
        "SELECT DISTINCT extract(epoch FROM expires_at - created_at)::int::text AS text FROM sessions";
    assert_eq!(scene.server.database.texts(lifetime).await, ["3600"]);
    scene.server.database.execute("UPDATE sessions SET expires_at = now() WHERE expires_at > now()").await;
    let replica = scene.server.replica().await;
    let refused =
        replica.with_secret(&scene.secret).auth.get_current_user(pb::GetCurrentUserRequest {}).await;
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
}

async fn database(connections: usize, statement_timeout: Duration) -> (TestDatabase, Database) {
    let created = TestDatabase::migrated().await;
    let settings = DatabaseSettings {
        ca: None,
        connections,
        connect_timeout: Duration::from_millis(500),
        statement_timeout,
        synchronous_commit: SynchronousCommit::On,
    };
    let database = Database::new(created.url.clone().into(), settings).unwrap();
    (created, database)
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_locks_and_idle_transactions_end_after_the_statement_timeout() {
    let (created, database) = database(2, Duration::from_millis(300)).await;
    let ended = async |sql: &str| {
        let mut conn = database.get(Payer::Server).await.unwrap();
        let done = within_timeout("the timeout", conn.batch_execute(sql)).await;
        Error::from(done.unwrap_err())
    };
    let error = ended("SELECT pg_sleep(60)").await;
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    let mut locker = created.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE users").await.unwrap();
    let error = ended("SET statement_timeout = 0; SELECT 1 FROM users").await;
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");

    let mut idle = database.get(Payer::Server).await.unwrap();
    idle.batch_execute("BEGIN").await.unwrap();
    let closed = async {
        let idle = "SELECT pid::text AS text FROM pg_stat_activity
            WHERE datname = current_database() AND state = 'idle in transaction' AND application_name = 'milepost'";
        while !created.texts(idle).await.is_empty() {}
    };
    within_timeout("the end of the idle transaction", closed).await;
    let error = Error::from(idle.batch_execute("SELECT 1").await.unwrap_err());
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_waits_for_a_connection_no_longer_than_the_connect_timeout_and_keeps_nobody_waiting() {
    let (_created, database) = database(4, Duration::from_secs(5)).await;
    let [flooding, other] = [(); 2].map(|()| Tenant::of_user(Uuid::now_v7()));
    let half = (database.get(flooding).await.unwrap(), database.get(flooding).await.unwrap());
    let refused = within_timeout("a refusal", database.get(flooding)).await;
    assert!(matches!(refused, Err(Error::Overloaded { .. })), "{refused:?}");
    let others = (database.get(other).await.unwrap(), database.get(other).await.unwrap());
    drop(half);
    drop((database.get(flooding).await.unwrap(), database.get(flooding).await.unwrap(), others));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kinds_filter_has_at_most_as_many_entries_as_there_are_kinds() {
    let mut scene = Scene::new().await;
    let kinds = |count: usize| pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(scene.job.id.clone())),
        kinds: vec![EventKind::Step.into(); count],
        ..Default::default()
    };
    let (at, past, far) = (kinds(5), kinds(6), kinds(900_000));
    scene.provider.events.list_events(at).await.unwrap();
    for past in [past, far] {
        let refused = scene.provider.events.list_events(past).await;
        assert_violations(refused, &["kinds"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_is_asked_for_with_each_scope_once() {
    let mut scene = Scene::new().await;
    let scopes = |count: usize| pb::CreateApiKeyRequest {
        scopes: vec![pb::ApiKeyScope::Read.into(); count],
        ..Default::default()
    };
    scene.provider.session.auth.create_api_key(scopes(3)).await.unwrap();
    for past in [4, 900_000] {
        let refused = scene.provider.session.auth.create_api_key(scopes(past)).await;
        assert_violations(refused, &["scopes"]);
    }
}
