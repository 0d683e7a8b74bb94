//! A batch is committed whole or not at all. No event of another batch lies
//! between its events, and a watch that starts within it receives the rest.

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb::{self, ErrorReason, Event, watch_events_request::Start};
use tonic::Code;

use super::assert_gap_free;
use crate::support::{TestServer, assert_refused, complete, info, step};

/// Expects that the events of each batch are named `batch/index/count`.
fn assert_batches_whole(log: &[Event]) {
    let mut rest: Vec<String> = Vec::new();
    for event in log {
        let parts: Vec<&str> = event.name.split('/').collect();
        let (index, count): (usize, usize) = (parts[1].parse().unwrap(), parts[2].parse().unwrap());
        if rest.is_empty() {
            assert_eq!(index, 0, "{} is not the first event of its batch", event.name);
            rest = (1..count).rev().map(|index| format!("{}/{index}/{count}", parts[0])).collect();
        } else {
            assert_eq!(
                rest.pop().as_deref(),
                Some(event.name.as_str()),
                "an event of another batch lies within a batch"
            );
        }
    }
    assert_eq!(rest, Vec::<String>::new(), "the last batch is incomplete");
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_stay_whole_with_writers_on_two_replicas() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    let mut watch = customer.clone().watch(&job).await;
    let writers: Vec<_> = (0..12)
        .map(|writer: usize| {
            let mut caller =
                if writer.is_multiple_of(2) { provider.clone() } else { replica.same(&provider) };
            let job = job.clone();
            tokio::spawn(async move {
                for batch in 0..6 {
                    let count = 1 + (writer * 7 + batch * 13) % 40;
                    let events = (0..count).map(|index| info(&format!("{writer}-{batch}/{index}/{count}")));
                    caller.append(&job, events).await;
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let log = provider.list(&job).await;
    assert_gap_free(&log);
    assert_batches_whole(&log);
    let watched = watch.events(log.len()).await;
    assert_eq!(watched, log);
    // A watch that starts in the middle of a batch receives the rest.
    for start in [1, log.len() / 3, log.len() - 1] {
        let after = Some(Start::AfterSequence(i64::try_from(start).unwrap()));
        let rest = customer.clone().watch_from(&job, after).await.caught_up().await.0;
        assert_eq!(rest, log[start..]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_batch_stores_nothing_and_fails_no_other_batch() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    let other = provider.job(&customer).await;
    for _ in 0..20 {
        let (mut first, mut second, mut third) = (provider.clone(), provider.clone(), provider.clone());
        let (refused, same_job, other_job) = tokio::join!(
            first.try_append(&job, [info("wrong/0/2"), step("unknown")]),
            second.try_append(&job, [info("right/0/2"), info("right/1/2")]),
            third.try_append(&other, [info("other/0/1")]),
        );
        let refusal = assert_refused(refused, Code::InvalidArgument, ErrorReason::FieldInvalid);
        assert_eq!(refusal.fields, ["events[1].step_tag"]);
        same_job.unwrap();
        other_job.unwrap();
    }
    let log = provider.list(&job).await;
    assert_eq!(log.len(), 40);
    assert_batches_whole(&log);
    assert_eq!(provider.list(&other).await.len(), 20);

    let refused = provider.try_append(&job, [complete(), info("late/0/1")]).await;
    assert_refused(refused, Code::FailedPrecondition, ErrorReason::JobClosed);
    assert_eq!(provider.list(&job).await, log, "the refused batch stored an event");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_the_database_refuses_fails_no_other_batch_of_its_transaction() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let [first, doomed, fine] =
        [provider.job(&customer).await, provider.job(&customer).await, provider.job(&customer).await];
    server
        .database
        .execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                 BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = NEW.name; END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON events
                 FOR EACH ROW WHEN (NEW.name LIKE '_____') EXECUTE FUNCTION refuse()",
        )
        .await;
    // A violated check, which is a bug of the server; an unknown error; a full disk.
    for (state, code) in
        [("23514", Code::Internal), ("P0001", Code::Unavailable), ("53100", Code::Unavailable)]
    {
        let mut locker = server.database.connect().await;
        locker.batch_execute("BEGIN; SELECT FROM event_log FOR UPDATE").await.unwrap();
        let append = |job: &pb::Job, name: &str| {
            let (mut provider, job, event) = (provider.clone(), job.clone(), info(name));
            tokio::spawn(async move { provider.try_append(&job, [event]).await })
        };
        let under_way = append(&first, "under way");
        server.database.wait_for_locks(1).await;
        let (refused, appended) = (append(&doomed, state), append(&fine, "all is well"));
        // Once these calls are answered, both appends wait for the next transaction.
        for _ in 0..20 {
            provider.get(&fine).await;
        }
        locker.batch_execute("COMMIT").await.unwrap();
        under_way.await.unwrap().unwrap();
        assert_eq!(refused.await.unwrap().unwrap_err().code(), code, "{state}");
        appended.await.unwrap().unwrap_or_else(|status| panic!("in the transaction with {state}: {status}"));
    }
    assert!(provider.list(&doomed).await.is_empty());
    assert_eq!(provider.list(&fine).await.len(), 3);
}
