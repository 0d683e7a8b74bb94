//! The memory of a server under a hostile load stays below the peak that docs/limits.md
//! derives from the settings.

use std::time::{Duration, Instant};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::future::join_all;
use h2::{RecvStream, SendStream, client::SendRequest};
use http::Request;
use milepost::limits::{BATCH_EVENTS, MESSAGE_BYTES, METADATA_NAMES};
use milepost_client::pb::{self, NewEvent};
use prost::Message as _;
use prost_types::{Struct, Value};
use tokio::{net::TcpStream, time::sleep};
use tonic::Code;

use crate::support::{ServerProcess, User, info, processes::Signal, within_timeout};

const MIB: usize = 1024 * 1024;
/// The defaults of `--streams-per-user` and `--bytes-in-flight-mib`.
const STREAMS: usize = 500;
const BYTES_IN_FLIGHT: usize = 16 * MIB;
const CONNECTIONS: usize = 10;

/// What docs/limits.md has for a byte in flight, a publish stream and a connection.
const OF_BYTE: usize = 16;
const OF_STREAM: usize = 192 * 1024;
const OF_CONNECTION: usize = 2 * MIB;

async fn connect(server: &ServerProcess) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(server.address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    client.ready().await.unwrap()
}

/// Opens a publish stream whose answers are never read.
async fn publish(
    server: &ServerProcess,
    user: &User,
    client: &mut SendRequest<Bytes>,
) -> (SendStream<Bytes>, RecvStream) {
    let path = format!("http://{}/milepost.v1.EventService/PublishEvents", server.address);
    let request = Request::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {}", user.key_secret))
        .body(())
        .unwrap();
    let (answer, batches) = client.send_request(request, false).unwrap();
    let answer = within_timeout("an open stream", answer).await.unwrap();
    (batches, answer.into_body())
}

fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.len().try_into().unwrap());
    frame.put_slice(message);
    frame.freeze()
}

fn batch(job: &pb::Job, events: Vec<NewEvent>) -> Bytes {
    let request = pb::PublishEventsRequest {
        batch_id: "b".to_owned(),
        job: Some(pb::publish_events_request::Job::JobId(job.id.clone())),
        expected_sequence: None,
        events,
    };
    framed(&request.encode_to_vec())
}

/// What takes the most memory once it is decoded.
fn hostile_messages(job: &pb::Job) -> Vec<Bytes> {
    let empty = [0x2a, 0].repeat(MESSAGE_BYTES / 2);
    let fields = (0..METADATA_NAMES).map(|name| (name.to_string(), Value::from(true))).collect();
    let event = NewEvent { id: String::new(), metadata: Some(Struct { fields }), ..info("") };
    let short = NewEvent { id: String::new(), ..info("") };
    vec![
        framed(&empty),
        batch(job, vec![event; BATCH_EVENTS]),
        batch(job, vec![short.clone(); BATCH_EVENTS]),
        batch(job, vec![short]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_of_a_server_stays_below_the_documented_peak_under_a_hostile_load() {
    let server = ServerProcess::start().await;
    let (mut hostile, mut honest) = (server.provider().await, server.provider().await);
    let customer = server.customer().await;
    let mut jobs = Vec::new();
    for provider in [&mut hostile, &mut honest] {
        provider.configuration(&[]).await;
        let job = provider.job(&customer).await;
        provider.append(&job, [info("first")]).await;
        jobs.push(job);
    }
    let idle = server.memory_peak_bytes();
    let peak = idle + OF_BYTE * BYTES_IN_FLIGHT + OF_STREAM * STREAMS + OF_CONNECTION * CONNECTIONS;
    let check = || {
        let now = server.memory_peak_bytes();
        assert!(now <= peak, "{} MiB, more than {} MiB", now / MIB, peak / MIB);
        now
    };

    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        let client = connect(&server).await;
        let opened = (0..STREAMS / CONNECTIONS).map(|_| {
            let (mut client, server, hostile) = (client.clone(), &server, &hostile);
            async move { publish(server, hostile, &mut client).await }
        });
        streams.extend(join_all(opened).await);
    }
    server.signal_postgres(Signal::STOP);
    // Longer than a credential counts as confirmed.
    sleep(Duration::from_secs(6)).await;
    let messages = hostile_messages(&jobs[0]);
    for round in 0..20 {
        for (index, (batches, _)) in streams.iter_mut().enumerate() {
            // A stream that the server has ended takes no more.
            let _ended = batches.send_data(messages[(index + round) % messages.len()].clone(), false);
            if index % 10 == 0 {
                tokio::task::yield_now().await;
                check();
            }
        }
    }
    // Until the server reads no more.
    let (mut last, mut since) = (check(), Instant::now());
    while since.elapsed() < Duration::from_secs(3) {
        sleep(Duration::from_millis(100)).await;
        let now = check();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    server.signal_postgres(Signal::CONT);
    within_timeout("an append of another user", async {
        while let Err(status) = honest.try_append(&jobs[1], [info("second")]).await {
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    check();
}
