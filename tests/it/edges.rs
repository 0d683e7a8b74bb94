//! What holds at the edges: between a check and what it allows, between two
//! answers that are both right, at the far end of a limit.

use std::{
    fmt::Debug,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};
use futures_util::future::join_all;
use milepost::pb::{
    self, ApiKeyScope, ErrorReason, WatchEndReason, publish_events_response::Outcome,
    watch_events_request::Scope, watch_events_response::Message,
};
use prost_types::FieldMask;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};
use uuid::Uuid;

use crate::{
    metrics::until,
    support::{
        CONNECTIONS, Caller, Clients, Mode, PASSWORD, Proxy, STREAMS_PER_USER, ServerProcess, TestDatabase,
        TestServer, User, assert_refused, assert_violations, info, registration, step, within_timeout,
    },
};

struct Scene {
    server: TestServer,
    provider: User,
    customer: User,
    job: pb::Job,
}

impl Scene {
    async fn new() -> Self {
        Self::on(TestServer::start().await).await
    }

    async fn on(server: TestServer) -> Self {
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        provider.configuration(&[("load", 1)]).await;
        let job = provider.job(&customer).await;
        Self { server, provider, customer, job }
    }

    /// The id of the key that the provider calls with.
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

    /// A job of a configuration that the server has not looked up yet.
    async fn unknown_job(&mut self) -> pb::Job {
        self.provider.register(registration("2.0.0", &[])).await;
        self.provider.job(&self.customer).await
    }

    async fn event_names(&self, job: &pb::Job) -> Vec<String> {
        let sql = format!("SELECT name AS text FROM events WHERE job_id = '{}' ORDER BY sequence", job.id);
        self.server.database.texts(&sql).await
    }
}

async fn who(caller: &mut Caller) -> Result<(), Status> {
    caller.auth.get_current_user(pb::GetCurrentUserRequest {}).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_proxy_is_known_by_its_ipv4_address_where_ipv6_is_served_too() {
    let database = TestDatabase::migrated().await;
    let settings = [
        ("DATABASE_URL", database.url.as_str()),
        ("MILEPOST_UNSAFE_DATABASE", "true"),
        ("MILEPOST_INSECURE_LISTEN", "true"),
        ("MILEPOST_SIGN_UP", "open"),
        ("MILEPOST_TRUSTED_PROXY", "127.0.0.8,::ffff:127.0.0.9"),
    ];
    let settings = settings.map(|(name, value)| (name, value.to_owned())).to_vec();
    let server = ServerProcess::start_with("::", settings).await;
    let clients = Clients::of(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), server.address.port()));
    let customer = clients.customer().await;

    let told = async |from: [u8; 4], hops: &str| {
        let claim = pb::LogInRequest { email: customer.email.clone(), password: PASSWORD.to_owned() };
        let mut request = Request::new(claim);
        request.metadata_mut().insert("x-forwarded-for", hops.parse().unwrap());
        clients.from(Ipv4Addr::from(from)).anonymous().auth.log_in(request).await.unwrap();
        let last = "SELECT host(client_address) AS text FROM audit_entries ORDER BY created_at DESC LIMIT 1";
        database.texts(last).await.remove(0)
    };
    assert_eq!(told([127, 0, 0, 1], "10.1.2.3").await, "127.0.0.1");
    assert_eq!(told([127, 0, 0, 8], "10.1.2.3").await, "10.1.2.3");
    assert_eq!(told([127, 0, 0, 9], "::ffff:10.1.2.4").await, "10.1.2.4");
    assert_eq!(told([127, 0, 0, 9], "10.1.2.5, ::ffff:127.0.0.8").await, "10.1.2.5");
}

