//! Appends that are large, many at once, or stored already.

use futures_util::future::join_all;
use milepost_client::pb;
use tonic::Code;

use super::{Hostile, requests};

/// Large batches in flight: more than the bytes that one user may have in flight.
const LARGE: usize = 5;
/// Replays in flight.
const REPLAYS: usize = 8;
/// Longest pause after large batches, which are stored.
const LARGE_PAUSE_MS: u64 = 3_000;
const PAUSE_MS: u64 = 400;
/// The provider's id of the job to which the tenant appends through both servers.
const ONE_JOB: &str = "one-job";

/// Whether the job of these appends is lost, with others that a failover has lost.
fn is_lost<T>(answers: &[Result<T, Code>]) -> bool {
    answers.iter().any(|answer| matches!(answer, Err(Code::NotFound)))
}

pub async fn append_large_batches(mut hostile: Hostile) {
    while let Some(job) = hostile.create_job().await {
        while !hostile.is_finishing() {
            let of_500 = hostile.random.bool();
            let appends =
                (0..LARGE).map(|_| hostile.append(requests::append(&job, requests::large_events(of_500))));
            let answers = join_all(appends).await;
            hostile.pause(LARGE_PAUSE_MS).await;
            if is_lost(&answers) {
                break;
            }
        }
    }
}

/// Appends a batch of 500, and then the same batch again and again: mostly a small one, and
/// sometimes one of 0.99 MB.
pub async fn replay(mut hostile: Hostile) {
    while let Some(job) = hostile.create_job().await {
        let batches = [requests::small_events(), requests::large_events(true)]
            .map(|events| requests::append(&job, events));
        let mut stored = [false; 2];
        while !hostile.is_finishing() {
            let which = usize::from(hostile.random.u32(..8) == 0);
            let in_flight = match (stored[which], which) {
                (false, _) => 1,
                (true, 0) => REPLAYS,
                (true, _) => LARGE,
            };
            let appends = (0..in_flight).map(|_| hostile.append(batches[which].clone()));
            let answers = join_all(appends).await;
            stored[which] |= answers.iter().any(Result::is_ok);
            hostile.pause(PAUSE_MS).await;
            if is_lost(&answers) {
                break;
            }
        }
    }
}

/// Appends single events to one job, with what may be its last sequence, while the same is
/// done through the other server.
pub async fn append_to_one_job(mut hostile: Hostile) {
    while let Some(job) = hostile.create_job_of(ONE_JOB).await {
        let mut last_sequence = 0;
        while !hostile.is_finishing() {
            let expected = hostile.random.bool().then_some(last_sequence);
            let appends = (0..4).map(|_| {
                let request = requests::append(&job, vec![requests::event()]);
                hostile.append(pb::AppendEventsRequest { expected_sequence: expected, ..request })
            });
            let answers = join_all(appends).await;
            let sequences = answers.iter().flatten().flat_map(|answer| &answer.events);
            last_sequence = sequences.map(|event| event.sequence).max().unwrap_or(last_sequence);
            hostile.pause(PAUSE_MS).await;
            if is_lost(&answers) {
                break;
            }
        }
    }
}
