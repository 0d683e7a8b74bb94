//! The audit: each act writes one audit entry and one line of the log, or is rolled
//! back.

use std::net::Ipv4Addr;

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb::{self, ErrorReason, UserRole};
use serde_json::{Value, json};
use tonic::{Code, Request, Response, Status};

use crate::support::{
    Caller, Clients, PASSWORD, ServerProcess, TRUSTED_PROXY, TestDatabase, TestServer, User, assert_refused,
    blocks, complete, info, operate, sign_up_request, within_timeout,
};

const NEW_PASSWORD: &str = "another horse battery";

/// All audit entries, oldest first, without their times and null columns.
async fn entries(database: &TestDatabase) -> Vec<Value> {
    let rows = database
        .texts(
            "SELECT jsonb_strip_nulls(to_jsonb(e) - 'created_at' - 'updated_at')::text AS text
             FROM audit_entries AS e ORDER BY created_at, id",
        )
        .await;
    rows.iter().map(|row| serde_json::from_str(row).unwrap()).collect()
}

/// The answer of a call and its request id.
#[track_caller]
fn answered<T>(answer: Result<Response<T>, Status>) -> (T, String) {
    let answer = answer.unwrap();
    let id = answer.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
    (answer.into_inner(), id)
}

/// The request id of a refused call.
#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>) -> String {
    answer.unwrap_err().metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned()
}

fn log_in_request(email: &str, password: &str) -> pb::LogInRequest {
    pb::LogInRequest { email: email.to_owned(), password: password.to_owned() }
}

fn change(current: &str) -> pb::ChangePasswordRequest {
    pb::ChangePasswordRequest { current_password: current.to_owned(), new_password: NEW_PASSWORD.to_owned() }
}

fn key(id: &str) -> pb::ExpireApiKeyRequest {
    pb::ExpireApiKeyRequest { api_key_id: id.to_owned() }
}

fn rotate(id: &str) -> pb::RotateApiKeyRequest {
    pb::RotateApiKeyRequest { api_key_id: id.to_owned(), overlap: None }
}

fn token_of(job: &pb::Job) -> pb::CreateWatchTokenRequest {
    let job = Some(pb::create_watch_token_request::Job::JobId(job.id.clone()));
    pb::CreateWatchTokenRequest { job, ..Default::default() }
}

fn token(id: &str) -> pb::ExpireWatchTokenRequest {
    pb::ExpireWatchTokenRequest { watch_token_id: id.to_owned() }
}

async fn renew(session: &Caller) -> Result<(), Status> {
    session.auth.clone().renew_customer_code(pb::RenewCustomerCodeRequest {}).await.map(drop)
}

fn closing(job: &pb::Job) -> pb::CloseJobRequest {
    let job = Some(pb::close_job_request::Job::JobId(job.id.clone()));
    pb::CloseJobRequest { job, reason: "no longer needed".to_owned() }
}

/// The stored hashes of all passwords and secrets.
async fn hashes(database: &TestDatabase) -> Vec<String> {
    database
        .texts(
            "SELECT password_hash AS text FROM users
             UNION ALL SELECT encode(secret_hash, 'hex') FROM sessions
             UNION ALL SELECT encode(key_hash, 'hex') FROM api_keys
             UNION ALL SELECT encode(secret_hash, 'hex') FROM watch_tokens",
        )
        .await
}

/// The expected entry of a call from 127.0.0.1.
fn entry(act: &str, request_id: impl Into<String>, actor: Value, subject: Value) -> Value {
    let mut entry = json!({"act": act, "client_address": "127.0.0.1", "request_id": request_id.into()});
    for part in [actor, subject] {
        entry.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
    }
    entry
}

