//! HTTP/1.1 on the port that serves gRPC, and its bounds.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use milepost::limits;
use milepost_client::pb;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};

use super::SHORT_KEEPALIVE;
use crate::support::{ServerProcess, TestDatabase, TestServer, info, named, within_timeout};

/// Sends these bytes and nothing else; returns what the server has answered when it closes the
/// connection.
async fn answer(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    until_closed(&mut stream, 3 * limits::HANDSHAKE).await
}

async fn until_closed(stream: &mut TcpStream, within: Duration) -> String {
    let mut answer = Vec::new();
    let closed = timeout(within, stream.read_to_end(&mut answer)).await;
    let text = String::from_utf8_lossy(&answer).into_owned();
    assert!(closed.is_ok(), "the connection stays open: {text:?}");
    text
}

/// Sends a request that is refused, and reads the answer; the connection stays open.
async fn ask(stream: &mut TcpStream) -> String {
    let request = "POST /milepost.v1.AuthService/GetCurrentUser HTTP/1.1\r\nhost: x\r\n\
                   content-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let whole = |answer: &[u8]| {
        let text = String::from_utf8_lossy(answer).into_owned();
        let (head, body) = text.split_once("\r\n\r\n")?;
        let length: usize = head.split_once("content-length: ")?.1.lines().next()?.parse().ok()?;
        (body.len() >= length).then_some(text)
    };
    loop {
        if let Some(text) = whole(&answer) {
            return text;
        }
        let mut part = [0; 4096];
        let bytes = within_timeout("the answer", stream.read(&mut part)).await.unwrap();
        assert!(bytes > 0, "closed after {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&part[..bytes]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_http_1_cannot_carry_or_that_is_no_call_is_told_so() {
    let server = TestServer::start().await;
    for (request, status, text) in [
        ("GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "404", "no method"),
        ("GET /nothing HTTP/1.0\r\n\r\n", "404", "no method"),
        (
            "POST /grpc.health.v1.Health/Check HTTP/1.1\r\nhost: x\r\ncontent-type: application/grpc\r\n\
             connection: close\r\ncontent-length: 5\r\n\r\n\0\0\0\0\0",
            "505",
            "need HTTP/2",
        ),
        (
            "POST /grpc.health.v1.Health/Check HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
             connection: close\r\ncontent-length: 2\r\n\r\n{}",
            "200",
            // The server may not be ready yet.
            "SERVING\"}",
        ),
        // Without its length.
        (
            "POST /grpc.health.v1.Health/Check HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
             connection: close\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
            "200",
            // The server may not be ready yet.
            "SERVING\"}",
        ),
        // A method that begins as the preface of HTTP/2 does.
        ("PRINT / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "404", "no method"),
        (
            "GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close, upgrade, http2-settings\r\nupgrade: h2c\r\n\
             http2-settings: AAMAAABkAAQAAP__\r\n\r\n",
            "404",
            "no method",
        ),
    ] {
        let answer = answer(server.address, request).await;
        let (head, body) = answer.split_once("\r\n\r\n").expect(request);
        assert_eq!(head.split(' ').nth(1), Some(status), "{request:?}: {head}");
        assert!(body.contains(text) && body.lines().count() == 1, "{request:?}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_closed_that_does_not_say_in_time_what_it_wants() {
    let server = TestServer::start().await;
    // The third is the second request of its connection.
    let mut second = TcpStream::connect(server.address).await.unwrap();
    ask(&mut second).await;
    second.write_all(b"GET / HT").await.unwrap();
    let second = async {
        sleep(limits::HANDSHAKE / 2).await;
        // More of the head does not give it more time.
        second.write_all(b"TP/1.1\r\nhost: ").await.unwrap();
        until_closed(&mut second, 2 * limits::HANDSHAKE).await
    };
    let waits =
        ["", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nhost:"].map(|begun| answer(server.address, begun));
    let (second, first) = tokio::join!(second, futures_util::future::join_all(waits));
    for answer in first.into_iter().chain([second]) {
        assert!(!answer.contains(" 200 "), "{answer}");
    }
    // Others are served meanwhile and afterwards.
    server.customer().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_of_more_than_16_kib_is_refused() {
    let server = TestServer::start().await;
    let head = |bytes: usize| {
        format!(
            "GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-long: {}\r\n\r\n",
            "x".repeat(bytes)
        )
    };
    let fits = answer(server.address, &head(15 * 1024)).await;
    assert!(fits.starts_with("HTTP/1.1 404 "), "{fits}");
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    // The server may close the connection while this is written.
    let _ = stream.write_all(head(64 * 1024).as_bytes()).await;
    let mut status = [0; 13];
    if within_timeout("the end", stream.read_exact(&mut status)).await.is_ok() {
        assert_eq!(&status, b"HTTP/1.1 431 ");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_after_a_minute_and_not_before_the_time_of_a_head() {
    let server = TestServer::start().await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    ask(&mut stream).await;
    sleep(limits::HANDSHAKE + Duration::from_secs(2)).await;
    assert!(ask(&mut stream).await.starts_with("HTTP/1.1 401 "));
    assert_eq!(until_closed(&mut stream, 2 * limits::IDLE).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stalls_ends_with_the_time_of_its_call() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /milepost.v1.AuthService/GetCurrentUser HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         authorization: Bearer {}\r\ncontent-length: 1000\r\n\r\n{{",
        user.key_secret
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = until_closed(&mut stream, 3 * limits::HANDSHAKE).await;
    assert!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
    assert!(answer.contains("DEADLINE_EXCEEDED"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_before_the_body_was_read_arrives() {
    let server = TestServer::start().await;
    let body = "x".repeat(3 * 1024 * 1024);
    for path in ["/", "/milepost.v1.AuthService/GetCurrentUser", "/milepost.v1.AuthService/LogIn"] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        within_timeout("the server to read", stream.write_all(body.as_bytes())).await.unwrap();
        let answer = until_closed(&mut stream, 2 * limits::HANDSHAKE).await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_writes_before_it_reads_gets_the_answer_to_a_request_that_was_not_read() {
    // More than the buffers of the connection hold, and less than is read on.
    const BODY: usize = 7 * limits::MESSAGE_BYTES / 2;
    let server = TestServer::start().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(16 * 1024).unwrap();
    let mut stream = socket.connect(server.address).await.unwrap();
    let head = format!("POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: {BODY}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..BODY / 1024 {
        within_timeout("the server to read", stream.write_all(&[b'x'; 1024])).await.unwrap();
    }
    let mut answered = [0; 12];
    within_timeout("the answer", stream.read_exact(&mut answered)).await.unwrap();
    assert_eq!(&answered, b"HTTP/1.1 404");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_has_a_limited_number_of_connections_and_others_have_their_own() {
    // Both ends of each connection are in this process.
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files }).unwrap();
    let server = TestServer::start().await;
    let connect = async |last: u8| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
        socket.connect(server.address).await.unwrap()
    };
    let mut open = Vec::new();
    for _ in 0..limits::HTTP1_CONNECTIONS_PER_ADDRESS {
        let mut stream = connect(50).await;
        ask(&mut stream).await;
        open.push(stream);
    }
    let mut refused = connect(50).await;
    // A whole request, which without the limit would be answered.
    refused.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    // With a reset, if the server has not read all of it.
    let end = within_timeout("the end", refused.read(&mut [0])).await;
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    ask(&mut connect(51).await).await;
    drop(open);
    let freed = async {
        loop {
            let mut stream = connect(50).await;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
            if stream.read(&mut [0]).await.is_ok_and(|bytes| bytes > 0) {
                return;
            }
        }
    };
    within_timeout("a connection that was closed to count no more", freed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_whose_peer_takes_nothing_any_more_is_disconnected_and_no_longer_counted() {
    let database = TestDatabase::migrated().await;
    let server = ServerProcess::on_with(&database, &SHORT_KEEPALIVE).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    // Far more than a connection holds.
    for _ in 0..20 {
        provider.append(&job, (0..500).map(|n| named(info("x"), format!("{n:0>250}")))).await;
    }
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut dead = socket.connect(server.address).await.unwrap();
    let message = format!("{{\"jobId\":\"{}\"}}", job.id);
    let mut body = vec![0];
    body.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    body.extend_from_slice(message.as_bytes());
    let head = format!(
        "POST /milepost.v1.EventService/WatchEvents HTTP/1.1\r\nhost: x\r\n\
         content-type: application/connect+json\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\n\r\n",
        provider.key_secret,
        body.len()
    );
    dead.write_all(&[head.as_bytes(), &body].concat()).await.unwrap();
    within_timeout("the answer", dead.readable()).await.unwrap();

    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let watch = pb::WatchEventsRequest { scope, ..Default::default() };
    let freed = async { while provider.watch_by(watch.clone()).await.is_err() {} };
    within_timeout("the end of the stream whose peer takes nothing", freed).await;
    drop(dead);
}
