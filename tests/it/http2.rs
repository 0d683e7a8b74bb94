//! What stands below the API: deadlines as gRPC has them, and HTTP/2's own
//! limits. By clients who look after nothing by themselves.

use std::net::SocketAddr;

use bytes::{BufMut as _, Bytes, BytesMut};
use diesel_async::SimpleAsyncConnection as _;
use h2::{
    RecvStream,
    client::{Connection, ResponseFuture, SendRequest},
};
use http::{HeaderMap, Request};
use milepost::{
    limits,
    pb::{self, ErrorReason},
};
use prost::Message;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, Status};

use crate::support::{
    STREAMS_PER_CONNECTION, ServerProcess, TestDatabase, TestServer, User, assert_refused, info,
    within_timeout,
};

/// Kinds of frames, flags and codes (RFC 9113).
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

/// Calls a method of EventService with one message and a deadline that only the
/// server knows of: tonic's client would keep it itself.
async fn call(
    server: &TestServer,
    user: &User,
    method: &str,
    timeout: &str,
    message: &impl Message,
) -> http::Response<RecvStream> {
    let (client, connection) = connect(server.address).await;
    tokio::spawn(connection);
    let mut request = request(server.address, user, method);
    request.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
    let answer = send(client.ready().await.unwrap(), request, message);
    within_timeout("an answer", answer).await.unwrap()
}

fn request(address: SocketAddr, user: &User, method: &str) -> Request<()> {
    Request::post(format!("http://{address}/milepost.v1.EventService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {}", user.key_secret))
        .body(())
        .unwrap()
}

/// Sends the request with its one message.
fn send(mut client: SendRequest<Bytes>, request: Request<()>, message: &impl Message) -> ResponseFuture {
    let (answer, mut body) = client.send_request(request, false).unwrap();
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.encoded_len().try_into().unwrap());
    message.encode(&mut frame).unwrap();
    body.send_data(frame.freeze(), true).unwrap();
    answer
}

/// The status in headers or trailers.
fn status(headers: &HeaderMap) -> Result<(), Status> {
    match Status::from_header_map(headers).expect("a status") {
        status if status.code() == Code::Ok => Ok(()),
        status => Err(status),
    }
}

