//! SIGTERM: the exit comes within the deadline, whatever clients do, and at
//! once where nobody waits for anything.

use std::time::Duration;

use milepost::pb::{self, event_service_client::EventServiceClient};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::Instant};
use tonic::{Request, transport::Endpoint};

use crate::support::{DRAIN_DEADLINE, ServerProcess, info, named};

/// The beginning of every HTTP/2 connection (RFC 9113), and an empty SETTINGS
/// frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

async fn saying(server: &ServerProcess, words: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(words).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_idle_or_silent_hold_no_exit_up() {
    let mut server = ServerProcess::start().await;
    let idle = server.customer().await;
    let silent = [
        saying(&server, b"").await,
        saying(&server, &PREFACE[..10]).await,
        saying(&server, PREFACE).await,
        // Never reads, and so never confirms that the server closes.
        saying(&server, &[PREFACE, SETTINGS].concat()).await,
    ];
    let started = Instant::now();
    server.terminate().await;
    assert_eq!(server.exit().await.code(), Some(0));
    assert!(started.elapsed() < DRAIN_DEADLINE, "the whole deadline was used");
    assert!(!server.log().contains("deadline passed"), "{}", server.log());
    drop((idle, silent));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_does_not_read_is_waited_for_until_the_deadline() {
    let mut server = ServerProcess::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    // Far more than the windows of HTTP/2 below.
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
    // What follows fills the window, which nobody says.
    tokio::time::sleep(Duration::from_millis(500)).await;

    let started = Instant::now();
    server.terminate().await;
    assert_eq!(server.exit().await.code(), Some(0));
    // Its own Postgres is stopped after that.
    assert!(started.elapsed() < DRAIN_DEADLINE * 2, "{:?}", started.elapsed());
    assert!(server.log().contains("deadline passed"), "it was not waited for: {}", server.log());
    drop(unread);
}
