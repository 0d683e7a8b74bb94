//! After its expiry, revocation, log-out or its user's password change or
//! disabling, a credential is refused at once by the replica that handled it
//! and within 5 s everywhere, for new calls and open streams. A replica that
//! could not confirm a credential for 5 s sends and accepts nothing under it
//! until it confirms it again.

mod writes;

use std::time::{Duration, Instant, SystemTime};

use futures_util::{
    future::join_all,
    stream::{self, StreamExt as _},
};
use milepost_client::pb::{
    self, ErrorReason, WatchEndReason,
    event_service_client::EventServiceClient,
    get_current_user_response::Credential,
    publish_events_response::Outcome,
    watch_events_request::{Scope, Start},
    watch_events_response::Message,
};
use prost_types::{Value, value::Kind};
use tokio::{
    sync::mpsc,
    time::{sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

use crate::{
    fairness::metric,
    support::{
        Authority, Caller, Clients, Mode, PASSWORD, Proxy, TestServer, TlsFiles, User, Watch, assert_refused,
        info, operate, with_metadata, within_timeout,
    },
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
    let mut caller = caller.clone();
    let refused = within_timeout("a call to be refused", async {
        loop {
            match caller.auth.get_current_user(pb::GetCurrentUserRequest {}).await {
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
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        provider.configuration(&[("load", 1)]).await;
        let job = provider.job(&customer).await;
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
    let mut caller = here.viewer.caller.clone();
    let next = caller.auth.get_current_user(pb::GetCurrentUserRequest {}).await;
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
    let next = here.caller.clone().auth.get_current_user(pb::GetCurrentUserRequest {}).await;
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
        let answer = fresh.with_secret(secret).auth.get_current_user(pb::GetCurrentUserRequest {}).await;
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

/// Waits until the replica can no longer confirm the credential. The credential is
/// checked first, so a malformed request is then not answered INVALID_ARGUMENT.
async fn wait_until_unconfirmed(uses: &Uses) {
    let mut caller = uses.viewer.caller.clone();
    let malformed = pb::WatchEventsRequest::default;
    within_timeout("a credential that is not confirmed", async {
        while caller.events.watch_events(malformed()).await.unwrap_err().code() == Code::InvalidArgument {
            sleep(PACE).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_without_database_pauses_credentials_until_it_confirms_them_again() {
    let mut scene = Scene::new().await;
    let proxy = Proxy::to(&scene.server.database.url).await;
    let severed = TestServer::on(scene.server.database.through(proxy.url.clone())).await;
    let [ending, staying] = [
        scene.key(pb::CreateApiKeyRequest::default()).await,
        scene.key(pb::CreateApiKeyRequest::default()).await,
    ];
    let mut ends = Uses::open(&severed, &ending.secret, &scene.job).await;
    let mut stays = Uses::open(&severed, &staying.secret, &scene.job).await;
    // Each watch first receives the events that the other credential appended.
    while timeout(A_MOMENT, ends.viewer.watch.next()).await.is_ok() {}
    while timeout(A_MOMENT, stays.viewer.watch.next()).await.is_ok() {}

    proxy.set(Mode::Refuse);
    let request = pb::ExpireApiKeyRequest { api_key_id: ending.api_key.unwrap().id };
    scene.provider.session.auth.expire_api_key(request).await.unwrap();
    let ended_at = Instant::now();
    wait_until_unconfirmed(&ends).await;
    assert!(ended_at.elapsed() < EVERYWHERE + PACE, "{:?}", ended_at.elapsed());
    wait_until_unconfirmed(&stays).await;

    // The replica accepts and sends nothing under either credential.
    scene.provider.append(&scene.job, [info("meanwhile")]).await;
    for uses in [&mut ends, &mut stays] {
        assert_eq!(uses.append().await.unwrap_err().code(), Code::Unavailable);
        uses.send("unconfirmed").await;
        assert!(timeout(A_MOMENT, uses.answers.message()).await.is_err());
        assert!(timeout(A_MOMENT, uses.viewer.watch.next()).await.is_err());
    }
    let names = async |provider: &mut User| -> Vec<String> {
        provider.list(&scene.job).await.into_iter().map(|event| event.name).collect()
    };
    assert!(!names(&mut scene.provider).await.contains(&"unconfirmed".to_owned()));

    // The replica confirms the valid credential, and ends the streams of the revoked
    // one, which it never confirmed again.
    proxy.set(Mode::Pass);
    let answer = within_timeout("the answer", stays.answers.message()).await.unwrap().unwrap();
    assert_eq!(answer.batch_id, "unconfirmed");
    let received: Vec<String> =
        stays.viewer.watch.events(2).await.into_iter().map(|event| event.name).collect();
    assert_eq!(received, ["meanwhile", "unconfirmed"]);
    let refused = within_timeout("the end", ends.answers.message()).await;
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    ends.calls_end().await;
    ends.viewer.watching_ends().await;
    let stored = names(&mut scene.provider).await;
    assert_eq!(stored.iter().filter(|name| *name == "unconfirmed").count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_expire_while_the_database_is_unavailable() {
    let mut scene = Scene::new().await;
    let proxy = Proxy::to(&scene.server.database.url).await;
    let severed = TestServer::on(scene.server.database.through(proxy.url.clone())).await;
    let mut viewers = Vec::new();
    // The first lifetime ends within the 5 s in which the credential counts as
    // confirmed, the second after them.
    for lifetime in [4, 9].map(Duration::from_secs) {
        let from = Instant::now();
        let secrets = [scene.key_for(lifetime).await, scene.watch_token(Some(lifetime)).await.secret];
        for secret in secrets {
            viewers.push((Viewer::open(&severed, &secret, &scene.job).await, from + lifetime));
        }
    }

    proxy.set(Mode::Refuse);
    scene.provider.append(&scene.job, [info("meanwhile")]).await;
    let ends = viewers.iter_mut().map(async |(viewer, ended_at)| {
        assert_eq!(viewer.watching_ends().await, []);
        let now = Instant::now();
        assert!(now > *ended_at - A_MOMENT && now < *ended_at + EVERYWHERE, "{now:?} {ended_at:?}");
        // Malformed, but the credential is checked first.
        let refused = viewer.caller.events.watch_events(pb::WatchEventsRequest::default()).await;
        let code = refused.unwrap_err().code();
        assert!(matches!(code, Code::Unauthenticated | Code::Unavailable), "{code:?}");
    });
    join_all(ends).await;

    proxy.set(Mode::Pass);
    for (viewer, _) in viewers {
        let refused = within_timeout("the database to be available", async {
            loop {
                match viewer.caller.clone().events.watch_events(watch_request(&scene.job)).await {
                    Err(status) if status.code() == Code::Unavailable => sleep(PACE).await,
                    answer => break answer.map(drop),
                }
            }
        });
        assert_refused(refused.await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_held_back_for_an_unconfirmed_credential_are_received_after_a_resume() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    // Events for four messages, which the server reads from the log at once.
    let text = Value { kind: Some(Kind::StringValue("x".repeat(16_300))) };
    for batch in 0..4 {
        let events = (0..50).map(|n| with_metadata(info(&format!("{batch}/{n}")), [("text", text.clone())]));
        provider.append(&job, events).await;
    }
    // The stream's window takes less than one message before the client reads.
    let channel = server.endpoint.clone().initial_stream_window_size(65_535).connect_lazy();
    let request = bearing(&customer.key_secret, watch_request(&job));
    let stream = EventServiceClient::new(channel).watch_events(request).await.unwrap().into_inner();
    let mut watch = Watch::new(stream);
    let mut seen = watch.events(1).await;

    let database = server.database.clone();
    database.make_unavailable().await;
    // A malformed request is answered INVALID_ARGUMENT while the credential counts
    // as confirmed.
    within_timeout("a credential that is not confirmed", async {
        while customer.watch_by(pb::WatchEventsRequest::default()).await.unwrap_err().code()
            == Code::InvalidArgument
        {}
    })
    .await;
    while let Ok(message) = tokio::time::timeout(Duration::from_secs(1), watch.next()).await {
        match message.unwrap().unwrap() {
            Message::Events(watched) => seen.extend(watched.events),
            other => panic!("{other:?}"),
        }
    }
    assert!(seen.len() < 200, "the server held no event back");
    drop(server);
    let Some(Message::End(end)) = watch.next().await.unwrap() else { panic!("no end") };
    assert_eq!(end.reason(), WatchEndReason::Draining);
    assert_refused(watch.next().await, Code::Unavailable, ErrorReason::Draining);

    database.make_available().await;
    let mut customer = replica.same(&customer);
    let start = Some(Start::ResumeToken(watch.resume_token));
    let mut resumed = within_timeout("the database to be available", async {
        loop {
            let request = pb::WatchEventsRequest { start: start.clone(), ..watch_request(&job) };
            match customer.watch_by(request).await {
                Err(status) if status.code() == Code::Unavailable => {}
                opened => break opened.unwrap(),
            }
        }
    })
    .await;
    seen.extend(resumed.caught_up().await.0);
    let sequences: Vec<i64> = seen.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, (1..=200).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_client_does_not_read_its_end_is_reset() {
    assert_reset_if_end_is_unread(&TestServer::start().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_over_tls_whose_client_does_not_read_its_end_is_reset() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    assert_reset_if_end_is_unread(&TestServer::with_tls(&files.server(), &authority).await).await;
}

/// Expires the key that the user calls with.
async fn expire_key(user: &mut User) {
    let me = user.auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap().into_inner();
    let Some(Credential::ApiKey(key)) = me.credential else { panic!("{:?}", me.credential) };
    user.session.auth.expire_api_key(pb::ExpireApiKeyRequest { api_key_id: key.id }).await.unwrap();
}

/// Whether a message of a watch has an event of this name.
fn has_event(response: &pb::WatchEventsResponse, name: &str) -> bool {
    let Some(Message::Events(watched)) = &response.message else { return false };
    watched.events.iter().any(|event| event.name == name)
}

/// A request with this secret as its credential.
fn bearing<T>(secret: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {secret}").parse().unwrap());
    request
}

async fn assert_reset_if_end_is_unread(server: &TestServer) {
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    // Two streams on one connection. The test does not read the first, whose window
    // is soon full; the second shows that the connection stays open.
    let channel = server.endpoint.clone().initial_stream_window_size(4_096).connect().await.unwrap();
    let mut streams = Vec::new();
    for secret in [&customer.key_secret, &provider.key_secret] {
        let mut client = EventServiceClient::new(channel.clone());
        streams.push(client.watch_events(bearing(secret, watch_request(&job))).await.unwrap().into_inner());
    }
    let [mut unread, mut other] = streams.try_into().unwrap();
    for _ in 0..20 {
        provider.append(&job, (0..50).map(|_| info("x"))).await;
    }

    expire_key(&mut customer).await;
    let watches = async || metric(server, "milepost_watches{scope=\"job\"}").await;
    within_timeout("the reset", async { while watches().await > 1 {} }).await;
    provider.append(&job, [info("after")]).await;
    let goes_on = async { while !has_event(&other.message().await.unwrap().unwrap(), "after") {} };
    within_timeout("the other watch to go on", goes_on).await;
    let mut events = 0;
    let end = loop {
        match unread.message().await {
            Ok(Some(response)) => match response.message.unwrap() {
                Message::Events(watched) => events += watched.events.len(),
                Message::CaughtUp(_) => {}
                more => panic!("the stream went on: {more:?}"),
            },
            end => break end,
        }
    };
    assert!(end.is_err() && events < 1_000, "{end:?} after {events} events");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_whose_client_does_not_read_its_end_is_reset() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    // Two streams on one connection. The first answer already fills the window of
    // the publish stream; the watch shows that the connection stays open.
    let channel = server.endpoint.clone().initial_stream_window_size(4_096).connect().await.unwrap();
    let mut client = EventServiceClient::new(channel);
    let (batches, events) = (20, 100);
    let batch = {
        let job = pb::publish_events_request::Job::JobId(job.id.clone());
        move |n: i64| pb::PublishEventsRequest {
            batch_id: n.to_string(),
            job: Some(job.clone()),
            expected_sequence: None,
            events: (0..events).map(|_| info("x")).collect(),
        }
    };
    let sent = stream::iter((0..batches).map(batch)).chain(stream::pending());
    let unread = client.publish_events(bearing(&provider.key_secret, sent)).await.unwrap();
    let other = client.watch_events(bearing(&customer.key_secret, watch_request(&job))).await.unwrap();
    let (mut unread, mut other) = (unread.into_inner(), other.into_inner());
    // As many batches as the server's publish window allows.
    within_timeout("the batches", async { while provider.get(&job).await.last_sequence < 8 * events {} })
        .await;
    // No signal tells when the first answer is sent; this pause is long enough.
    sleep(PACE).await;

    expire_key(&mut provider).await;
    let streams = async || metric(&server, "milepost_publish_streams").await;
    within_timeout("the reset", async { while streams().await > 0 {} }).await;
    let mut session = User { key: provider.session.clone(), ..provider.clone() };
    session.append(&job, [info("after")]).await;
    let goes_on = async { while !has_event(&other.message().await.unwrap().unwrap(), "after") {} };
    within_timeout("the watch to go on", goes_on).await;
    let mut answers = 0;
    let end = loop {
        match unread.message().await {
            Ok(Some(_)) => answers += 1,
            end => break end,
        }
    };
    assert!(end.is_err() && answers < batches, "{end:?} after {answers} answers");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_that_one_call_finds_lost_is_refused_to_every_later_call() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    provider.session.jobs.list_jobs(pb::ListJobsRequest::default()).await.unwrap();
    // As a failover does that loses the log-in.
    server.database.execute(&format!("DELETE FROM sessions WHERE user_id = '{}'", provider.id)).await;
    let found = provider.session.auth.get_current_user(pb::GetCurrentUserRequest {}).await;
    assert_refused(found, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    // This call reads no row of the session.
    let later = provider.session.jobs.list_jobs(pb::ListJobsRequest::default()).await;
    assert_refused(later, Code::Unauthenticated, ErrorReason::CredentialInvalid);
}
