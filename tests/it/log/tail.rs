//! The tail of the log goes on, whatever one tenant stores.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use futures_util::StreamExt as _;
use milepost_client::pb::{self, ErrorReason};
use tokio::time::timeout;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{TIMEOUT, TestServer, Watch, assert_refused, info, step, within_timeout};

#[tokio::test(flavor = "multi_thread")]
async fn the_tail_needs_no_metadata_of_any_configuration() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1), ("scan", 1)]).await;
    provider.append(&job, [info("before")]).await;
    let replica = server.replica().await;
    let mut watch = replica.same(&customer).watch_all().await;
    watch.caught_up().await;
    let _locked = server.database.lock("metadata_configurations").await;
    provider.append(&job, [step("scan")]).await;
    assert_eq!(watch.events(1).await[0].step_tag, "scan");
}

/// Appends to a job, beside the server, an event whose time no server can read.
pub async fn append_unreadable(server: &TestServer, job: &pb::Job) {
    let append = format!(
        "BEGIN;
        UPDATE job_states SET last_sequence = last_sequence + 1, last_event_id = gen_random_uuid()
            WHERE job_id = '{id}';
        UPDATE event_log SET position = position + 1;
        INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
            points_done, percent, created_at)
        SELECT job_id, last_sequence, position, last_event_id, 'info', '', '', 'running', 0, 0, 'infinity'
        FROM job_states, event_log WHERE job_id = '{id}';
        COMMIT",
        id = job.id
    );
    server.database.execute(&append).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_cannot_be_read_ends_the_watches_that_need_it_and_no_others() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let (mut other, others_customer) = (server.provider().await, server.customer().await);
    for provider in [&mut provider, &mut other] {
        provider.configuration(&[]).await;
    }
    let (broken, whole) = (provider.job(&customer).await, provider.job(&customer).await);
    let others_job = other.job(&others_customer).await;
    provider.append(&broken, [info("readable")]).await;
    let mut needing = [customer.clone().watch(&broken).await, provider.watch_all().await];
    let mut unconcerned: [Watch; 3] = [
        customer.clone().watch(&whole).await,
        other.watch_all().await,
        others_customer.clone().watch(&others_job).await,
    ];
    for watch in needing.iter_mut().chain(&mut unconcerned) {
        watch.caught_up().await;
    }

    append_unreadable(&server, &broken).await;
    for watch in &mut needing {
        assert_refused(within_timeout("the end", watch.next()).await, Code::Internal, ErrorReason::Internal);
    }
    provider.append(&whole, [info("later")]).await;
    other.append(&others_job, [info("later")]).await;
    for watch in &mut unconcerned {
        assert_eq!(watch.events(1).await[0].name, "later");
    }
    // A new watch of all jobs reads the past beside the event, and ends at it alone.
    let mut others_past = other.watch_all().await;
    assert_eq!(others_past.caught_up().await.0.len(), 1);
    let mut past = provider.watch_all().await;
    assert_eq!(past.events(1).await[0].name, "readable");
    assert_refused(past.next().await, Code::Internal, ErrorReason::Internal);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_without_its_job_holds_nobody_up() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let (gone, job) = (provider.job(&customer).await, provider.job(&customer).await);
    let replica = server.replica().await;
    let mut watch = replica.same(&customer).watch_all().await;
    watch.caught_up().await;
    // In one transaction, so that no tail sees the event with its job.
    let append = format!(
        "BEGIN;
        SET LOCAL session_replication_role = replica;
        UPDATE event_log SET position = position + 1;
        INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
            points_done, percent, created_at)
        SELECT '{id}', 1, position, gen_random_uuid(), 'info', '', '', 'running', 0, 0, now() FROM event_log;
        DELETE FROM jobs WHERE id = '{id}';
        COMMIT",
        id = gone.id
    );
    server.database.execute(&append).await;
    provider.append(&job, [info("later")]).await;
    assert_eq!(watch.events(1).await[0].name, "later");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_tail_is_behind_is_not_ready() {
    let server = TestServer::start().await;
    server.wait_for_health("", ServingStatus::Serving).await;
    let locked = server.database.lock("event_log").await;
    server.wait_for_health("", ServingStatus::NotServing).await;
    drop(locked);
    server.wait_for_health("", ServingStatus::Serving).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_is_read_from_the_database_once() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let id = provider.configuration(&[("load", 1)]).await.id;
    let request = || pb::GetJobConfigurationRequest {
        key: Some(pb::get_job_configuration_request::Key::Id(id.clone())),
        version: String::new(),
    };
    let first = provider.configurations.get_job_configuration(request()).await.unwrap().into_inner();
    let _locked = server.database.lock("metadata_configurations").await;
    let second = provider.configurations.get_job_configuration(request()).await.unwrap().into_inner();
    assert_eq!(first, second);
}

/// A server that hears of no other one has nobody to tell of its commits. It tells another one as
/// soon as that one listens, and also that it may have missed some.
#[tokio::test(flavor = "multi_thread")]
async fn commits_are_announced_while_another_server_listens() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let mut connection = server.database.connect().await;
    connection.batch_execute("LISTEN milepost").await.unwrap();
    let mut heard = std::pin::pin!(connection.notifications_stream());
    // Returns once events are announced; false after a while in which none were.
    let mut announced = async |patience| {
        let announced = async { while !heard.next().await.unwrap().unwrap().payload.starts_with("log ") {} };
        timeout(patience, announced).await.is_ok()
    };
    within_timeout("silence", async {
        loop {
            provider.append(&job, [info("to nobody")]).await;
            if !announced(Duration::from_millis(300)).await {
                break;
            }
        }
    })
    .await;
    let _replica = server.replica().await;
    assert!(announced(TIMEOUT).await, "the new server may have missed the last event");
    provider.append(&job, [info("to the new server")]).await;
    assert!(announced(TIMEOUT).await);
}
