//! Limits of a call: the bytes of its message, and how many unauthenticated calls are served at once.

use std::fmt::Debug;

use milepost::limits::{
    MESSAGE_BYTES, PASSWORD_MIN_BYTES, UNAUTHENTICATED_CALL_BYTES, UNAUTHENTICATED_CALLS,
};
use milepost_client::pb::{self, ErrorReason};
use prost::Message as _;
use tokio::task::JoinSet;
use tonic::{Code, Response, Status, Streaming};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};

use super::scene::{Scene, sign_up};
use crate::support::{
    Clients, PASSWORD, STREAMS_PER_CONNECTION, TestServer, assert_refused, raw, within_timeout,
};

/// The message, padded to exactly `bytes` bytes by an unknown field.
fn padded(mut message: Vec<u8>, bytes: usize) -> Vec<u8> {
    message.extend([0xFA, 0x7F]);
    // The length as a varint of three bytes, whatever its value.
    let rest = bytes - message.len() - 3;
    let groups = [rest & 0x7F | 0x80, rest >> 7 & 0x7F | 0x80, rest >> 14];
    message.extend(groups.map(|group| u8::try_from(group).unwrap()));
    message.resize(bytes, 0);
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_has_at_most_one_mebibyte() {
    let scene = Scene::new().await;
    let padded = |bytes| padded(Vec::new(), bytes);
    scene.call("AuthService/GetCurrentUser", padded(MESSAGE_BYTES)).await.unwrap();
    let status = scene.call("AuthService/GetCurrentUser", padded(MESSAGE_BYTES + 1)).await.unwrap_err();
    // tonic refuses such a message itself, with OUT_OF_RANGE.
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(status.message().contains(&MESSAGE_BYTES.to_string()), "{status:?}");

    // In a stream such a message ends the stream, after the batches before it are
    // answered.
    let batches = [scene.valid_request("EventService/PublishEvents"), padded(MESSAGE_BYTES + 1)];
    let channel = scene.server.channel.clone();
    let opened = raw::open(channel, Some(&scene.secret), "EventService/PublishEvents", batches);
    let mut answers = opened.await.unwrap();
    assert!(within_timeout("an answer", answers.message()).await.unwrap().is_some());
    let status = within_timeout("the end", answers.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unauthenticated_call_sends_at_most_64_kib() {
    let server = TestServer::start().await;
    // The limit includes the five bytes of the prefix of each gRPC message.
    let at = HealthCheckRequest { service: "x".repeat(UNAUTHENTICATED_CALL_BYTES - 5 - 4) };
    assert_eq!(at.encoded_len(), UNAUTHENTICATED_CALL_BYTES - 5);
    let mut past = at.clone();
    past.service.push('x');
    let mut health = HealthClient::new(server.channel.clone());
    assert_eq!(health.check(at).await.unwrap_err().code(), Code::NotFound);
    let sign_up = async |bytes| {
        let message = padded(sign_up(PASSWORD_MIN_BYTES).encode_to_vec(), bytes - 5);
        let mut answers = raw::open(server.channel.clone(), None, "AuthService/SignUp", [message]).await?;
        within_timeout("an answer", answers.message()).await
    };
    assert!(sign_up(UNAUTHENTICATED_CALL_BYTES).await.unwrap().is_some());
    for refused in
        [sign_up(UNAUTHENTICATED_CALL_BYTES + 1).await.map(drop), health.check(past).await.map(drop)]
    {
        let status = refused.unwrap_err();
        assert_eq!(status.code(), Code::OutOfRange);
        assert!(status.message().contains(&UNAUTHENTICATED_CALL_BYTES.to_string()), "{status:?}");
    }
}

async fn watch_health(clients: &Clients) -> Result<Streaming<HealthCheckResponse>, Status> {
    let mut health = HealthClient::new(clients.channel.clone());
    health.watch(HealthCheckRequest::default()).await.map(Response::into_inner)
}

#[track_caller]
fn assert_overloaded<T: Debug>(refused: Result<T, Status>) {
    let refusal = assert_refused(refused, Code::ResourceExhausted, ErrorReason::Overloaded);
    assert!(refusal.details.retry_info().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_streams_open_at_once_are_limited() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let (mut connections, mut watching) = (Vec::new(), Vec::new());
    for n in 0..UNAUTHENTICATED_CALLS {
        if n % STREAMS_PER_CONNECTION as usize == 0 {
            connections.push(server.other_clients());
        }
        watching.push(watch_health(connections.last().unwrap()).await.unwrap());
    }
    assert_overloaded(watch_health(&server).await);
    // Other calls still pass, with and without a credential.
    let check = HealthCheckRequest::default();
    HealthClient::new(server.channel.clone()).check(check).await.unwrap();
    user.clone().session.current_user().await.unwrap();
    let log_in = pb::LogInRequest { email: user.email.clone(), password: PASSWORD.to_owned() };
    server.anonymous().auth.log_in(log_in).await.unwrap();

    watching.pop();
    within_timeout("a free permit", async { while watch_health(&server).await.is_err() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_calls_in_flight_are_limited() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    let log_in = async || {
        let request = pb::LogInRequest { email: user.email.clone(), password: PASSWORD.to_owned() };
        server.anonymous().auth.log_in(request).await
    };
    let mut unfinished = JoinSet::new();
    let mut connection = server.other_clients();
    for n in 0..=UNAUTHENTICATED_CALLS {
        if n % STREAMS_PER_CONNECTION as usize == 0 {
            connection = server.other_clients();
        }
        let channel = connection.channel.clone();
        unfinished.spawn(raw::begin(channel, "AuthService/LogIn"));
    }
    let one_more = within_timeout("a refusal", unfinished.join_next()).await;
    assert_overloaded(one_more.unwrap().unwrap());
    assert_overloaded(log_in().await);
    let answer = user.clone().session.current_user().await;
    answer.unwrap();
    watch_health(&server).await.unwrap();
    drop(unfinished);
    within_timeout("a free permit", async { while log_in().await.is_err() {} }).await;
}
