//! Edge cases: credentials that end during an outage or a wait, repeated calls whose
//! outcome changed meanwhile, and values exactly at a limit.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};
use milepost_client::pb::{
    self, ApiKeyScope, ErrorReason, WatchEndReason, publish_events_response::Outcome,
    watch_events_request::Scope, watch_events_response::Message,
};
use prost_types::FieldMask;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};
use uuid::Uuid;

use crate::support::{
    Caller, Clients, Mode, PASSWORD, Proxy, STREAMS_PER_USER, ServerProcess, TestDatabase, TestServer, User,
    assert_refused, assert_violations, info, registration, step, within_timeout,
};

struct Fixture {
    server: TestServer,
    provider: User,
    customer: User,
    job: pb::Job,
}

impl Fixture {
    async fn new() -> Self {
        Self::on(TestServer::start().await).await
    }

    async fn on(server: TestServer) -> Self {
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        provider.configuration(&[("load", 1)]).await;
        let job = provider.job(&customer).await;
        Self { server, provider, customer, job }
    }

    /// The id of the API key that the provider calls with.
    async fn key_id(&mut self) -> String {
        let keys = self.provider.session.auth.list_api_keys(pb::ListApiKeysRequest::default()).await.unwrap();
        keys.into_inner().api_keys[0].id.clone()
    }

    async fn expire_key(&mut self) -> Result<(), Status> {
        let request = pb::ExpireApiKeyRequest { api_key_id: self.key_id().await };
        self.provider.session.auth.expire_api_key(request).await.map(drop)
    }

    async fn rotate_key(&mut self, overlap: Duration) -> Result<pb::RotateApiKeyResponse, Status> {
        let overlap = Some(overlap.try_into().unwrap());
        let request = pb::RotateApiKeyRequest { api_key_id: self.key_id().await, overlap };
        Ok(self.provider.session.auth.rotate_api_key(request).await?.into_inner())
    }

    /// A job of a configuration that the server has not cached yet.
    async fn uncached_job(&mut self) -> pb::Job {
        self.provider.register(registration("2.0.0", &[])).await;
        self.provider.job(&self.customer).await
    }

    async fn event_names(&self, job: &pb::Job) -> Vec<String> {
        let sql = format!("SELECT name AS text FROM events WHERE job_id = '{}' ORDER BY sequence", job.id);
        self.server.database.texts(&sql).await
    }
}

async fn get_current_user(caller: &mut Caller) -> Result<(), Status> {
    caller.auth.get_current_user(pb::GetCurrentUserRequest {}).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_proxy_is_recognized_by_its_ipv4_address_on_a_dual_stack_listener() {
    let database = TestDatabase::migrated().await;
    let settings = [
        ("DATABASE_URL", database.url.as_str()),
        ("MILEPOST_UNSAFE_DATABASE", "true"),
        ("MILEPOST_INSECURE_LISTEN", "true"),
        ("MILEPOST_SIGN_UP", "open"),
        ("MILEPOST_TRUSTED_PROXY", "127.0.0.8/31,::ffff:127.0.0.16/124"),
    ];
    let settings = settings.map(|(name, value)| (name, value.to_owned())).to_vec();
    let server = ServerProcess::start_with("::", settings).await;
    let clients = Clients::of(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), server.address.port()));
    let customer = clients.customer().await;

    let logged_address = async |from: [u8; 4], hops: &str| {
        let credentials = pb::LogInRequest { email: customer.email.clone(), password: PASSWORD.to_owned() };
        let mut request = Request::new(credentials);
        request.metadata_mut().insert("x-forwarded-for", hops.parse().unwrap());
        clients.from(Ipv4Addr::from(from)).anonymous().auth.log_in(request).await.unwrap();
        let last = "SELECT host(client_address) AS text FROM audit_entries ORDER BY created_at DESC LIMIT 1";
        database.texts(last).await.remove(0)
    };
    assert_eq!(logged_address([127, 0, 0, 1], "10.1.2.3").await, "127.0.0.1");
    assert_eq!(logged_address([127, 0, 0, 8], "10.1.2.3").await, "10.1.2.3");
    assert_eq!(logged_address([127, 0, 0, 9], "::ffff:10.1.2.4").await, "10.1.2.4");
    assert_eq!(logged_address([127, 0, 0, 9], "10.1.2.5, ::ffff:127.0.0.8").await, "10.1.2.5");
    // In the range, and with ports as some proxies write them.
    assert_eq!(logged_address([127, 0, 0, 20], "10.1.2.6:50000, 127.0.0.31:443").await, "10.1.2.6");
    assert_eq!(logged_address([127, 0, 0, 20], "[2001:db8::6]:50000").await, "2001:db8::6");
    assert_eq!(logged_address([127, 0, 0, 32], "10.1.2.7").await, "127.0.0.32");
    assert_eq!(logged_address([127, 0, 0, 20], "10.1.2.8, unknown").await, "127.0.0.20");
}

