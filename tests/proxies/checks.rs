//! What must work through every proxy.

use std::{fs, net::Ipv4Addr, process::Stdio};

use milepost::limits::{BATCH_EVENTS, ERROR_DETAILS_BYTES, MESSAGE_BYTES};
use milepost_client::pb::{self, publish_events_response::Outcome, watch_events_response::Message};
use milepost_testing::{
    Clients, ServerProcess, TestDatabase, User, Watch, connect_client::envelope, info, installed::succeed,
    with_metadata, within_timeout,
};
use prost::Message as _;
use prost_types::value::Kind as Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Status, Streaming};
use tonic_types::pb::{ErrorInfo, Status as RpcStatus};

use crate::proxy::{Kind, Proxy};

/// Heartbeats, 5 s apart, that take longer than the time-outs of the proxy twice.
const HEARTBEATS: usize = 5;
/// Users who watch and append at the same time.
const CLIENTS: usize = 20;
/// The text of one event's metadata, in bytes.
const TEXT_BYTES: usize = 15 * 1024;

/// A server behind a proxy, and users who call through it.
pub struct Scene {
    proxy: Proxy,
    server: ServerProcess,
    database: TestDatabase,
    provider: User,
    customer: User,
}

impl Scene {
    pub async fn new(kind: Kind) -> Self {
        let database = TestDatabase::migrated().await;
        let server = ServerProcess::on_with(
            &database,
            &[("MILEPOST_SIGN_UP", "open"), ("MILEPOST_TRUSTED_PROXY", "127.0.0.1/32")],
        )
        .await;
        let proxy = Proxy::start(kind, server.address).await;
        within_timeout("an answer through the proxy", async {
            let who = pb::GetCurrentUserRequest {};
            let mut anonymous = proxy.clients().anonymous();
            while anonymous.auth.get_current_user(who).await.unwrap_err().code() != Code::Unauthenticated {}
        })
        .await;
        let clients = proxy.clients();
        let (mut provider, customer) = (clients.provider().await, clients.customer().await);
        provider.configuration(&[("load", 1)]).await;
        Self { proxy, server, database, provider, customer }
    }

    pub async fn passes_everything_on(&self) {
        // At the same time as the others, since it takes longest.
        tokio::join!(self.keeps_a_silent_watch(), async {
            self.passes_the_largest_errors().await;
            self.passes_large_requests().await;
            self.names_the_client().await;
            self.serves_browsers_and_curl().await;
            self.isolates_a_watcher_that_does_not_read().await;
        });
    }

    /// A watch without events outlives the time-outs of the proxy by its heartbeats.
    async fn keeps_a_silent_watch(&self) {
        let mut provider = self.provider.clone();
        let job = provider.job(&self.customer).await;
        let mut watch = self.customer.clone().watch_by(silent_watch(&job)).await.unwrap();
        watch.caught_up().await;
        for _ in 0..HEARTBEATS {
            let message = watch.next().await.expect("the watch stays open");
            assert!(matches!(message, Some(Message::Heartbeat(_))), "{message:?}");
        }
        provider.append(&job, [info("after the silence")]).await;
        watch.until(|message| matches!(message, Message::Events(_))).await;
    }

    /// An error of the largest details and message arrives as the server sent it.
    async fn passes_the_largest_errors(&self) {
        let mut through = self.provider.clone();
        let job = through.job(&self.customer).await;
        // Over a connection that is closed afterwards.
        let mut direct = self.server.other_clients().same(&through);
        let mut largest = 0;
        // Headers are compressed letter by letter. After two other letters the last one takes
        // the most bits in base64, of all text that was tried.
        for letter in ["x", "X", "~", "\u{ff}", "\u{ffbe}"] {
            for before in ["", "x", "xx"] {
                let events = (0..BATCH_EVENTS)
                    .map(|_| unknown_step(&format!("{before}{}", letter.repeat(62))))
                    .collect::<Vec<_>>();
                let expected = direct.try_append(&job, events.clone()).await.unwrap_err();
                let arrived = through.try_append(&job, events).await.unwrap_err();
                assert_same(&arrived, &expected);
                largest = largest.max(arrived.details().len().div_ceil(3) * 4);
            }
        }
        assert!(largest > ERROR_DETAILS_BYTES * 9 / 10, "only {largest} bytes were tried");
        let named =
            |name: String| pb::GetJobRequest { job: Some(pb::get_job_request::Job::ProviderJobId(name)) };
        let name = "\u{ffbe}".repeat(256);
        let expected = direct.jobs.get_job(named(name.clone())).await.unwrap_err();
        assert_same(&through.jobs.get_job(named(name)).await.unwrap_err(), &expected);
    }

