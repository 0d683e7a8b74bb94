//! A key that a key makes does not outlive it.

use std::time::{Duration, SystemTime};

use milepost_client::pb::{self, ApiKeyScope};
use prost_types::Timestamp;

use crate::support::{Caller, TestServer, assert_violations};

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
