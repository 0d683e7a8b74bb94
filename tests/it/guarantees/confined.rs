//! After its expiry, revocation, log-out or its user's password change or
//! disabling, a credential is refused at once by the replica that handled it
//! and within 5 s everywhere, for new calls and open streams. A replica that
//! could not confirm a credential for 5 s sends and accepts nothing under it
//! until it confirms it again.

mod unconfirmed;
mod unread;
mod writes;

use std::time::{Duration, Instant, SystemTime};

use milepost_client::pb::{
    self, ErrorReason, WatchEndReason, publish_events_response::Outcome, watch_events_request::Scope,
    watch_events_response::Message,
};
use tokio::{
    sync::mpsc,
    time::{sleep, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

use crate::support::{
    Caller, Clients, PASSWORD, TestServer, User, Watch, assert_refused, info, operate, within_timeout,
};

/// Longest until every replica refuses an ended credential.
const EVERYWHERE: Duration = Duration::from_secs(5);
/// How long a test waits to see that something does not happen.
const A_MOMENT: Duration = Duration::from_secs(1);
/// Pause between two calls that are repeated until they are refused.
const PACE: Duration = Duration::from_millis(50);

fn watch_request(job: &pb::Job) -> pb::WatchEventsRequest {
    pb::WatchEventsRequest { scope: Some(Scope::JobId(job.id.clone())), ..Default::default() }
}

/// Repeats a call until it is refused.
async fn calls_end(caller: &Caller) {
    let caller = caller.clone();
    let refused = within_timeout("a call to be refused", async {
        loop {
            match caller.current_user().await {
                Ok(_) => sleep(PACE).await,
                refused => break refused,
            }
        }
    });
    assert_refused(refused.await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
}

/// A caller that watches a job on one replica and repeats GetCurrentUser there.
struct Viewer {
    caller: Caller,
    watch: Watch,
}

impl Viewer {
    async fn open(clients: &Clients, secret: &str, job: &pb::Job) -> Self {
        let mut caller = clients.other_clients().with_secret(secret);
        let mut watch =
            Watch::new(caller.events.watch_events(watch_request(job)).await.unwrap().into_inner());
        watch.caught_up().await;
        Self { caller, watch }
    }

    /// Reads the watch to its `end`; returns the messages before it.
    async fn watching_ends(&mut self) -> Vec<Message> {
        let mut messages = self.watch.until(|message| matches!(message, Message::End(_))).await;
        let Some(Message::End(end)) = messages.pop() else { unreachable!("just matched") };
        assert_eq!(end.reason(), WatchEndReason::CredentialEnded);
        assert_refused(self.watch.next().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
        messages
    }

    /// Calls and watches until both are refused, which must happen within `time`.
    async fn ends_within(mut self, time: Duration, ended_at: Instant) {
        calls_end(&self.caller).await;
        let called = ended_at.elapsed();
        self.watching_ends().await;
        let watched = ended_at.elapsed();
        assert!(watched < time, "{called:?} {watched:?}");
    }
}

/// The uses of one credential on one replica: calls, a publish stream, a watch.
struct Uses {
    viewer: Viewer,
    job: pb::Job,
    batches: mpsc::Sender<pb::PublishEventsRequest>,
    answers: Streaming<pb::PublishEventsResponse>,
}

impl Uses {
    /// Opens a watch and a publish stream and makes a call; all of them work.
    async fn open(clients: &Clients, secret: &str, job: &pb::Job) -> Self {
        let mut viewer = Viewer::open(clients, secret, job).await;
        let (batches, stream) = mpsc::channel(1);
        let answers = viewer.caller.events.publish_events(ReceiverStream::new(stream)).await;
        let mut uses = Self { viewer, job: job.clone(), batches, answers: answers.unwrap().into_inner() };
        uses.publish().await.unwrap();
        uses.append().await.unwrap();
        uses.viewer.watch.events(1).await;
        uses
    }

    fn append(&self) -> impl Future<Output = Result<(), Status>> + use<> {
        let mut caller = self.viewer.caller.clone();
        let request = pb::AppendEventsRequest {
            job: Some(pb::append_events_request::Job::JobId(self.job.id.clone())),
            expected_sequence: None,
            events: vec![info("appended")],
        };
        async move { caller.events.append_events(request).await.map(drop) }
    }

    /// Sends one batch on the publish stream.
    async fn send(&self, name: &str) {
        let request = pb::PublishEventsRequest {
            batch_id: name.to_owned(),
            job: Some(pb::publish_events_request::Job::JobId(self.job.id.clone())),
            expected_sequence: None,
            events: vec![info(name)],
        };
        // If the stream has ended, the next read of its answers returns the status.
        let _ = self.batches.send(request).await;
    }

    async fn publish(&mut self) -> Result<(), Status> {
        self.send("published").await;
        let answer = within_timeout("an answer", self.answers.message()).await?;
        let outcome = answer.expect("the stream has not ended").outcome;
        assert!(matches!(outcome, Some(Outcome::Appended(_))), "{outcome:?}");
        Ok(())
    }

    /// Repeats a call until it is refused; an append is then refused too.
    async fn calls_end(&self) {
        calls_end(&self.viewer.caller).await;
        assert_refused(self.append().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    }

    /// Publishes batches until one is refused.
    async fn publishing_ends(&mut self) {
        let refused = loop {
            match self.publish().await {
                Ok(()) => sleep(PACE).await,
                refused => break refused,
            }
        };
        assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    }

    /// Calls, publishes and watches until all three are refused, which must happen
    /// within `time`.
    async fn ends_within(mut self, time: Duration, ended_at: Instant) {
        self.calls_end().await;
        let called = ended_at.elapsed();
        self.publishing_ends().await;
        let published = ended_at.elapsed();
        self.viewer.watching_ends().await;
        let watched = ended_at.elapsed();
        assert!(watched < time, "{called:?} {published:?} {watched:?}");
    }
}

struct Scene {
    server: TestServer,
    replica: TestServer,
    provider: User,
    job: pb::Job,
}

impl Scene {
    async fn new() -> Self {
        let server = TestServer::start().await;
        let replica = server.replica().await;
        let (provider, _, job) = server.job(&[("load", 1)]).await;
        Self { server, replica, provider, job }
    }

    /// Logs in; returns the secret of the new session.
    async fn session(&self) -> String {
        self.server.log_in(&self.provider).await
    }

    async fn key(&mut self, request: pb::CreateApiKeyRequest) -> pb::CreateApiKeyResponse {
        self.provider.session.auth.create_api_key(request).await.unwrap().into_inner()
    }

    /// The secret of a new key that expires after `lifetime`.
    async fn key_for(&mut self, lifetime: Duration) -> String {
        let expires_at = Some((SystemTime::now() + lifetime).into());
        self.key(pb::CreateApiKeyRequest { expires_at, ..Default::default() }).await.secret
    }

    async fn watch_token(&mut self, lifetime: Option<Duration>) -> pb::CreateWatchTokenResponse {
        let request = pb::CreateWatchTokenRequest {
            job: Some(pb::create_watch_token_request::Job::JobId(self.job.id.clone())),
            lifetime: lifetime.map(|lifetime| lifetime.try_into().unwrap()),
            ..Default::default()
        };
        self.provider.auth.create_watch_token(request).await.unwrap().into_inner()
    }

    /// Opens all uses of this secret on both replicas.
    async fn open(&self, secret: &str) -> [Uses; 2] {
        let (here, there) = tokio::join!(
            Uses::open(&self.server, secret, &self.job),
            Uses::open(&self.replica, secret, &self.job)
        );
        [here, there]
    }
}

/// Asserts that the replica that ended the credential refuses the next call and
/// ends its streams within a second, and the other replica within 5 s.
async fn assert_refused_everywhere([here, there]: [Uses; 2], ended_at: Instant) {
    let caller = here.viewer.caller.clone();
    let next = caller.current_user().await;
    assert_refused(next, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    tokio::join!(here.ends_within(Duration::from_secs(1), ended_at), there.ends_within(EVERYWHERE, ended_at));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_refused_everywhere_after_its_expiry() {
    let mut scene = Scene::new().await;
    let (lifetime, from) = (Duration::from_secs(6), Instant::now());
    let secret = scene.key_for(lifetime).await;
    let [here, there] = scene.open(&secret).await;
    let ended_at = from + lifetime;
    sleep_until(ended_at.into()).await;
    tokio::join!(here.ends_within(EVERYWHERE, ended_at), there.ends_within(EVERYWHERE, ended_at));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_refused_everywhere_after_its_revocation() {
    let mut scene = Scene::new().await;
    let created = scene.key(pb::CreateApiKeyRequest::default()).await;
    let uses = scene.open(&created.secret).await;
    let request = pb::ExpireApiKeyRequest { api_key_id: created.api_key.unwrap().id };
    scene.provider.session.auth.expire_api_key(request).await.unwrap();
    assert_refused_everywhere(uses, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_refused_everywhere_after_a_rotation_without_an_overlap() {
    let mut scene = Scene::new().await;
    let created = scene.key(pb::CreateApiKeyRequest::default()).await;
    let uses = scene.open(&created.secret).await;
    let overlap = Some(prost_types::Duration::default());
    let request = pb::RotateApiKeyRequest { api_key_id: created.api_key.unwrap().id, overlap };
    scene.provider.session.auth.rotate_api_key(request).await.unwrap();
    assert_refused_everywhere(uses, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_key_is_refused_everywhere_after_the_overlap() {
    let mut scene = Scene::new().await;
    let created = scene.key(pb::CreateApiKeyRequest::default()).await;
    let [here, there] = scene.open(&created.secret).await;
    let overlap = Duration::from_secs(3);
    let api_key_id = created.api_key.unwrap().id;
    let request = pb::RotateApiKeyRequest { api_key_id, overlap: Some(overlap.try_into().unwrap()) };
    scene.provider.session.auth.rotate_api_key(request).await.unwrap();
    let ended_at = Instant::now() + overlap;
    // Both replicas accept the old key until shortly before its end.
    sleep_until((ended_at - A_MOMENT).into()).await;
    for uses in [&here, &there] {
        uses.append().await.unwrap();
    }
    sleep_until(ended_at.into()).await;
    tokio::join!(here.ends_within(EVERYWHERE, ended_at), there.ends_within(EVERYWHERE, ended_at));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_token_is_refused_everywhere_after_its_revocation() {
    let mut scene = Scene::new().await;
    let created = scene.watch_token(None).await;
    let here = Viewer::open(&scene.server, &created.secret, &scene.job).await;
    let there = Viewer::open(&scene.replica, &created.secret, &scene.job).await;
    let request = pb::ExpireWatchTokenRequest { watch_token_id: created.watch_token.unwrap().id };
    scene.provider.auth.expire_watch_token(request).await.unwrap();
    let ended_at = Instant::now();
    let next = here.caller.current_user().await;
    assert_refused(next, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    tokio::join!(here.ends_within(Duration::from_secs(1), ended_at), there.ends_within(EVERYWHERE, ended_at));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_refused_everywhere_after_its_log_out() {
    let scene = Scene::new().await;
    let secret = scene.session().await;
    let uses = scene.open(&secret).await;
    scene.server.with_secret(secret).auth.log_out(pb::LogOutRequest {}).await.unwrap();
    assert_refused_everywhere(uses, Instant::now()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_sessions_are_refused_everywhere_after_a_password_change() {
    let mut scene = Scene::new().await;
    let uses = scene.open(&scene.session().await).await;
    let request = pb::ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: "another horse".to_owned(),
    };
    scene.provider.session.auth.change_password(request).await.unwrap();
    assert_refused_everywhere(uses, Instant::now()).await;
}

/// An operator disables the user, of which no replica is notified.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_and_keys_are_refused_everywhere_after_the_user_is_disabled() {
    let scene = Scene::new().await;
    let email = scene.provider.email.clone();
    let secrets = [scene.session().await, scene.provider.key_secret.clone()];
    let mut uses = Vec::new();
    for secret in &secrets {
        uses.extend(scene.open(secret).await);
    }
    operate(&scene.server.database, &["disable", &email], "").await;
    let ended_at = Instant::now();
    let mut ends = tokio::task::JoinSet::new();
    for uses in uses {
        ends.spawn(uses.ends_within(EVERYWHERE, ended_at));
    }
    ends.join_all().await;

    // A new replica, which has not looked up these credentials yet, refuses them too.
    let fresh = scene.server.replica().await;
    for secret in secrets {
        let answer = fresh.with_secret(secret).current_user().await;
        assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    }
    let request = pb::LogInRequest { email, password: PASSWORD.to_owned() };
    let answer = fresh.anonymous().auth.log_in(request).await;
    assert_refused(answer, Code::Unauthenticated, ErrorReason::LogInFailed);
}

/// The session that expires in an hour seems to have expired when the user is disabled, as by
/// a clock that is ahead then.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_a_disabled_user_stay_refused_everywhere_after_the_user_is_enabled() {
    let mut scene = Scene::new().await;
    let email = scene.provider.email.clone();
    let token = scene.watch_token(None).await.secret;
    let (session, expired) = (scene.session().await, scene.session().await);
    let move_expiry = async |expires_at: &str| {
        let newest = "SELECT max(created_at) FROM sessions";
        let sql = format!("UPDATE sessions SET expires_at = {expires_at} WHERE created_at = ({newest})");
        scene.server.database.execute(&sql).await;
    };
    move_expiry("now() - interval '1 hour'").await;
    for command in ["disable", "enable"] {
        operate(&scene.server.database, &[command, &email], "").await;
    }
    move_expiry("now() + interval '1 hour'").await;

    let fresh = scene.server.replica().await;
    for secret in [session, expired, scene.provider.key_secret.clone(), token] {
        for server in [&scene.server, &fresh] {
            let mut caller = server.with_secret(&secret);
            let refused = within_timeout("a refusal", async {
                let request =
                    || pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(scene.job.id.clone())) };
                loop {
                    match caller.jobs.get_job(request()).await {
                        Ok(_) => sleep(PACE).await,
                        refused => break refused,
                    }
                }
            });
            assert_refused(refused.await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
        }
    }
    let request = pb::LogInRequest { email, password: PASSWORD.to_owned() };
    fresh.anonymous().auth.log_in(request).await.unwrap();
}

/// A request with this secret as its credential.
fn bearing<T>(secret: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {secret}").parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_that_one_call_finds_lost_is_refused_to_every_later_call() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    provider.session.jobs.list_jobs(pb::ListJobsRequest::default()).await.unwrap();
    // As a failover does that loses the log-in.
    server.database.execute(&format!("DELETE FROM sessions WHERE user_id = '{}'", provider.id)).await;
    let found = provider.session.current_user().await;
    assert_refused(found, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    // This call reads no row of the session.
    let later = provider.session.jobs.list_jobs(pb::ListJobsRequest::default()).await;
    assert_refused(later, Code::Unauthenticated, ErrorReason::CredentialInvalid);
}
