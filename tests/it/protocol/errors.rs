//! What errors contain, and what they must not reveal.

use std::time::Duration;

use milepost_client::pb::{self, ErrorReason};
use tonic::{Code, Status};

use crate::support::{PASSWORD, TestServer, assert_refused, info, within_timeout};

async fn failed_log_in(server: &TestServer, email: &str, password: &str) -> Status {
    let request = pb::LogInRequest { email: email.to_owned(), password: password.to_owned() };
    server.anonymous().auth.log_in(request).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_and_an_unknown_email_are_indistinguishable() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let wrong_password = failed_log_in(&server, &user.email, "a wrong password").await;
    let unknown_email = failed_log_in(&server, "nobody@example.com", PASSWORD).await;
    let not_an_email = failed_log_in(&server, "nobody", "x").await;
    // No user can have these.
    let control = failed_log_in(&server, "nobody\u{1b}@example.com", PASSWORD).await;
    let invisible = failed_log_in(&server, &user.email.replace('@', "\u{200b}@"), PASSWORD).await;
    for status in [&wrong_password, &unknown_email, &not_an_email, &control, &invisible] {
        assert_eq!(status.code(), wrong_password.code());
        assert_eq!(status.message(), wrong_password.message());
        assert_eq!(status.details(), wrong_password.details());
        let headers: Vec<_> = status.metadata().keys().map(|key| format!("{key:?}")).collect();
        let expected: Vec<_> = wrong_password.metadata().keys().map(|key| format!("{key:?}")).collect();
        assert_eq!(headers, expected);
    }
    assert_refused(Err::<(), _>(wrong_password), Code::Unauthenticated, ErrorReason::LogInFailed);
    // Each is counted and audited alike: on the address, an e-mail, and their pair.
    assert_eq!(server.count("audit_entries WHERE act = 'log_in_failed'").await, 5);
    assert_eq!(server.count("log_in_attempts WHERE failures = 1").await, 10);
    assert_eq!(server.count("log_in_attempts WHERE failures = 5").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn values_quoted_in_errors_are_truncated() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::ProviderJobId("ü".repeat(256))) };
    let status = provider.jobs.get_job(request).await.unwrap_err();
    let refusal = assert_refused(Err::<(), _>(status.clone()), Code::NotFound, ErrorReason::ResourceNotFound);
    let name = &refusal.details.resource_info().unwrap().resource_name;
    for text in [status.message(), name] {
        assert!(text.matches('ü').count() <= 64, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_reported_at_once_and_calls_succeed_after_it_without_a_restart() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let event = info("x");

    server.database.make_unavailable().await;
    let answer = within_timeout("a refusal", provider.try_append(&job, [event.clone()])).await;
    let refusal = assert_refused(answer, Code::Unavailable, ErrorReason::DatabaseUnavailable);
    let retry_after = refusal.details.retry_info().unwrap().retry_delay.unwrap();
    assert!(retry_after > Duration::ZERO);

    server.database.make_available().await;
    let appended = within_timeout("the database to be available again", async {
        loop {
            match provider.try_append(&job, [event.clone()]).await {
                Err(status) if status.code() == Code::Unavailable => {}
                appended => break appended.unwrap(),
            }
        }
    })
    .await;
    assert_eq!(appended[0].sequence, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_request_never_causes_an_internal_error() {
    let server = TestServer::start().await;
    let mut user = server.provider().await;
    // Requests without any field.
    let codes = [
        user.session.auth.sign_up(pb::SignUpRequest::default()).await.map(|_| ()),
        user.session.auth.log_in(pb::LogInRequest::default()).await.map(|_| ()),
        user.session.auth.change_password(pb::ChangePasswordRequest::default()).await.map(|_| ()),
        user.session.auth.expire_api_key(pb::ExpireApiKeyRequest::default()).await.map(|_| ()),
        user.session
            .configurations
            .register_job_configuration(pb::RegisterJobConfigurationRequest::default())
            .await
            .map(|_| ()),
        user.session
            .configurations
            .get_job_configuration(pb::GetJobConfigurationRequest::default())
            .await
            .map(|_| ()),
        user.session.jobs.create_job(pb::CreateJobRequest::default()).await.map(|_| ()),
        user.session.jobs.get_job(pb::GetJobRequest::default()).await.map(|_| ()),
        user.session.jobs.close_job(pb::CloseJobRequest::default()).await.map(|_| ()),
        user.session.events.append_events(pb::AppendEventsRequest::default()).await.map(|_| ()),
        user.session.events.list_events(pb::ListEventsRequest::default()).await.map(|_| ()),
    ]
    .map(|answer| answer.unwrap_err().code());
    let expected = |code| matches!(code, Code::InvalidArgument | Code::Unauthenticated);
    assert!(codes.into_iter().all(expected), "{codes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_response_carries_a_request_id() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let answered = user.auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap();
    assert!(answered.metadata().contains_key("x-request-id"));
    let refused = server.anonymous().current_user().await.unwrap_err();
    assert!(refused.metadata().contains_key("x-request-id"));
}
