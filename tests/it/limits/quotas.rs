//! Quotas of what a user has: exact on all servers together, and refused last.

use std::time::Duration;

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};
use futures_util::future::join_all;
use milepost::config::QuotaSettings;
use milepost_client::pb::{self, ErrorReason};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::support::{
    Caller, PASSWORD, QUOTAS, TestDatabase, TestServer, User, assert_refused, complete, info, registration,
    within_timeout,
};

/// Two servers on one database. The provider calls the first one, and `there` the second.
pub struct Scene {
    pub here: TestServer,
    pub there: TestServer,
    pub provider: User,
    pub customer: User,
    pub job: pb::Job,
}

impl Scene {
    pub async fn new(quotas: QuotaSettings) -> Self {
        let database = TestDatabase::migrated().await;
        let here = TestServer::with_quotas(database.clone(), quotas).await;
        let there = TestServer::with_quotas(database, quotas).await;
        let (provider, customer, job) = here.job(&[("load", 1)]).await;
        Self { here, there, provider, customer, job }
    }

    /// The provider on each server.
    fn providers(&self) -> [User; 2] {
        [self.provider.clone(), self.there.same(&self.provider)]
    }

    /// Locks what the provider has. Whoever is to take more waits until it is dropped.
    async fn lock_usage(&self) -> AsyncPgConnection {
        let mut locker = self.here.database.connect().await;
        let lock = format!("BEGIN; SELECT FROM user_usage WHERE user_id = '{}' FOR UPDATE", self.provider.id);
        locker.batch_execute(&lock).await.unwrap();
        locker
    }

