//! Users and sessions.

use std::time::Duration;

use milepost::secret::{Secret, SecretKind};
use milepost_client::pb::{self, ErrorReason, UserRole, get_current_user_response::Credential};
use prost_types::FieldMask;
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::support::{
    Caller, Mode, PASSWORD, TestServer, assert_refused, assert_violations, sign_up_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_sign_up_creates_a_user_and_a_session() {
    let server = TestServer::start().await;
    let response =
        server.anonymous().auth.sign_up(sign_up_request("Ada@Example.com")).await.unwrap().into_inner();
    let user = response.user.unwrap();
    assert_eq!(user.email, "Ada@Example.com", "the case is kept");
    assert_eq!(user.role(), UserRole::Customer);
    let session = response.session.unwrap();
    assert!(session.expires_at.unwrap().seconds > user.created_at.unwrap().seconds);
    assert_eq!((session.created_at, session.updated_at), (user.created_at, user.updated_at));

    let me = server.with_secret(session.secret).current_user().await.unwrap();
    assert_eq!(me.user.unwrap(), user);
    let Some(Credential::Session(current)) = me.credential else { panic!("{:?}", me.credential) };
    assert_eq!((current.id, current.secret.as_str()), (session.id, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_email_is_refused_whatever_its_case_and_the_other_fields() {
    let server = TestServer::start().await;
    server.anonymous().auth.sign_up(sign_up_request("ada@example.com")).await.unwrap();

    let mut again = sign_up_request("ADA@example.com");
    again.first_name = "Grace".to_owned();
    for request in [sign_up_request("ada@example.com"), again] {
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
        let request = pb::SignUpRequest { password, ..sign_up_request("ada@example.com") };
        assert_violations(server.anonymous().auth.sign_up(request).await, &["password"]);
    }
    for (email, password) in
        [("short@example.com", "12345678".to_owned()), ("long@example.com", "x".repeat(71))]
    {
        let request = pb::SignUpRequest { password: password.clone(), ..sign_up_request(email) };
        server.anonymous().auth.sign_up(request).await.unwrap();
        server.try_log_in(email, &password).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_works_whatever_the_case_of_the_email() {
    let server = TestServer::start().await;
    server.anonymous().auth.sign_up(sign_up_request("Ada@Example.com")).await.unwrap();
    let caller = server.with_secret(server.try_log_in("aDA@eXAMPLE.COM", PASSWORD).await.unwrap());
    assert_eq!(caller.current_user().await.unwrap().user.unwrap().email, "Ada@Example.com");
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
    for caller in callers {
        let status = caller.current_user().await.unwrap_err();
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
    let unknown = server.with_secret(Secret::generate(SecretKind::ApiKey).unwrap().reveal());
    let refused_at_once = async |caller: &mut Caller| {
        let refused =
            timeout(Duration::from_secs(1), caller.current_user()).await.expect("it needs no query");
        assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    };

    // The look-up of a key waits for this lock.
    let locker = server.database.lock("api_keys").await;
    let caller = unknown.clone();
    let look_up = tokio::spawn(async move { caller.current_user().await });
    server.database.wait_for_locks(1).await;
    refused_at_once(&mut mistyped).await;
    drop(locker);
    assert_refused(look_up.await.unwrap(), Code::Unauthenticated, ErrorReason::CredentialInvalid);

    proxy.set(Mode::Refuse);
    assert_refused(unknown.current_user().await, Code::Unavailable, ErrorReason::DatabaseUnavailable);
    refused_at_once(&mut mistyped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_out_ends_that_session_and_no_other() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let other = server.with_secret(server.try_log_in(&user.email, PASSWORD).await.unwrap());
    user.session.auth.log_out(pb::LogOutRequest {}).await.unwrap();
    let again = user.session.auth.log_out(pb::LogOutRequest {}).await;
    assert_refused(again, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    other.current_user().await.unwrap();
    user.key.current_user().await.unwrap();
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
    let other = server.with_secret(server.try_log_in(&user.email, PASSWORD).await.unwrap());
    let mut change = async |current: &str, new: &str| {
        let request =
            pb::ChangePasswordRequest { current_password: current.to_owned(), new_password: new.to_owned() };
        user.session.auth.change_password(request).await
    };

    assert_violations(change("a wrong one", "another horse").await, &["current_password"]);
    other.current_user().await.unwrap();

    let changed = change(PASSWORD, "another horse").await.unwrap().into_inner();
    assert_eq!((changed.ended_sessions, changed.valid_api_keys), (1, 1));
    assert_refused(other.current_user().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    user.session.current_user().await.unwrap();
    user.key.current_user().await.unwrap();
    let old = server.try_log_in(&user.email, PASSWORD).await;
    assert_refused(old, Code::Unauthenticated, ErrorReason::LogInFailed);
    server.try_log_in(&user.email, "another horse").await.unwrap();
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
async fn every_invalid_path_of_an_update_mask_is_reported() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
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
async fn a_session_expires_after_its_lifetime() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let secret = server.log_in(&user).await;
    let lifetime =
        "SELECT DISTINCT extract(epoch FROM expires_at - created_at)::int::text AS text FROM sessions";
    assert_eq!(server.database.texts(lifetime).await, ["3600"]);
    server.database.execute("UPDATE sessions SET expires_at = now() WHERE expires_at > now()").await;
    let replica = server.replica().await;
    let refused = replica.with_secret(&secret).current_user().await;
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
}
