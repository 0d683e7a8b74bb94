//! Users, sessions and API keys.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost::secret::{Secret, SecretKind};
use milepost_client::pb::{self, ApiKeyScope, ErrorReason, UserRole, get_current_user_response::Credential};
use prost_types::{FieldMask, Timestamp};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::support::{
    Caller, Mode, PASSWORD, TestServer, User, assert_refused, assert_violations, registration, within_timeout,
};

fn sign_up(email: &str) -> pb::SignUpRequest {
    pb::SignUpRequest {
        role: UserRole::Customer.into(),
        email: email.to_owned(),
        password: PASSWORD.to_owned(),
        first_name: "Ada".to_owned(),
        last_name: "Lovelace".to_owned(),
    }
}

async fn current_user(caller: &mut Caller) -> Result<pb::GetCurrentUserResponse, Status> {
    Ok(caller.auth.get_current_user(pb::GetCurrentUserRequest {}).await?.into_inner())
}

async fn log_in(server: &TestServer, email: &str, password: &str) -> Result<Caller, Status> {
    let request = pb::LogInRequest { email: email.to_owned(), password: password.to_owned() };
    let response = server.anonymous().auth.log_in(request).await?.into_inner();
    Ok(server.with_secret(response.session.unwrap().secret))
}

async fn keys(user: &mut User) -> Vec<pb::ApiKey> {
    let response = user.session.auth.list_api_keys(pb::ListApiKeysRequest::default()).await.unwrap();
    response.into_inner().api_keys
}