#[tokio::test(flavor = "multi_thread")]
async fn each_act_writes_one_audit_entry_and_one_log_line_without_secrets() {
    let server = ServerProcess::start().await;
    let database = server.database();
    let anonymous = || json!({"actor": "anonymous"});
    let mut unauthenticated = server.anonymous().auth;
    let mut expected = Vec::new();
    let mut secrets = vec![PASSWORD.to_owned(), NEW_PASSWORD.to_owned()];

    let (signed_up, request) = answered(
        unauthenticated
            .sign_up(pb::SignUpRequest {
                role: UserRole::Provider.into(),
                ..sign_up_request("ada@example.com")
            })
            .await,
    );
    let (user, first) = (signed_up.user.unwrap().id, signed_up.session.unwrap());
    let subject = json!({"user_id": user, "session_id": first.id});
    expected.push(entry("sign_up", request, anonymous(), subject));
    secrets.push(first.secret.clone());

    let request = refused(unauthenticated.log_in(log_in_request("ADA@example.com", "my secret guess")).await);
    expected.push(entry("log_in_failed", request, anonymous(), json!({"user_id": user})));
    let request =
        refused(unauthenticated.log_in(log_in_request("my-secret-typed@example.com", PASSWORD)).await);
    expected.push(entry("log_in_failed", request, anonymous(), json!({})));
    let (logged_in, request) =
        answered(unauthenticated.log_in(log_in_request("ada@example.com", PASSWORD)).await);
    let second = logged_in.session.unwrap();
    let subject = json!({"user_id": user, "session_id": second.id});
    expected.push(entry("log_in", request, anonymous(), subject));
    secrets.extend(["my secret guess".to_owned(), "my-secret-typed".to_owned(), second.secret.clone()]);
    secrets.extend(hashes(&database).await);

    let by_session = |session: &pb::Session| json!({"actor": "session", "actor_user_id": user, "actor_credential_id": session.id});
    let own = || json!({"user_id": user});
    let mut session = server.with_secret(&second.secret);
    let request = refused(session.auth.change_password(change("my secret guess")).await);
    expected.push(entry("log_in_failed", request, by_session(&second), own()));
    let (_, request) = answered(session.auth.change_password(change(PASSWORD)).await);
    expected.push(entry("password_changed", request, by_session(&second), own()));

    let (created, request) = answered(session.auth.create_api_key(pb::CreateApiKeyRequest::default()).await);
    let old = created.api_key.unwrap().id;
    let subject = json!({"user_id": user, "api_key_id": old});
    expected.push(entry("api_key_created", request, by_session(&second), subject));
    let (rotated, request) = answered(session.auth.rotate_api_key(rotate(&old)).await);
    let new = rotated.api_key.unwrap().id;
    let subject = json!({"user_id": user, "api_key_id": old, "new_api_key_id": new});
    expected.push(entry("api_key_rotated", request, by_session(&second), subject));
    let (_, request) = answered(session.auth.expire_api_key(key(&old)).await);
    let subject = json!({"user_id": user, "api_key_id": old});
    expected.push(entry("api_key_expired", request, by_session(&second), subject));
    secrets.extend([created.secret, rotated.secret.clone()]);

    // Appending events is no act, nor is the completion of a job.
    let customer = server.customer().await;
    let of_customer = entries(&database).await.split_off(expected.len());
    let acts: Vec<_> = of_customer.iter().map(|entry| entry["act"].clone()).collect();
    assert_eq!(acts, ["sign_up", "api_key_created"]);
    expected.extend(of_customer.into_iter().map(without_id));
    let current = customer.session.current_user().await.unwrap();
    let Some(pb::get_current_user_response::Credential::Session(of_customer)) = current.credential else {
        panic!("{current:?}");
    };
    let mut auth = customer.session.auth.clone();
    let (_, request) = answered(auth.renew_customer_code(pb::RenewCustomerCodeRequest {}).await);
    let actor =
        json!({"actor": "session", "actor_user_id": customer.id, "actor_credential_id": of_customer.id});
    expected.push(entry("customer_code_renewed", request, actor.clone(), json!({"user_id": customer.id})));
    let by_key = server.with_secret(&rotated.secret);
    let mut provider = User {
        id: user.clone(),
        email: "ada@example.com".to_owned(),
        session: session.clone(),
        key: by_key,
        key_secret: rotated.secret,
    };
    provider.configuration(&[("load", 1)]).await;
    let (job, completed) = (provider.job(&customer).await, provider.job(&customer).await);
    provider.append(&completed, [complete()]).await;

    let with_key = || json!({"actor": "api_key", "actor_user_id": user, "actor_credential_id": new});
    let (created, request) = answered(provider.auth.create_watch_token(token_of(&job)).await);
    let shown = created.watch_token.unwrap().id;
    let subject = || json!({"user_id": user, "watch_token_id": shown, "job_id": job.id});
    expected.push(entry("watch_token_created", request, with_key(), subject()));
    let (_, request) = answered(provider.auth.expire_watch_token(token(&shown)).await);
    expected.push(entry("watch_token_expired", request, with_key(), subject()));
    let (_, request) = answered(provider.jobs.close_job(closing(&job)).await);
    let subject = json!({"user_id": user, "job_id": job.id});
    expected.push(entry("job_closed", request, with_key(), subject));
    let asked = provider.job(&customer).await;
    let mut jobs = customer.session.jobs.clone();
    let cancellation = pb::RequestCancellationRequest { job_id: asked.id.clone(), reason: "why".to_owned() };
    let (_, request) = answered(jobs.request_cancellation(cancellation.clone()).await);
    let subject = json!({"user_id": customer.id, "job_id": asked.id});
    expected.push(entry("cancellation_requested", request, actor.clone(), subject));
    // The second request changes nothing.
    assert!(jobs.request_cancellation(cancellation).await.unwrap().into_inner().existed);
    for (act, held) in [("job_held", true), ("job_released", false)] {
        let held = pb::HoldJobRequest { job: Some(pb::hold_job_request::Job::JobId(asked.id.clone())), held };
        let (_, request) = answered(jobs.hold_job(held.clone()).await);
        let subject = json!({"user_id": customer.id, "job_id": asked.id});
        expected.push(entry(act, request, actor.clone(), subject));
        assert!(jobs.hold_job(held).await.unwrap().into_inner().existed);
    }
    secrets.push(created.secret);

    let (_, request) = answered(session.auth.log_out(pb::LogOutRequest {}).await);
    let subject = json!({"user_id": user, "session_id": second.id});
    expected.push(entry("log_out", request, by_session(&second), subject));

    let by_operator = |act: &str, user: &str| json!({"act": act, "actor": "operator", "user_id": user});
    let create =
        operate(&database, &["create", "ops@example.com", "--role", "customer"], "operator's first").await;
    let created_id = create.split(' ').next().unwrap();
    operate(&database, &["set-password", "ops@example.com"], "operator's second").await;
    secrets.extend(hashes(&database).await);
    operate(&database, &["disable", "ops@example.com"], "").await;
    // The second command changes nothing.
    for _ in 0..2 {
        operate(&database, &["enable", "ops@example.com"], "").await;
    }
    let acts = ["user_created", "password_set", "user_disabled", "user_enabled"];
    expected.extend(acts.map(|act| by_operator(act, created_id)));
    secrets.extend(["operator's first".to_owned(), "operator's second".to_owned()]);

    // A log-in that the throttle refuses is logged, but writes no entry: it must stay
    // cheap.
    for n in 0..6 {
        database.block_log_ins_for(30).await;
        let answer = unauthenticated.log_in(log_in_request("nobody@example.com", "my secret guess")).await;
        let throttled = answer.as_ref().unwrap_err().code() == Code::ResourceExhausted;
        assert_eq!(throttled, n == 5);
        expected
            .extend((!throttled).then(|| entry("log_in_failed", refused(answer), anonymous(), json!({}))));
    }

    let entries = entries(&database).await;
    assert_eq!(entries.iter().cloned().map(without_id).collect::<Vec<_>>(), expected);
    let log = server.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let lines: Vec<_> = lines.filter(|line| line["target"] == "milepost::audit").map(as_entry).collect();
    let (throttled, lines): (Vec<_>, Vec<_>) =
        lines.into_iter().partition(|line| line["act"] == "log_in_throttled");
    let of_calls = entries.iter().filter(|entry| entry["actor"] != "operator");
    assert_eq!(lines, of_calls.cloned().collect::<Vec<_>>());
    let [throttled] = throttled.try_into().unwrap();
    assert_eq!(throttled["client_address"], "127.0.0.1");

    let rows = entries.iter().map(Value::to_string).collect::<String>();
    secrets.extend(hashes(&database).await);
    assert!(secrets.len() > 20);
    for secret in secrets {
        assert!(
            !rows.contains(&secret) && !log.contains(&secret),
            "{secret} is in an audit entry or in the log"
        );
    }
}

