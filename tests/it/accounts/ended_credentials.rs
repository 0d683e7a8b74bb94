//! Sessions, API keys and watch tokens that ended 30 days ago are removed.

use milepost_client::pb::{self, ErrorReason};
use tonic::Code;

use crate::support::{PASSWORD, TestServer, User, assert_refused, within_timeout};

/// The columns that each kind of credential is told by.
const TABLES: [(&str, &str); 3] =
    [("sessions", "secret_hash"), ("api_keys", "key_hash"), ("watch_tokens", "secret_hash")];

struct Scene {
    server: TestServer,
    provider: User,
    job: pb::Job,
}

impl Scene {
    async fn new() -> Self {
        let server = TestServer::start().await;
        let (provider, _, job) = server.job(&[("load", 1)]).await;
        Self { server, provider, job }
    }

    /// Makes one more credential of each kind; returns the ids of the key and the token.
    async fn make(&mut self) -> [String; 2] {
        let request = pb::LogInRequest { email: self.provider.email.clone(), password: PASSWORD.to_owned() };
        self.server.anonymous().auth.log_in(request).await.unwrap();
        let session = &mut self.provider.session.auth;
        let key = session.create_api_key(pb::CreateApiKeyRequest::default()).await.unwrap();
        let job = Some(pb::create_watch_token_request::Job::JobId(self.job.id.clone()));
        let token = pb::CreateWatchTokenRequest { job, ..Default::default() };
        let token = session.create_watch_token(token).await.unwrap();
        [key.into_inner().api_key.unwrap().id, token.into_inner().watch_token.unwrap().id]
    }

    /// Lets the newest credential of each kind have ended this many days ago.
    async fn end(&self, how: &str, days: u32) {
        for (table, _) in TABLES {
            self.server
                .database
                .execute(&format!(
                    "UPDATE {table} SET {how} = clock_timestamp() - interval '{days} days'
                     WHERE created_at = (SELECT max(created_at) FROM {table})"
                ))
                .await;
        }
    }

    async fn counts(&self) -> [usize; 3] {
        let [(sessions, _), (keys, _), (tokens, _)] = TABLES;
        [self.server.count(sessions).await, self.server.count(keys).await, self.server.count(tokens).await]
    }

    async fn usage(&mut self) -> [i64; 2] {
        let usage = self.provider.auth.get_usage(pb::GetUsageRequest {}).await.unwrap().into_inner();
        [usage.api_keys.unwrap().used, usage.watch_tokens.unwrap().used]
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_is_removed_30_days_after_it_ended_and_not_before() {
    let mut scene = Scene::new().await;
    let mut gone = Vec::new();
    for (how, days) in [("revoked_at", 31), ("expires_at", 31), ("revoked_at", 29), ("expires_at", 29)] {
        let ids = scene.make().await;
        scene.end(how, days).await;
        if days > 30 {
            gone.push(ids);
        }
    }
    let audited = scene.server.count("audit_entries").await;
    let before = scene.counts().await;
    let (keys, tokens) = (before[1], before[2]);
    // Those of the customer are not the provider's.
    assert_eq!(scene.usage().await.map(|used| usize::try_from(used).unwrap()), [keys - 1, tokens]);

    // A server that starts takes a step at once.
    let _replica = scene.server.replica().await;
    let left = before.map(|count| count - 2);
    within_timeout("the removal", async {
        while scene.counts().await != left {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(scene.server.count("audit_entries").await, audited);
    assert_eq!(scene.usage().await.map(|used| usize::try_from(used).unwrap()), [keys - 3, tokens - 2]);
    for [api_key_id, watch_token_id] in gone {
        let session = &mut scene.provider.session.auth;
        let expired = session.expire_api_key(pb::ExpireApiKeyRequest { api_key_id }).await;
        assert_refused(expired, Code::NotFound, ErrorReason::ResourceNotFound);
        let expired = session.expire_watch_token(pb::ExpireWatchTokenRequest { watch_token_id }).await;
        assert_refused(expired, Code::NotFound, ErrorReason::ResourceNotFound);
    }
    let listed = scene.provider.session.auth.list_api_keys(pb::ListApiKeysRequest::default()).await;
    let listed = listed.unwrap().into_inner().api_keys;
    assert_eq!(listed.iter().filter(|key| key.revoked_at.is_some()).count(), 1, "for 30 days");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_of_the_removal_is_bounded_and_waits_for_nobody() {
    let mut scene = Scene::new().await;
    // The server takes steps of its own.
    scene.server.app.database.stop_tasks();
    for _ in 0..3 {
        scene.make().await;
        scene.end("revoked_at", 31).await;
    }
    let step = async |most: u32| {
        let sql = format!("SELECT remove_ended_credentials(interval '30 days', {most})::text AS text");
        scene.server.database.texts(&sql).await[0].clone()
    };
    assert_eq!(step(1).await, "3", "one of each kind");
    let mut locker = scene.server.database.connect().await;
    let held = "BEGIN; SELECT FROM user_usage FOR UPDATE; SELECT FROM users FOR UPDATE";
    diesel_async::SimpleAsyncConnection::batch_execute(&mut locker, held).await.unwrap();
    assert_eq!(within_timeout("a step", step(100)).await, "6");
    let row = "SELECT FROM credential_removal FOR UPDATE";
    diesel_async::SimpleAsyncConnection::batch_execute(&mut locker, row).await.unwrap();
    assert_eq!(within_timeout("a step beside another", step(100)).await, "0");
}
