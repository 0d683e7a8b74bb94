//! Status and progress are the same for every watcher at the same sequence.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb::JobStatus;

use crate::support::{TestServer, complete, error, info, step};

#[tokio::test(flavor = "multi_thread")]
async fn watches_lists_and_appends_agree_on_status_and_progress() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer, job) = server.job(&[("load", 10), ("segment", 60), ("report", 30)]).await;
    let live = [customer.clone(), replica.same(&customer)].map(|mut customer| {
        let job = job.clone();
        async move { customer.watch(&job).await }
    });
    let live = futures_util::future::join_all(live).await;
    let mut appended = Vec::new();
    for (n, event) in [
        step("load"),
        error("hm"),
        info("retrying"),
        step("load"),
        step("segment"),
        step("report"),
        complete(),
    ]
    .into_iter()
    .enumerate()
    {
        let mut caller = if n % 2 == 0 { provider.clone() } else { replica.same(&provider) };
        appended.extend(caller.append(&job, [event]).await);
    }
    let appended: Vec<_> =
        appended.iter().map(|event| (event.sequence, event.status, event.progress)).collect();
    let states: Vec<_> = appended
        .iter()
        .map(|(_, status, progress)| (JobStatus::try_from(*status).unwrap(), progress.unwrap().percent))
        .collect();
    assert_eq!(
        states,
        [
            (JobStatus::Running, 10),
            (JobStatus::Failed, 10),
            (JobStatus::Failed, 10),
            (JobStatus::Running, 10),
            (JobStatus::Running, 70),
            (JobStatus::Running, 99),
            (JobStatus::Complete, 100),
        ]
    );
    let mut logs = vec![provider.list(&job).await, replica.same(&provider).list(&job).await];
    for watch in live {
        logs.push(watch.read_to_end().await.events);
    }
    logs.push(customer.clone().watch(&job).await.read_to_end().await.events);
    logs.push(replica.same(&customer).watch(&job).await.read_to_end().await.events);
    for events in &logs {
        assert_eq!(events, &logs[0], "every reader receives the same fields of every event");
        let seen: Vec<_> =
            events.iter().map(|event| (event.sequence, event.status, event.progress)).collect();
        assert_eq!(seen, appended);
    }
    let job = provider.get(&job).await;
    assert_eq!((job.last_sequence, job.status, job.progress), appended[appended.len() - 1]);
}

/// A replica plans the next round on the state after the round that it is
/// committing. If another replica commits first, that state never comes to be, and
/// the last sequence alone may not reveal this.
#[tokio::test(flavor = "multi_thread")]
async fn status_and_progress_are_right_when_another_replica_appends_as_many_events_first() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1), ("report", 1)]).await;
    provider.append(&job, [info("remembered")]).await;
    // Another replica's append, not yet committed.
    let mut other = server.database.connect().await;
    let sql = format!(
        "BEGIN;
         UPDATE job_states SET last_sequence = 2, status = 'failed' WHERE job_id = '{id}';
         UPDATE jobs SET status = 'failed' WHERE id = '{id}';
         UPDATE event_log SET position = position + 1;
         INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status, points_done, percent, created_at)
         SELECT '{id}', 2, position, gen_random_uuid(), 'error', 'the other''s', '', 'failed', 0, 0, clock_timestamp()
         FROM event_log",
        id = job.id
    );
    other.batch_execute(&sql).await.unwrap();
    let append = |event| {
        let (mut caller, job) = (provider.clone(), job.clone());
        tokio::spawn(async move { caller.append(&job, [event]).await })
    };
    let first = append(step("load"));
    server.database.wait_for_locks(1).await;
    let second = append(info("planned on the first"));
    // No signal tells when the round is planned; this pause is long enough.
    tokio::time::sleep(Duration::from_millis(100)).await;
    other.batch_execute("COMMIT").await.unwrap();
    first.await.unwrap();
    second.await.unwrap();

    let events: Vec<_> = (provider.list(&job).await.into_iter())
        .map(|event| (event.name.clone(), event.status(), event.progress.unwrap().points_done))
        .collect();
    let events: Vec<_> =
        events.iter().map(|(name, status, points)| (name.as_str(), *status, *points)).collect();
    assert_eq!(
        events,
        [
            ("remembered", JobStatus::Running, 0),
            ("the other's", JobStatus::Failed, 0),
            ("load", JobStatus::Running, 1),
            ("planned on the first", JobStatus::Running, 1),
        ]
    );
}
