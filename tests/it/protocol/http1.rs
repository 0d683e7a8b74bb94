//! HTTP/1.1 on the port that serves gRPC.

use std::net::SocketAddr;

use milepost::limits;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::TestServer;

/// Sends these bytes and nothing else; returns what the server has answered when it closes the
/// connection.
async fn answer(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A version of HTTP that begins late may take its own time for the head.
    let closed = timeout(3 * limits::HANDSHAKE, stream.read_to_end(&mut answer)).await;
    assert!(closed.is_ok(), "{request:?} keeps its connection open");
    String::from_utf8(answer).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_over_http_1_is_told_to_use_http_2() {
    let server = TestServer::start().await;
    for request in [
        "GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "POST /grpc.health.v1.Health/Check HTTP/1.1\r\nhost: x\r\ncontent-type: application/grpc\r\n\
         content-length: 5\r\n\r\n\0\0\0\0\0",
        // A method that begins as the preface of HTTP/2 does.
        "PRINT / HTTP/1.1\r\nhost: x\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n\
         http2-settings: AAMAAABkAAQAAP__\r\n\r\n",
    ] {
        let answer = answer(server.address, request).await;
        let (head, body) = answer.split_once("\r\n\r\n").expect(request);
        assert_eq!(head.split(' ').nth(1), Some("505"), "{request:?}: {head}");
        assert!(body.contains("needs HTTP/2") && body.lines().count() == 1, "{request:?}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_closed_that_does_not_say_in_time_what_it_wants() {
    let server = TestServer::start().await;
    let waits =
        ["", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nhost:"].map(|begun| answer(server.address, begun));
    for answer in futures_util::future::join_all(waits).await {
        assert!(!answer.contains(" 200 "), "{answer}");
    }
    // Others are served meanwhile and afterwards.
    server.customer().await;
}
