//! Requests that are compressed by gzip.

use std::{fs, io::Write as _};

use bytes::Bytes;
use flate2::{Compress, Compression, FlushCompress, write::GzEncoder};
use http_body_util::{BodyExt as _, Full};
use milepost::limits::{MESSAGE_BYTES, UNAUTHENTICATED_CALL_BYTES};
use milepost_client::pb;
use prost::Message as _;
use prost_types::value::Kind;
use tonic::{Code, Status, body::Body, codec::CompressionEncoding::Gzip};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tower::ServiceExt as _;

use crate::support::{
    Clients, PASSWORD, ServerProcess, TestDatabase, TestServer, info, with_metadata, within_timeout,
};

/// What a server may grow by while it refuses messages that decompress to 900 MiB.
const GROWTH_BYTES: usize = 64 * 1024 * 1024;

/// The status of a call whose body is these bytes, which say to be encoded in this way.
async fn send(clients: &Clients, secret: &str, method: &str, encoding: &str, body: Vec<u8>) -> Status {
    let request = http::Request::post(format!("/milepost.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-encoding", encoding)
        .header("authorization", format!("Bearer {secret}"))
        .body(Body::new(Full::new(Bytes::from(body))))
        .unwrap();
    within_timeout("an answer", async {
        let (head, body) = clients.channel.clone().oneshot(request).await.unwrap().into_parts();
        if let Some(status) = Status::from_header_map(&head.headers) {
            return status;
        }
        let trailers = body.collect().await.unwrap().trailers().cloned().unwrap();
        Status::from_header_map(&trailers).unwrap()
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_requests_are_served_and_answers_are_not_compressed() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let mut sign_in = server.anonymous().auth.send_compressed(Gzip).accept_compressed(Gzip);
    let log_in = pb::LogInRequest { email: provider.email.clone(), password: PASSWORD.to_owned() };
    let answer = sign_in.log_in(log_in).await.unwrap();
    assert!(!answer.metadata().contains_key("grpc-encoding"));
    provider.key.auth = provider.key.auth.send_compressed(Gzip);
    provider.key.configurations = provider.key.configurations.send_compressed(Gzip);
    provider.key.jobs = provider.key.jobs.send_compressed(Gzip);
    provider.key.events = provider.key.events.send_compressed(Gzip).accept_compressed(Gzip);
    provider.key.current_user().await.unwrap();
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("in a call")]).await;
    let long = Kind::StringValue("x".repeat(10_000)).into();
    let batch = pb::PublishEventsRequest {
        batch_id: "1".to_owned(),
        job: Some(pb::publish_events_request::Job::JobId(job.id.clone())),
        events: vec![with_metadata(info("in a stream"), [("text", long)])],
        ..Default::default()
    };
    let batches = tokio_stream::iter(vec![batch; 3]);
    let mut answers = provider.key.events.publish_events(batches).await.unwrap().into_inner();
    while let Some(answer) = answers.message().await.unwrap() {
        assert!(matches!(answer.outcome, Some(pb::publish_events_response::Outcome::Appended(_))));
    }
    assert_eq!(provider.list(&job).await.len(), 2, "the batches have the same event id");
    let mut watch = provider.watch(&job).await;
    watch.caught_up().await;
    let mut health = HealthClient::new(server.channel.clone()).send_compressed(Gzip);
    health.check(HealthCheckRequest::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_compression_is_unimplemented_and_the_answer_names_gzip() {
    let server = TestServer::start().await;
    let user = server.customer().await;
    for encoding in ["deflate", "zstd", "br"] {
        let status =
            send(&server, &user.key_secret, "AuthService/GetCurrentUser", encoding, vec![0; 5]).await;
        assert_eq!(status.code(), Code::Unimplemented, "{encoding}: {status:?}");
        let accepted = status.metadata().get("grpc-accept-encoding").unwrap();
        assert_eq!(accepted, "gzip,identity", "{encoding}");
    }
}

/// So many mebibytes of zeros, compressed. It lacks the end, which nobody reads.
fn bomb(mebibytes: usize) -> Vec<u8> {
    const GZIP_HEADER: [u8; 10] = [0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 0xFF];
    let mut mebibyte = Vec::with_capacity(64 * 1024);
    let mut compress = Compress::new(Compression::best(), false);
    // After a full flush what follows does not depend on what came before.
    compress.compress_vec(&vec![0; 1024 * 1024], &mut mebibyte, FlushCompress::Full).unwrap();
    assert_eq!(compress.total_in(), 1024 * 1024);
    [&GZIP_HEADER[..], &mebibyte.repeat(mebibytes)].concat()
}

fn compressed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap();
    [&[1][..], &length.to_be_bytes(), message].concat()
}

fn peak_bytes(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_decompresses_beyond_its_limit_is_refused_without_taking_memory() {
    let database = TestDatabase::migrated().await;
    let server = ServerProcess::on(&database).await;
    let user = server.provider().await;
    let [pid] = server.pids()[..] else { panic!("one process") };
    let call = async |method: &str, message: Vec<u8>| {
        send(&server, &user.key_secret, method, "gzip", compressed(&message)).await
    };
    let assert_too_large = |status: Status, limit: usize| {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert!(status.message().contains(&limit.to_string()), "{status:?}");
    };
    let large = bomb(900);
    assert!(large.len() < MESSAGE_BYTES, "{} bytes", large.len());
    let small = bomb(50);
    assert!(small.len() < UNAUTHENTICATED_CALL_BYTES, "{} bytes", small.len());
    // Each call takes a little memory, also the first one.
    assert_too_large(call("EventService/AppendEvents", bomb(2)).await, MESSAGE_BYTES);
    let before = peak_bytes(pid);
    for _ in 0..3 {
        for method in ["EventService/AppendEvents", "EventService/PublishEvents"] {
            assert_too_large(call(method, large.clone()).await, MESSAGE_BYTES);
        }
        assert_too_large(call("AuthService/LogIn", small.clone()).await, UNAUTHENTICATED_CALL_BYTES);
    }
    let grown = peak_bytes(pid) - before;
    assert!(grown < GROWTH_BYTES, "the server took {grown} bytes");

    // Without a credential the limit counts decompressed bytes, too.
    let log_in = |length| {
        let request = pb::LogInRequest { email: "x".repeat(length), ..Default::default() };
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&request.encode_to_vec()).unwrap();
        encoder.finish().unwrap()
    };
    let shorter = call("AuthService/LogIn", log_in(UNAUTHENTICATED_CALL_BYTES - 100)).await;
    assert_eq!(shorter.code(), Code::InvalidArgument);
    let longer = call("AuthService/LogIn", log_in(UNAUTHENTICATED_CALL_BYTES)).await;
    assert_too_large(longer, UNAUTHENTICATED_CALL_BYTES);
}