/// The database is away meanwhile: nobody else can know.
#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_key_ends_with_its_overlap_where_it_was_rotated() {
    let database = TestDatabase::migrated().await;
    let proxy = Proxy::to(&database.url).await;
    let mut scene = Scene::on(TestServer::on(database.through(proxy.url.clone())).await).await;
    let job = scene.job.clone();
    let mut watch = scene.provider.watch(&job).await;
    watch.caught_up().await;

    let rotated = scene.rotate_key(Duration::from_millis(1_500)).await.unwrap();
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
    // Wrong in its shape, which it is not told.
    let refused = scene.provider.events.append_events(pb::AppendEventsRequest::default()).await;
    let code = refused.unwrap_err().code();
    assert!(matches!(code, Code::Unauthenticated | Code::Unavailable), "{code:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_had_ended_already_is_ended_here_as_well() {
    let mut scene = Scene::new().await;
    let Scene { server, job, .. } = &scene;
    let (database, job) = (server.database.clone(), job.clone());
    let job = Some(pb::create_watch_token_request::Job::JobId(job.id));
    let request = pb::CreateWatchTokenRequest { job, ..Default::default() };
    let created = scene.provider.auth.create_watch_token(request).await.unwrap().into_inner();
    let mut guest = scene.server.with_secret(created.secret);
    who(&mut guest).await.unwrap();
    // As after an answer that was lost.
    database.execute("UPDATE watch_tokens SET expires_at = now()").await;
    let request = pb::ExpireWatchTokenRequest { watch_token_id: created.watch_token.unwrap().id };
    let again = scene.provider.auth.expire_watch_token(request).await;
    assert_refused(again, Code::FailedPrecondition, ErrorReason::WatchTokenAlreadyExpired);
    assert_refused(who(&mut guest).await, Code::Unauthenticated, ErrorReason::CredentialInvalid);

    for rotates in [false, true] {
        let mut scene = Scene::new().await;
        let database = scene.server.database.clone();
        who(&mut scene.provider.key).await.unwrap();
        database.execute("UPDATE api_keys SET expires_at = now()").await;
        let again = if rotates {
            scene.rotate_key(Duration::from_secs(60)).await.map(drop)
        } else {
            scene.expire_key().await
        };
        assert_refused(again, Code::FailedPrecondition, ErrorReason::ApiKeyAlreadyExpired);
        let refused = who(&mut scene.provider.key).await;
        assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    }
}

/// Keeps whoever looks up a configuration waiting until it is dropped.
async fn hold_configurations(database: &TestDatabase) -> AsyncPgConnection {
    let mut holder = database.connect().await;
    holder.batch_execute("BEGIN; LOCK TABLE job_configurations IN ACCESS EXCLUSIVE MODE").await.unwrap();
    holder
}

async fn somebody_waits(database: &TestDatabase) {
    const WAITING: &str = "SELECT pid::text AS text FROM pg_locks
        WHERE NOT granted AND relation = 'job_configurations'::regclass
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    within_timeout("somebody to wait", async { while database.texts(WAITING).await.is_empty() {} }).await;
}

