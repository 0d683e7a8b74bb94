//! Backends of Postgres that do not answer, a replay that finds no events for long, and
//! a log that has become shorter.

use std::time::Duration;

use futures_util::future::join_all;
use milepost_client::pb::{
    self, ErrorReason, WatchEndReason, watch_events_request::Scope, watch_events_response::Message,
};
use tokio::{process::Command, time::timeout};
use tonic::Code;

use crate::support::{TestServer, assert_refused, info, within_timeout};

/// Process ids of backends of Postgres that are stopped (SIGSTOP) until this is dropped.
pub struct Stopped(Vec<String>);

impl Stopped {
    pub async fn new(pids: Vec<String>) -> Self {
        let status = Command::new("kill").args(["-s", "STOP"]).args(&pids).status().await.unwrap();
        assert!(status.success(), "kill -s STOP {pids:?}");
        Self(pids)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // `kill` fails if a backend has ended meanwhile.
        let _ = std::process::Command::new("kill").args(["-s", "CONT"]).args(&self.0).status();
    }
}

/// Backends of the pooled connections and of the tail, but not those that append, LISTEN
/// or check the availability.
const READERS: &str = "SELECT pid::text AS text FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'milepost'
      AND query !~ 'append_events|^LISTEN|^SELECT 1$'";

#[tokio::test(flavor = "multi_thread")]
async fn connections_whose_backend_does_not_answer_are_dropped() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("here")]).await;
    let mut watch = customer.clone().watch(&job).await;
    watch.caught_up().await;
    // Whether a call succeeds within 2 s. While connections are dropped, it may be refused.
    let get_job = || {
        let (mut provider, id) = (provider.clone(), job.id.clone());
        async move {
            let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(id)) };
            let answer = timeout(Duration::from_secs(2), provider.jobs.get_job(request)).await;
            answer.is_ok_and(|answer| answer.is_ok())
        }
    };
    join_all((0..30).map(|_| get_job())).await;
    let pids = server.database.texts(READERS).await;
    assert!(pids.len() > 2, "{pids:?}");

    let _stopped = Stopped::new(pids).await;
    let replica = server.replica().await;
    replica.same(&provider).append(&job, [info("elsewhere")]).await;
    // The statement timeout is 5 s, but a stopped backend does not enforce it, and its
    // connection stays open.
    let received = timeout(Duration::from_secs(8), watch.events(1)).await;
    assert_eq!(
        received.expect("the tail drops a connection whose backend does not answer")[0].name,
        "elsewhere"
    );
    // A checked-out connection is closed after twice the statement timeout, however early
    // its callers cancel.
    let dropped = async { while !get_job().await {} };
    assert!(timeout(Duration::from_secs(16), dropped).await.is_ok(), "no call succeeds");
    for _ in 0..10 {
        assert!(get_job().await, "a connection to a stopped backend is still in use");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_finds_no_events_sends_heartbeats() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("first")]).await;
    // A long log, in which the watch looks for events of many jobs, each of which takes the
    // database some time. There are none.
    let many_jobs = format!(
        "UPDATE event_log SET position = 10000000000;
         INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                           provider_job_id, provider_job_name, points_total, status, last_sequence, last_event_id)
         SELECT gen_random_uuid(), provider_id, customer_id, job_configuration_id, configuration_tag,
                'scan-' || n, '', points_total, status, last_sequence, last_event_id
         FROM jobs, generate_series(1, 1000) AS n WHERE id = '{}';
         CREATE OR REPLACE FUNCTION sequence_at(job uuid, last_sequence bigint, log_position bigint)
         RETURNS bigint LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.01); RETURN 0; END'",
        job.id
    );
    server.database.execute(&many_jobs).await;
    let replica = server.replica().await;
    let request = pb::WatchEventsRequest {
        scope: Some(Scope::AllJobs(pb::AllJobs::default())),
        heartbeat_interval: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
        ..Default::default()
    };
    let mut watch = replica.same(&customer).watch_by(request).await.unwrap();
    let mut token = String::new();
    for _ in 0..2 {
        match timeout(Duration::from_secs(8), watch.next()).await.expect("a heartbeat").unwrap() {
            Some(Message::Heartbeat(_)) => assert_ne!(watch.resume_token, token, "the resume token advances"),
            other => panic!("{other:?}"),
        }
        token.clone_from(&watch.resume_token);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_end_if_the_log_has_become_shorter() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("kept"), info("lost")]).await;
    let mut watches = [customer.clone().watch(&job).await, provider.watch_all().await];
    for watch in &mut watches {
        assert_eq!(watch.caught_up().await.0.len(), 2);
    }
    // As if an older backup had been restored.
    let restore = "BEGIN;
        ALTER TABLE events DISABLE TRIGGER events_refuse_delete;
        DELETE FROM events WHERE sequence = 2;
        ALTER TABLE events ENABLE TRIGGER events_refuse_delete;
        UPDATE jobs SET last_sequence = 1;
        UPDATE event_log SET position = position - 1;
        COMMIT";
    server.database.execute(restore).await;
    for watch in &mut watches {
        let ended = within_timeout("the end", watch.next()).await.unwrap();
        let Some(Message::End(end)) = ended else { panic!("{ended:?}") };
        assert_eq!(end.reason(), WatchEndReason::LogSetBack);
        assert_refused(watch.next().await, Code::OutOfRange, ErrorReason::LogSetBack);
    }
    provider.append(&job, [info("anew")]).await;
    let names: Vec<_> = provider.list(&job).await.into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["kept", "anew"]);
}