    /// A call of almost the largest size, and a stream of more bytes than any single one.
    async fn passes_large_requests(&self) {
        let mut provider = self.provider.clone();
        let job = provider.job(&self.customer).await;
        provider.append(&job, large_events(MESSAGE_BYTES / (TEXT_BYTES + 1024))).await;
        let batch = |number: usize| pb::PublishEventsRequest {
            batch_id: number.to_string(),
            job: Some(pb::publish_events_request::Job::JobId(job.id.clone())),
            events: large_events(10),
            ..Default::default()
        };
        let batches: Vec<_> = (0..30).map(batch).collect();
        let count = batches.len();
        let mut answers =
            provider.events.publish_events(tokio_stream::iter(batches)).await.unwrap().into_inner();
        for _ in 0..count {
            let answer = within_timeout("an answer", answers.message()).await.unwrap().unwrap();
            assert!(matches!(answer.outcome, Some(Outcome::Appended(_))), "{answer:?}");
        }
        assert!(within_timeout("the end", answers.message()).await.unwrap().is_none());
    }

    /// The audit, and with it the throttle, has the address of the client.
    async fn names_the_client(&self) {
        let client = self.proxy.clients().from(Ipv4Addr::new(127, 0, 0, 5));
        client.log_in(&self.customer).await;
        let last = "SELECT host(client_address) AS text FROM audit_entries ORDER BY created_at DESC LIMIT 1";
        assert_eq!(self.database.texts(last).await, ["127.0.0.5"]);
    }

