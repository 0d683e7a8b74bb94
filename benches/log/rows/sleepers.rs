//! Watchers that never read, among many that do.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost::pb::{
    AllJobs, FromNow, WatchEventsRequest, WatchEventsResponse,
    event_service_client::EventServiceClient,
    watch_events_request::{Scope, Start},
    watch_events_response::Message,
};
use tokio::{task::JoinSet, time::timeout};
use tonic::{
    Request, Streaming,
    metadata::{Ascii, MetadataValue},
};

use super::{fan_out::Audience, watch};
use crate::{
    Result,
    bed::Bed,
    report::{Goal, Measure, Outcome},
    service::endpoint,
    store::Store,
};

/// Those that never read; they watch all jobs, on connections of their own.
const SLEEPERS: usize = 100;
const SLEEPERS_CONNECTIONS: usize = 4;
/// What each of them takes unread, in bytes.
const WINDOW_BYTES: u32 = 64 * 1024;
/// What each of them may cost the server in memory, in kB.
const MOST_KB: f64 = 1_500.0;
/// Longest that they may take to catch up once they wake.
const TIMEOUT: Duration = Duration::from_secs(900);

/// The delays of 1,000 watchers with and without sleepers, while 10,000 others
/// stand idle; what the sleepers cost; and that they get everything once they
/// wake. One round: waking is as much work as all the rest.
pub(super) async fn measure(bed: &Bed, name: &str) -> Result<Vec<Outcome>> {
    let server = bed.server(&bed.database().await?).await?;
    let watch::Scene { tenant, jobs, senders, watchers } = watch::scene(server.address).await?;
    let idle: Arc<[String]> = tenant.more_jobs(server.address, jobs.len(), jobs.len()).await?.into();
    let idle =
        Store::milepost(server.address, &tenant.customer_key, idle, super::fan_out::CONNECTIONS).await?;
    let idle = Audience::gather(&idle).await?;

    let mut delay = Outcome::new(name, "ms p99", "none asleep", None);
    let mut memory =
        Outcome::new(format!("{name}-memory"), "kB/sleeper", "none", Some(Goal::Within(MOST_KB)));
    bed.checkpoint().await?;
    let none_asleep = watch::round(bed, &senders, &watchers).await?;
    let before = server.resident_bytes()?;
    let bearer: MetadataValue<Ascii> = format!("Bearer {}", tenant.customer_key).parse()?;
    let mut connections = Vec::new();
    for _ in 0..SLEEPERS_CONNECTIONS {
        // What waits unread at the client is soon enough.
        let endpoint = endpoint(server.address)?.initial_stream_window_size(WINDOW_BYTES);
        connections.push(EventServiceClient::new(endpoint.connect().await?));
    }
    let asleep = |number: usize| {
        let mut client = connections[number % SLEEPERS_CONNECTIONS].clone();
        let mut request = Request::new(WatchEventsRequest {
            scope: Some(Scope::AllJobs(AllJobs::default())),
            start: Some(Start::FromNow(FromNow {})),
            ..Default::default()
        });
        request.metadata_mut().insert("authorization", bearer.clone());
        async move {
            let mut stream = client.watch_events(request).await?.into_inner();
            stream.message().await?.ok_or("a watch that ended before it caught up")?;
            Ok::<_, crate::Error>(stream)
        }
    };
    let sleepers: Vec<_> = stream::iter(0..SLEEPERS).map(asleep).buffered(20).try_collect().await?;
    bed.checkpoint().await?;
    delay.milepost(watch::round(bed, &senders, &watchers).await?);
    delay.peer(none_asleep);
    let bytes = server.resident_bytes()?.saturating_sub(before);
    memory.milepost(Measure::of(
        f64::from(u32::try_from(bytes / 1_000)?) / f64::from(u32::try_from(SLEEPERS)?),
    ));
    idle.check()?;

    let events = watch::beats(bed) * jobs.len();
    let mut waking: JoinSet<Result<()>> = JoinSet::new();
    for sleeper in sleepers {
        waking.spawn(async move { timeout(TIMEOUT, wake(sleeper, events)).await? });
    }
    while let Some(woken) = waking.join_next().await {
        woken??;
    }
    Ok(vec![delay, memory])
}

/// Reads so many events: each job's in order, none twice, none missing.
async fn wake(mut stream: Streaming<WatchEventsResponse>, events: usize) -> Result<()> {
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
                return Err(format!("a sleeper got event {sequence} after event {last}").into());
            }
            read += 1;
        }
    }
    if read == events { Ok(()) } else { Err(format!("a sleeper got {read} events of {events}").into()) }
}
