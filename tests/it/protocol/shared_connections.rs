//! One HTTP/2 connection with the calls of several users, as a proxy or a gateway has it:
//! what becomes of one user's calls ends no other user's.

use std::{net::SocketAddr, time::Duration};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::{
    Reason, RecvStream, SendStream,
    client::{Builder, SendRequest},
};
use milepost_client::pb::{self, watch_events_response::Message as Watched};
use prost::Message;
use tokio::{net::TcpStream, time::timeout};

use super::http2::{framed, request, status};
use crate::support::{CONNECTIONS, PASSWORD, TestServer, User, info, named, within_timeout};

/// How many bytes of an answer the client takes before it has read them.
const WINDOW: u32 = 1024;

/// An HTTP/2 connection. It never connects again.
struct Connection {
    client: SendRequest<Bytes>,
    address: SocketAddr,
}

impl Connection {
    async fn to(server: &TestServer) -> Self {
        let stream = TcpStream::connect(server.address).await.unwrap();
        let mut builder = Builder::new();
        let (client, connection) = builder.initial_window_size(WINDOW).handshake(stream).await.unwrap();
        tokio::spawn(connection);
        Self { client, address: server.address }
    }

    /// Opens a call of EventService; `last` ends its request after the first message.
    async fn open(
        &self,
        secret: &str,
        method: &str,
        first: &impl Message,
        last: bool,
    ) -> (RecvStream, SendStream<Bytes>) {
        let mut client = self.client.clone().ready().await.unwrap();
        let (answer, mut body) = client.send_request(request(self.address, secret, method), false).unwrap();
        body.send_data(framed(first), last).unwrap();
        let answer = within_timeout("the response to start", answer).await.unwrap();
        assert_eq!(answer.status(), 200);
        (answer.into_body(), body)
    }

    async fn watch(&self, secret: &str, job: &pb::Job) -> Messages {
        let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
        let watch = pb::WatchEventsRequest { scope, ..Default::default() };
        let (body, _) = self.open(secret, "WatchEvents", &watch, true).await;
        Messages { body, read: BytesMut::new() }
    }

    /// Appends one event and panics if that is refused.
    async fn append(&self, secret: &str, job: &pb::Job, name: &str) {
        let append = pb::AppendEventsRequest {
            job: Some(pb::append_events_request::Job::JobId(job.id.clone())),
            expected_sequence: None,
            events: vec![info(name)],
        };
        let (mut body, _) = self.open(secret, "AppendEvents", &append, true).await;
        while let Some(data) = within_timeout("the answer", body.data()).await {
            body.flow_control().release_capacity(data.unwrap().len()).unwrap();
        }
        let trailers = within_timeout("trailers", body.trailers()).await.unwrap().unwrap();
        status(&trailers).unwrap();
    }
}

/// The messages of a watch whose client reads.
struct Messages {
    body: RecvStream,
    read: BytesMut,
}

impl Messages {
    async fn next(&mut self) -> Watched {
        loop {
            if let Some((head, rest)) = self.read.split_at_checked(5)
                && let length = u32::from_be_bytes(head[1..].try_into().unwrap()).try_into().unwrap()
                && rest.len() >= length
            {
                self.read.advance(5);
                let message = self.read.split_to(length);
                return pb::WatchEventsResponse::decode(message).unwrap().message.unwrap();
            }
            let data = within_timeout("more of the watch", self.body.data()).await;
            let data = data.expect("the watch stays open").expect("the connection stays open");
            self.body.flow_control().release_capacity(data.len()).unwrap();
            self.read.extend_from_slice(&data);
        }
    }

    async fn caught_up(&mut self) {
        while !matches!(self.next().await, Watched::CaughtUp(_)) {}
    }

    /// The name of the only event of the next message with events.
    async fn name(&mut self) -> String {
        loop {
            if let Watched::Events(events) = self.next().await {
                assert_eq!(events.events.len(), 1);
                return events.events[0].name.clone();
            }
        }
    }
}

/// Waits until the server may send no more of this answer, since the client reads nothing.
async fn fill_window(body: &mut RecvStream) {
    let mut taken = 0;
    while taken < WINDOW as usize {
        taken += within_timeout("the answer", body.data()).await.unwrap().unwrap().len();
    }
}

/// Waits until the server resets the stream.
async fn reset(body: &mut RecvStream) {
    let error = within_timeout("the reset", body.data()).await.unwrap().unwrap_err();
    assert!(error.is_reset() && error.is_remote(), "{error:?}");
    assert_eq!(error.reason(), Some(Reason::CANCEL));
}