    /// The page, a call by a page of the proxy's origin, and a watch in JSON, by HTTP/1.1 and
    /// HTTP/2 alike.
    async fn serves_browsers_and_curl(&self) {
        let mut provider = self.provider.clone();
        let credential = format!("authorization: Bearer {}", provider.key_secret);
        for version in ["--http1.1", "--http2"] {
            let job = provider.job(&self.customer).await;
            let page = succeed(&mut self.proxy.curl(version, "/")).await;
            assert!(page.starts_with("<!doctype html>"), "{page}");
            for (origin, status) in [(self.proxy.origin().as_str(), "200"), ("https://a.example", "403")] {
                let mut call = self.proxy.curl(version, "/milepost.v1.JobService/GetJob");
                call.args(["-H", &credential, "-H", "content-type: application/json"]);
                call.args([
                    "-H",
                    &format!("origin: {origin}"),
                    "-d",
                    &format!(r#"{{"jobId": "{}"}}"#, job.id),
                ]);
                call.args(["--write-out", " %{http_code}"]);
                let answer = succeed(&mut call).await;
                assert!(answer.ends_with(status), "{answer}");
                assert_eq!(answer.contains(&job.provider_job_id), status == "200", "{answer}");
            }
            let mut watch = self.proxy.curl(version, "/milepost.v1.EventService/WatchEvents");
            watch.args(["-H", &credential, "-H", "content-type: application/connect+json"]);
            watch
                .args(["--data-binary", "@-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .kill_on_drop(true);
            let mut watch = watch.spawn().unwrap();
            let request = envelope(0, format!(r#"{{"jobId": "{}"}}"#, job.id).as_bytes());
            watch.stdin.take().unwrap().write_all(&request).await.unwrap();
            let (mut received, mut text) = (watch.stdout.take().unwrap(), String::new());
            for awaited in ["caughtUp", "first", "second", "third"] {
                if awaited != "caughtUp" {
                    provider.append(&job, [info(awaited)]).await;
                }
                // Each event comes while the stream is open: the proxy does not hold it back.
                within_timeout(awaited, async {
                    while !text.contains(awaited) {
                        let mut part = [0; 4096];
                        let length = received.read(&mut part).await.unwrap();
                        assert_ne!(length, 0, "the watch ended after {text}");
                        text.push_str(&String::from_utf8_lossy(&part[..length]));
                    }
                })
                .await;
            }
        }
    }

    /// A watcher that does not read holds up neither watches nor appends of others.
    async fn isolates_a_watcher_that_does_not_read(&self) {
        let (mut provider, mut customer) = (self.provider.clone(), self.proxy.clients().customer().await);
        let unread = self.unread_watch(&self.customer.key_secret).await;
        let job = provider.job(&customer).await;
        let mut watch = customer.watch(&job).await;
        watch.caught_up().await;
        for _ in 0..3 {
            provider.append(&job, large_events(1)).await;
            watch.until(|message| matches!(message, Message::Events(_))).await;
        }
        drop(unread);
    }

    /// The credential of a watch that is not read ends. That stream ends, and nothing else of
    /// the connection that the proxy has for all clients.
    pub async fn ends_only_the_unread_watch_of_a_user_who_logs_out(&self) {
        let secret = self.proxy.clients().log_in(&self.customer).await;
        let (_clients, mut unread) = self.unread_watch(&secret).await;
        let (mut provider, mut other) = (self.provider.clone(), self.proxy.clients().customer().await);
        let job = provider.job(&other).await;
        let mut watch = other.watch_by(silent_watch(&job)).await.unwrap();
        watch.caught_up().await;
        self.proxy.clients().with_secret(&secret).auth.log_out(pb::LogOutRequest {}).await.unwrap();
        // The server waits for less than a heartbeat interval for the unread stream.
        let message = watch.next().await.expect("the watch stays open");
        assert!(matches!(message, Some(Message::Heartbeat(_))), "{message:?}");
        for _ in 0..3 {
            provider.append(&job, [info("an event")]).await;
            watch.until(|message| matches!(message, Message::Events(_))).await;
        }
        let ended = async {
            loop {
                match unread.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("the unread watch ended with OK"),
                    Err(_) => break,
                }
            }
        };
        within_timeout("the end of the unread watch", ended).await;
    }

    /// A watch by this secret of the customer. Its client does not read what awaits it.
    async fn unread_watch(&self, secret: &str) -> (Clients, Streaming<pb::WatchEventsResponse>) {
        let mut provider = self.provider.clone();
        let job = provider.job(&self.customer).await;
        for _ in 0..4 {
            provider.append(&job, large_events(60)).await;
        }
        let mut clients = self.proxy.clients();
        clients.endpoint = clients.endpoint.initial_stream_window_size(65_535);
        let clients = clients.other_clients();
        let scope = Some(pb::watch_events_request::Scope::JobId(job.id));
        let request = pb::WatchEventsRequest { scope, ..Default::default() };
        let mut stream = clients.with_secret(secret).events.watch_events(request).await.unwrap().into_inner();
        // The server has begun to send, and more than the windows on the way hold is left.
        within_timeout("a message", stream.message()).await.unwrap();
        (clients, stream)
    }

    /// Many users watch and append over connections of their own. Returns how many there
    /// are, and how many connections the server has meanwhile.
    pub async fn many_clients(&self) -> (usize, usize) {
        let mut watching: Vec<(User, pb::Job, Watch)> = Vec::new();
        for _ in 0..CLIENTS {
            let mut provider = self.proxy.clients().same(&self.provider);
            let job = provider.job(&self.customer).await;
            let mut watch = provider.watch(&job).await;
            watch.caught_up().await;
            watching.push((provider, job, watch));
        }
        let connections = connections_to(self.server.address.port());
        for (provider, job, watch) in &mut watching {
            provider.append(job, [info("an event")]).await;
            watch.until(|message| matches!(message, Message::Events(_))).await;
        }
        (CLIENTS, connections)
    }
}

/// Open connections to this port of this machine, by their ends at the server.
fn connections_to(port: u16) -> usize {
    const ESTABLISHED: &str = "01";
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let of_server = |line: &&str| {
        let mut columns = line.split_whitespace().skip(1);
        let local = columns.next().is_some_and(|local| local.ends_with(&format!(":{port:04X}")));
        local && columns.nth(1) == Some(ESTABLISHED)
    };
    table.lines().filter(of_server).count()
}

fn large_events(count: usize) -> Vec<pb::NewEvent> {
    let text = || Value::StringValue("x".repeat(TEXT_BYTES)).into();
    (0..count).map(|_| with_metadata(info("large"), [("text", text())])).collect()
}

/// A watch of this job with the shortest heartbeat interval.
fn silent_watch(job: &pb::Job) -> pb::WatchEventsRequest {
    pb::WatchEventsRequest {
        scope: Some(pb::watch_events_request::Scope::JobId(job.id.clone())),
        heartbeat_interval: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
        ..Default::default()
    }
}

fn unknown_step(tag: &str) -> pb::NewEvent {
    pb::NewEvent { step_tag: tag.to_owned(), ..info("an event") }
}

#[track_caller]
fn assert_same(arrived: &Status, expected: &Status) {
    assert_eq!((arrived.code(), arrived.message()), (expected.code(), expected.message()));
    assert_eq!(arrived.details().len(), expected.details().len());
    let decoded = |status: &Status| {
        let mut details = RpcStatus::decode(status.details()).unwrap().details;
        // A map has no order in protobuf, so that its bytes may differ.
        (ErrorInfo::decode(&*details.remove(0).value).unwrap(), details)
    };
    assert_eq!(decoded(arrived), decoded(expected));
    assert!(arrived.metadata().contains_key("x-request-id"));
}
