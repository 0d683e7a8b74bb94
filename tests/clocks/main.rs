//! What holds while the database's clock is wrong: after it was set back, as by a failover
//! to a standby that is behind, and while it is ahead and afterwards.
//!
//! `cargo test --test clocks` needs Debian's faketime.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::{
    env, fs,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, SystemTime},
};

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb::{self, ErrorReason, create_watch_token_request::Job};
use milepost_testing::{
    Caller, Clients, Clock, PASSWORD, ServerProcess, TemporaryDir, TestDatabase, TestServer, assert_refused,
    complete, info, operate, within_timeout,
};
use tonic::{Code, Status};

const MINUTE: i64 = 60;
const DAY: i64 = 24 * 60 * MINUTE;
/// An address from which no user has logged in before.
const OTHER_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// A server whose embedded Postgres has a clock of its own.
struct Scene {
    server: ServerProcess,
    database: TestDatabase,
    clock: Clock,
    _dir: TemporaryDir,
}

impl Scene {
    async fn new() -> Self {
        let dir = TemporaryDir::new();
        let clock = Clock::if_installed(dir.path()).expect("libfaketime; Debian: apt-get install faketime");
        // The server finds Postgres by PATH, and clears the environment of Postgres.
        let installed = fs::read_link(format!("/proc/{}/exe", TestDatabase::postmaster().await)).unwrap();
        let variables = clock.variables().map(|(name, value)| format!("{name}={value}")).join(" ");
        for (name, variables) in
            [("initdb", ""), ("pg_ctl", ""), ("postgres", &*format!("{variables} FAKETIME_NO_CACHE=1"))]
        {
            let (file, program) = (dir.path().join(name), installed.with_file_name(name));
            fs::write(&file, format!("#!/bin/sh\nexec env {variables} {} \"$@\"\n", program.display()))
                .unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = format!("{}:{}", dir.path().display(), env::var("PATH").unwrap());
        let server = ServerProcess::start_with("127.0.0.1", vec![("PATH", path)]).await;
        Self { database: server.database(), server, clock, _dir: dir }
    }

    /// A server that has seen no credential yet.
    async fn new_server(&self) -> TestServer {
        TestServer::on(self.database.clone()).await
    }

    /// A row's column `text`.
    async fn text(&self, sql: &str) -> String {
        self.database.texts(sql).await.remove(0)
    }
}

async fn use_of(caller: Caller) -> Result<(), Status> {
    caller.current_user().await.map(drop)
}

async fn assert_accepted(clients: &Clients, secret: &str) {
    use_of(clients.with_secret(secret)).await.unwrap();
}

async fn assert_ended(clients: &Clients, what: &str, secret: &str) {
    let answer = use_of(clients.with_secret(secret)).await;
    assert!(answer.is_err(), "{what} is accepted");
    assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);
}

