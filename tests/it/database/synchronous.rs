//! A synchronous standby that does not answer: commits wait for it, with their locks, for as
//! long as it takes.

use std::time::{Duration, Instant};

use milepost::limits::CREDENTIAL_CONFIRMED_WITHIN;
use milepost_client::pb::{self, ErrorReason, NewEvent};
use tonic::Code;
use uuid::Uuid;

use crate::support::{Replication, TestServer, User, assert_refused, info, registration, within_timeout};

struct World {
    replication: Replication,
    server: TestServer,
    provider: User,
    job: pb::Job,
}

impl World {
    async fn start() -> Self {
        let replication = Replication::start().await;
        replication.make_synchronous().await;
        let server = TestServer::on(replication.database()).await;
        let (mut provider, _, job) = server.job(&[("a", 1)]).await;
        provider.append(&job, [info("before")]).await;
        Self { replication, server, provider, job }
    }

    /// Returns once the server knows whether commits come.
    async fn commits(&self, come: bool) {
        let mut available = self.server.app.database.available();
        within_timeout(format!("readiness {come}"), available.wait_for(|ready| *ready == Some(come)))
            .await
            .unwrap();
    }
}

fn with_id(event: NewEvent) -> NewEvent {
    NewEvent { id: Uuid::now_v7().to_string(), ..event }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_refused_soon_and_what_was_sent_is_safe_by_its_id() {
    let world = World::start().await;
    let (mut provider, job) = (world.provider.clone(), world.job.clone());
    world.replication.part().await;
    let event = with_id(info("sent once"));
    // The first call waits until the server knows; later ones are refused at once.
    for _ in 0..2 {
        let refused = within_timeout("a refusal", provider.try_append(&job, [event.clone()])).await;
        assert_refused(refused, Code::Unavailable, ErrorReason::DatabaseUnavailable);
    }
    world.commits(false).await;
    let refused = provider.configurations.register_job_configuration(registration("2.0.0", &[])).await;
    assert_refused(refused, Code::Unavailable, ErrorReason::DatabaseUnavailable);

    // Reads go on, and credentials stay confirmed.
    let since = Instant::now();
    while since.elapsed() < CREDENTIAL_CONFIRMED_WITHIN + Duration::from_secs(2) {
        provider.get(&job).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    world.replication.join().await;
    world.commits(true).await;
    let appended = provider.append(&job, [event]).await;
    assert_eq!((appended[0].sequence, appended[0].existed), (2, true));
    assert_eq!(provider.list(&job).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_wait_was_cancelled_is_not_acknowledged() {
    let world = World::start().await;
    world.replication.part().await;
    let (mut provider, job) = (world.provider.clone(), world.job.clone());
    let append = tokio::spawn(async move { provider.try_append(&job, [info("cancelled")]).await });
    let cancel =
        "SELECT pg_cancel_backend(pid)::text AS text FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    within_timeout("the commit to wait", async {
        while world.replication.on("a").texts(cancel).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_refused(append.await.unwrap(), Code::Unavailable, ErrorReason::DatabaseUnavailable);

    let mut provider = world.provider.clone();
    let registered = tokio::spawn(async move {
        provider.configurations.register_job_configuration(registration("2.0.0", &[])).await
    });
    within_timeout("the commit to wait", async {
        while world.replication.on("a").texts(cancel).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_refused(registered.await.unwrap(), Code::Unavailable, ErrorReason::DatabaseUnavailable);
}