/// Reads a stream of answers to its end: how many bytes, and with which status.
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
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    (provider, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_past_the_deadline_of_its_client_is_told_so_with_details() {
    let server = TestServer::start().await;
    let (mut provider, job) = job(&server).await;
    let append = |name: &str| pb::AppendEventsRequest {
        job: Some(pb::append_events_request::Job::JobId(job.id.clone())),
        expected_sequence: None,
        events: vec![info(name)],
    };
    let mut holder = server.database.connect().await;
    let hold = format!("BEGIN; SELECT 1 FROM jobs WHERE id = '{}' FOR UPDATE", job.id);
    holder.batch_execute(&hold).await.unwrap();
    // Again and again: tonic has a timer of its own for the same deadline.
    for timeout in ["100m", "0S", "1n", "50000u", "100m", "100m"] {
        let answer = call(&server, &provider, "AppendEvents", timeout, &append("held")).await;
        assert_refused(status(answer.headers()), Code::DeadlineExceeded, ErrorReason::DeadlineExceeded);
    }
    holder.batch_execute("COMMIT").await.unwrap();
    // One that is far away, and what is no deadline, do no harm.
    for timeout in ["99999999H", "5", "x", "-1S"] {
        let answer = call(&server, &provider, "AppendEvents", timeout, &append("free")).await;
        assert_eq!(read(answer.into_body()).await.1.map_err(|status| status.code()), Ok(()), "{timeout}");
    }
    assert_eq!(provider.list(&job).await.iter().filter(|event| event.name == "free").count(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_covers_all_of_a_stream() {
    let server = TestServer::start().await;
    let (mut provider, job) = job(&server).await;
    provider.append(&job, [info("past")]).await;
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let watch = pb::WatchEventsRequest { scope, ..Default::default() };
    let answer = call(&server, &provider, "WatchEvents", "1S", &watch).await;
    let (bytes, status) = read(answer.into_body()).await;
    assert!(bytes > 0, "the past came before");
    assert_refused(status, Code::DeadlineExceeded, ErrorReason::DeadlineExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_tells_how_many_streams_it_may_have_and_refuses_one_more() {
    let server = TestServer::start().await;
    let mut client = Frames::connect(server.address).await;
    let told = client.settings.iter().find(|(id, _)| *id == 3).map(|(_, value)| *value);
    assert_eq!(told, Some(STREAMS_PER_CONNECTION));
    // Each waits for its message.
    for _ in 0..STREAMS_PER_CONNECTION {
        client.open(END_HEADERS).await;
    }
    let last = client.open(END_HEADERS).await;
    assert_eq!(client.until(RST_STREAM).await, (last, REFUSED_STREAM));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_gone_without_a_word_is_let_go_and_its_streams_count_no_longer() {
    let database = TestDatabase::migrated().await;
    let settings = [
        ("DATABASE_URL", database.url.as_str()),
        ("MILEPOST_UNSAFE_DATABASE", "true"),
        ("MILEPOST_KEEPALIVE_INTERVAL_S", "1"),
        ("MILEPOST_KEEPALIVE_TIMEOUT_S", "1"),
        ("MILEPOST_STREAMS_PER_USER", "1"),
    ];
    let settings = settings.map(|(name, value)| (name, value.to_owned())).to_vec();
    let server = ServerProcess::start_with("127.0.0.1", settings).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let watch = pb::WatchEventsRequest { scope, ..Default::default() };
    let mut lives = customer.clone().watch(&job).await;
    lives.caught_up().await;

    // Nobody turns the crank of this one any more, which answers PINGs, once it
    // has its stream.
    let (client, mut connection) = connect(server.address).await;
    let opening = async {
        let client = client.ready().await.unwrap();
        within_timeout("a stream", send(client, request(server.address, &provider, "WatchEvents"), &watch))
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
    let room = async { while provider.watch_by(watch.clone()).await.is_err() {} };
    within_timeout("the end of who does not answer", room).await;
    let end = within_timeout("the end of the connection", connection).await;
    // Closed, with or without a word.
    drop((end, opened));

    // Who answers stays.
    provider.append(&job, [info("later")]).await;
    assert_eq!(lives.events(1).await[0].name, "later");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_resets_what_they_asked_for_again_and_again_is_cut_off() {
    let server = TestServer::start().await;
    // In one go, so that none is looked at in between.
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
    reset(limits::PENDING_RESET_STREAMS).await.is_answered().await;
    let mut client = reset(limits::PENDING_RESET_STREAMS + 1).await;
    assert_eq!(client.until(GOAWAY).await.1, ENHANCE_YOUR_CALM);
    // Others are served.
    server.customer().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_faulty_requests_again_and_again_is_cut_off() {
    let server = TestServer::start().await;
    let mut client = Frames::connect(server.address).await;
    for _ in 0..limits::FAULTY_STREAMS {
        client.ask_faultily().await;
    }
    client.is_answered().await;
    client.ask_faultily().await;
    assert_eq!(client.until(GOAWAY).await.1, ENHANCE_YOUR_CALM);
}

/// POST, http, and SignUp's path, which waits for its message (RFC 7541: three
/// from the static table, the path a literal of its index 4).
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

/// A client that sends and sees frames as they are.
struct Frames {
    stream: TcpStream,
    last: u32,
    /// Id and value of what the server told first.
    settings: Vec<(u16, u32)>,
}

impl Frames {
    async fn connect(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
        let mut client = Self { stream, last: 0, settings: Vec::new() };
        let (kind, _, payload) = client.read().await;
        assert_eq!(kind, 4, "settings come first");
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
        // It may have been cut off already.
        let _ = within_timeout("the server to read", self.stream.write_all(frames)).await;
    }

    async fn open(&mut self, flags: u8) -> u32 {
        let stream = self.next_stream();
        self.send(&frame(HEADERS, flags, stream, REQUEST)).await;
        stream
    }

    /// With `:status`, in a request.
    async fn ask_faultily(&mut self) {
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

    /// All that was sent was read, and was not too much.
    async fn is_answered(&mut self) {
        self.send(&frame(PING, 0, 0, &[0; 8])).await;
        self.until(PING).await;
    }

    /// Stream and code of the next frame of this kind, which says why something
    /// is over.
    async fn until(&mut self, wanted: u8) -> (u32, u32) {
        loop {
            let (kind, stream, payload) = self.read().await;
            if kind == wanted {
                let code = if kind == GOAWAY { &payload[4..8] } else { &payload[..4] };
                return (stream, u32::from_be_bytes(code.try_into().unwrap()));
            }
        }
    }
}
