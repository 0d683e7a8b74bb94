//! Watch tokens: access to one job for people without an account.

use milepost_client::pb::{
    self, ErrorReason, WatchEndReason, get_current_user_response::Credential, watch_events_request::Scope,
    watch_events_response::Message,
};
use tonic::Code;

use crate::support::{
    Caller, TOKEN_STREAMS_PER_USER, TestServer, User, Watch, assert_refused, assert_violations, info,
};

fn token_request(job: &pb::Job) -> pb::CreateWatchTokenRequest {
    let job = Some(pb::create_watch_token_request::Job::JobId(job.id.clone()));
    pb::CreateWatchTokenRequest { job, ..Default::default() }
}

async fn create_token(provider: &mut User, job: &pb::Job) -> (pb::WatchToken, String) {
    let created = provider.auth.create_watch_token(token_request(job)).await.unwrap().into_inner();
    (created.watch_token.unwrap(), created.secret)
}

async fn watch(viewer: &mut Caller, scope: Scope) -> Result<Watch, tonic::Status> {
    let request = pb::WatchEventsRequest { scope: Some(scope), ..Default::default() };
    Ok(Watch::new(viewer.events.watch_events(request).await?.into_inner()))
}

async fn fixture() -> (TestServer, User, pb::Job) {
    let server = TestServer::start().await;
    let (provider, _, job) = server.job(&[("load", 1)]).await;
    (server, provider, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_token_gives_live_access_to_one_job_only() {
    let (server, mut provider, job) = fixture().await;
    provider.append(&job, [info("before")]).await;
    let (token, secret) = create_token(&mut provider, &job).await;
    assert!(secret.starts_with("mpw_") && secret.starts_with(&token.secret_prefix));
    let mut viewer = server.with_secret(&secret);

    let mut watching = watch(&mut viewer, Scope::JobId(job.id.clone())).await.unwrap();
    assert_eq!(watching.caught_up().await.0.len(), 1);
    provider.append(&job, [info("live")]).await;
    assert_eq!(watching.events(1).await[0].name, "live");

    let me = viewer.current_user().await.unwrap();
    assert_eq!(me.user, None);
    let Some(Credential::WatchToken(shown)) = me.credential else { panic!("{:?}", me.credential) };
    assert_eq!((shown.id, shown.job_id), (token.id, job.id.clone()));

    let all = watch(&mut viewer, Scope::AllJobs(pb::AllJobs::default())).await;
    assert_refused(all, Code::PermissionDenied, ErrorReason::RoleRequired);
    // The provider_job_id is valid for the provider only.
    let by_provider_job_id = watch(&mut viewer, Scope::ProviderJobId(job.provider_job_id)).await;
    assert_refused(by_provider_job_id, Code::NotFound, ErrorReason::ResourceNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_watch_token_is_refused_and_its_streams_end() {
    let (server, mut provider, job) = fixture().await;
    let (token, secret) = create_token(&mut provider, &job).await;
    let mut viewer = server.with_secret(&secret);
    let mut watching = watch(&mut viewer, Scope::JobId(job.id.clone())).await.unwrap();
    watching.caught_up().await;

    let request = pb::ExpireWatchTokenRequest { watch_token_id: token.id };
    let expired = provider.auth.expire_watch_token(request.clone()).await.unwrap().into_inner();
    let expired = expired.watch_token.unwrap();
    assert!(expired.revoked_at.is_some() && expired.expires_at == token.expires_at);
    assert_eq!((token.updated_at, expired.updated_at), (token.created_at, expired.revoked_at));
    let refused = viewer.current_user().await;
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    let Some(Message::End(end)) = watching.next().await.unwrap() else { panic!("no end") };
    assert_eq!(end.reason(), WatchEndReason::CredentialEnded);
    assert_refused(watching.next().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    let again = provider.auth.expire_watch_token(request).await;
    assert_refused(again, Code::FailedPrecondition, ErrorReason::WatchTokenAlreadyExpired);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_token_ends_after_its_lifetime_or_with_its_creator() {
    let (server, mut provider, job) = fixture().await;
    let lifetime = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    for bad in [0, -1, 30 * 24 * 60 * 60 + 1] {
        let request = pb::CreateWatchTokenRequest { lifetime: lifetime(bad), ..token_request(&job) };
        assert_violations(provider.auth.create_watch_token(request).await, &["lifetime"]);
    }
    let request = pb::CreateWatchTokenRequest { lifetime: lifetime(1), ..token_request(&job) };
    let short = provider.auth.create_watch_token(request).await.unwrap().into_inner().secret;
    let (_, long) = create_token(&mut provider, &job).await;
    let mut watching = watch(&mut server.with_secret(&short), Scope::JobId(job.id.clone())).await.unwrap();
    watching.caught_up().await;
    let Some(Message::End(end)) = watching.next().await.unwrap() else { panic!("no end") };
    assert_eq!(end.reason(), WatchEndReason::CredentialEnded);

    let mut viewer = server.with_secret(&long);
    let mut watching = watch(&mut viewer, Scope::JobId(job.id.clone())).await.unwrap();
    watching.caught_up().await;
    server
        .database
        .execute(&format!("UPDATE users SET disabled_at = now() WHERE id = '{}'", provider.id))
        .await;
    let Some(Message::End(end)) = watching.next().await.unwrap() else { panic!("no end") };
    assert_eq!(end.reason(), WatchEndReason::CredentialEnded);
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_tokens_are_listed_in_pages() {
    let (_server, mut provider, job) = fixture().await;
    let mut created_ids = Vec::new();
    for _ in 0..3 {
        created_ids.push(create_token(&mut provider, &job).await.0.id);
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
    assert_eq!(listed, created_ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watch_tokens_of_all_jobs_of_a_provider_have_a_limit_of_streams() {
    let (server, mut provider, first) = fixture().await;
    let customer = server.customer().await;
    let jobs = [first, provider.job(&customer).await, provider.job(&customer).await];
    let mut watches = Vec::new();
    let mut viewers = Vec::new();
    for job in &jobs {
        viewers.push((server.with_secret(create_token(&mut provider, job).await.1), job.id.clone()));
    }
    while watches.len() < TOKEN_STREAMS_PER_USER {
        let (viewer, job) = &mut viewers[watches.len() % 3];
        watches.push(watch(viewer, Scope::JobId(job.clone())).await.unwrap());
    }
    let (viewer, job) = &mut viewers[0];
    let beyond = watch(viewer, Scope::JobId(job.clone())).await;
    assert_refused(beyond, Code::ResourceExhausted, ErrorReason::Overloaded);
    // The provider's own streams are counted by themselves.
    provider.watch_all().await.caught_up().await;
}