    /// Runs calls that take what the quota has left, and lets all of them come to it before
    /// one of them goes on.
    async fn race<T>(&self, calls: Vec<impl Future<Output = T>>) -> Vec<T> {
        let mut locker = self.lock_usage().await;
        let count = calls.len();
        let released = async {
            self.here.database.wait_for_locks(count).await;
            locker.batch_execute("COMMIT").await.unwrap();
        };
        within_timeout("the answers", async { futures_util::join!(join_all(calls), released).0 }).await
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Configuration,
    Job,
    Key,
    Token,
}

const KINDS: [(Kind, &str); 4] = [
    (Kind::Configuration, "configurations"),
    (Kind::Job, "open_jobs"),
    (Kind::Key, "api_keys"),
    (Kind::Token, "watch_tokens"),
];

/// Takes one more. The provider has a configuration, a job, a key and no token.
async fn take(kind: Kind, mut provider: User, customer: &User, job: &pb::Job) -> Result<(), Status> {
    match kind {
        Kind::Configuration => {
            let tag = Uuid::now_v7().to_string();
            let request =
                pb::RegisterJobConfigurationRequest { tag, ..registration("1.0.0", &[("load", 1)]) };
            provider.configurations.register_job_configuration(request).await.map(drop)
        }
        Kind::Job => {
            let request = provider.new_job(customer);
            provider.jobs.create_job(request).await.map(drop)
        }
        Kind::Key => provider.session.auth.create_api_key(pb::CreateApiKeyRequest::default()).await.map(drop),
        Kind::Token => {
            let job = Some(pb::create_watch_token_request::Job::JobId(job.id.clone()));
            let request = pb::CreateWatchTokenRequest { job, ..Default::default() };
            provider.auth.create_watch_token(request).await.map(drop)
        }
    }
}

/// The provider with a session on each server, since a key of the fixture cannot make keys.
async fn with_sessions(scene: &Scene) -> [User; 2] {
    let mut providers = scene.providers();
    let request = pb::LogInRequest { email: scene.provider.email.clone(), password: PASSWORD.to_owned() };
    let session = scene.there.anonymous().auth.log_in(request).await.unwrap().into_inner().session.unwrap();
    providers[1].session = scene.there.with_secret(session.secret);
    providers
}

#[track_caller]
fn assert_used_up<T: std::fmt::Debug>(answer: Result<T, Status>, quota: &str, limit: &str) {
    let refusal = assert_refused(answer, Code::ResourceExhausted, ErrorReason::QuotaExceeded);
    let metadata = |key: &str| refusal.metadata[key].as_str();
    assert_eq!((metadata("quota"), metadata("limit"), metadata("used")), (quota, limit, limit));
    assert!(refusal.details.retry_info().is_none(), "waiting does not help");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_servers_that_race_for_the_last_place_one_gets_it() {
    const LIMIT: i64 = 3;
    let quotas = QuotaSettings {
        configurations_per_user: LIMIT,
        open_jobs_per_user: LIMIT,
        api_keys_per_user: LIMIT,
        watch_tokens_per_user: LIMIT,
        ..QUOTAS
    };
    let scene = Scene::new(quotas).await;
    let providers = with_sessions(&scene).await;
    let take = |kind, provider: &User| take(kind, provider.clone(), &scene.customer, &scene.job);
    for (kind, name) in KINDS {
        let had = if matches!(kind, Kind::Token) { 0 } else { 1 };
        for _ in had..LIMIT - 1 {
            take(kind, &providers[0]).await.unwrap();
        }
        let calls = providers.iter().chain(&providers).map(|provider| take(kind, provider)).collect();
        let (taken, refused): (Vec<_>, Vec<_>) = scene.race(calls).await.into_iter().partition(Result::is_ok);
        assert_eq!((taken.len(), refused.len()), (1, 3), "{name}: {refused:?}");
        for refused in refused {
            assert_used_up(refused, name, "3");
        }
    }
    // Another user has quotas of their own.
    let mut other = scene.there.provider().await;
    other.configuration(&[("load", 1)]).await;
    other.job(&scene.customer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_write_is_answered_although_the_quota_is_used_up() {
    let quotas = QuotaSettings { configurations_per_user: 2, open_jobs_per_user: 2, ..QUOTAS };
    let scene = Scene::new(quotas).await;
    let [mut here, mut there] = scene.providers();
    // Both servers get the same request for the last place.
    let job = here.new_job(&scene.customer);
    let create = |mut provider: User| {
        let request = job.clone();
        async move { provider.jobs.create_job(request).await.map(|job| job.into_inner().existed) }
    };
    let mut answers = scene.race(vec![create(here.clone()), create(there.clone())]).await;
    answers.sort_by_key(|answer| *answer.as_ref().unwrap());
    assert_eq!(answers.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [false, true]);
    assert!(create(here.clone()).await.unwrap() && create(there.clone()).await.unwrap());
    let other = pb::CreateJobRequest { provider_job_name: "other".to_owned(), ..job.clone() };
    let differs = here.jobs.create_job(other).await;
    assert_refused(differs, Code::AlreadyExists, ErrorReason::JobDiffers);
    // What does not exist is told before the quota.
    let unknown =
        pb::CreateJobRequest { configuration_tag: "unknown".to_owned(), ..here.new_job(&scene.customer) };
    let unknown = there.jobs.create_job(unknown).await;
    assert_refused(unknown, Code::NotFound, ErrorReason::ResourceNotFound);
    let more = here.new_job(&scene.customer);
    assert_used_up(there.jobs.create_job(more).await, "open_jobs", "2");

    let request = registration("2.0.0", &[("load", 1)]);
    let register = |mut provider: User, request: pb::RegisterJobConfigurationRequest| async move {
        let answer = provider.configurations.register_job_configuration(request).await;
        answer.map(|registered| registered.into_inner().existed)
    };
    let calls = [&here, &there].map(|provider| register(provider.clone(), request.clone())).into();
    let mut answers = scene.race(calls).await;
    answers.sort_by_key(|answer| *answer.as_ref().unwrap());
    assert_eq!(answers.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [false, true]);
    assert!(register(there.clone(), request).await.unwrap());
    let differs = register(here.clone(), registration("2.0.0", &[("other", 1)])).await;
    assert_refused(differs, Code::AlreadyExists, ErrorReason::JobConfigurationDiffers);
    assert_used_up(register(here, registration("3.0.0", &[("load", 1)])).await, "configurations", "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_closes_makes_room_on_every_server() {
    let scene = Scene::new(QuotaSettings { open_jobs_per_user: 2, ..QUOTAS }).await;
    let [mut here, mut there] = scene.providers();
    let mut job = there.job(&scene.customer).await;
    let changes = format!(
        "INSERT INTO usage_changes (user_id, api_keys) SELECT '{}', 0 FROM generate_series(1, 2500)",
        scene.provider.id
    );
    for closes in ["complete", "close", "complete", "close"] {
        let more = here.new_job(&scene.customer);
        assert_used_up(here.jobs.create_job(more).await, "open_jobs", "2");
        // However many changes stand before the one that makes room.
        scene.here.database.execute(&changes).await;
        match closes {
            "complete" => drop(there.append(&job, [info("last"), complete()]).await),
            _ => drop(there.close(&job).await.unwrap()),
        }
        job = here.job(&scene.customer).await;
    }
    let counted = "SELECT (open_jobs + (SELECT coalesce(sum(open_jobs), 0) FROM usage_changes))::text AS text
                   FROM user_usage WHERE open_jobs > 0";
    assert_eq!(scene.here.database.texts(counted).await, ["2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_that_closes_a_job_does_not_wait_for_its_providers_transactions() {
    let scene = Scene::new(QUOTAS).await;
    let [mut here, mut there] = scene.providers();
    let job = here.job(&scene.customer).await;
    let _locker = scene.lock_usage().await;
    within_timeout("a completion", here.append(&scene.job, [complete()])).await;
    within_timeout("a close", there.close(&job)).await.unwrap();
}

/// A provider who closes jobs and creates none has the changes taken over all the same.
#[tokio::test(flavor = "multi_thread")]
async fn changes_are_taken_over_in_the_background_except_those_of_locked_users() {
    let scene = Scene::new(QUOTAS).await;
    let [mut here, _] = scene.providers();
    let mut other = scene.here.provider().await;
    other.configuration(&[("load", 1)]).await;
    let job = other.job(&scene.customer).await;
    other.append(&job, [complete()]).await;
    here.append(&scene.job, [complete()]).await;
    let locker = scene.lock_usage().await;
    let settle = "SELECT settle_some_usage(100)::text AS text";
    let left = "SELECT user_id::text AS text FROM usage_changes";
    within_timeout("the changes of the other", async {
        while scene.here.database.texts(left).await != [scene.provider.id.clone()] {
            scene.here.database.texts(settle).await;
        }
    })
    .await;
    drop(locker);
    within_timeout("all changes", async {
        while !scene.here.database.texts(left).await.is_empty() {
            scene.here.database.texts(settle).await;
        }
    })
    .await;
    assert_eq!(scene.here.count("user_usage WHERE open_jobs <> 0").await, 0);
}

async fn log_in(server: &TestServer, user: &User) -> pb::Session {
    let request = pb::LogInRequest { email: user.email.clone(), password: PASSWORD.to_owned() };
    server.anonymous().auth.log_in(request).await.unwrap().into_inner().session.unwrap()
}

async fn is_valid(caller: &Caller) -> bool {
    caller.current_user().await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_beyond_the_quota_of_sessions_ends_the_oldest_one() {
    const LIMIT: usize = 3;
    let scene = Scene::new(QuotaSettings { sessions_per_user: 3, ..QUOTAS }).await;
    let user = &scene.customer;
    let mut sessions = vec![user.session.clone()];
    let mut audited = Vec::new();
    for n in 0..5 {
        let server = if n % 2 == 0 { &scene.here } else { &scene.there };
        let session = log_in(server, user).await;
        audited.push(session.id.clone());
        sessions.push(server.with_secret(session.secret));
    }
    let (ended, valid) = sessions.split_at(sessions.len() - LIMIT);
    for session in valid {
        assert!(is_valid(session).await);
    }
    // The server that ended it refuses it at once, the other one within 5 s.
    within_timeout("the oldest sessions to end", async {
        for session in ended {
            while is_valid(session).await {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    })
    .await;
    let entries = "SELECT session_id::text AS text FROM audit_entries WHERE act = 'session_ended'
                   AND actor = 'anonymous' AND client_address IS NOT NULL ORDER BY created_at OFFSET 1";
    assert_eq!(scene.here.database.texts(entries).await, audited[..2], "after that of the sign-up");

    // Log-ins at once on both servers leave as many.
    join_all((0..4).map(|n| log_in(if n % 2 == 0 { &scene.here } else { &scene.there }, user))).await;
    let valid = format!("sessions WHERE user_id = '{}' AND is_valid(revoked_at, expires_at)", user.id);
    assert_eq!(scene.here.count(&valid).await, LIMIT);
    // A session that was logged out makes room.
    let last = scene.here.with_secret(log_in(&scene.here, user).await.secret);
    last.clone().auth.log_out(pb::LogOutRequest {}).await.unwrap();
    let ended = scene.here.count("audit_entries WHERE act = 'session_ended'").await;
    log_in(&scene.there, user).await;
    assert_eq!(scene.here.count("audit_entries WHERE act = 'session_ended'").await, ended);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_of_the_log_in_refuses_the_ended_session_at_once() {
    let scene = Scene::new(QuotaSettings { sessions_per_user: 1, ..QUOTAS }).await;
    assert!(is_valid(&scene.customer.session).await);
    log_in(&scene.here, &scene.customer).await;
    assert!(!is_valid(&scene.customer.session).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_can_be_replaced_when_the_quota_of_keys_is_used_up_up_to_tenfold() {
    let scene = Scene::new(QuotaSettings { api_keys_per_user: 2, ..QUOTAS }).await;
    let mut session = scene.provider.session.clone().auth;
    let created = session.create_api_key(pb::CreateApiKeyRequest::default()).await.unwrap().into_inner();
    let mut api_key_id = created.api_key.unwrap().id;
    let more = session.create_api_key(pb::CreateApiKeyRequest::default()).await;
    assert_used_up(more, "api_keys", "2");
    for _ in 2..20 {
        let request = pb::RotateApiKeyRequest { api_key_id, overlap: None };
        api_key_id = session.rotate_api_key(request).await.unwrap().into_inner().api_key.unwrap().id;
    }
    let refused = session.rotate_api_key(pb::RotateApiKeyRequest { api_key_id, overlap: None }).await;
    assert_used_up(refused, "api_keys", "20");
}