/// The database is unavailable when the overlap ends, so that the expiry is
/// known only to the process that rotated the key.
#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_key_expires_at_the_end_of_its_overlap_even_during_an_outage() {
    let database = TestDatabase::migrated().await;
    let proxy = Proxy::to(&database.url).await;
    let mut fixture = Fixture::on(TestServer::on(database.through(proxy.url.clone())).await).await;
    let job = fixture.job.clone();
    let mut watch = fixture.provider.watch(&job).await;
    watch.caught_up().await;

    let rotated = fixture.rotate_key(Duration::from_millis(1_500)).await.unwrap();
    proxy.set(Mode::Refuse);
    let expires_at = rotated.old_api_key.unwrap().expires_at.unwrap();
    let expires_at = SystemTime::try_from(expires_at).unwrap();
    let end = watch.until(|message| matches!(message, Message::End(_))).await.pop();
    let now = SystemTime::now();
    let Some(Message::End(end)) = end else { unreachable!("just matched") };
    assert_eq!(end.reason(), WatchEndReason::CredentialEnded);
    assert_refused(watch.next().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    let (soonest, latest) = (Duration::from_millis(500), Duration::from_secs(1));
    assert!(now + soonest > expires_at && now < expires_at + latest, "{now:?} {expires_at:?}");
    // The request is invalid, but the credential is checked before the shape.
    let refused = fixture.provider.events.append_events(pb::AppendEventsRequest::default()).await;
    let code = refused.unwrap_err().code();
    assert!(matches!(code, Code::Unauthenticated | Code::Unavailable), "{code:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn expiring_an_already_expired_credential_also_ends_the_cached_one() {
    let mut fixture = Fixture::new().await;
    let Fixture { server, job, .. } = &fixture;
    let (database, job) = (server.database.clone(), job.clone());
    let job = Some(pb::create_watch_token_request::Job::JobId(job.id));
    let request = pb::CreateWatchTokenRequest { job, ..Default::default() };
    let created = fixture.provider.auth.create_watch_token(request).await.unwrap().into_inner();
    let mut viewer = fixture.server.with_secret(created.secret);
    get_current_user(&mut viewer).await.unwrap();
    // As if ExpireWatchToken had succeeded on another replica and its answer were lost.
    database.execute("UPDATE watch_tokens SET expires_at = now()").await;
    let request = pb::ExpireWatchTokenRequest { watch_token_id: created.watch_token.unwrap().id };
    let again = fixture.provider.auth.expire_watch_token(request).await;
    assert_refused(again, Code::FailedPrecondition, ErrorReason::WatchTokenAlreadyExpired);
    assert_refused(
        get_current_user(&mut viewer).await,
        Code::Unauthenticated,
        ErrorReason::CredentialInvalid,
    );

    for rotates in [false, true] {
        let mut fixture = Fixture::new().await;
        let database = fixture.server.database.clone();
        get_current_user(&mut fixture.provider.key).await.unwrap();
        database.execute("UPDATE api_keys SET expires_at = now()").await;
        let again = if rotates {
            fixture.rotate_key(Duration::from_secs(60)).await.map(drop)
        } else {
            fixture.expire_key().await
        };
        assert_refused(again, Code::FailedPrecondition, ErrorReason::ApiKeyAlreadyExpired);
        let refused = get_current_user(&mut fixture.provider.key).await;
        assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    }
}

/// Locks `job_configurations`. Statements that read a configuration wait until the
/// returned connection is dropped.
async fn lock_configurations(database: &TestDatabase) -> AsyncPgConnection {
    let mut locker = database.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE job_configurations IN ACCESS EXCLUSIVE MODE").await.unwrap();
    locker
}

async fn wait_for_blocked_statement(database: &TestDatabase) {
    const WAITING: &str = "SELECT pid::text AS text FROM pg_locks
        WHERE NOT granted AND relation = 'job_configurations'::regclass
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    within_timeout("a statement that waits for the lock", async {
        while database.texts(WAITING).await.is_empty() {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_ends_with_its_credential_even_while_a_batch_waits() {
    let mut fixture = Fixture::new().await;
    let database = fixture.server.database.clone();
    let job = fixture.uncached_job().await;
    let locker = lock_configurations(&database).await;
    let (batches, stream) = mpsc::channel(1);
    let answers = fixture.provider.events.publish_events(ReceiverStream::new(stream)).await;
    let mut answers = answers.unwrap().into_inner();
    let batch = pb::PublishEventsRequest {
        batch_id: "late".to_owned(),
        job: Some(pb::publish_events_request::Job::JobId(job.id.clone())),
        expected_sequence: None,
        events: vec![info("late")],
    };
    batches.send(batch).await.unwrap();
    wait_for_blocked_statement(&database).await;
    fixture.expire_key().await.unwrap();
    // Sooner than the statement timeout of 5 s.
    let refused = timeout(Duration::from_secs(3), answers.message())
        .await
        .expect("the stream ends while the batch still waits");
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    drop(locker);
    // The refused batch stored nothing: the next event is the only one.
    let mut provider = fixture.provider.clone();
    provider.key = provider.session.clone();
    provider.append(&job, [info("next")]).await;
    assert_eq!(fixture.event_names(&job).await, ["next"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_id_that_is_too_long_is_echoed_truncated() {
    let mut fixture = Fixture::new().await;
    let (batches, stream) = mpsc::channel(1);
    let answers = fixture.provider.events.publish_events(ReceiverStream::new(stream)).await;
    let mut answers = answers.unwrap().into_inner();
    for (length, echo) in [
        (256, "ü".repeat(256)),
        (257, format!("{}…", "ü".repeat(64))),
        (400_000, format!("{}…", "ü".repeat(64))),
    ] {
        let batch = pb::PublishEventsRequest {
            batch_id: "ü".repeat(length),
            job: Some(pb::publish_events_request::Job::JobId(fixture.job.id.clone())),
            expected_sequence: None,
            events: vec![info("an event")],
        };
        batches.send(batch).await.unwrap();
        let answer = within_timeout("an answer", answers.message()).await.unwrap().unwrap();
        assert_eq!(answer.batch_id, echo);
        assert_eq!(matches!(answer.outcome, Some(Outcome::Appended(_))), length == 256);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_create_job_is_compared_even_if_its_customer_is_disabled() {
    let Fixture { server, mut provider, customer, .. } = Fixture::new().await;
    let stored = provider.new_job(&customer);
    let job = provider.jobs.create_job(stored.clone()).await.unwrap().into_inner().job.unwrap();
    server
        .database
        .execute(&format!("UPDATE users SET disabled_at = now() WHERE id = '{}'", customer.id))
        .await;

    let again = provider.jobs.create_job(stored.clone()).await.unwrap().into_inner();
    assert!(again.existed && again.job.unwrap().id == job.id);
    let renamed = pb::CreateJobRequest { provider_job_name: "Another".to_owned(), ..stored.clone() };
    let of_other_customer =
        pb::CreateJobRequest { customer_id: Uuid::now_v7().to_string(), ..stored.clone() };
    let of_other_tag = pb::CreateJobRequest { configuration_tag: "none".to_owned(), ..stored.clone() };
    for (request, field) in [
        (renamed, "provider_job_name"),
        (of_other_customer, "customer_id"),
        (of_other_tag, "configuration_tag"),
    ] {
        let refused = provider.jobs.create_job(request).await;
        let refusal = assert_refused(refused, Code::AlreadyExists, ErrorReason::JobDiffers);
        assert_eq!(refusal.fields, [field]);
    }
    let new = pb::CreateJobRequest { provider_job_id: "new".to_owned(), ..stored };
    let refused = provider.jobs.create_job(new).await;
    assert_refused(refused, Code::NotFound, ErrorReason::ResourceNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_step_tag_is_refused_with_the_first_known_tags_and_their_number() {
    let Fixture { server: _server, mut provider, customer, .. } = Fixture::new().await;
    let mut known_tags = async |version: &str, first: String| {
        let mut request = registration(version, &[]);
        let tags = std::iter::once(first).chain((1..100).map(|n| format!("step {n}")));
        request.steps =
            tags.map(|tag| pb::StepConfiguration { name: tag.clone(), tag, ..Default::default() }).collect();
        provider.register(request).await;
        let job = provider.job(&customer).await;
        let answer = provider.try_append(&job, [step("lod")]).await;
        let refusal = assert_violations(answer, &["events[0].step_tag"]);
        assert_eq!(refusal.metadata["known_step_tags"], "100");
        let description = &refusal.details.bad_request().unwrap().field_violations[0].description;
        description.split_once("known: ").unwrap().1.to_owned()
    };
    let short = known_tags("2.0.0", "step 0".to_owned()).await;
    assert!(short.starts_with(r#""step 0", "step 1", "step 2", "#) && short.ends_with(", …"), "{short}");
    let long = known_tags("3.0.0", "\u{1F9E0}".repeat(256)).await;
    assert_eq!(long, format!("\"{}…\", …", "\u{1F9E0}".repeat(64)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_resume_token_is_refused_before_the_job_is_looked_up() {
    let mut fixture = Fixture::new().await;
    let job = fixture.job.clone();
    let mut watch = fixture.provider.watch(&job).await;
    watch.caught_up().await;
    let from = |scope: Scope, token: &str| pb::WatchEventsRequest {
        scope: Some(scope),
        start: Some(pb::watch_events_request::Start::ResumeToken(token.to_owned())),
        ..Default::default()
    };
    let unknown_job = Scope::JobId(Uuid::now_v7().to_string());
    let truncated = &watch.resume_token[1..];
    let mut open = async |request| fixture.provider.watch_by(request).await.map(|_watch| ());
    for bad in ["nonsense", "", truncated] {
        assert_violations(open(from(unknown_job.clone(), bad)).await, &["resume_token"]);
    }
    let wrong = pb::WatchEventsRequest { kinds: vec![77], ..from(unknown_job.clone(), "nonsense") };
    assert_violations(open(wrong).await, &["kinds[0]", "resume_token"]);
    // A valid token of another job: the job is looked up before both are compared.
    let of_other_job = open(from(unknown_job, &watch.resume_token)).await;
    assert_refused(of_other_job, Code::NotFound, ErrorReason::ResourceNotFound);

    let mut watches = vec![watch];
    while watches.len() < STREAMS_PER_USER {
        watches.push(fixture.provider.watch(&job).await);
    }
    let bad = fixture.provider.watch_by(from(Scope::JobId(job.id), "nonsense")).await.map(drop);
    assert_violations(bad, &["resume_token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_invalid_path_of_an_update_mask_is_reported() {
    let Fixture { server: _server, mut provider, .. } = Fixture::new().await;
    let mut update = async |paths: Vec<&str>| {
        let paths = paths.into_iter().map(str::to_owned).collect();
        let request = pb::UpdateCurrentUserRequest {
            user: Some(pb::User::default()),
            update_mask: Some(FieldMask { paths }),
        };
        provider.session.auth.update_current_user(request).await
    };
    let refusal =
        assert_violations(update(vec!["email", "first_name", "role"]).await, &["update_mask", "update_mask"]);
    let violations = &refusal.details.bad_request().unwrap().field_violations;
    for (violation, path) in violations.iter().zip(["email", "role"]) {
        assert!(violation.description.contains(path), "{violation:?}");
    }
    // The number of paths and the number of violations are bounded.
    update(vec!["first_name"; 64]).await.unwrap();
    let refusal = assert_violations(update(vec!["first_name"; 65]).await, &["update_mask"]);
    assert_eq!(refusal.metadata["violations"], "1");
    let refusal =
        assert_refused(update(vec![""; 400_000]).await, Code::InvalidArgument, ErrorReason::FieldInvalid);
    assert_eq!(refusal.metadata["violations"], "65");
}

#[tokio::test(flavor = "multi_thread")]
async fn rotating_an_expired_key_without_its_scopes_is_permission_denied() {
    let mut fixture = Fixture::new().await;
    fixture.expire_key().await.unwrap();
    let request = pb::CreateApiKeyRequest { scopes: vec![ApiKeyScope::Manage.into()], ..Default::default() };
    let manager = fixture.provider.session.auth.create_api_key(request).await.unwrap().into_inner();
    let mut manager = fixture.server.with_secret(manager.secret);
    let request = pb::RotateApiKeyRequest { api_key_id: fixture.key_id().await, overlap: None };
    let refused = manager.auth.rotate_api_key(request).await;
    assert_refused(refused, Code::PermissionDenied, ErrorReason::ScopeRequired);
    let refused = fixture.rotate_key(Duration::ZERO).await;
    assert_refused(refused, Code::FailedPrecondition, ErrorReason::ApiKeyAlreadyExpired);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_per_user_must_be_less_than_streams_per_connection() {
    let database = TestDatabase::migrated().await;
    for (of_user, of_connection) in [("1000", "1000"), ("99999", "1000"), ("500", "2")] {
        let flags =
            ["--unsafe-database", "--streams-per-user", of_user, "--streams-per-connection", of_connection];
        let refusal = ServerProcess::refused_with(&database.url, &flags).await;
        let last = refusal.lines().last().unwrap();
        for word in flags[1..].iter().copied().chain(["milepost: "]) {
            assert!(last.contains(word), "{refusal}");
        }
    }
}