fn without_id(mut entry: Value) -> Value {
    entry.as_object_mut().unwrap().remove("id").expect("every entry has an id");
    entry
}

/// A line of the log as an entry, without the fields of every line.
fn as_entry(mut line: Value) -> Value {
    let fields = line.as_object_mut().unwrap();
    for each in ["timestamp", "level", "target", "span"] {
        fields.remove(each);
    }
    if let Some(id) = fields.remove("entry_id") {
        fields.insert("id".to_owned(), id);
    }
    line
}

/// A provider's job, key, watch token and sessions, on a server.
struct Scene {
    server: TestServer,
    provider: User,
    customer: User,
    job: pb::Job,
    other_job: pb::Job,
    key_id: String,
    token_id: String,
}

impl Scene {
    async fn new() -> Self {
        let server = TestServer::start().await;
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        provider.configuration(&[("load", 1)]).await;
        let (job, other_job) = (provider.job(&customer).await, provider.job(&customer).await);
        let key_id = provider.keys().await.remove(0).id;
        let token = provider.auth.create_watch_token(token_of(&job)).await.unwrap().into_inner();
        Self { server, provider, customer, job, other_job, key_id, token_id: token.watch_token.unwrap().id }
    }

    /// All rows but for the times of their last use and update.
    async fn stored(&self) -> Vec<String> {
        let tables = ["users", "sessions", "api_keys", "watch_tokens", "jobs", "events"];
        let rows = tables.map(|table| {
            format!("SELECT (to_jsonb(t) - 'last_used_at' - 'updated_at')::text AS text FROM {table} AS t")
        });
        let mut rows = self.server.database.texts(&rows.join(" UNION ALL ")).await;
        rows.sort_unstable();
        rows
    }