/// A server, a connection to it, and a watch of a provider's job over this connection.
struct Fixture {
    server: TestServer,
    connection: Connection,
    provider: User,
    customer: User,
    job: pb::Job,
    watch: Messages,
}

impl Fixture {
    async fn new() -> Self {
        let server = TestServer::start().await;
        let connection = Connection::to(&server).await;
        let (mut provider, customer, job) = server.job(&[]).await;
        // Of more than a frame of HTTP/2.
        provider.append(&job, (0..500).map(|n| named(info("x"), format!("{n:0>250}")))).await;
        let mut watch = connection.watch(&provider.key_secret, &job).await;
        watch.caught_up().await;
        Self { server, connection, provider, customer, job, watch }
    }

    /// Asserts that the provider's calls over the connection go on.
    async fn assert_unharmed(&mut self) {
        self.connection.append(&self.provider.key_secret, &self.job, "later").await;
        assert_eq!(self.watch.name().await, "later");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_not_read_is_reset_alone_when_its_session_ends() {
    let mut fixture = Fixture::new().await;
    let Fixture { server, connection, customer, job, .. } = &fixture;
    let request = pb::LogInRequest { email: customer.email.clone(), password: PASSWORD.to_owned() };
    let session = server.anonymous().auth.log_in(request).await.unwrap().into_inner().session.unwrap();
    let mut unread = connection.watch(&session.secret, job).await;
    fill_window(&mut unread.body).await;
    server.with_secret(&session.secret).auth.log_out(pb::LogOutRequest {}).await.unwrap();
    reset(&mut unread.body).await;
    fixture.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_whose_answers_are_not_read_is_reset_alone_when_its_key_ends() {
    let mut fixture = Fixture::new().await;
    let mut other = fixture.server.provider().await;
    other.configuration(&[]).await;
    let job = other.job(&fixture.customer).await;
    let batch = pb::PublishEventsRequest {
        batch_id: "1".to_owned(),
        job: Some(pb::publish_events_request::Job::JobId(job.id.clone())),
        events: (0..500).map(|_| info("x")).collect(),
        ..Default::default()
    };
    let (mut unread, mut batches) =
        fixture.connection.open(&other.key_secret, "PublishEvents", &batch, false).await;
    fill_window(&mut unread).await;
    let keys = other.session.auth.list_api_keys(pb::ListApiKeysRequest::default()).await.unwrap();
    let api_key_id = keys.into_inner().api_keys[0].id.clone();
    other.session.auth.expire_api_key(pb::ExpireApiKeyRequest { api_key_id }).await.unwrap();
    reset(&mut unread).await;
    // The server has let go of the request too.
    assert!(within_timeout("the reset", std::future::poll_fn(|cx| batches.poll_reset(cx))).await.is_ok());
    fixture.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_that_the_server_does_not_read_holds_up_no_other_call() {
    let mut fixture = Fixture::new().await;
    // It is refused and answered, without being stored.
    let batch = pb::PublishEventsRequest { batch_id: "x".repeat(8 * 1024), ..Default::default() };
    let (_unread, mut batches) =
        fixture.connection.open(&fixture.provider.key_secret, "PublishEvents", &batch, false).await;
    // The client reads no answer, and so the server stops reading; then the windows fill.
    let sending = async {
        loop {
            let frame = framed(&batch);
            batches.reserve_capacity(frame.len());
            while batches.capacity() < frame.len() {
                let capacity = std::future::poll_fn(|cx| batches.poll_capacity(cx)).await;
                assert!(matches!(capacity, Some(Ok(_))), "the stream has ended: {capacity:?}");
            }
            batches.send_data(frame, false).unwrap();
        }
    };
    // No signal tells when the client may send no more.
    assert!(timeout(Duration::from_secs(3), sending).await.is_err());
    fixture.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_not_read_keeps_no_turn_to_read_the_past() {
    let Fixture { connection, provider, customer, .. } = &mut Fixture::new().await;
    let job = &provider.job(customer).await;
    // Messages of a page each that are so small that a second read begins before the first
    // message is sent and uses up the window.
    for _ in 0..2 {
        provider.append(job, (0..500).map(|_| info("x"))).await;
    }
    let mut unread = Vec::new();
    // More than one user may have read the past at a time.
    for _ in 0..CONNECTIONS {
        let mut watch = connection.watch(&provider.key_secret, job).await;
        fill_window(&mut watch.body).await;
        unread.push(watch);
    }
    let mut watch = connection.watch(&provider.key_secret, job).await;
    within_timeout("the past of one that is read", watch.caught_up()).await;
}
