//! SIGTERM: the server exits within the drain deadline whatever clients do, and at
//! once if no call is in flight.

use std::time::Duration;

use milepost_client::pb::{self, event_service_client::EventServiceClient};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::Instant};
use tonic::{Request, transport::Endpoint};

use crate::support::{DRAIN_DEADLINE, ServerProcess, info, named};

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
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
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
