//! SIGTERM: the server exits within the drain deadline whatever clients do, and at
//! once if no call is in flight.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb::{self, event_service_client::EventServiceClient};
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_stream::StreamExt as _;
use tonic::{Request, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::support::{
    DRAIN_DEADLINE, ServerProcess, TestDatabase, complete, info, named, step, within_timeout,
};

/// The connection preface of HTTP/2 (RFC 9113), and an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

async fn connect_and_send(server: &ServerProcess, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_and_silent_connections_do_not_delay_the_exit() {
    let mut server = ServerProcess::start().await;
    let idle = server.customer().await;
    let silent = [
        connect_and_send(&server, b"").await,
        connect_and_send(&server, &PREFACE[..10]).await,
        connect_and_send(&server, PREFACE).await,
        // Never reads, so it never acknowledges that the server closes the connection.
        connect_and_send(&server, &[PREFACE, SETTINGS].concat()).await,
    ];
    let started = Instant::now();
    server.terminate();
    assert_eq!(server.exit().await.code(), Some(0));
    assert!(started.elapsed() < DRAIN_DEADLINE, "the exit took the whole deadline");
    assert!(!server.log().contains("deadline passed"), "{}", server.log());
    drop((idle, silent));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_does_not_read_delays_the_exit_until_the_deadline() {
    let mut server = ServerProcess::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    // Far more than the HTTP/2 windows that the client below sets.
    for _ in 0..4 {
        provider.append(&job, (0..500).map(|n| named(info("x"), format!("{n:0>250}")))).await;
    }
    let endpoint = Endpoint::from_shared(format!("http://{}", server.address)).unwrap();
    let channel = endpoint
        .initial_stream_window_size(65_535)
        .initial_connection_window_size(65_535)
        .connect()
        .await
        .unwrap();
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let mut request = Request::new(pb::WatchEventsRequest { scope, ..Default::default() });
    let bearer = format!("Bearer {}", customer.key_secret);
    request.metadata_mut().insert("authorization", bearer.parse().unwrap());
    let mut unread = EventServiceClient::new(channel).watch_events(request).await.unwrap().into_inner();
    unread.message().await.unwrap().expect("the past");
    // The messages that follow fill the window. No signal tells when, and this pause
    // is long enough.
    tokio::time::sleep(Duration::from_millis(500)).await;

    let started = Instant::now();
    server.terminate();
    assert_eq!(server.exit().await.code(), Some(0));
    // The server stops its embedded Postgres after the drain.
    assert!(started.elapsed() < DRAIN_DEADLINE * 2, "{:?}", started.elapsed());
    assert!(
        server.log().contains("deadline passed"),
        "the server did not wait for the watcher: {}",
        server.log()
    );
    drop(unread);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sigterm_watches_end_with_draining_and_the_exit_code_is_0() {
    let mut server = ServerProcess::start().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [step("load")]).await;
    let mut watch = customer.watch(&job).await;
    watch.caught_up().await;

    server.terminate();
    let last = watch.next().await.unwrap();
    let Some(pb::watch_events_response::Message::End(end)) = last else { panic!("{last:?}") };
    assert_eq!(end.reason(), pb::WatchEndReason::Draining);
    let status = watch.next().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(server.exit().await.code(), Some(0));

    // After a restart, the watch resumes with its token.
    server.restart().await;
    let start = pb::watch_events_request::Start::ResumeToken(watch.resume_token);
    let watch = customer.watch_from(&job, Some(start)).await;
    provider.append(&job, [complete()]).await;
    let watched = watch.read_to_end().await;
    assert_eq!(watched.events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sigterm_health_becomes_not_serving_first_and_calls_in_flight_finish() {
    let database = TestDatabase::migrated().await;
    let mut server = ServerProcess::on(&database).await;
    let (mut provider, _, job) = server.job(&[]).await;
    let mut health = server.other_clients().health();
    let mut statuses = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    within_timeout("readiness", async {
        while statuses.next().await.expect("the health stream stays open").unwrap().status()
            != ServingStatus::Serving
        {}
    })
    .await;
    let mut locker = database.lock_job(&job).await;
    let appending = tokio::spawn(async move { provider.try_append(&job, [info("in flight")]).await });
    database.wait_for_locks(1).await;

    server.terminate();
    let update =
        within_timeout("a change of health", statuses.next()).await.expect("the health stream stays open");
    assert_eq!(update.expect("health changes before the stream ends").status(), ServingStatus::NotServing);
    // Longer than the drain of a server without calls takes.
    let ended = timeout(Duration::from_secs(3), server.exit()).await;
    assert!(ended.is_err(), "the server exited with a call in flight: {ended:?}");
    locker.batch_execute("COMMIT").await.unwrap();
    let appended = within_timeout("the answer", appending).await.unwrap().unwrap();
    assert_eq!(appended[0].sequence, 1);
    assert_eq!(server.exit().await.code(), Some(0));
    assert!(!server.log().contains("deadline passed"), "{}", server.log());
}
