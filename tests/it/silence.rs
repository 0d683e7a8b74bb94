//! What is told of a database that has nothing to say for long, of such a past,
//! and of one that is no longer as it was.

use std::time::Duration;

use futures_util::future::join_all;
use milepost::pb::{self, ErrorReason, watch_events_request::Scope, watch_events_response::Message};
use tokio::{process::Command, time::timeout};
use tonic::Code;

use crate::support::{TestServer, assert_refused, info, within_timeout};

/// Backends of Postgres that do nothing any more, until this is dropped.
struct Stopped(Vec<String>);

impl Stopped {
    async fn these(pids: Vec<String>) -> Self {
        let status = Command::new("kill").args(["-s", "STOP"]).args(&pids).status().await.unwrap();
        assert!(status.success(), "kill -s STOP {pids:?}");
        Self(pids)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Those that are gone meanwhile need it no more.
        let _ = std::process::Command::new("kill").args(["-s", "CONT"]).args(&self.0).status();
    }
}

/// Connections of the pool and the tail's: not the one that appends, nor those
/// that listen and ask.
const OF_READERS: &str = "SELECT pid::text AS text FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'milepost'
      AND query !~ 'append_events|^LISTEN|^SELECT 1$'";

#[tokio::test(flavor = "multi_thread")]
async fn connections_on_which_nobody_answers_are_given_up() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("here")]).await;
    let mut watch = customer.clone().watch(&job).await;
    watch.caught_up().await;
    let ask = || {
        let (mut provider, job) = (provider.clone(), job.clone());
        async move { provider.get(&job).await }
    };
    join_all((0..30).map(|_| ask())).await;
    let pids = server.database.texts(OF_READERS).await;
    assert!(pids.len() > 2, "{pids:?}");

    let _stopped = Stopped::these(pids).await;
    let replica = server.replica().await;
    replica.same(&provider).append(&job, [info("elsewhere")]).await;
    // Here a statement may take 5 s, and nobody tells that a connection is lost.
    let heard = timeout(Duration::from_secs(8), watch.events(1)).await;
    assert_eq!(heard.expect("the tail waits for what never answers")[0].name, "elsewhere");
    // And a use of one out of the pool twice as much, however soon callers leave.
    let given_up = async { while timeout(Duration::from_secs(2), ask()).await.is_err() {} };
    assert!(timeout(Duration::from_secs(16), given_up).await.is_ok(), "no call gets through");
    for _ in 0..10 {
        assert!(timeout(Duration::from_secs(2), ask()).await.is_ok(), "such a connection is still in use");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_past_with_nothing_to_tell_is_not_silent() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("first")]).await;
    // As much of others' as takes minutes to look through.
    server.database.execute("UPDATE event_log SET position = 10000000000").await;
    let replica = server.replica().await;
    let request = pb::WatchEventsRequest {
        scope: Some(Scope::AllJobs(pb::AllJobs::default())),
        heartbeat_interval: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
        ..Default::default()
    };
    let mut watch = replica.same(&customer).watch_by(request).await.unwrap();
    assert_eq!(watch.events(1).await[0].name, "first");
    let first = watch.resume_token.clone();
    for _ in 0..2 {
        match timeout(Duration::from_secs(8), watch.next()).await.expect("a heartbeat").unwrap() {
            Some(Message::Heartbeat(_)) => assert_ne!(watch.resume_token, first, "it gets on"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_shorter_than_it_was_ends_who_watched_it() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("kept"), info("lost")]).await;
    let mut watches = [customer.clone().watch(&job).await, provider.watch_all().await];
    for watch in &mut watches {
        assert_eq!(watch.caught_up().await.0.len(), 2);
    }
    // As if a back-up had been restored.
    let restore = "BEGIN;
        ALTER TABLE events DISABLE TRIGGER events_refuse_delete;
        DELETE FROM events WHERE sequence = 2;
        ALTER TABLE events ENABLE TRIGGER events_refuse_delete;
        UPDATE jobs SET last_sequence = 1;
        UPDATE event_log SET position = position - 1;
        COMMIT";
    server.database.execute(restore).await;
    for watch in &mut watches {
        let ended = within_timeout("the end", watch.next()).await;
        assert_refused(ended, Code::OutOfRange, ErrorReason::PositionBeyondLog);
    }
    provider.append(&job, [info("anew")]).await;
    let names: Vec<_> = provider.list(&job).await.into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["kept", "anew"]);
}
