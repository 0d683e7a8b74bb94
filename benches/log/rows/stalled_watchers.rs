//! Watchers that do not read (stalled watchers), among many that do.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost_client::{
    Client,
    pb::{
        AllJobs, FromNow, WatchEventsRequest, WatchEventsResponse,
        watch_events_request::{Scope, Start},
        watch_events_response::Message,
    },
};
use tokio::{task::JoinSet, time::timeout};
use tonic::Streaming;

use super::{fan_out::Watchers, watch};
use crate::{
    Result,
    event_service::endpoint,
    harness::{Harness, serve},
    report::{Goal, Measure, Outcome},
    store::Store,
};

/// Stalled watchers; they watch all jobs.
const STALLED: usize = 100;
/// Connections of the stalled watchers alone.
const STALLED_CONNECTIONS: usize = 4;
/// HTTP/2 window of each stalled watcher's stream, in bytes.
const WINDOW_BYTES: u32 = 64 * 1024;
/// Goal for the server's memory for each stalled watcher, in kB.
const GOAL_KB: f64 = 1_500.0;
/// Limit for a stalled watcher to receive all events once it reads.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Measures the delays of 1,000 watchers with and without stalled watchers, while 10,000
/// other watchers are idle, and the server's memory for the stalled ones. Checks that the
/// stalled watchers receive all events once they read. There is one round, since reading
/// all events takes as long as the rest of the row.
pub(super) async fn measure(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let server = serve(&harness.database().await?).await;
    let watch::WatchLoad { accounts, jobs, senders, watchers } = watch::watch_load(server.address).await?;
    let idle_jobs: Arc<[String]> =
        accounts.create_more_jobs(server.address, jobs.len(), jobs.len()).await?.into();
    let idle_store =
        Store::milepost(server.address, &accounts.customer, idle_jobs, super::fan_out::CONNECTIONS).await?;
    let idle_watchers = Watchers::open(&idle_store).await?;

    let mut delay = Outcome::new(name, "ms p99").compared_with("none stalled", None);
    let mut memory = Outcome::new(format!("{name}-memory"), "kB/watcher")
        .compared_with("none", Some(Goal::Within(GOAL_KB)));
    harness.checkpoint().await?;
    let without_stalled = watch::round(harness, &senders, watch::open(&watchers).await?).await?;
    let before = server.resident_bytes();
    let mut connections = Vec::new();
    for _ in 0..STALLED_CONNECTIONS {
        // With a small window, unread events soon stay in the server.
        let endpoint = endpoint(server.address)?.initial_stream_window_size(WINDOW_BYTES);
        let client = Client::new(endpoint.connect().await?).with_credential(&accounts.customer.key_secret)?;
        connections.push(client.events());
    }
    let open = |number: usize| {
        let mut client = connections[number % STALLED_CONNECTIONS].clone();
        let request = WatchEventsRequest {
            scope: Some(Scope::AllJobs(AllJobs::default())),
            start: Some(Start::FromNow(FromNow {})),
            ..Default::default()
        };
        async move {
            let mut stream = client.watch_events(request).await?.into_inner();
            stream.message().await?.ok_or("a watch ended before it caught up")?;
            Ok::<_, crate::Error>(stream)
        }
    };
    let stalled: Vec<_> = stream::iter(0..STALLED).map(open).buffered(20).try_collect().await?;
    harness.checkpoint().await?;
    delay.add_milepost(watch::round(harness, &senders, watch::open(&watchers).await?).await?);
    delay.add_peer(without_stalled);
    let bytes = server.resident_bytes().saturating_sub(before);
    memory.add_milepost(Measure::of(
        f64::from(u32::try_from(bytes / 1_000)?) / f64::from(u32::try_from(STALLED)?),
    ));
    idle_watchers.check()?;

    let events = watch::events_per_job(harness) * jobs.len();
    let mut reading: JoinSet<Result<()>> = JoinSet::new();
    for stream in stalled {
        reading.spawn(async move { timeout(TIMEOUT, read_all(stream, events)).await? });
    }
    while let Some(read) = reading.join_next().await {
        read??;
    }
    Ok(vec![delay, memory])
}

/// Reads this number of events, and checks that each job's are in order, none twice and
/// none missing.
async fn read_all(mut stream: Streaming<WatchEventsResponse>, events: usize) -> Result<()> {
    let mut last: HashMap<String, i64> = HashMap::new();
    let mut read = 0;
    while read < events {
        let response = stream.message().await?.ok_or("a watch ended")?;
        let Some(Message::Events(watched)) = response.message else { continue };
        for event in watched.events {
            let sequence = event.sequence;
            if let Some(last) = last.insert(event.job_id, sequence)
                && sequence != last + 1
            {
                return Err(format!("a stalled watcher received event {sequence} after event {last}").into());
            }
            read += 1;
        }
    }
    if read == events {
        Ok(())
    } else {
        Err(format!("a stalled watcher received {read} events of {events}").into())
    }
}
