//! Publish streams with messages that cannot be appended, and ones that are not read.

use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use milepost::limits::MESSAGE_BYTES;
use milepost_client::pb::{self, publish_events_response::Outcome};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, client::Grpc};

use super::{Hostile, TIMEOUT, encoded::EncodedRequests, requests};

/// Messages of one stream of empty events.
const MESSAGES: usize = 6;
/// Batches that are sent over a stream which is not read, unless the server stops reading.
const UNREAD_BATCHES: usize = 100;
/// After this time the server reads no more of a stream.
const STUCK: Duration = Duration::from_secs(1);
const PAUSE_MS: u64 = 1_000;
const UNREAD_PAUSE_MS: u64 = 4_000;
/// Longest time for which a stream that the server does not read stays open.
const HOLD_MS: u64 = 1_000;

/// Publishes messages of 1 MiB whose events are empty: two bytes each, and a hundred times as
/// much once they are decoded.
pub async fn publish_empty_events(mut hostile: Hostile) {
    // Field 5 of PublishEventsRequest, with 0 bytes.
    let message = Bytes::from([0x2a, 0].repeat(MESSAGE_BYTES / 2));
    while !hostile.is_finishing() {
        let messages = vec![message.clone(); MESSAGES];
        match timeout(TIMEOUT, publish(&hostile, messages)).await {
            Ok(Ok(answers)) => read(&hostile, answers.into_inner()).await,
            Ok(Err(status)) => {
                hostile.refused(&status);
            }
            Err(_) => hostile.count(|answers| answers.unanswered += 1),
        }
        hostile.pause(PAUSE_MS).await;
    }
}

async fn publish(
    hostile: &Hostile,
    messages: Vec<Bytes>,
) -> Result<Response<Streaming<pb::PublishEventsResponse>>, Status> {
    let mut grpc = Grpc::new(hostile.context.service(hostile.replica, &hostile.context.hostile));
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::from_static("/milepost.v1.EventService/PublishEvents");
    grpc.streaming(Request::new(tokio_stream::iter(messages)), path, EncodedRequests).await
}

/// Counts the answers to the end of a stream.
async fn read(hostile: &Hostile, mut answers: Streaming<pb::PublishEventsResponse>) {
    loop {
        match timeout(TIMEOUT, answers.message()).await {
            Ok(Ok(Some(answer))) => match answer.outcome {
                Some(Outcome::Refused(_)) => hostile.count(|answers| answers.refused += 1),
                Some(Outcome::Appended(_)) | None => {
                    hostile.context.record_unexpected("a batch of empty events was not refused".to_owned());
                }
            },
            Ok(Ok(None)) => return,
            Ok(Err(status)) => {
                hostile.refused(&status);
                return;
            }
            Err(_) => return hostile.count(|answers| answers.unanswered += 1),
        }
    }
}

/// Publishes one batch again and again, does not read the answers, and goes on until the
/// server reads no more.
pub async fn leave_answers_unread(mut hostile: Hostile) {
    while let Some(job) = hostile.create_job().await {
        let request = pb::PublishEventsRequest {
            batch_id: "again".to_owned(),
            job: Some(pb::publish_events_request::Job::JobId(job)),
            expected_sequence: None,
            events: requests::small_events(),
        };
        let mut client = hostile.context.slow_client(hostile.replica, &hostile.context.hostile);
        let (batches, receiver) = mpsc::channel(1);
        let answers = hostile.call(client.events.publish_events(ReceiverStream::new(receiver))).await;
        for _ in 0..UNREAD_BATCHES {
            let sent = timeout(STUCK, batches.send(request.clone())).await;
            if answers.is_err() || !matches!(sent, Ok(Ok(()))) || hostile.is_finishing() {
                break;
            }
        }
        hostile.pause(HOLD_MS).await;
        drop((answers, batches));
        // While it is open, it leaves the tenant's other loads no bytes in flight.
        hostile.pause(UNREAD_PAUSE_MS).await;
    }
}