/// That a call for a job, which has to wait while its key is expired, is refused
/// and leaves nothing.
async fn assert_not_done_once_ended<T, F>(call: impl FnOnce(User, pb::Job) -> F)
where
    T: Debug + Send + 'static,
    F: Future<Output = Result<T, Status>> + Send + 'static,
{
    let mut scene = Scene::new().await;
    let database = scene.server.database.clone();
    let job = scene.unknown_job().await;
    let holder = hold_configurations(&database).await;
    let calling = tokio::spawn(call(scene.provider.clone(), job.clone()));
    somebody_waits(&database).await;
    scene.expire_key().await.unwrap();
    drop(holder);
    let refused = within_timeout("an answer", calling).await.unwrap();
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    assert_eq!(scene.event_names(&job).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_is_not_accepted_once_its_credential_has_ended() {
    assert_not_done_once_ended(
        |mut provider, job| async move { provider.try_append(&job, [info("late")]).await },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_not_closed_once_the_credential_has_ended() {
    assert_not_done_once_ended(|mut provider, job| async move {
        let job = Some(pb::close_job_request::Job::JobId(job.id));
        provider.jobs.close_job(pb::CloseJobRequest { job, ..Default::default() }).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_made_once_the_credential_ended_while_its_call_waited_for_a_connection() {
    let mut scene = Scene::new().await;
    let database = scene.server.database.clone();
    let scopes = [ApiKeyScope::Read, ApiKeyScope::Append, ApiKeyScope::Manage].map(i32::from).to_vec();
    let request = pb::CreateApiKeyRequest { scopes, ..Default::default() };
    let ending = scene.provider.session.auth.create_api_key(request).await.unwrap().into_inner();
    let mut ending_user = scene.provider.clone();
    ending_user.key = scene.server.with_secret(ending.secret);
    let mut watch = ending_user.watch(&scene.job).await;
    watch.caught_up().await;
    let (api_key_id, job) = (scene.key_id().await, scene.job.id.clone());
    let rotated = format!("api_keys WHERE id = '{api_key_id}' AND expires_at IS NOT NULL");
    let made = async || {
        let tables = ["api_keys", &rotated, "watch_tokens", "job_configurations", "audit_entries"];
        join_all(tables.map(|table| scene.server.count(table))).await
    };
    let before = made().await;

    let holder = hold_configurations(&database).await;
    for _ in 0..CONNECTIONS {
        let mut configurations = scene.provider.configurations.clone();
        let request = pb::ListJobConfigurationsRequest::default();
        tokio::spawn(async move { configurations.list_job_configurations(request).await });
    }
    within_timeout("all connections to be in use", async {
        while database.waiting_for_locks().await.len() < CONNECTIONS {}
    })
    .await;
    let calling = tokio::spawn(async move {
        let Caller { auth, mut configurations, .. } = ending_user.key;
        let [mut creating, mut rotating, mut showing] = [(); 3].map(|()| auth.clone());
        let rotate = pb::RotateApiKeyRequest { api_key_id, overlap: None };
        let job = Some(pb::create_watch_token_request::Job::JobId(job));
        let show = pb::CreateWatchTokenRequest { job, ..Default::default() };
        let answers = tokio::join!(
            creating.create_api_key(pb::CreateApiKeyRequest::default()),
            rotating.rotate_api_key(rotate),
            showing.create_watch_token(show),
            configurations.register_job_configuration(registration("2.0.0", &[])),
        );
        [answers.0.map(drop), answers.1.map(drop), answers.2.map(drop), answers.3.map(drop)]
    });
    until(&scene.server, "milepost_database_connections_waiting", |calls| calls >= 4.0).await;
    let end = format!("UPDATE api_keys SET expires_at = now() WHERE id = '{}'", ending.api_key.unwrap().id);
    database.execute(&end).await;
    watch.until(|message| matches!(message, Message::End(_))).await;
    drop(holder);
    let answers = within_timeout("the answers", calling).await.unwrap();
    let codes = answers.map(|answer| answer.map_err(|status| status.code()));
    assert_eq!(codes, [Err(Code::Unauthenticated); 4]);
    assert_eq!(made().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_ends_with_its_credential_also_while_a_batch_waits() {
    let mut scene = Scene::new().await;
    let database = scene.server.database.clone();
    let job = scene.unknown_job().await;
    let holder = hold_configurations(&database).await;
    let (batches, stream) = mpsc::channel(1);
    let answers = scene.provider.events.publish_events(ReceiverStream::new(stream)).await;
    let mut answers = answers.unwrap().into_inner();
    let batch = pb::PublishEventsRequest {
        batch_id: "late".to_owned(),
        job: Some(pb::publish_events_request::Job::JobId(job.id.clone())),
        expected_sequence: None,
        events: vec![info("late")],
    };
    batches.send(batch).await.unwrap();
    somebody_waits(&database).await;
    scene.expire_key().await.unwrap();
    // Sooner than the database gives up.
    let refused = timeout(Duration::from_secs(3), answers.message()).await.expect("the end, at once");
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    drop(holder);
    // Whoever comes next comes after it.
    let mut provider = scene.provider.clone();
    provider.key = provider.session.clone();
    provider.append(&job, [info("next")]).await;
    assert_eq!(scene.event_names(&job).await, ["next"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_id_that_is_too_long_is_echoed_shortly() {
    let mut scene = Scene::new().await;
    let (batches, stream) = mpsc::channel(1);
    let answers = scene.provider.events.publish_events(ReceiverStream::new(stream)).await;
    let mut answers = answers.unwrap().into_inner();
    for (length, echo) in [
        (256, "ü".repeat(256)),
        (257, format!("{}…", "ü".repeat(64))),
        (400_000, format!("{}…", "ü".repeat(64))),
    ] {
        let batch = pb::PublishEventsRequest {
            batch_id: "ü".repeat(length),
            job: Some(pb::publish_events_request::Job::JobId(scene.job.id.clone())),
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
async fn a_repeated_job_is_compared_whoever_its_customer_is_by_now() {
    let Scene { server, mut provider, customer, .. } = Scene::new().await;
    let stored = provider.new_job(&customer);
    let job = provider.jobs.create_job(stored.clone()).await.unwrap().into_inner().job.unwrap();
    server
        .database
        .execute(&format!("UPDATE users SET disabled_at = now() WHERE id = '{}'", customer.id))
        .await;

    let again = provider.jobs.create_job(stored.clone()).await.unwrap().into_inner();
    assert!(again.existed && again.job.unwrap().id == job.id);
    let named = pb::CreateJobRequest { provider_job_name: "Another".to_owned(), ..stored.clone() };
    let strangers = pb::CreateJobRequest { customer_id: Uuid::now_v7().to_string(), ..stored.clone() };
    let elsewhere = pb::CreateJobRequest { configuration_tag: "none".to_owned(), ..stored.clone() };
    for (request, field) in
        [(named, "provider_job_name"), (strangers, "customer_id"), (elsewhere, "configuration_tag")]
    {
        let refused = provider.jobs.create_job(request).await;
        let refusal = assert_refused(refused, Code::AlreadyExists, ErrorReason::JobDiffers);
        assert_eq!(refusal.fields, [field]);
    }
    let new = pb::CreateJobRequest { provider_job_id: "new".to_owned(), ..stored };
    let refused = provider.jobs.create_job(new).await;
    assert_refused(refused, Code::NotFound, ErrorReason::ResourceNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_known_steps_the_first_are_named_however_long_and_all_are_counted() {
    let Scene { server: _server, mut provider, customer, .. } = Scene::new().await;
    let mut known = async |version: &str, first: String| {
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
    let short = known("2.0.0", "step 0".to_owned()).await;
    assert!(short.starts_with(r#""step 0", "step 1", "step 2", "#) && short.ends_with(", …"), "{short}");
    let long = known("3.0.0", "\u{1F9E0}".repeat(256)).await;
    assert_eq!(long, format!("\"{}…\", …", "\u{1F9E0}".repeat(64)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_resume_token_is_told_before_anything_is_looked_for() {
    let mut scene = Scene::new().await;
    let job = scene.job.clone();
    let mut watch = scene.provider.watch(&job).await;
    watch.caught_up().await;
    let from = |scope: Scope, token: &str| pb::WatchEventsRequest {
        scope: Some(scope),
        start: Some(pb::watch_events_request::Start::ResumeToken(token.to_owned())),
        ..Default::default()
    };
    let nowhere = Scope::JobId(Uuid::now_v7().to_string());
    let cut = &watch.resume_token[1..];
    let mut open = async |request| scene.provider.watch_by(request).await.map(|_watch| ());
    for bad in ["nonsense", "", cut] {
        assert_violations(open(from(nowhere.clone(), bad)).await, &["resume_token"]);
    }
    let wrong = pb::WatchEventsRequest { kinds: vec![77], ..from(nowhere.clone(), "nonsense") };
    assert_violations(open(wrong).await, &["kinds[0]", "resume_token"]);
    // Of another job: which one has to be known first.
    let elsewhere = open(from(nowhere, &watch.resume_token)).await;
    assert_refused(elsewhere, Code::NotFound, ErrorReason::ResourceNotFound);

    let mut watches = vec![watch];
    while watches.len() < STREAMS_PER_USER {
        watches.push(scene.provider.watch(&job).await);
    }
    let bad = scene.provider.watch_by(from(Scope::JobId(job.id), "nonsense")).await.map(drop);
    assert_violations(bad, &["resume_token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_path_of_a_mask_that_is_at_fault_is_told() {
    let Scene { server: _server, mut provider, .. } = Scene::new().await;
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
    // Bounded all the same.
    update(vec!["first_name"; 64]).await.unwrap();
    let refusal = assert_violations(update(vec!["first_name"; 65]).await, &["update_mask"]);
    assert_eq!(refusal.metadata["violations"], "1");
    let refusal =
        assert_refused(update(vec![""; 400_000]).await, Code::InvalidArgument, ErrorReason::FieldInvalid);
    assert_eq!(refusal.metadata["violations"], "65");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_rotate_a_key_is_not_told_that_it_has_expired() {
    let mut scene = Scene::new().await;
    scene.expire_key().await.unwrap();
    let request = pb::CreateApiKeyRequest { scopes: vec![ApiKeyScope::Manage.into()], ..Default::default() };
    let manager = scene.provider.session.auth.create_api_key(request).await.unwrap().into_inner();
    let mut manager = scene.server.with_secret(manager.secret);
    let request = pb::RotateApiKeyRequest { api_key_id: scene.key_id().await, overlap: None };
    let refused = manager.auth.rotate_api_key(request).await;
    assert_refused(refused, Code::PermissionDenied, ErrorReason::ScopeRequired);
    let refused = scene.rotate_key(Duration::ZERO).await;
    assert_refused(refused, Code::FailedPrecondition, ErrorReason::ApiKeyAlreadyExpired);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_may_not_be_given_as_many_streams_as_a_connection_has() {
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
