//! A server without its database: it cannot confirm credentials, and trusts none for long.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use milepost_client::pb::{
    self, ErrorReason, WatchEndReason, event_service_client::EventServiceClient, watch_events_request::Start,
    watch_events_response::Message,
};
use prost_types::{Value, value::Kind};
use tokio::time::{sleep, timeout};
use tonic::Code;

use super::{A_MOMENT, EVERYWHERE, PACE, Scene, Uses, Viewer, bearing, watch_request};
use crate::support::{
    Mode, Proxy, TestServer, User, Watch, assert_refused, info, with_metadata, within_timeout,
};

/// Waits until the replica can no longer confirm the credential. The credential is
/// checked first, so a malformed request is then not answered INVALID_ARGUMENT.
async fn wait_until_unconfirmed(uses: &Uses) {
    let mut caller = uses.viewer.caller.clone();
    let malformed = pb::WatchEventsRequest::default;
    within_timeout("a credential that is not confirmed", async {
        while caller.events.watch_events(malformed()).await.unwrap_err().code() == Code::InvalidArgument {
            sleep(PACE).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_without_database_pauses_credentials_until_it_confirms_them_again() {
    let mut scene = Scene::new().await;
    let proxy = Proxy::to(&scene.server.database.url).await;
    let severed = TestServer::on(scene.server.database.through(proxy.url.clone())).await;
    let [ending, staying] = [
        scene.key(pb::CreateApiKeyRequest::default()).await,
        scene.key(pb::CreateApiKeyRequest::default()).await,
    ];
    let mut ends = Uses::open(&severed, &ending.secret, &scene.job).await;
    let mut stays = Uses::open(&severed, &staying.secret, &scene.job).await;
    // Each watch first receives the events that the other credential appended.
    while timeout(A_MOMENT, ends.viewer.watch.next()).await.is_ok() {}
    while timeout(A_MOMENT, stays.viewer.watch.next()).await.is_ok() {}

    proxy.set(Mode::Refuse);
    let request = pb::ExpireApiKeyRequest { api_key_id: ending.api_key.unwrap().id };
    scene.provider.session.auth.expire_api_key(request).await.unwrap();
    let ended_at = Instant::now();
    wait_until_unconfirmed(&ends).await;
    assert!(ended_at.elapsed() < EVERYWHERE + PACE, "{:?}", ended_at.elapsed());
    wait_until_unconfirmed(&stays).await;

    // The replica accepts and sends nothing under either credential.
    scene.provider.append(&scene.job, [info("meanwhile")]).await;
    for uses in [&mut ends, &mut stays] {
        assert_eq!(uses.append().await.unwrap_err().code(), Code::Unavailable);
        uses.send("unconfirmed").await;
        assert!(timeout(A_MOMENT, uses.answers.message()).await.is_err());
        assert!(timeout(A_MOMENT, uses.viewer.watch.next()).await.is_err());
    }
    let names = async |provider: &mut User| -> Vec<String> {
        provider.list(&scene.job).await.into_iter().map(|event| event.name).collect()
    };
    assert!(!names(&mut scene.provider).await.contains(&"unconfirmed".to_owned()));

    // The replica confirms the valid credential, and ends the streams of the revoked
    // one, which it never confirmed again.
    proxy.set(Mode::Pass);
    let answer = within_timeout("the answer", stays.answers.message()).await.unwrap().unwrap();
    assert_eq!(answer.batch_id, "unconfirmed");
    let received: Vec<String> =
        stays.viewer.watch.events(2).await.into_iter().map(|event| event.name).collect();
    assert_eq!(received, ["meanwhile", "unconfirmed"]);
    let refused = within_timeout("the end", ends.answers.message()).await;
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    ends.calls_end().await;
    ends.viewer.watching_ends().await;
    let stored = names(&mut scene.provider).await;
    assert_eq!(stored.iter().filter(|name| *name == "unconfirmed").count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_expire_while_the_database_is_unavailable() {
    let mut scene = Scene::new().await;
    let proxy = Proxy::to(&scene.server.database.url).await;
    let severed = TestServer::on(scene.server.database.through(proxy.url.clone())).await;
    let mut viewers = Vec::new();
    // The first lifetime ends within the 5 s in which the credential counts as
    // confirmed, the second after them.
    for lifetime in [4, 9].map(Duration::from_secs) {
        let from = Instant::now();
        let secrets = [scene.key_for(lifetime).await, scene.watch_token(Some(lifetime)).await.secret];
        for secret in secrets {
            viewers.push((Viewer::open(&severed, &secret, &scene.job).await, from + lifetime));
        }
    }

    proxy.set(Mode::Refuse);
    scene.provider.append(&scene.job, [info("meanwhile")]).await;
    let ends = viewers.iter_mut().map(async |(viewer, ended_at)| {
        assert_eq!(viewer.watching_ends().await, []);
        let now = Instant::now();
        assert!(now > *ended_at - A_MOMENT && now < *ended_at + EVERYWHERE, "{now:?} {ended_at:?}");
        // Malformed, but the credential is checked first.
        let refused = viewer.caller.events.watch_events(pb::WatchEventsRequest::default()).await;
        let code = refused.unwrap_err().code();
        assert!(matches!(code, Code::Unauthenticated | Code::Unavailable), "{code:?}");
    });
    join_all(ends).await;

    proxy.set(Mode::Pass);
    for (viewer, _) in viewers {
        let refused = within_timeout("the database to be available", async {
            loop {
                match viewer.caller.clone().events.watch_events(watch_request(&scene.job)).await {
                    Err(status) if status.code() == Code::Unavailable => sleep(PACE).await,
                    answer => break answer.map(drop),
                }
            }
        });
        assert_refused(refused.await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_held_back_for_an_unconfirmed_credential_are_received_after_a_resume() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    // Events for four messages, which the server reads from the log at once.
    let text = Value { kind: Some(Kind::StringValue("x".repeat(16_300))) };
    for batch in 0..4 {
        let events = (0..50).map(|n| with_metadata(info(&format!("{batch}/{n}")), [("text", text.clone())]));
        provider.append(&job, events).await;
    }
    // The stream's window takes less than one message before the client reads.
    let channel = server.endpoint.clone().initial_stream_window_size(65_535).connect_lazy();
    let request = bearing(&customer.key_secret, watch_request(&job));
    let stream = EventServiceClient::new(channel).watch_events(request).await.unwrap().into_inner();
    let mut watch = Watch::new(stream);
    let mut seen = watch.events(1).await;

    let database = server.database.clone();
    database.make_unavailable().await;
    // A malformed request is answered INVALID_ARGUMENT while the credential counts
    // as confirmed.
    within_timeout("a credential that is not confirmed", async {
        while customer.watch_by(pb::WatchEventsRequest::default()).await.unwrap_err().code()
            == Code::InvalidArgument
        {}
    })
    .await;
    while let Ok(message) = tokio::time::timeout(Duration::from_secs(1), watch.next()).await {
        match message.unwrap().unwrap() {
            Message::Events(watched) => seen.extend(watched.events),
            other => panic!("{other:?}"),
        }
    }
    assert!(seen.len() < 200, "the server held no event back");
    drop(server);
    let Some(Message::End(end)) = watch.next().await.unwrap() else { panic!("no end") };
    assert_eq!(end.reason(), WatchEndReason::Draining);
    assert_refused(watch.next().await, Code::Unavailable, ErrorReason::Draining);

    database.make_available().await;
    let mut customer = replica.same(&customer);
    let start = Some(Start::ResumeToken(watch.resume_token));
    let mut resumed = within_timeout("the database to be available", async {
        loop {
            let request = pb::WatchEventsRequest { start: start.clone(), ..watch_request(&job) };
            match customer.watch_by(request).await {
                Err(status) if status.code() == Code::Unavailable => {}
                opened => break opened.unwrap(),
            }
        }
    })
    .await;
    seen.extend(resumed.caught_up().await.0);
    let sequences: Vec<i64> = seen.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, (1..=200).collect::<Vec<_>>());
}
