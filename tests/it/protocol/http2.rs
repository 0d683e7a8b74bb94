//! Below the API: gRPC deadlines and the limits of HTTP/2, tested with clients that
//! enforce neither themselves.

use std::net::SocketAddr;

use bytes::{BufMut as _, Bytes, BytesMut};
use diesel_async::SimpleAsyncConnection as _;
use h2::{
    RecvStream,
    client::{Connection, ResponseFuture, SendRequest},
};
use http::{HeaderMap, Request};
use milepost::limits;
use milepost_client::pb::{self, ErrorReason};
use prost::Message;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, Status};

use super::SHORT_KEEPALIVE;
use crate::support::{ServerProcess, TestDatabase, TestServer, User, assert_refused, info, within_timeout};

/// Frame types, flags and error codes of HTTP/2 (RFC 9113).
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_HEADERS: u8 = 4;
const END_STREAM: u8 = 1;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const ENHANCE_YOUR_CALM: u32 = 11;

async fn connect(address: SocketAddr) -> (SendRequest<Bytes>, Connection<TcpStream>) {
    h2::client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap()
}

/// Calls a method of EventService with one message and with `timeout` in the header
/// `grpc-timeout`. The server alone enforces that deadline; tonic's client would
/// enforce it as well.
async fn call(
    server: &TestServer,
    user: &User,
    method: &str,
    timeout: &str,
    message: &impl Message,
) -> http::Response<RecvStream> {
    let (client, connection) = connect(server.address).await;
    tokio::spawn(connection);
    let mut request = request(server.address, &user.key_secret, method);
    request.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
    let answer = send(client.ready().await.unwrap(), request, message);
    within_timeout("an answer", answer).await.unwrap()
}

pub fn request(address: SocketAddr, secret: &str, method: &str) -> Request<()> {
    Request::post(format!("http://{address}/milepost.v1.EventService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {secret}"))
        .body(())
        .unwrap()
}

fn send(mut client: SendRequest<Bytes>, request: Request<()>, message: &impl Message) -> ResponseFuture {
    let (answer, mut body) = client.send_request(request, false).unwrap();
    body.send_data(framed(message), true).unwrap();
    answer
}

/// A message as gRPC sends it: not compressed, with its length before it.
pub fn framed(message: &impl Message) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.encoded_len().try_into().unwrap());
    message.encode(&mut frame).unwrap();
    frame.freeze()
}

/// The gRPC status, from headers or trailers.
pub fn status(headers: &HeaderMap) -> Result<(), Status> {
    match Status::from_header_map(headers).expect("a status") {
        status if status.code() == Code::Ok => Ok(()),
        status => Err(status),
    }
}

/// Reads a response stream to its end. Returns the number of bytes and the status.
async fn read(mut body: RecvStream) -> (usize, Result<(), Status>) {
    let mut bytes = 0;
    while let Some(data) = within_timeout("more of the stream", body.data()).await {
        let data = data.unwrap();
        bytes += data.len();
        body.flow_control().release_capacity(data.len()).unwrap();
    }
    let trailers = within_timeout("trailers", body.trailers()).await.unwrap().expect("trailers");
    (bytes, status(&trailers))
}

