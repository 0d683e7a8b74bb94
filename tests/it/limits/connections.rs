//! What all users share is shared in turns: however much one user asks for, the others get
//! their part of it.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb::{self, ErrorReason};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::support::{
    CONNECTIONS, Caller, TestDatabase, TestServer, assert_refused, registration, within_timeout,
};

/// Calls of one user that are in flight at once.
const READS: usize = 600;
const REGISTRATIONS: usize = 100;

/// How many statements wait for the lock on `step_configurations`.
async fn waiting_for_steps(database: &TestDatabase) -> usize {
    let sql = "SELECT pid::text AS text FROM pg_locks
        WHERE NOT granted AND relation = 'step_configurations'::regclass
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    database.texts(sql).await.len()
}

/// Calls that all need the steps of configurations, each repeated until `stop`. Returns how
/// many were served and the refusals.
fn flood(caller: &Caller, stop: &CancellationToken) -> JoinSet<(usize, Vec<Status>)> {
    let mut calls = JoinSet::new();
    for index in 0..READS + REGISTRATIONS {
        let (mut caller, stop) = (caller.clone(), stop.clone());
        calls.spawn(async move {
            let (mut served, mut refusals) = (0, Vec::new());
            while !stop.is_cancelled() {
                let answer = if index < READS {
                    let request = pb::ListJobConfigurationsRequest::default();
                    caller.configurations.list_job_configurations(request).await.map(drop)
                } else {
                    let request = registration(&format!("2.0.{index}"), &[("load", 1), ("scan", 2)]);
                    caller.configurations.register_job_configuration(request).await.map(drop)
                };
                match answer {
                    Ok(()) => served += 1,
                    Err(refusal) => {
                        refusals.push(refusal);
                        // Without a pause, the refused calls use up the processor.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }
            (served, refusals)
        });
    }
    calls
}

#[tokio::test(flavor = "multi_thread")]
async fn one_user_leaves_others_half_of_the_connections_to_the_database() {
    let server = TestServer::start().await;
    let (mut flooding, mut quiet) = (server.provider().await, server.provider().await);
    let customer = server.customer().await;
    flooding.configuration(&[("load", 1)]).await;
    quiet.configuration(&[("load", 1)]).await;
    let job = quiet.job(&customer).await;
    // From here on the server remembers the steps of the quiet provider's job.
    quiet.get(&job).await;

    let mut locker = server.database.connect().await;
    let stop = CancellationToken::new();
    let mut calls = flood(&flooding, &stop);
    let half = CONNECTIONS / 2;
    // Several times, each shorter than a statement may wait for a lock.
    for _ in 0..5 {
        locker.batch_execute("BEGIN; LOCK TABLE step_configurations IN ACCESS EXCLUSIVE MODE").await.unwrap();
        within_timeout("the flood to use its part", async {
            while waiting_for_steps(&server.database).await < half {}
        })
        .await;
        for _ in 0..5 {
            assert_eq!(quiet.get(&job).await.id, job.id, "every call of another user succeeds");
            let used = waiting_for_steps(&server.database).await;
            assert!(used <= half, "the flood uses {used} connections, more than its part");
        }
        locker.batch_execute("ROLLBACK").await.unwrap();
    }
    stop.cancel();
    let mut served = 0;
    while let Some(ended) = within_timeout("the flood to end", calls.join_next()).await {
        let (of_caller, refusals) = ended.unwrap();
        served += of_caller;
        for refusal in refusals {
            let refusal =
                assert_refused(Err::<(), _>(refusal), Code::ResourceExhausted, ErrorReason::Overloaded);
            assert!(refusal.details.retry_info().is_some(), "{refusal:?}");
        }
    }
    assert!(served > 0);
}