async fn log_in(clients: &Clients, email: &str, password: &str) -> Result<String, Status> {
    let request = pb::LogInRequest { email: email.to_owned(), password: password.to_owned() };
    let answer = clients.anonymous().auth.log_in(request).await?.into_inner();
    Ok(answer.session.unwrap().secret)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_credential_stays_refused_on_every_server_after_the_clock_is_set_back() {
    for back in [MINUTE, DAY] {
        let scene = Scene::new().await;
        let server = &scene.server;
        let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
        let session = log_in(server, &provider.email, PASSWORD).await.unwrap();
        let other_session = log_in(server, &customer.email, PASSWORD).await.unwrap();
        let keys = &mut provider.session.auth;
        let create = pb::CreateApiKeyRequest::default;
        let [expired, rotated] = [
            keys.create_api_key(create()).await.unwrap().into_inner(),
            keys.create_api_key(create()).await.unwrap().into_inner(),
        ];
        let create = pb::CreateWatchTokenRequest { job: Some(Job::JobId(job.id)), ..Default::default() };
        let token = keys.create_watch_token(create).await.unwrap().into_inner();

        server.with_secret(&session).auth.log_out(pb::LogOutRequest {}).await.unwrap();
        let api_key_id = expired.api_key.unwrap().id;
        let key =
            keys.expire_api_key(pb::ExpireApiKeyRequest { api_key_id }).await.unwrap().into_inner().api_key;
        let api_key_id = rotated.api_key.unwrap().id;
        let overlap = Some(prost_types::Duration::default());
        let old = keys.rotate_api_key(pb::RotateApiKeyRequest { api_key_id, overlap }).await.unwrap();
        let watch_token_id = token.watch_token.unwrap().id;
        let watch_token =
            keys.expire_watch_token(pb::ExpireWatchTokenRequest { watch_token_id }).await.unwrap();
        for (revoked_at, expires_at) in [
            key.map(|key| (key.revoked_at, key.expires_at)).unwrap(),
            old.into_inner().old_api_key.map(|key| (key.revoked_at, key.expires_at)).unwrap(),
        ] {
            assert!(revoked_at.is_some() && expires_at.is_none());
        }
        let watch_token = watch_token.into_inner().watch_token.unwrap();
        assert!(watch_token.expires_at.unwrap().seconds > watch_token.revoked_at.unwrap().seconds + MINUTE);
        let request = pb::ChangePasswordRequest {
            current_password: PASSWORD.to_owned(),
            new_password: "another horse".to_owned(),
        };
        let mut changing = customer.session.clone();
        let changed = changing.auth.change_password(request).await.unwrap().into_inner();
        assert_eq!(changed.ended_sessions, 1);
        let disabled = server.customer().await;
        operate(&scene.database, &["disable", &disabled.email], "").await;

        scene.clock.set(-back);
        let new_server = scene.new_server().await;
        for clients in [&**server, &*new_server] {
            for (what, secret) in [
                ("a session that logged out", &session),
                ("another session of a user with a new password", &other_session),
                ("an expired key", &expired.secret),
                ("a rotated key", &rotated.secret),
                ("an expired watch token", &token.secret),
            ] {
                assert_ended(clients, what, secret).await;
            }
            assert_accepted(clients, &provider.key_secret).await;
        }
        // The server that the operator's command does not reach may have cached it.
        assert_ended(&new_server, "a key of a disabled user", &disabled.key_secret).await;
        for table in ["sessions", "api_keys", "watch_tokens"] {
            let again =
                format!("UPDATE {table} SET revoked_at = clock_timestamp() WHERE revoked_at IS NOT NULL");
            for sql in [again.replace("clock_timestamp()", "NULL"), again] {
                let changed = scene.database.connect().await.batch_execute(&sql).await;
                assert!(changed.is_err(), "{sql}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_keeps_refusing_an_expired_key_after_the_clock_is_set_back() {
    let scene = Scene::new().await;
    let mut user = scene.server.customer().await;
    let expires_at = Some((SystemTime::now() + Duration::from_secs(2)).into());
    let request = pb::CreateApiKeyRequest { expires_at, ..Default::default() };
    let secret = user.session.auth.create_api_key(request).await.unwrap().into_inner().secret;
    assert_accepted(&scene.server, &secret).await;
    let ended = async { while use_of(scene.server.with_secret(&secret)).await.is_ok() {} };
    within_timeout("the key to expire", ended).await;
    let expired =
        "SELECT (expires_at < clock_timestamp())::text AS text FROM api_keys WHERE expires_at IS NOT NULL";
    within_timeout("the key to expire in the database", async {
        while scene.text(expired).await != "true" {}
    })
    .await;
    // This server sees the key only after its expiry.
    let late = scene.new_server().await;
    assert_ended(&late, "the expired key", &secret).await;

    scene.clock.set(-MINUTE);
    // Twice, since it is not a cached credential that is refused.
    for _ in 0..2 {
        assert_ended(&scene.server, "the expired key", &secret).await;
        assert_ended(&late, "the expired key", &secret).await;
    }
    // Expiry is by the database's clock, and this server knows nothing else.
    assert_accepted(&*scene.new_server().await, &secret).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttle_that_was_set_while_the_clock_was_ahead_ends_when_the_clock_is_right() {
    let scene = Scene::new().await;
    let remote = scene.server.from(OTHER_ADDRESS);
    let user = scene.server.customer().await;
    let wrong = async || log_in(&remote, &user.email, "a wrong guess").await;
    let throttled = |answer: Result<String, Status>| {
        let refusal = assert_refused(answer, Code::ResourceExhausted, ErrorReason::LogInThrottled);
        let wait = refusal.details.retry_info().unwrap().retry_delay.unwrap();
        assert!((Duration::from_secs(50)..=Duration::from_secs(60)).contains(&wait), "{wait:?}");
    };
    scene.clock.set(DAY);
    wrong().await.unwrap_err();
    // The next failure blocks the pair, the address and the e-mail for a minute.
    scene.database.execute("UPDATE log_in_attempts SET failures = 30").await;
    assert_refused(wrong().await, Code::Unauthenticated, ErrorReason::LogInFailed);
    throttled(wrong().await);

    scene.clock.set(0);
    log_in(&remote, &user.email, PASSWORD).await.unwrap();
    // The failures of the address and the e-mail still count.
    assert_refused(wrong().await, Code::Unauthenticated, ErrorReason::LogInFailed);
    throttled(wrong().await);

    // Keys that are not used again do not count when the clock has come as far.
    scene.clock.set(DAY);
    log_in(&scene.server.from(Ipv4Addr::new(127, 0, 0, 3)), "nobody@example.com", PASSWORD)
        .await
        .unwrap_err();
    scene.clock.set(0);
    log_in(&scene.server.from(Ipv4Addr::new(127, 0, 0, 4)), "somebody@example.com", PASSWORD)
        .await
        .unwrap_err();
    let ahead = "SELECT count(*)::text AS text FROM log_in_attempts WHERE last_at > clock_timestamp()";
    assert_eq!(scene.text(ahead).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_removes_nothing_early_when_the_clock_is_set_ahead_and_all_in_the_end() {
    for stepped_before in [true, false] {
        let scene = Scene::new().await;
        let (mut provider, customer) = (scene.server.provider().await, scene.server.customer().await);
        provider.configuration(&[("load", 1)]).await;
        let (closed, open) = (provider.job(&customer).await, provider.job(&customer).await);
        provider.append(&closed, [complete()]).await;
        scene.database.keep_step_times().await;
        // How many jobs one step of a retention of an hour removes.
        let step = "SELECT marked::text AS text FROM remove_expired_events(interval '1 hour', 100, 1000)";
        let assert_kept = async || assert_eq!(scene.text(step).await, "0");
        if stepped_before {
            assert_kept().await;
        }
        // Ahead for a moment, and back again.
        scene.clock.set(DAY);
        assert_kept().await;
        provider.append(&open, [info("while the clock is ahead")]).await;
        assert_kept().await;
        scene.clock.set(0);
        assert_kept().await;

        // Ahead for good: the hour passes all the same.
        for minute in 0..60 {
            scene.clock.set(DAY + minute * MINUTE);
            assert_kept().await;
        }
        scene.clock.set(DAY + 62 * MINUTE);
        assert_eq!(scene.text(step).await, "1");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_ahead_removes_no_credential_that_is_valid_by_the_right_one() {
    let scene = Scene::new().await;
    let step = "SELECT remove_ended_credentials(interval '30 days', 100)::text AS text";
    assert_eq!(scene.text(step).await, "0");
    let user = scene.server.customer().await;
    let expires_at = Some((SystemTime::now() + Duration::from_secs(60 * 60)).into());
    let request = pb::CreateApiKeyRequest { expires_at, ..Default::default() };
    let created = user.session.clone().auth.create_api_key(request).await.unwrap().into_inner();
    scene.clock.set(40 * DAY);
    for _ in 0..3 {
        assert_eq!(scene.text(step).await, "0");
    }
    scene.clock.set(0);
    assert_eq!(scene.text(step).await, "0");
    let server = scene.new_server().await;
    assert_accepted(&server, &created.secret).await;
}
