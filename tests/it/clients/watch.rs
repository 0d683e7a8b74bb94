use std::time::Duration;

use milepost_client::{
    pb::{Event, WatchEventsRequest, watch_events_request::Scope, watch_events_response::Message},
    prost_types,
};
use tokio::time::{Instant, timeout};
use tonic::Code;

use super::{Told, client};
use crate::support::{Mode, Proxy, TestServer, complete, info, within_timeout};

/// Twice the shortest heartbeat interval, and 5 s.
const SILENCE: Duration = Duration::from_secs(15);

async fn next_events(watch: &mut milepost_client::Watch, count: usize) -> Vec<Event> {
    let mut events = Vec::new();
    while events.len() < count {
        let message = within_timeout("a message", watch.next()).await.unwrap().expect("the job is open");
        if let Some(Message::Events(received)) = message.message {
            events.extend(received.events);
        }
    }
    events
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_whose_connection_breaks_shows_each_event_once() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    let proxy = Proxy::to_server(server.address).await;
    let interruptions = Told::new();
    let told = interruptions.clone();
    let request = WatchEventsRequest { scope: Some(Scope::JobId(job.id.clone())), ..Default::default() };
    let mut watch = client(&proxy.url, &customer)
        .await
        .watch(request)
        .on_interruption(move |error, _| told.push(error.to_string()));
    let mut seen = Vec::new();
    for round in 0..5 {
        provider.append(&job, (0..3).map(|n| info(&format!("{round}/{n}")))).await;
        seen.extend(next_events(&mut watch, 3).await);
        proxy.cut();
    }
    provider.append(&job, [complete()]).await;
    while let Some(message) = within_timeout("the end", watch.next()).await.unwrap() {
        if let Some(Message::Events(received)) = message.message {
            seen.extend(received.events);
        }
    }
    assert_eq!(seen, provider.list(&job).await);
    assert!(interruptions.all().len() >= 5, "{:?}", interruptions.all());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_is_broken_however_the_caller_waits() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    let proxy = Proxy::to_server(server.address).await;
    let interruptions = Told::new();
    let told = interruptions.clone();
    let request = WatchEventsRequest {
        scope: Some(Scope::JobId(job.id.clone())),
        heartbeat_interval: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        ..Default::default()
    };
    let mut watch = client(&proxy.url, &customer)
        .await
        .watch(request)
        .on_interruption(move |error, _| told.push(error.code()));
    let caught_up = within_timeout("caught_up", watch.next()).await.unwrap().unwrap();
    assert!(matches!(caught_up.message, Some(Message::CaughtUp(_))), "{caught_up:?}");

    let start = Instant::now();
    proxy.set(Mode::Hold);
    within_timeout("the interruption", async {
        while interruptions.all().is_empty() {
            // A caller that waits for something else as well drops the future often.
            assert!(timeout(Duration::from_millis(200), watch.next()).await.is_err());
        }
    })
    .await;
    assert_eq!(interruptions.all(), [Code::Unavailable]);
    assert!(start.elapsed() >= SILENCE, "{:?}", start.elapsed());
    provider.append(&job, [info("during the silence")]).await;
    proxy.cut();
    proxy.set(Mode::Pass);
    let events = next_events(&mut watch, 1).await;
    assert_eq!(events, provider.list(&job).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_server_ends_a_watch() {
    let server = TestServer::start().await;
    let (_, customer, job) = server.job(&[]).await;
    let client = client(&format!("http://{}", server.address), &customer).await;
    let request =
        |id: &str| WatchEventsRequest { scope: Some(Scope::JobId(id.to_owned())), ..Default::default() };
    let mut unknown = client.watch(request(&customer.id));
    let error = within_timeout("the error", unknown.next()).await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::NotFound, Some("RESOURCE_NOT_FOUND")));
    assert_eq!(unknown.next().await.unwrap(), None, "it has ended");

    let mut watch = client.watch(request(&job.id));
    within_timeout("caught_up", watch.next()).await.unwrap();
    customer.clone().expire_key().await.unwrap();
    let error = within_timeout("the error", async {
        loop {
            if let Err(error) = watch.next().await {
                return error;
            }
        }
    })
    .await;
    assert_eq!((error.code(), error.reason()), (Code::Unauthenticated, Some("CREDENTIAL_INVALID")));
}
