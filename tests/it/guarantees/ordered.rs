//! A job's events are numbered 1, 2, 3 … in commit order.

use super::{assert_gap_free, sequences};
use crate::support::{TestServer, assert_refused, info};
use milepost_client::pb::{self, ErrorReason};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn sequences_have_no_gap_with_writers_on_two_replicas() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    let writers: Vec<_> = (0..16)
        .map(|writer| {
            let mut caller = if writer % 2 == 0 { provider.clone() } else { replica.same(&provider) };
            let job = job.clone();
            tokio::spawn(async move {
                let mut last = 0;
                for batch in 0..12 {
                    let events = (0..1 + batch % 3).map(|n| info(&format!("{writer}/{batch}/{n}")));
                    let appended = sequences(&caller.append(&job, events).await);
                    assert!(appended[0] > last, "a batch sent after an answer has higher sequences");
                    assert!(appended.windows(2).all(|pair| pair[1] == pair[0] + 1));
                    last = appended[appended.len() - 1];
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let log = provider.list(&job).await;
    assert_eq!(log.len(), 16 * 24);
    assert_gap_free(&log);
    assert!(log.windows(2).all(|pair| {
        let at = |event: &pb::Event| event.created_at.map(|at| (at.seconds, at.nanos));
        at(&pair[0]) <= at(&pair[1])
    }));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_one_of_several_writers_with_the_same_expected_sequence_appends() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    let append = |mut caller: crate::support::User, expected: i64| {
        let request = pb::AppendEventsRequest {
            job: Some(pb::append_events_request::Job::JobId(job.id.clone())),
            expected_sequence: Some(expected),
            events: vec![info("a"), info("b")],
        };
        async move { caller.events.append_events(request).await }
    };
    for round in 0..10 {
        let answers = tokio::join!(
            append(provider.clone(), round * 2),
            append(replica.same(&provider), round * 2),
            append(provider.clone(), round * 2),
        );
        let mut appended = 0;
        for answer in [answers.0, answers.1, answers.2] {
            match answer {
                Ok(_) => appended += 1,
                refused => {
                    let refusal = assert_refused(refused, Code::Aborted, ErrorReason::SequenceMismatch);
                    assert_eq!(refusal.metadata["last_sequence"], (round * 2 + 2).to_string());
                }
            }
        }
        assert_eq!(appended, 1);
    }
    assert_gap_free(&provider.list(&job).await);
}
