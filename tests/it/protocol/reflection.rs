//! How many bytes reflection sends, and to whom.

use std::{net::Ipv4Addr, time::Instant};

use milepost::limits::{
    REFLECTION_BYTES, REFLECTION_BYTES_PER_SECOND, REFLECTION_REQUEST_BYTES, REFLECTION_STREAM_BYTES,
    UNAUTHENTICATED_CALL_BYTES,
};
use milepost_client::pb::ErrorReason;
use prost::Message as _;
use tonic::{Code, Request};
use tonic_reflection::pb::{v1, v1alpha};

use crate::operations::health::SERVICES;
use crate::support::{Clients, TRUSTED_PROXY, TestServer, assert_refused};

/// Asks for the largest file by a short name, as often as one call without a credential may.
macro_rules! read_greedily {
    ($version:ident, $clients:expr, $metadata:expr) => {{
        use $version::{
            server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
        };
        let symbol = MessageRequest::FileContainingSymbol("milepost.v1.User".to_owned());
        let asked = $version::ServerReflectionRequest { host: String::new(), message_request: Some(symbol) };
        // Each message has a header of five bytes.
        let times = UNAUTHENTICATED_CALL_BYTES / (asked.encoded_len() + 5);
        let mut request = Request::new(tokio_stream::iter(vec![asked; times]));
        for (name, value) in $metadata {
            request.metadata_mut().insert(name, value.parse().unwrap());
        }
        let mut client = ServerReflectionClient::new($clients.channel.clone());
        let mut answers = client.server_reflection_info(request).await.unwrap().into_inner();
        let mut bytes = 0;
        loop {
            match answers.message().await {
                Ok(Some(answer)) => bytes += answer.encoded_len(),
                Ok(None) => break (bytes, Ok(())),
                Err(status) => break (bytes, Err(status)),
            }
        }
    }};
}

/// Reads greedily in one stream after the other, until the budget ends one. Returns all bytes.
async fn exhaust(clients: &Clients, name: &'static str, value: &str) -> usize {
    let mut all = 0;
    loop {
        let (bytes, end) = match all / REFLECTION_STREAM_BYTES % 2 {
            0 => read_greedily!(v1, clients, [(name, value)]),
            _ => read_greedily!(v1alpha, clients, [(name, value)]),
        };
        let by_stream = end.as_ref().is_err_and(|status| status.message().contains("in a stream"));
        assert_refused(end, Code::ResourceExhausted, ErrorReason::Overloaded);
        assert!(bytes <= REFLECTION_STREAM_BYTES, "{bytes} bytes in a stream");
        all += bytes;
        if !by_stream {
            return all;
        }
    }
}

/// Asserts that so many bytes are what a budget has that was full at this time.
#[track_caller]
fn assert_full_budget(since: Instant, bytes: usize) {
    let gained = (since.elapsed().as_secs_f64() * REFLECTION_BYTES_PER_SECOND as f64).ceil();
    let most = REFLECTION_BYTES as f64 + gained;
    assert!(bytes > REFLECTION_BYTES / 2 && bytes as f64 <= most, "{bytes} bytes, {most} allowed");
}