    /// Tries each act of a call once; returns the results.
    async fn act(&mut self) -> Vec<Result<(), Status>> {
        let provider = &mut self.provider;
        let mut unauthenticated = self.server.anonymous().auth;
        let email = provider.email.clone();
        let mut session = provider.session.auth.clone();
        vec![
            unauthenticated.sign_up(sign_up_request("new@example.com")).await.map(drop),
            unauthenticated.log_in(log_in_request(&email, "a wrong guess")).await.map(drop),
            unauthenticated.log_in(log_in_request(&email, PASSWORD)).await.map(drop),
            session.change_password(change(PASSWORD)).await.map(drop),
            session.create_api_key(pb::CreateApiKeyRequest::default()).await.map(drop),
            session.rotate_api_key(rotate(&self.key_id)).await.map(drop),
            provider.jobs.close_job(closing(&self.job)).await.map(drop),
            provider.auth.create_watch_token(token_of(&self.job)).await.map(drop),
            provider.auth.expire_watch_token(token(&self.token_id)).await.map(drop),
            session.expire_api_key(key(&self.key_id)).await.map(drop),
            session.log_out(pb::LogOutRequest {}).await.map(drop),
            renew(&self.customer.session).await,
        ]
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_act_whose_audit_entry_cannot_be_stored_is_rolled_back() {
    let mut scene = Scene::new().await;
    let database = scene.server.database.clone();
    let before = scene.stored().await;
    let entries_before = entries(&database).await;
    // Removes the known pairs of e-mail and address that the sign-ups left.
    database.execute("DELETE FROM log_in_attempts").await;
    // The entry is refused first by its INSERT, then by the commit.
    let refuse = "ALTER TABLE audit_entries ADD CONSTRAINT audit_entries_none_check CHECK (false) NOT VALID";
    let accept = "ALTER TABLE audit_entries DROP CONSTRAINT audit_entries_none_check";
    let lose = "
        CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''lost''; END';
        CREATE CONSTRAINT TRIGGER lose AFTER INSERT ON audit_entries
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION lose()";
    let keep = "DROP FUNCTION lose CASCADE";
    for (broken, mended) in [(refuse, accept), (lose, keep)] {
        database.execute(broken).await;
        for (n, answer) in scene.act().await.into_iter().enumerate() {
            let Err(status) = answer else { panic!("act {n} went through: {broken}") };
            assert!(matches!(status.code(), Code::Internal | Code::Unavailable), "act {n}: {status:?}");
        }
        // Another call at the same time is answered as usual.
        let mut provider = scene.provider.clone();
        let mut others = scene.provider.clone();
        let close = provider.jobs.close_job(closing(&scene.job));
        let (closed, appended) = tokio::join!(close, others.try_append(&scene.other_job, []));
        assert!(closed.is_err() && appended.is_err_and(|status| status.code() == Code::InvalidArgument));
        assert_eq!(scene.stored().await, before);
        assert_eq!(entries(&database).await, entries_before);
        assert_eq!(
            database.texts("SELECT 'x' AS text FROM log_in_attempts WHERE succeeded_at IS NOT NULL").await,
            [""; 0]
        );
        // Resets the throttle, as a quarter of an hour does.
        database.execute("DELETE FROM log_in_attempts").await;
        database.execute(mended).await;
    }
    for (n, answer) in scene.act().await.into_iter().enumerate() {
        assert_eq!(answer.is_err(), n == 1, "act {n}: {answer:?}");
    }
    let acts: Vec<_> = entries(&database).await.split_off(entries_before.len());
    let acts: Vec<_> = acts.iter().map(|entry| entry["act"].as_str().unwrap()).collect();
    assert_eq!(
        acts,
        [
            "sign_up",
            "log_in_failed",
            "log_in",
            "password_changed",
            "api_key_created",
            "api_key_rotated",
            "job_closed",
            "watch_token_created",
            "watch_token_expired",
            "api_key_expired",
            "log_out",
            "customer_code_renewed",
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_close_whose_audit_entry_cannot_be_stored_fails_no_other_append() {
    let mut scene = Scene::new().await;
    let refuse = "ALTER TABLE audit_entries ADD CONSTRAINT audit_entries_none_check CHECK (false) NOT VALID";
    scene.server.database.execute(refuse).await;
    let mut others = scene.provider.clone();
    let append = async {
        for n in 0..50 {
            others.append(&scene.other_job, [info(&n.to_string())]).await;
        }
    };
    let close = async {
        for _ in 0..20 {
            let refused = scene.provider.jobs.close_job(closing(&scene.job)).await;
            assert_eq!(refused.unwrap_err().code(), Code::Internal);
        }
    };
    tokio::join!(append, close);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_calls_write_no_audit_entry() {
    let mut scene = Scene::new().await;
    let other = scene.server.provider().await;
    scene.provider.append(&scene.other_job, [complete()]).await;
    for answer in scene.act().await.drain(..).skip(2) {
        answer.unwrap();
    }
    let before = entries(&scene.server.database).await;
    let Scene { server, provider, job, other_job, key_id, token_id, .. } = &mut scene;
    let email = provider.email.clone();
    let mut unauthenticated = server.anonymous().auth;
    let mut session = log_in(server, &email, NEW_PASSWORD).await;
    let refusals = [
        unauthenticated.sign_up(sign_up_request(&email.to_uppercase())).await.map(drop),
        unauthenticated.sign_up(sign_up_request("nobody")).await.map(drop),
        unauthenticated.log_in(log_in_request("a\0b", PASSWORD)).await.map(drop),
        provider.session.auth.log_out(pb::LogOutRequest {}).await.map(drop),
        session.auth.rotate_api_key(rotate(key_id)).await.map(drop),
        session.auth.expire_api_key(key(key_id)).await.map(drop),
        other.clone().session.auth.expire_api_key(key(key_id)).await.map(drop),
        other.clone().key.auth.create_api_key(pb::CreateApiKeyRequest::default()).await.map(drop),
        session.auth.expire_watch_token(token(token_id)).await.map(drop),
        other.clone().key.auth.create_watch_token(token_of(job)).await.map(drop),
        other.clone().key.jobs.close_job(closing(job)).await.map(drop),
        session.jobs.close_job(closing(other_job)).await.map(drop),
        renew(&session).await,
    ];
    for (n, answer) in refusals.into_iter().enumerate() {
        assert!(answer.is_err(), "{n}");
    }
    // Nor does a close that is repeated.
    assert!(session.jobs.close_job(closing(job)).await.unwrap().into_inner().existed);
    let mut after = entries(&server.database).await;
    after.retain(|entry| entry["act"] != "log_in" || before.contains(entry));
    assert_eq!(after, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_another_call_commits_while_a_call_waits_is_not_audited_again() {
    for act in ["LogOut", "ExpireApiKey", "RotateApiKey", "ExpireWatchToken"] {
        let Scene { server, mut provider, key_id, token_id, .. } = Scene::new().await;
        let database = server.database.clone();
        let before = entries(&database).await;
        let table = match act {
            "LogOut" => "sessions",
            "ExpireWatchToken" => "watch_tokens",
            _ => "api_keys",
        };
        let mut other = database.connect().await;
        other.batch_execute(&format!("BEGIN; SELECT FROM {table} FOR UPDATE")).await.unwrap();
        let calling = tokio::spawn(async move {
            let session = &mut provider.session.auth;
            match act {
                "LogOut" => session.log_out(pb::LogOutRequest {}).await.map(drop),
                "ExpireApiKey" => session.expire_api_key(key(&key_id)).await.map(drop),
                "RotateApiKey" => session.rotate_api_key(rotate(&key_id)).await.map(drop),
                _ => session.expire_watch_token(token(&token_id)).await.map(drop),
            }
        });
        database.wait_for_locks(1).await;
        // As another server does whose transaction began after that of the call.
        let end = format!("UPDATE {table} SET revoked_at = clock_timestamp(); COMMIT");
        other.batch_execute(&end).await.unwrap();
        let answer = within_timeout("the answer", calling).await.unwrap();
        match act {
            "LogOut" => answer.unwrap(),
            _ => assert_eq!(answer.unwrap_err().code(), Code::FailedPrecondition, "{act}"),
        }
        assert_eq!(entries(&database).await, before, "{act}");
    }
}

async fn log_in(clients: &Clients, email: &str, password: &str) -> Caller {
    let answer = clients.anonymous().auth.log_in(log_in_request(email, password)).await.unwrap().into_inner();
    clients.with_secret(answer.session.unwrap().secret)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_entry_has_the_client_address_that_the_throttle_uses() {
    let server = TestServer::start().await;
    let from = async |through: Clients, forwarded: &str| {
        let mut request = Request::new(log_in_request("nobody@example.com", PASSWORD));
        request.metadata_mut().insert("x-forwarded-for", forwarded.parse().unwrap());
        let failed = through.anonymous().auth.log_in(request).await;
        assert_refused(failed, Code::Unauthenticated, ErrorReason::LogInFailed);
    };
    from(server.from(TRUSTED_PROXY), "10.0.0.1, 192.0.2.7").await;
    from(server.from(TRUSTED_PROXY), "2001:db8::7").await;
    from(server.from(Ipv4Addr::new(127, 0, 0, 2)), "192.0.2.7").await;
    let entries = entries(&server.database).await;
    let addresses: Vec<_> = entries.iter().map(|entry| entry["client_address"].as_str().unwrap()).collect();
    assert_eq!(addresses, ["192.0.2.7", "2001:db8::7", "127.0.0.2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_log_in_is_audited_though_its_caller_cancelled_the_call() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    // Hashing takes about a second, so that the caller can cancel meanwhile.
    let slow = bcrypt::hash(PASSWORD, 14).unwrap();
    server.database.execute(&format!("UPDATE users SET password_hash = '{slow}'")).await;
    server.database.execute("DELETE FROM log_in_attempts").await;
    let before = entries(&server.database).await.len();
    let mut clients = server.other_clients().anonymous();
    let guess =
        tokio::spawn(async move { clients.auth.log_in(log_in_request(&user.email, "a wrong guess")).await });
    within_timeout("the attempt", async { while server.count("log_in_attempts").await == 0 {} }).await;
    assert!(!guess.is_finished());
    guess.abort();
    within_timeout("its entry", async { while server.count("audit_entries").await == before {} }).await;
    assert_eq!(entries(&server.database).await[before]["act"], "log_in_failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn audit_entries_are_immutable_unless_the_table_owner_disables_the_trigger() {
    let server = TestServer::start().await;
    server.customer().await;
    let before = entries(&server.database).await;
    assert_eq!(before.len(), 2);
    let mut connection = server.database.connect().await;
    for change in [
        "UPDATE audit_entries SET user_id = gen_random_uuid()",
        "DELETE FROM audit_entries",
        "TRUNCATE audit_entries",
    ] {
        assert!(connection.batch_execute(change).await.is_err(), "{change}");
    }
    assert_eq!(entries(&server.database).await, before);

    let statements = blocks("docs/security.md", "sql");
    let prune = statements.iter().find(|block| block.contains("DISABLE TRIGGER")).unwrap();
    server.database.execute(prune).await;
    assert_eq!(entries(&server.database).await, before, "entries younger than a year stay");
    server.database.execute(&prune.replace("1 year", "0 years")).await;
    assert_eq!(entries(&server.database).await, [Value::Null; 0]);
    server.customer().await;
    assert!(connection.batch_execute("DELETE FROM audit_entries").await.is_err());
}
