//! API keys: their scopes, and how they expire, are rotated and end.

use std::time::{Duration, SystemTime};

use milepost_client::pb::{
    self, ApiKeyScope, ErrorReason, WatchEndReason, get_current_user_response::Credential,
    watch_events_response::Message,
};
use prost_types::Timestamp;
use tonic::{Code, Status};

use crate::support::{
    Caller, Mode, Proxy, TestDatabase, TestServer, User, assert_refused, assert_violations, registration,
    within_timeout,
};

async fn key_with(user: &mut User, scopes: &[ApiKeyScope]) -> Result<pb::CreateApiKeyResponse, Status> {
    let scopes = scopes.iter().map(|&scope| scope.into()).collect();
    let request = pb::CreateApiKeyRequest { scopes, ..Default::default() };
    Ok(user.session.auth.create_api_key(request).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_of_a_key_is_shown_once_and_stored_nowhere() {
    let server = TestServer::start().await;
    let mut user = server.provider().await;
    let me = user.key.current_user().await.unwrap();
    let Some(Credential::ApiKey(key)) = me.credential else { panic!("{:?}", me.credential) };
    assert!(user.key_secret.starts_with(&key.key_prefix) && user.key_secret.len() > 40);
    assert_eq!(key.scopes, [ApiKeyScope::Read as i32, ApiKeyScope::Append as i32]);
    assert_eq!(user.keys().await.len(), 1);

    let random = user.key_secret.trim_start_matches(&key.key_prefix);
    let stored = server.database.texts("SELECT api_keys::text AS text FROM api_keys").await.concat();
    assert!(!stored.contains(random));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_is_refused_at_once_and_stays_in_the_list() {
    let server = TestServer::start().await;
    let mut user = server.customer().await;
    let [first] = user.keys().await.try_into().unwrap();
    let second = key_with(&mut user, &[ApiKeyScope::Read]).await.unwrap().api_key.unwrap();

    let request = pb::ExpireApiKeyRequest { api_key_id: first.id.clone() };
    let expired = user.session.auth.expire_api_key(request.clone()).await.unwrap().into_inner();
    let expired = expired.api_key.unwrap();
    assert!(expired.revoked_at.is_some() && expired.expires_at.is_none());
    assert_eq!((first.updated_at, expired.updated_at), (first.created_at, expired.revoked_at));
    assert_refused(user.key.current_user().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    let again = user.session.auth.expire_api_key(request).await;
    assert_refused(again, Code::FailedPrecondition, ErrorReason::ApiKeyAlreadyExpired);

    let listed: Vec<_> = user.keys().await.into_iter().map(|key| (key.id, key.revoked_at)).collect();
    assert_eq!(listed, [(first.id, expired.revoked_at), (second.id, None)], "oldest first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_key_and_its_successor_are_both_valid_during_the_overlap() {
    let server = TestServer::start().await;
    let mut user = server.provider().await;
    let [old] = user.keys().await.try_into().unwrap();
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
    let successor = server.with_secret(&rotated.secret);
    successor.current_user().await.unwrap();

    // The server remembers the old key as valid, but the key ends with the overlap.
    let ended = async { while user.key.current_user().await.is_ok() {} };
    within_timeout("the end of the overlap", ended).await;
    assert_refused(user.key.current_user().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    successor.current_user().await.unwrap();
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
    assert_refused(successor.current_user().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    server.with_secret(&rotated.secret).current_user().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_user_is_not_found() {
    let server = TestServer::start().await;
    let (mut ada, mut grace) = (server.customer().await, server.customer().await);
    let [key] = ada.keys().await.try_into().unwrap();
    let answer = grace.session.auth.expire_api_key(pb::ExpireApiKeyRequest { api_key_id: key.id }).await;
    assert_refused(answer, Code::NotFound, ErrorReason::ResourceNotFound);
    ada.key.current_user().await.unwrap();
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
    let never_used_before = server.with_secret(secret);
    let answer = never_used_before.current_user().await;
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
        caller.current_user().await.unwrap();
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
async fn a_customers_key_has_the_scope_append_only_if_it_is_asked_for() {
    let server = TestServer::start().await;
    let mut customer = server.customer().await;
    let asked = key_with(&mut customer, &[ApiKeyScope::Append]).await.unwrap().api_key.unwrap();
    assert_eq!(asked.scopes, [ApiKeyScope::Append as i32]);
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
    assert_eq!(listed, user.keys().await);
    assert_eq!(listed.len(), 5);

    for (page_size, page_token, field) in [(-1, "", "page_size"), (2, "nonsense", "page_token")] {
        let request = pb::ListApiKeysRequest { page_size, page_token: page_token.to_owned() };
        assert_violations(user.session.auth.list_api_keys(request).await, &[field]);
    }
}

const HOUR: Duration = Duration::from_secs(60 * 60);

/// A time of whole seconds, as stored.
fn after(time: Duration) -> Timestamp {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Timestamp { seconds: i64::try_from((now + time).as_secs()).unwrap(), nanos: 0 }
}

fn request(expires_at: Option<Timestamp>) -> pb::CreateApiKeyRequest {
    let scopes = [ApiKeyScope::Read, ApiKeyScope::Append, ApiKeyScope::Manage].map(i32::from).to_vec();
    pb::CreateApiKeyRequest { expires_at, scopes, ..Default::default() }
}

/// The new key and its secret.
async fn create(caller: &mut Caller, expires_at: Option<Timestamp>) -> (pb::ApiKey, String) {
    let created = caller.auth.create_api_key(request(expires_at)).await.unwrap().into_inner();
    (created.api_key.unwrap(), created.secret)
}

async fn rotate(caller: &mut Caller, id: &str) -> Result<pb::ApiKey, tonic::Status> {
    let request = pb::RotateApiKeyRequest { api_key_id: id.to_owned(), overlap: None };
    Ok(caller.auth.rotate_api_key(request).await?.into_inner().api_key.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_a_key_makes_expires_with_it_or_earlier() {
    let server = TestServer::start().await;
    let mut session = server.provider().await.session;
    let (end, earlier, later) = (after(HOUR), after(HOUR / 2), after(2 * HOUR));
    let (maker, secret) = create(&mut session, Some(end)).await;
    assert_eq!(maker.expires_at, Some(end));
    let mut key = server.with_secret(secret);

    assert_eq!(create(&mut key, None).await.0.expires_at, Some(end));
    assert_eq!(create(&mut key, Some(end)).await.0.expires_at, Some(end));
    assert_eq!(create(&mut key, Some(earlier)).await.0.expires_at, Some(earlier));
    let refused = key.auth.create_api_key(request(Some(later))).await;
    let refusal = assert_violations(refused, &["expires_at"]);
    let description = &refusal.details.bad_request().unwrap().field_violations[0].description;
    let limit = format!(
        "SELECT to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') AS text
         FROM api_keys WHERE id = '{}'",
        maker.id
    );
    assert!(description.contains(&server.database.texts(&limit).await[0]), "{description}");

    // So do those that replace another one.
    let (endless, _) = create(&mut session, None).await;
    assert_eq!(endless.expires_at, None, "a session's keys may outlive it");
    assert_eq!(rotate(&mut key, &endless.id).await.unwrap().expires_at, Some(end));
    let (longer, _) = create(&mut session, Some(later)).await;
    assert_violations(rotate(&mut key, &longer.id).await, &["api_key_id"]);
    assert_eq!(rotate(&mut session, &longer.id).await.unwrap().expires_at, Some(later));
    assert_eq!(rotate(&mut key, &maker.id).await.unwrap().expires_at, Some(end), "it rotates itself");

    // A key without an expiry makes keys without one.
    let (_, secret) = create(&mut session, None).await;
    assert_eq!(create(&mut server.with_secret(secret), None).await.0.expires_at, None);
}

/// Replaces the oldest key, which the provider calls with.
async fn rotate_first(provider: &mut User, overlap: Duration) -> Result<pb::RotateApiKeyResponse, Status> {
    let api_key_id = provider.keys().await.remove(0).id;
    let request = pb::RotateApiKeyRequest { api_key_id, overlap: Some(overlap.try_into().unwrap()) };
    Ok(provider.session.auth.rotate_api_key(request).await?.into_inner())
}

/// The database is unavailable when the overlap ends, so that the expiry is
/// known only to the process that rotated the key.
#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_key_expires_at_the_end_of_its_overlap_even_during_an_outage() {
    let database = TestDatabase::migrated().await;
    let proxy = Proxy::to(&database.url).await;
    let server = TestServer::on(database.through(proxy.url.clone())).await;
    let (mut provider, _, job) = server.job(&[]).await;
    let mut watch = provider.watch(&job).await;
    watch.caught_up().await;

    let rotated = rotate_first(&mut provider, Duration::from_millis(1_500)).await.unwrap();
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
    let refused = provider.events.append_events(pb::AppendEventsRequest::default()).await;
    let code = refused.unwrap_err().code();
    assert!(matches!(code, Code::Unauthenticated | Code::Unavailable), "{code:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn expiring_an_already_expired_credential_also_ends_the_cached_one() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let (watch_token_id, secret) = provider.create_watch_token(&job).await;
    let viewer = server.with_secret(secret);
    viewer.current_user().await.unwrap();
    // As if ExpireWatchToken had succeeded on another replica and its answer were lost.
    server.database.execute("UPDATE watch_tokens SET expires_at = now()").await;
    let again = provider.auth.expire_watch_token(pb::ExpireWatchTokenRequest { watch_token_id }).await;
    assert_refused(again, Code::FailedPrecondition, ErrorReason::WatchTokenAlreadyExpired);
    assert_refused(viewer.current_user().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);

    for rotates in [false, true] {
        let mut provider = server.provider().await;
        provider.current_user().await.unwrap();
        server.database.execute("UPDATE api_keys SET expires_at = now()").await;
        let again = if rotates {
            rotate_first(&mut provider, Duration::from_secs(60)).await.map(drop)
        } else {
            provider.expire_key().await.map(drop)
        };
        assert_refused(again, Code::FailedPrecondition, ErrorReason::ApiKeyAlreadyExpired);
        assert_refused(provider.current_user().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rotating_an_expired_key_without_its_scopes_is_permission_denied() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let expired = provider.expire_key().await.unwrap();
    let (_, manager) = provider.create_key(&[ApiKeyScope::Manage]).await;
    let request = pb::RotateApiKeyRequest { api_key_id: expired.id, overlap: None };
    let refused = server.with_secret(manager).auth.rotate_api_key(request).await;
    assert_refused(refused, Code::PermissionDenied, ErrorReason::ScopeRequired);
    let refused = rotate_first(&mut provider, Duration::ZERO).await;
    assert_refused(refused, Code::FailedPrecondition, ErrorReason::ApiKeyAlreadyExpired);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_is_asked_for_with_each_scope_once() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let scopes = |count: usize| pb::CreateApiKeyRequest {
        scopes: vec![pb::ApiKeyScope::Read.into(); count],
        ..Default::default()
    };
    provider.session.auth.create_api_key(scopes(3)).await.unwrap();
    for past in [4, 900_000] {
        let refused = provider.session.auth.create_api_key(scopes(past)).await;
        assert_violations(refused, &["scopes"]);
    }
}
