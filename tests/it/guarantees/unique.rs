//! An event with an id given by the client is stored once, however often it is
//! sent.

use std::collections::HashSet;

use milepost_client::pb::NewEvent;

use super::{assert_gap_free, sequences};
use crate::support::{TestServer, complete, info, step};

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_many_callers_send_at_once_is_stored_once() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    for round in 0..20 {
        let batch: Vec<NewEvent> = (0..3).map(|n| info(&format!("{round}/{n}"))).collect();
        let senders: Vec<_> = (0..6)
            .map(|sender| {
                let mut caller = if sender % 2 == 0 { provider.clone() } else { replica.same(&provider) };
                let (job, batch) = (job.clone(), batch.clone());
                tokio::spawn(async move { caller.append(&job, batch).await })
            })
            .collect();
        let mut new = 0;
        let mut seen = HashSet::new();
        for sender in senders {
            let appended = sender.await.unwrap();
            new += usize::from(!appended[0].existed);
            assert!(appended.iter().all(|event| event.existed == appended[0].existed));
            seen.insert(sequences(&appended));
        }
        assert_eq!((new, seen.len()), (1, 1), "one sender appends, and all receive the same sequences");
    }
    let log = provider.list(&job).await;
    assert_gap_free(&log);
    let ids: HashSet<&str> = log.iter().map(|event| event.id.as_str()).collect();
    assert_eq!((ids.len(), log.len()), (60, 60));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_stored_and_new_events_appends_only_the_new_ones() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    let (a, b, c, d) = (info("a"), info("b"), info("c"), info("d"));
    provider.append(&job, [b.clone()]).await;
    let appended = provider.append(&job, [a.clone(), b, c, d]).await;
    assert_eq!(sequences(&appended), [2, 1, 3, 4]);
    assert_eq!(appended.iter().map(|event| event.existed).collect::<Vec<_>>(), [false, true, false, false]);
    assert_gap_free(&provider.list(&job).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn sending_every_batch_of_a_closed_job_again_stores_nothing() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, _, job) = server.job(&[("load", 10), ("report", 5)]).await;
    let mut batches: Vec<Vec<NewEvent>> =
        (0..20).map(|n| vec![info(&format!("{n}")), step("load")]).collect();
    batches.push(vec![step("report"), complete()]);
    let mut answers = Vec::new();
    for batch in &batches {
        answers.push(provider.append(&job, batch.clone()).await);
    }
    let log = provider.list(&job).await;
    for mut caller in [provider.clone(), replica.same(&provider)] {
        for (batch, first) in batches.iter().zip(&answers) {
            let again = caller.append(&job, batch.clone()).await;
            assert!(again.iter().all(|event| event.existed));
            for (again, first) in again.iter().zip(first) {
                assert_eq!((&again.id, again.sequence), (&first.id, first.sequence));
                assert_eq!((again.status, &again.progress), (first.status, &first.progress));
            }
        }
    }
    assert_eq!(provider.list(&job).await, log);
}