/// A header that the server does not read.
const IGNORED: (&str, &str) = ("x-ignored", "");

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_reflection_sends_four_times_as_much_as_it_may_receive() {
    let server = TestServer::start().await;
    let (bytes, end) = read_greedily!(v1, server, [IGNORED]);
    assert_refused(end, Code::ResourceExhausted, ErrorReason::Overloaded);
    assert!(bytes > REFLECTION_STREAM_BYTES / 2 && bytes <= 4 * UNAUTHENTICATED_CALL_BYTES, "{bytes} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_sends_each_address_and_each_user_no_more_than_a_budget() {
    let server = TestServer::start().await;
    let address = |last| server.from(Ipv4Addr::new(127, 0, 0, last));
    // Over several connections and both versions of the protocol it is one budget, also for
    // calls with a credential that is not valid.
    let began = Instant::now();
    let mut bytes = exhaust(&address(2), IGNORED.0, IGNORED.1).await;
    bytes += exhaust(&address(2), IGNORED.0, IGNORED.1).await;
    bytes += exhaust(&address(2), "authorization", "Bearer nonsense").await;
    assert_full_budget(began, bytes);
    assert_full_budget(Instant::now(), exhaust(&address(3), IGNORED.0, IGNORED.1).await);

    let user = server.customer().await;
    let (began, bearer) = (Instant::now(), format!("Bearer {}", user.key_secret));
    let of_user = exhaust(&address(2), "authorization", &bearer).await;
    let elsewhere = exhaust(&address(4), "authorization", &bearer).await;
    assert_full_budget(began, of_user + elsewhere);
    // The user's bytes were not counted for the address.
    assert_full_budget(Instant::now(), exhaust(&address(4), IGNORED.0, IGNORED.1).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_trusted_proxy_each_client_has_its_own_budget() {
    let server = TestServer::start().await;
    let proxy = server.from(TRUSTED_PROXY);
    let name = "x-forwarded-for";
    for client in ["192.0.2.1", "192.0.2.2:4321"] {
        assert_full_budget(Instant::now(), exhaust(&proxy, name, client).await);
    }
    // All addresses of an IPv6 network of 64 bits count as one.
    let began = Instant::now();
    let first = exhaust(&proxy, name, "2001:db8::1").await;
    let second = exhaust(&proxy, name, "2001:db8::2").await;
    assert_full_budget(began, first + second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_of_reflection_has_at_most_1_kib() {
    use v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest,
    };
    let server = TestServer::start().await;
    for (bytes, code) in
        [(REFLECTION_REQUEST_BYTES, Code::NotFound), (REFLECTION_REQUEST_BYTES + 1, Code::OutOfRange)]
    {
        // The field has a tag of one byte and a length of two.
        let symbol = MessageRequest::FileContainingSymbol("x".repeat(bytes - 3));
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(symbol) };
        assert_eq!(request.encoded_len(), bytes);
        let mut client = ServerReflectionClient::new(server.channel.clone());
        let mut answers =
            client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        // A stream whose request is not read ends without an answer.
        let answer = answers.message().await;
        let status = answer.err().map(|status| status.code());
        assert_eq!(status, (code == Code::NotFound).then_some(code), "{bytes} bytes");
    }
}

/// The services that reflection lists. The two versions of the protocol differ only in
/// their package.
macro_rules! listed_services {
    ($version:ident, $channel:expr) => {{
        use $version::{
            server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
            server_reflection_response::MessageResponse,
        };
        let request = $version::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = ServerReflectionClient::new($channel);
        let mut responses =
            client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        match responses.message().await.unwrap().unwrap().message_response.unwrap() {
            MessageResponse::ListServicesResponse(list) => {
                list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        }
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn both_versions_of_reflection_list_the_services() {
    let server = TestServer::start().await;
    let v1 = listed_services!(v1, server.channel.clone());
    let v1alpha = listed_services!(v1alpha, server.channel.clone());
    for service in SERVICES.into_iter().chain(["grpc.health.v1.Health"]) {
        assert!(v1.iter().any(|name| name == service), "{service} in {v1:?}");
        assert!(v1alpha.iter().any(|name| name == service), "{service} in {v1alpha:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_describes_the_messages_of_error_details() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let server = TestServer::start().await;
    let mut client = ServerReflectionClient::new(server.channel.clone());
    for detail in
        ["ErrorInfo", "BadRequest", "PreconditionFailure", "ResourceInfo", "RetryInfo", "QuotaFailure"]
    {
        let symbol = MessageRequest::FileContainingSymbol(format!("google.rpc.{detail}"));
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(symbol) };
        let mut responses =
            client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let response = responses.message().await.unwrap().unwrap().message_response.unwrap();
        assert!(matches!(response, MessageResponse::FileDescriptorResponse(_)), "{detail}: {response:?}");
    }
}
