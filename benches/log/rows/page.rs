//! The watch of a page, which is JSON over HTTP/1.1, compared with a watch by gRPC: the
//! server's memory for each stream, and its processor time for each message. As each
//! reader has another device, each stream has a connection of its own.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use http::Version;
use milepost_testing::connect_client::JsonWatch;
use serde_json::json;

use super::fan_out::Watchers;
use crate::{
    Result,
    accounts::Accounts,
    harness::{Harness, serve},
    report::{Goal, Measure, Outcome},
    store::{EventStream, Store},
};

/// Fewer than the HTTP/1.1 connections that a server takes from one address.
const STREAMS: u32 = 900;
/// Events in a round, each a message to every stream.
const EVENTS: u32 = 200;

#[derive(Clone, Copy)]
enum Protocol {
    Page,
    Grpc,
}

pub(super) async fn measure(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let goal = Some(Goal::AtMost(1.5));
    let mut memory = Outcome::new(format!("{name}-memory"), "kB/stream").compared_with("gRPC", goal);
    let mut cost = Outcome::new(format!("{name}-cost"), "µs/message").compared_with("gRPC", goal);
    for _ in 0..harness.options.rounds {
        let [bytes, micros] = watch(harness, Protocol::Page).await?;
        memory.add_milepost(bytes);
        cost.add_milepost(micros);
        let [bytes, micros] = watch(harness, Protocol::Grpc).await?;
        memory.add_peer(bytes);
        cost.add_peer(micros);
    }
    Ok(vec![memory, cost])
}

/// The memory of a stream in kB, and the processor time of a message in microseconds, of a
/// new server: a process seldom returns memory.
async fn watch(harness: &Harness, protocol: Protocol) -> Result<[Measure; 2]> {
    let server = serve(&harness.database().await?).await;
    let accounts = Accounts::create(server.address).await;
    let jobs = accounts.create_jobs(server.address, 1).await?;
    let writer = Store::milepost(server.address, &accounts.provider, jobs.clone().into(), 1).await?;
    writer.writer(0).append(&writer.logs, 0, 0).await?;
    let before = server.resident_bytes();
    let (job, reader) = (&jobs[0], &accounts.customer);
    let open = |_| async move {
        match protocol {
            Protocol::Page => {
                let request = json!({"jobId": job, "fromNow": {}});
                let secret = &reader.key_secret;
                let mut watch = JsonWatch::open(server.address, Version::HTTP_11, secret, &request).await;
                watch.until("caughtUp").await;
                Ok((EventStream::Page(Box::new(watch)), None))
            }
            Protocol::Grpc => {
                let store = Store::milepost(server.address, reader, [job.clone()].into(), 1).await?;
                store.watch(0, 0).await
            }
        }
    };
    let streams = stream::iter(0..STREAMS).map(open).buffer_unordered(50).try_collect().await?;
    let watchers = Watchers::of(streams);
    watchers.append_and_wait(&writer).await?;
    let bytes = u32::try_from(server.resident_bytes().saturating_sub(before))?;
    let started = server.processor_time();
    for _ in 0..EVENTS {
        watchers.append_and_wait(&writer).await?;
    }
    let micros = (server.processor_time() - started).as_secs_f64() * 1e6;
    let measures = [f64::from(bytes) / 1e3 / f64::from(STREAMS), micros / f64::from(STREAMS * EVENTS)];
    Ok(measures.map(Measure::of))
}
