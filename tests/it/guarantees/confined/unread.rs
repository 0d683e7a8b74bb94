//! Streams whose client does not read the end that its credential brings.

use futures_util::stream::{self, StreamExt as _};
use milepost_client::pb::{self, event_service_client::EventServiceClient, watch_events_response::Message};
use tokio::time::sleep;

use super::{PACE, bearing, watch_request};
use crate::{
    limits::fairness::metric,
    support::{Authority, TestServer, TlsFiles, User, info, within_timeout},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_client_does_not_read_its_end_is_reset() {
    assert_reset_if_end_is_unread(&TestServer::start().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_over_tls_whose_client_does_not_read_its_end_is_reset() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    assert_reset_if_end_is_unread(&TestServer::with_tls(&files.server(), &authority).await).await;
}

/// Whether a message of a watch has an event of this name.
fn has_event(response: &pb::WatchEventsResponse, name: &str) -> bool {
    let Some(Message::Events(watched)) = &response.message else { return false };
    watched.events.iter().any(|event| event.name == name)
}

async fn assert_reset_if_end_is_unread(server: &TestServer) {
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    // Two streams on one connection. The test does not read the first, whose window
    // is soon full; the second shows that the connection stays open.
    let channel = server.endpoint.clone().initial_stream_window_size(4_096).connect().await.unwrap();
    let mut streams = Vec::new();
    for secret in [&customer.key_secret, &provider.key_secret] {
        let mut client = EventServiceClient::new(channel.clone());
        streams.push(client.watch_events(bearing(secret, watch_request(&job))).await.unwrap().into_inner());
    }
    let [mut unread, mut other] = streams.try_into().unwrap();
    for _ in 0..20 {
        provider.append(&job, (0..50).map(|_| info("x"))).await;
    }

    customer.expire_key().await.unwrap();
    let watches = async || metric(server, "milepost_watches{scope=\"job\"}").await;
    within_timeout("the reset", async { while watches().await > 1 {} }).await;
    provider.append(&job, [info("after")]).await;
    let goes_on = async { while !has_event(&other.message().await.unwrap().unwrap(), "after") {} };
    within_timeout("the other watch to go on", goes_on).await;
    let mut events = 0;
    let end = loop {
        match unread.message().await {
            Ok(Some(response)) => match response.message.unwrap() {
                Message::Events(watched) => events += watched.events.len(),
                Message::CaughtUp(_) => {}
                more => panic!("the stream went on: {more:?}"),
            },
            end => break end,
        }
    };
    assert!(end.is_err() && events < 1_000, "{end:?} after {events} events");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_whose_client_does_not_read_its_end_is_reset() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    // Two streams on one connection. The first answer already fills the window of
    // the publish stream; the watch shows that the connection stays open.
    let channel = server.endpoint.clone().initial_stream_window_size(4_096).connect().await.unwrap();
    let mut client = EventServiceClient::new(channel);
    let (batches, events) = (20, 100);
    let batch = {
        let job = pb::publish_events_request::Job::JobId(job.id.clone());
        move |n: i64| pb::PublishEventsRequest {
            batch_id: n.to_string(),
            job: Some(job.clone()),
            expected_sequence: None,
            events: (0..events).map(|_| info("x")).collect(),
        }
    };
    let sent = stream::iter((0..batches).map(batch)).chain(stream::pending());
    let unread = client.publish_events(bearing(&provider.key_secret, sent)).await.unwrap();
    let other = client.watch_events(bearing(&customer.key_secret, watch_request(&job))).await.unwrap();
    let (mut unread, mut other) = (unread.into_inner(), other.into_inner());
    // As many batches as the server's publish window allows.
    within_timeout("the batches", async { while provider.get(&job).await.last_sequence < 8 * events {} })
        .await;
    // No signal tells when the first answer is sent; this pause is long enough.
    sleep(PACE).await;

    provider.expire_key().await.unwrap();
    let streams = async || metric(&server, "milepost_publish_streams").await;
    within_timeout("the reset", async { while streams().await > 0 {} }).await;
    let mut session = User { key: provider.session.clone(), ..provider.clone() };
    session.append(&job, [info("after")]).await;
    let goes_on = async { while !has_event(&other.message().await.unwrap().unwrap(), "after") {} };
    within_timeout("the watch to go on", goes_on).await;
    let mut answers = 0;
    let end = loop {
        match unread.message().await {
            Ok(Some(_)) => answers += 1,
            end => break end,
        }
    };
    assert!(end.is_err() && answers < batches, "{end:?} after {answers} answers");
}
