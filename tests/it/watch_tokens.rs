//! Watch tokens: one job, for people without an account.

use milepost::pb::{
    self, ErrorReason, WatchEndReason, get_current_user_response::Credential, watch_events_request::Scope,
    watch_events_response::Message,
};
use tonic::Code;

use crate::support::{Caller, TestServer, User, Watch, assert_refused, assert_violations, info};

fn of(job: &pb::Job) -> pb::CreateWatchTokenRequest {
    let job = Some(pb::create_watch_token_request::Job::JobId(job.id.clone()));
    pb::CreateWatchTokenRequest { job, ..Default::default() }
}

async fn token(provider: &mut User, job: &pb::Job) -> (pb::WatchToken, String) {
    let created = provider.auth.create_watch_token(of(job)).await.unwrap().into_inner();
    (created.watch_token.unwrap(), created.secret)
}

async fn watch(guest: &mut Caller, scope: Scope) -> Result<Watch, tonic::Status> {
    let request = pb::WatchEventsRequest { scope: Some(scope), ..Default::default() };
    Ok(Watch::new(guest.events.watch_events(request).await?.into_inner()))
}

async fn scene() -> (TestServer, User, pb::Job) {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    (server, provider, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_follows_the_one_job_live() {
    let (server, mut provider, job) = scene().await;
    provider.append(&job, [info("before")]).await;
    let (token, secret) = token(&mut provider, &job).await;
    assert!(secret.starts_with("mpw_") && secret.starts_with(&token.secret_prefix));
    let mut guest = server.with_secret(&secret);

    let mut film = watch(&mut guest, Scope::JobId(job.id.clone())).await.unwrap();
    assert_eq!(film.caught_up().await.0.len(), 1);
    provider.append(&job, [info("live")]).await;
    assert_eq!(film.events(1).await[0].name, "live");

    let me = guest.auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap().into_inner();
    assert_eq!(me.user, None);
    let Some(Credential::WatchToken(told)) = me.credential else { panic!("{:?}", me.credential) };
    assert_eq!((told.id, told.job_id), (token.id, job.id.clone()));

    let all = watch(&mut guest, Scope::AllJobs(pb::AllJobs::default())).await;
    assert_refused(all, Code::PermissionDenied, ErrorReason::RoleRequired);
    // The provider's own name for the job is the provider's.
    let named = watch(&mut guest, Scope::ProviderJobId(job.provider_job_id)).await;
    assert_refused(named, Code::NotFound, ErrorReason::ResourceNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_is_refused_and_its_streams_end() {
    let (server, mut provider, job) = scene().await;
    let (token, secret) = token(&mut provider, &job).await;
    let mut guest = server.with_secret(&secret);
    let mut film = watch(&mut guest, Scope::JobId(job.id.clone())).await.unwrap();
    film.caught_up().await;

    let request = pb::ExpireWatchTokenRequest { watch_token_id: token.id };
    let expired = provider.auth.expire_watch_token(request.clone()).await.unwrap().into_inner();
    assert!(expired.watch_token.unwrap().expires_at.is_some());
    let refused = guest.auth.get_current_user(pb::GetCurrentUserRequest {}).await;
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    let Some(Message::End(end)) = film.next().await.unwrap() else { panic!("no end") };
    assert_eq!(end.reason(), WatchEndReason::CredentialEnded);
    assert_refused(film.next().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    let again = provider.auth.expire_watch_token(request).await;
    assert_refused(again, Code::FailedPrecondition, ErrorReason::WatchTokenAlreadyExpired);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_lives_as_long_as_it_was_made_for_and_ends_with_its_maker() {
    let (server, mut provider, job) = scene().await;
    let lifetime = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    for bad in [0, -1, 30 * 24 * 60 * 60 + 1] {
        let request = pb::CreateWatchTokenRequest { lifetime: lifetime(bad), ..of(&job) };
        assert_violations(provider.auth.create_watch_token(request).await, &["lifetime"]);
    }
    let request = pb::CreateWatchTokenRequest { lifetime: lifetime(1), ..of(&job) };
    let short = provider.auth.create_watch_token(request).await.unwrap().into_inner().secret;
    let (_, long) = token(&mut provider, &job).await;
    let mut film = watch(&mut server.with_secret(&short), Scope::JobId(job.id.clone())).await.unwrap();
    film.caught_up().await;
    let Some(Message::End(end)) = film.next().await.unwrap() else { panic!("no end") };
    assert_eq!(end.reason(), WatchEndReason::CredentialEnded);

    let mut guest = server.with_secret(&long);
    let mut film = watch(&mut guest, Scope::JobId(job.id.clone())).await.unwrap();
    film.caught_up().await;
    server
        .database
        .execute(&format!("UPDATE users SET disabled_at = now() WHERE id = '{}'", provider.id))
        .await;
    let Some(Message::End(end)) = film.next().await.unwrap() else { panic!("no end") };
    assert_eq!(end.reason(), WatchEndReason::CredentialEnded);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_listed_page_by_page_without_their_secrets() {
    let (_server, mut provider, job) = scene().await;
    let mut made = Vec::new();
    for _ in 0..3 {
        made.push(token(&mut provider, &job).await.0.id);
    }
    let mut request = pb::ListWatchTokensRequest {
        job: Some(pb::list_watch_tokens_request::Job::ProviderJobId(job.provider_job_id.clone())),
        page_size: 2,
        ..Default::default()
    };
    let first = provider.auth.list_watch_tokens(request.clone()).await.unwrap().into_inner();
    request.page_token = first.next_page_token;
    let second = provider.auth.list_watch_tokens(request).await.unwrap().into_inner();
    assert_eq!((first.watch_tokens.len(), second.watch_tokens.len()), (2, 1));
    assert_eq!(second.next_page_token, "");
    let listed: Vec<_> =
        first.watch_tokens.into_iter().chain(second.watch_tokens).map(|token| token.id).collect();
    assert_eq!(listed, made);
}