async fn key_with(user: &mut User, scopes: &[ApiKeyScope]) -> Result<pb::CreateApiKeyResponse, Status> {
    let scopes = scopes.iter().map(|&scope| scope.into()).collect();
    let request = pb::CreateApiKeyRequest { scopes, ..Default::default() };
    Ok(user.session.auth.create_api_key(request).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_up_creates_a_user_and_a_session() {
    let server = TestServer::start().await;
    let response = server.anonymous().auth.sign_up(sign_up("Ada@Example.com")).await.unwrap().into_inner();
    let user = response.user.unwrap();
    assert_eq!(user.email, "Ada@Example.com", "the case is kept");
    assert_eq!(user.role(), UserRole::Customer);
    let session = response.session.unwrap();
    assert!(session.expires_at.unwrap().seconds > user.created_at.unwrap().seconds);
    assert_eq!((session.created_at, session.updated_at), (user.created_at, user.updated_at));

    let me = current_user(&mut server.with_secret(session.secret)).await.unwrap();
    assert_eq!(me.user.unwrap(), user);
    let Some(Credential::Session(current)) = me.credential else { panic!("{:?}", me.credential) };
    assert_eq!((current.id, current.secret.as_str()), (session.id, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_email_is_refused_whatever_its_case_and_the_other_fields() {
    let server = TestServer::start().await;
    server.anonymous().auth.sign_up(sign_up("ada@example.com")).await.unwrap();

    let mut again = sign_up("ADA@example.com");
    again.first_name = "Grace".to_owned();
    for request in [sign_up("ada@example.com"), again] {
        let answer = server.anonymous().auth.sign_up(request).await;
        let refusal = assert_refused(answer, Code::AlreadyExists, ErrorReason::EmailTaken);
        assert_eq!(refusal.fields, ["email"]);
    }
    assert_eq!(server.count("users").await, 1);
    assert_eq!(server.count("sessions").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_up_is_answered_with_all_its_violations_at_once() {
    let server = TestServer::start().await;
    let request = pb::SignUpRequest {
        role: UserRole::Unspecified.into(),
        email: "nobody".to_owned(),
        password: "short".to_owned(),
        first_name: "a\0b".to_owned(),
        last_name: "x".repeat(257),
    };
    let answer = server.anonymous().auth.sign_up(request).await;
    assert_violations(answer, &["role", "email", "password", "first_name", "last_name"]);
    assert_eq!(server.count("users").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_has_8_to_71_bytes_and_no_nul() {
    let server = TestServer::start().await;
    for password in ["1234567".to_owned(), "x".repeat(72), "ü".repeat(36), "12345678\0".to_owned()] {
        let request = pb::SignUpRequest { password, ..sign_up("ada@example.com") };
        assert_violations(server.anonymous().auth.sign_up(request).await, &["password"]);
    }
    for (email, password) in
        [("short@example.com", "12345678".to_owned()), ("long@example.com", "x".repeat(71))]
    {
        let request = pb::SignUpRequest { password: password.clone(), ..sign_up(email) };
        server.anonymous().auth.sign_up(request).await.unwrap();
        log_in(&server, email, &password).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_works_whatever_the_case_of_the_email() {
    let server = TestServer::start().await;
    server.anonymous().auth.sign_up(sign_up("Ada@Example.com")).await.unwrap();
    let mut caller = log_in(&server, "aDA@eXAMPLE.COM", PASSWORD).await.unwrap();
    assert_eq!(current_user(&mut caller).await.unwrap().user.unwrap().email, "Ada@Example.com");
}

/// The secret with another last character.
fn mistyped(secret: &str) -> String {
    let (rest, last) = secret.split_at(secret.len() - 1);
    format!("{rest}{}", if last == "x" { "y" } else { "x" })
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_without_a_valid_credential_all_get_the_same_answer() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let ended = user.session.clone();
    user.session.auth.log_out(pb::LogOutRequest {}).await.unwrap();

    let callers = [
        server.anonymous(),
        server.with_secret(""),
        server.with_secret("nonsense"),
        server.with_secret("mpk_nonsense"),
        server.with_secret(mistyped(&user.key_secret)),
        ended,
    ];
    let mut answers = Vec::new();
    for mut caller in callers {
        let status = current_user(&mut caller).await.unwrap_err();
        assert_refused(Err::<(), _>(status.clone()), Code::Unauthenticated, ErrorReason::CredentialInvalid);
        answers.push((status.message().to_owned(), status.details().to_vec()));
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "one message and one reason: {answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistyped_key_is_refused_without_a_query() {
    let (server, proxy) = TestServer::through_proxy().await;
    let user = server.customer().await;
    let mut mistyped = server.with_secret(mistyped(&user.key_secret));
    let mut unknown = server.with_secret(Secret::generate(SecretKind::ApiKey).unwrap().reveal());
    let refused_at_once = async |caller: &mut Caller| {
        let refused = timeout(Duration::from_secs(1), current_user(caller)).await.expect("it needs no query");
        assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    };

    // The look-up of a key waits for this lock.
    let mut locker = server.database.connect().await;
    locker.batch_execute("BEGIN; LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let mut caller = unknown.clone();
    let look_up = tokio::spawn(async move { current_user(&mut caller).await });
    within_timeout("the look-up of the key", async {
        while server.database.waiting_for_locks().await.is_empty() {}
    })
    .await;
    refused_at_once(&mut mistyped).await;
    drop(locker);
    assert_refused(look_up.await.unwrap(), Code::Unauthenticated, ErrorReason::CredentialInvalid);

    proxy.set(Mode::Refuse);
    assert_refused(current_user(&mut unknown).await, Code::Unavailable, ErrorReason::DatabaseUnavailable);
    refused_at_once(&mut mistyped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_out_ends_that_session_and_no_other() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let mut other = log_in(&server, &user.email, PASSWORD).await.unwrap();
    user.session.auth.log_out(pb::LogOutRequest {}).await.unwrap();
    let again = user.session.auth.log_out(pb::LogOutRequest {}).await;
    assert_refused(again, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    current_user(&mut other).await.unwrap();
    current_user(&mut user.key).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_sets_the_names_that_its_mask_lists() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let names =
        pb::User { first_name: "Grace".to_owned(), last_name: "Hopper".to_owned(), ..Default::default() };
    let mut update = async |paths: &[&str]| {
        let update_mask = Some(FieldMask { paths: paths.iter().map(|&path| path.to_owned()).collect() });
        let request = pb::UpdateCurrentUserRequest { user: Some(names.clone()), update_mask };
        user.session.auth.update_current_user(request).await
    };

    let updated = update(&["first_name"]).await.unwrap().into_inner().user.unwrap();
    assert_eq!((updated.first_name.as_str(), updated.last_name.as_str()), ("Grace", "Lovelace"));
    let refused = update(&["email"]).await;
    assert_refused(refused, Code::InvalidArgument, ErrorReason::FieldInvalid);
    let updated = update(&[]).await.unwrap().into_inner().user.unwrap();
    assert_eq!((updated.first_name.as_str(), updated.last_name.as_str()), ("Grace", "Hopper"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_change_ends_the_other_sessions_and_no_key() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let mut other = log_in(&server, &user.email, PASSWORD).await.unwrap();
    let mut change = async |current: &str, new: &str| {
        let request =
            pb::ChangePasswordRequest { current_password: current.to_owned(), new_password: new.to_owned() };
        user.session.auth.change_password(request).await
    };

    assert_violations(change("a wrong one", "another horse").await, &["current_password"]);
    current_user(&mut other).await.unwrap();

    let changed = change(PASSWORD, "another horse").await.unwrap().into_inner();
    assert_eq!((changed.ended_sessions, changed.valid_api_keys), (1, 1));
    assert_refused(current_user(&mut other).await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    current_user(&mut user.session).await.unwrap();
    current_user(&mut user.key).await.unwrap();
    let old = log_in(&server, &user.email, PASSWORD).await;
    assert_refused(old, Code::Unauthenticated, ErrorReason::LogInFailed);
    log_in(&server, &user.email, "another horse").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_of_a_key_is_shown_once_and_stored_nowhere() {
    let server = TestServer::start().await;
    let mut user = server.provider().await;
    let me = current_user(&mut user.key).await.unwrap();
    let Some(Credential::ApiKey(key)) = me.credential else { panic!("{:?}", me.credential) };
    assert!(user.key_secret.starts_with(&key.key_prefix) && user.key_secret.len() > 40);
    assert_eq!(key.scopes, [ApiKeyScope::Read as i32, ApiKeyScope::Append as i32]);
    assert_eq!(keys(&mut user).await.len(), 1);

    let random = user.key_secret.trim_start_matches(&key.key_prefix);
    let stored = server.database.texts("SELECT api_keys::text AS text FROM api_keys").await.concat();
    assert!(!stored.contains(random));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_is_refused_at_once_and_stays_in_the_list() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let [first] = keys(&mut user).await.try_into().unwrap();
    let second = key_with(&mut user, &[ApiKeyScope::Read]).await.unwrap().api_key.unwrap();

    let request = pb::ExpireApiKeyRequest { api_key_id: first.id.clone() };
    let expired = user.session.auth.expire_api_key(request.clone()).await.unwrap().into_inner();
    let expired = expired.api_key.unwrap();
    assert!(expired.revoked_at.is_some() && expired.expires_at.is_none());
    assert_eq!((first.updated_at, expired.updated_at), (first.created_at, expired.revoked_at));
    assert_refused(current_user(&mut user.key).await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    let again = user.session.auth.expire_api_key(request).await;
    assert_refused(again, Code::FailedPrecondition, ErrorReason::ApiKeyAlreadyExpired);

    let listed: Vec<_> = keys(&mut user).await.into_iter().map(|key| (key.id, key.revoked_at)).collect();
    assert_eq!(listed, [(first.id, expired.revoked_at), (second.id, None)], "oldest first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_key_and_its_successor_are_both_valid_during_the_overlap() {
    let server = TestServer::start().await;
    let mut user = server.provider().await;
    let [old] = keys(&mut user).await.try_into().unwrap();
    let rotate = |seconds| pb::RotateApiKeyRequest {
        api_key_id: old.id.clone(),
        overlap: Some(prost_types::Duration { seconds, nanos: 0 }),
    };
    for bad in [-1, 30 * 24 * 60 * 60 + 1] {
        assert_violations(user.session.auth.rotate_api_key(rotate(bad)).await, &["overlap"]);
    }
    let rotated = user.session.auth.rotate_api_key(rotate(1)).await.unwrap().into_inner();
    let (new, ends) = (rotated.api_key.unwrap(), rotated.old_api_key.unwrap());
    assert_eq!((&new.note, &new.scopes, new.expires_at), (&old.note, &old.scopes, None));
    assert_eq!((&ends.id, &ends.key_prefix), (&old.id, &old.key_prefix));
    assert!(ends.expires_at.is_some() && new.id != old.id);
    let mut successor = server.with_secret(&rotated.secret);
    current_user(&mut successor).await.unwrap();

    // The server remembers the old key as valid, but the key ends with the overlap.
    let ended = async { while current_user(&mut user.key).await.is_ok() {} };
    within_timeout("the end of the overlap", ended).await;
    assert_refused(current_user(&mut user.key).await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    current_user(&mut successor).await.unwrap();
    // The server ends the key a moment before the database does.
    let refused = async {
        loop {
            if let Err(status) = user.session.auth.rotate_api_key(rotate(1)).await {
                return status;
            }
        }
    };
    let again: Result<(), _> = Err(within_timeout("the end of the key in the database", refused).await);
    assert_refused(again, Code::FailedPrecondition, ErrorReason::ApiKeyAlreadyExpired);

    // Without an overlap the old key ends at once.
    let now = pb::RotateApiKeyRequest { api_key_id: new.id, ..rotate(0) };
    let rotated = user.session.auth.rotate_api_key(now).await.unwrap().into_inner();
    assert_eq!(rotated.api_key.unwrap().expires_at, None, "the new key does not end with the old one");
    assert_refused(current_user(&mut successor).await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    current_user(&mut server.with_secret(&rotated.secret)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_user_is_not_found() {
    let server = TestServer::start().await;
    let (mut ada, mut grace) = (server.customer().await, server.customer().await);
    let [key] = keys(&mut ada).await.try_into().unwrap();
    let answer = grace.session.auth.expire_api_key(pb::ExpireApiKeyRequest { api_key_id: key.id }).await;
    assert_refused(answer, Code::NotFound, ErrorReason::ResourceNotFound);
    current_user(&mut ada.key).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_is_refused_and_an_expiry_in_the_past_is_invalid() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let past = pb::CreateApiKeyRequest {
        expires_at: Some(Timestamp { seconds: 1, nanos: 0 }),
        ..Default::default()
    };
    assert_violations(user.session.auth.create_api_key(past).await, &["expires_at"]);

    let secret = key_with(&mut user, &[]).await.unwrap().secret;
    server.database.execute("UPDATE api_keys SET expires_at = now()").await;
    let mut never_used_before = server.with_secret(secret);
    let answer = current_user(&mut never_used_before).await;
    assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_limited_to_its_scopes() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let mut with_scopes = async |scopes: &[ApiKeyScope]| {
        server.with_secret(key_with(&mut provider, scopes).await.unwrap().secret)
    };
    let mut read = with_scopes(&[ApiKeyScope::Read]).await;
    let mut append = with_scopes(&[ApiKeyScope::Append]).await;
    let mut manage = with_scopes(&[ApiKeyScope::Manage]).await;

    let register = registration("1.0.0", &[]);
    append.configurations.register_job_configuration(register.clone()).await.unwrap();
    read.jobs.list_jobs(pb::ListJobsRequest::default()).await.unwrap();
    manage.auth.list_api_keys(pb::ListApiKeysRequest::default()).await.unwrap();
    for caller in [&mut read, &mut append, &mut manage] {
        current_user(caller).await.unwrap();
    }

    let denied = |answer: Result<_, Status>| {
        assert_refused(answer, Code::PermissionDenied, ErrorReason::ScopeRequired)
    };
    let refusal = denied(read.configurations.register_job_configuration(register).await.map(|_| ()));
    assert!(refusal.metadata.contains_key("scope"), "{:?}", refusal.metadata);
    denied(append.jobs.list_jobs(pb::ListJobsRequest::default()).await.map(|_| ()));
    denied(read.auth.list_api_keys(pb::ListApiKeysRequest::default()).await.map(|_| ()));
    let wider = pb::CreateApiKeyRequest { scopes: vec![ApiKeyScope::Append.into()], ..Default::default() };
    denied(manage.auth.create_api_key(wider).await.map(|_| ()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_customers_key_cannot_have_the_scope_append() {
    let server = TestServer::start().await;
    let mut customer = server.customer().await;
    let answer = key_with(&mut customer, &[ApiKeyScope::Append]).await;
    assert_refused(answer, Code::InvalidArgument, ErrorReason::FieldInvalid);
    let default = key_with(&mut customer, &[]).await.unwrap().api_key.unwrap();
    assert_eq!(default.scopes, [ApiKeyScope::Read as i32]);
}

#[tokio::test(flavor = "multi_thread")]
async fn methods_that_need_a_session_refuse_a_key() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let denied = |answer: Result<_, Status>| {
        assert_refused(answer, Code::PermissionDenied, ErrorReason::SessionRequired)
    };
    denied(user.key.auth.log_out(pb::LogOutRequest {}).await.map(|_| ()));
    denied(user.key.auth.update_current_user(pb::UpdateCurrentUserRequest::default()).await.map(|_| ()));
    denied(user.key.auth.change_password(pb::ChangePasswordRequest::default()).await.map(|_| ()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_is_checked_before_the_request() {
    let server = TestServer::start().await;
    let mut customer = server.customer().await;
    let denied =
        |answer: Result<_, Status>| assert_refused(answer, Code::PermissionDenied, ErrorReason::RoleRequired);
    let user = &mut customer.session;
    denied(
        user.configurations
            .register_job_configuration(pb::RegisterJobConfigurationRequest::default())
            .await
            .map(|_| ()),
    );
    denied(
        user.configurations
            .list_job_configurations(pb::ListJobConfigurationsRequest::default())
            .await
            .map(|_| ()),
    );
    denied(user.jobs.create_job(pb::CreateJobRequest::default()).await.map(|_| ()));
    denied(user.jobs.close_job(pb::CloseJobRequest::default()).await.map(|_| ()));
    denied(user.events.append_events(pb::AppendEventsRequest::default()).await.map(|_| ()));
}

#[tokio::test(flavor = "multi_thread")]
async fn api_keys_are_listed_in_pages() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    for _ in 0..4 {
        key_with(&mut user, &[]).await.unwrap();
    }
    let mut request = pb::ListApiKeysRequest { page_size: 2, page_token: String::new() };
    let mut listed = Vec::new();
    loop {
        let page = user.session.auth.list_api_keys(request.clone()).await.unwrap().into_inner();
        assert!(page.api_keys.len() <= 2);
        listed.extend(page.api_keys);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(listed, keys(&mut user).await);
    assert_eq!(listed.len(), 5);

    for (page_size, page_token, field) in [(-1, "", "page_size"), (2, "nonsense", "page_token")] {
        let request = pb::ListApiKeysRequest { page_size, page_token: page_token.to_owned() };
        assert_violations(user.session.auth.list_api_keys(request).await, &[field]);
    }
}
