//! Many watchers that resume at once after the server was restarted.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost::{
    client::Client,
    pb::{
        WatchEventsRequest,
        watch_events_request::{Scope, Start},
        watch_events_response::Message,
    },
};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    Result,
    bed::Bed,
    load::latency,
    report::{Measure, Outcome},
    store::{append, new_event, watch},
    tenant::{self, Tenant},
};

/// Watchers, each of its own job.
const WATCHERS: usize = 1_000;
const CONNECTIONS: usize = 8;
/// Longest that resuming may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The time until the last watcher is caught up again, from when the new server
/// listens. Each has one event to catch up with.
pub(super) async fn measure(bed: &Bed, name: &str) -> Result<Vec<Outcome>> {
    let database = bed.database().await?;
    let mut server = bed.server(&database).await?;
    let address = server.address;
    let tenant = Tenant::create(address).await?;
    let jobs = tenant.jobs(address, WATCHERS).await?;
    let mut outcome = Outcome::new(name, "ms to the last", "none", None);
    for _ in 0..bed.options.rounds {
        let tokens = leave(address, &tenant, &jobs).await?;
        server.stop().await?;
        server = bed.server_at(&database, address).await?;
        bed.checkpoint().await?;
        outcome.milepost(resume(address, &tenant, tokens).await?);
    }
    Ok(vec![outcome])
}

/// Opens all the watches, appends an event that they do not read any more; their
/// tokens.
async fn leave(server: SocketAddr, tenant: &Tenant, jobs: &[String]) -> Result<Vec<(String, String)>> {
    let customers = &tenant::connect(server, &tenant.customer_key, CONNECTIONS).await?;
    let provider = &tenant::connect(server, &tenant.provider_key, 1).await?[0];
    let left = |(number, job): (usize, String)| async move {
        let scope = Scope::JobId(job.clone());
        let start = Start::FromNow(milepost::pb::FromNow {});
        let (stream, token, _) = watch(&customers[number % CONNECTIONS], scope, start).await?;
        provider.events().append_events(append(job.clone(), vec![new_event(number, 0)])).await?;
        drop(stream);
        Ok::<_, crate::Error>((job, token))
    };
    stream::iter(jobs.iter().cloned().enumerate()).map(left).buffer_unordered(64).try_collect().await
}

async fn resume(server: SocketAddr, tenant: &Tenant, tokens: Vec<(String, String)>) -> Result<Measure> {
    let started = Instant::now();
    let clients = tenant::connect(server, &tenant.customer_key, CONNECTIONS).await?;
    let mut resuming = JoinSet::new();
    for (number, (job, token)) in tokens.into_iter().enumerate() {
        let client = clients[number % CONNECTIONS].clone();
        resuming.spawn(async move {
            timeout(TIMEOUT, catch_up(&client, job, token)).await??;
            Ok::<_, crate::Error>(started.elapsed())
        });
    }
    let mut delays = Vec::new();
    while let Some(resumed) = resuming.join_next().await {
        delays.push(resumed??);
    }
    let last = delays.iter().max().copied().unwrap_or_default();
    Ok(Measure { value: last.as_secs_f64() * 1e3, latencies: Some(latency(&delays)) })
}

/// Until `caught_up`, with exactly the one event that was missed; again after a
/// refusal that says that it may be tried again.
async fn catch_up(client: &Client, job: String, token: String) -> Result<()> {
    let scope = Some(Scope::JobId(job));
    let request = WatchEventsRequest { scope, start: Some(Start::ResumeToken(token)), ..Default::default() };
    let mut stream = loop {
        match client.events().watch_events(request.clone()).await {
            Ok(response) => break response.into_inner(),
            Err(status) if status.code() == tonic::Code::Unavailable => {
                sleep(Duration::from_millis(10)).await
            }
            Err(status) => return Err(status.into()),
        }
    };
    let mut events = 0;
    while let Some(response) = stream.message().await? {
        match response.message {
            Some(Message::Events(watched)) => events += watched.events.len(),
            Some(Message::CaughtUp(_)) if events == 1 => return Ok(()),
            other => return Err(format!("after {events} events a resumed watch said {other:?}").into()),
        }
    }
    Err("a resumed watch ended".into())
}