async fn job(server: &TestServer) -> (User, pb::Job) {
    let (provider, _, job) = server.job(&[("load", 1)]).await;
    (provider, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_past_its_grpc_timeout_gets_deadline_exceeded_with_details() {
    let server = TestServer::start().await;
    let (mut provider, job) = job(&server).await;
    let append = |name: &str| pb::AppendEventsRequest {
        job: Some(pb::append_events_request::Job::JobId(job.id.clone())),
        expected_sequence: None,
        events: vec![info(name)],
    };
    let mut locker = server.database.lock_job(&job).await;
    // Repeated, because tonic's own timer for the same deadline races with milepost's.
    for timeout in ["100m", "0S", "1n", "50000u", "100m", "100m"] {
        let answer = call(&server, &provider, "AppendEvents", timeout, &append("held")).await;
        assert_refused(status(answer.headers()), Code::DeadlineExceeded, ErrorReason::DeadlineExceeded);
    }
    locker.batch_execute("COMMIT").await.unwrap();
    // A distant deadline and malformed values of `grpc-timeout` have no effect.
    for timeout in ["99999999H", "5", "x", "-1S"] {
        let answer = call(&server, &provider, "AppendEvents", timeout, &append("free")).await;
        assert_eq!(read(answer.into_body()).await.1.map_err(|status| status.code()), Ok(()), "{timeout}");
    }
    assert_eq!(provider.list(&job).await.iter().filter(|event| event.name == "free").count(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_covers_the_whole_stream() {
    let server = TestServer::start().await;
    let (mut provider, job) = job(&server).await;
    provider.append(&job, [info("past")]).await;
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let watch = pb::WatchEventsRequest { scope, ..Default::default() };
    let answer = call(&server, &provider, "WatchEvents", "1S", &watch).await;
    let (bytes, status) = read(answer.into_body()).await;
    assert!(bytes > 0, "the past events come before the deadline");
    assert_refused(status, Code::DeadlineExceeded, ErrorReason::DeadlineExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_announces_max_concurrent_streams_and_refuses_one_more() {
    const STREAMS: u32 = 10;
    let database = TestDatabase::migrated().await;
    let settings =
        [("MILEPOST_STREAMS_PER_CONNECTION", &*STREAMS.to_string()), ("MILEPOST_STREAMS_PER_USER", "2")];
    let server = ServerProcess::on_with(&database, &settings).await;
    let mut client = Frames::connect(server.address).await;
    let announced = client.settings.iter().find(|(id, _)| *id == 3).map(|(_, value)| *value);
    assert_eq!(announced, Some(STREAMS));
    // Each call stays open for seconds, because the server waits for its message. They come at
    // once, so that the last one is there before the first one has ended.
    let streams: Vec<u32> = (0..=STREAMS).map(|_| client.next_stream()).collect();
    let frames = streams.iter().map(|stream| frame(HEADERS, END_HEADERS, *stream, REQUEST));
    client.send(&frames.collect::<Vec<_>>().concat()).await;
    assert_eq!(client.read_until(RST_STREAM).await, (streams[streams.len() - 1], REFUSED_STREAM));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_answering_pings_is_disconnected_and_its_streams_are_no_longer_counted() {
    let database = TestDatabase::migrated().await;
    let server = ServerProcess::on_with(&database, &SHORT_KEEPALIVE).await;
    let (mut provider, customer, job) = server.job(&[]).await;
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let watch = pb::WatchEventsRequest { scope, ..Default::default() };
    let mut live = customer.clone().watch(&job).await;
    live.caught_up().await;

    // Once the stream is open, nothing polls `connection` any more, so that the
    // client answers no PING.
    let (client, mut connection) = connect(server.address).await;
    let opening = async {
        let client = client.ready().await.unwrap();
        within_timeout(
            "a stream",
            send(client, request(server.address, &provider.key_secret, "WatchEvents"), &watch),
        )
        .await
        .unwrap()
    };
    let opened = tokio::select! {
        opened = opening => opened,
        closed = &mut connection => panic!("{closed:?}"),
    };
    assert_eq!(opened.status(), 200);
    let one_more = provider.watch_by(watch.clone()).await;
    assert_refused(one_more, Code::ResourceExhausted, ErrorReason::Overloaded);
    let freed = async { while provider.watch_by(watch.clone()).await.is_err() {} };
    within_timeout("the end of the unresponsive client's stream", freed).await;
    let end = within_timeout("the end of the connection", connection).await;
    // The connection may end with or without an error.
    drop((end, opened));

    // A connection that answers PINGs stays open.
    provider.append(&job, [info("later")]).await;
    assert_eq!(live.events(1).await[0].name, "later");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_resets_too_many_streams_is_closed() {
    let server = TestServer::start().await;
    // In one write, so that the server accepts few streams before their reset.
    let reset = async |streams: usize| {
        let mut client = Frames::connect(server.address).await;
        let mut frames = BytesMut::new();
        for _ in 0..streams {
            let stream = client.next_stream();
            frames.put(frame(HEADERS, END_HEADERS | END_STREAM, stream, REQUEST));
            frames.put(frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes()));
        }
        client.send(&frames).await;
        client
    };
    reset(limits::PENDING_RESET_STREAMS).await.assert_open().await;
    // Far more, since the server may accept streams while it receives the next ones.
    reset(20 * limits::PENDING_RESET_STREAMS).await.assert_closed().await;
    // Other connections are still served.
    server.customer().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_sends_too_many_malformed_requests_is_closed() {
    let server = TestServer::start().await;
    let mut client = Frames::connect(server.address).await;
    for _ in 0..limits::FAULTY_STREAMS {
        client.send_malformed_request().await;
    }
    client.assert_open().await;
    client.send_malformed_request().await;
    assert_eq!(client.read_until(GOAWAY).await.1, ENHANCE_YOUR_CALM);
}

/// The header block of a SignUp call, after which the server waits for the message.
/// By RFC 7541, POST and http are entries of the static table; `:path` and
/// `:authority` are literals with names from that table.
const REQUEST: &[u8] = b"\x83\x86\x04\x1f/milepost.v1.AuthService/SignUp\x01\x01x";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_uint(payload.len().try_into().unwrap(), 3);
    frame.put_u8(kind);
    frame.put_u8(flags);
    frame.put_u32(stream);
    frame.put_slice(payload);
    frame.freeze()
}

/// An HTTP/2 client that writes and reads raw frames.
struct Frames {
    stream: TcpStream,
    last: u32,
    /// Id and value of each setting in the server's first SETTINGS frame.
    settings: Vec<(u16, u32)>,
}

impl Frames {
    async fn connect(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
        let mut client = Self { stream, last: 0, settings: Vec::new() };
        let (kind, _, payload) = client.read().await;
        assert_eq!(kind, 4, "the first frame is SETTINGS");
        let (settings, _) = payload.as_chunks::<6>();
        let parsed = settings
            .iter()
            .map(|&[i, d, v, a, l, u]| (u16::from_be_bytes([i, d]), u32::from_be_bytes([v, a, l, u])));
        client.settings = parsed.collect();
        client
    }

    fn next_stream(&mut self) -> u32 {
        self.last = if self.last == 0 { 1 } else { self.last + 2 };
        self.last
    }

    async fn send(&mut self, frames: &[u8]) {
        // The server may have closed the connection already.
        let _ = within_timeout("the server to read", self.stream.write_all(frames)).await;
    }

    /// A request must not have the pseudo-header `:status` (RFC 9113, section 8.3).
    async fn send_malformed_request(&mut self) {
        let stream = self.next_stream();
        self.send(&frame(HEADERS, END_HEADERS | END_STREAM, stream, &[0x88])).await;
    }

    async fn read(&mut self) -> (u8, u32, Vec<u8>) {
        let read = async {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await.unwrap();
            let [a, b, c, kind, _, stream @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]).try_into().unwrap()];
            self.stream.read_exact(&mut payload).await.unwrap();
            (kind, u32::from_be_bytes(stream), payload)
        };
        within_timeout("a frame", read).await
    }

    /// Asserts by a PING that the server has read every frame and has kept the
    /// connection open.
    async fn assert_open(&mut self) {
        self.send(&frame(PING, 0, 0, &[0; 8])).await;
        self.read_until(PING).await;
    }

    /// Asserts that the server closes the connection; what it has sent may be lost with it.
    async fn assert_closed(&mut self) {
        let mut sent = Vec::new();
        let _ = within_timeout("the end of the connection", self.stream.read_to_end(&mut sent)).await;
    }

    /// Reads up to the next frame of this type. Returns its stream and, of RST_STREAM
    /// and GOAWAY, its error code.
    async fn read_until(&mut self, wanted: u8) -> (u32, u32) {
        loop {
            let (kind, stream, payload) = self.read().await;
            if kind == wanted {
                let code = if kind == GOAWAY { &payload[4..8] } else { &payload[..4] };
                return (stream, u32::from_be_bytes(code.try_into().unwrap()));
            }
        }
    }
}
