//! Many watchers that all resume after a restart of the server.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost_client::{
    Client,
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
    accounts::{self, Accounts},
    events::{append_request, new_event},
    harness::{Harness, serve, stop},
    load::latency,
    report::{Measure, Outcome},
    store::watch,
};

/// Watchers, each of its own job.
const WATCHERS: usize = 1_000;
const CONNECTIONS: usize = 8;
/// Limit for a watcher to resume.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Measures the time from when the new server listens until the last watcher has caught
/// up. Each watcher has missed one event.
pub(super) async fn measure(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let database = harness.database().await?;
    let mut server = serve(&database).await;
    let address = server.address;
    let accounts = Accounts::create(address).await;
    let jobs = accounts.create_jobs(address, WATCHERS).await?;
    let mut outcome = Outcome::new(name, "ms to the last").compared_with("none", None);
    for _ in 0..harness.options.rounds {
        let tokens = watch_and_close(address, &accounts, &jobs).await?;
        stop(&mut server).await;
        server.restart().await;
        harness.checkpoint().await?;
        outcome.add_milepost(resume(address, &accounts, tokens).await?);
    }
    Ok(vec![outcome])
}

/// Opens a watch of each job, appends an event to the job, and closes the watch without
/// reading it. Returns each job's id with the token from before the event.
async fn watch_and_close(
    server: SocketAddr,
    accounts: &Accounts,
    jobs: &[String],
) -> Result<Vec<(String, String)>> {
    let customers = &accounts::connect(server, &accounts.customer, CONNECTIONS).await?;
    let provider = &accounts::connect(server, &accounts.provider, 1).await?[0];
    let watch_one = |(number, job): (usize, String)| async move {
        let scope = Scope::JobId(job.clone());
        let start = Start::FromNow(milepost_client::pb::FromNow {});
        let (stream, token, _) = watch(&customers[number % CONNECTIONS], scope, start).await?;
        provider.events().append_events(append_request(job.clone(), vec![new_event(number, 0)])).await?;
        drop(stream);
        Ok::<_, crate::Error>((job, token))
    };
    stream::iter(jobs.iter().cloned().enumerate()).map(watch_one).buffer_unordered(64).try_collect().await
}

async fn resume(server: SocketAddr, accounts: &Accounts, tokens: Vec<(String, String)>) -> Result<Measure> {
    let started = Instant::now();
    let clients = accounts::connect(server, &accounts.customer, CONNECTIONS).await?;
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

/// Resumes a watch and checks that exactly the one missed event comes before
/// `caught_up`. Tries again after UNAVAILABLE.
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
            other => return Err(format!("a resumed watch sent {other:?} after {events} events").into()),
        }
    }
    Err("a resumed watch ended before it caught up".into())
}
