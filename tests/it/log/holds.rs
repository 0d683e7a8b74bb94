//! HoldJob: retention removes nothing of a job that either side holds.

use milepost_client::pb::{self, ApiKeyScope, ErrorReason, hold_job_request::Job as ByKey};
use tonic::{Code, Status};

use super::retention::{completed, remove_all};
use crate::support::{TestServer, User, assert_refused};

const PROVIDER: usize = 0;
const CUSTOMER: usize = 1;

async fn hold(user: &mut User, job: &pb::Job, held: bool) -> Result<pb::HoldJobResponse, Status> {
    let request = pb::HoldJobRequest { job: Some(ByKey::JobId(job.id.clone())), held };
    Ok(user.session.jobs.hold_job(request).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_removes_nothing_of_a_job_that_either_side_holds() {
    let server = TestServer::start().await;
    let mut sides = [server.provider().await, server.customer().await];
    let [provider, customer] = &mut sides;
    provider.configuration(&[]).await;
    let mut jobs = Vec::new();
    for _ in 0..4 {
        jobs.push(completed(provider, customer, 3).await);
    }
    let [free, by_provider, by_customer, by_both] = &jobs[..] else { unreachable!("four jobs") };
    for (side, job, expected) in [
        (PROVIDER, by_provider, (true, false)),
        (CUSTOMER, by_customer, (false, true)),
        (PROVIDER, by_both, (true, false)),
        (CUSTOMER, by_both, (true, true)),
    ] {
        let answer = hold(&mut sides[side], job, true).await.unwrap();
        let held = answer.job.unwrap();
        assert_eq!((held.held_by_provider, held.held_by_customer), expected);
        assert!(!answer.existed && hold(&mut sides[side], job, true).await.unwrap().existed);
    }
    remove_all(&server).await;
    assert_eq!(server.count("removed_logs").await, 1);
    for (job, events) in [(free, 0), (by_provider, 4), (by_customer, 4), (by_both, 4)] {
        assert_eq!(
            server
                .database
                .texts(&format!("SELECT count(*)::text AS text FROM events WHERE job_id = '{}'", job.id))
                .await,
            [events.to_string()]
        );
    }

    // What one side lifts, the other one keeps.
    assert!(!hold(&mut sides[CUSTOMER], by_both, false).await.unwrap().existed);
    assert!(hold(&mut sides[CUSTOMER], by_both, false).await.unwrap().existed);
    remove_all(&server).await;
    assert_eq!(sides[PROVIDER].list(by_both).await.len(), 4);
    for (side, job) in [(PROVIDER, by_both), (PROVIDER, by_provider), (CUSTOMER, by_customer)] {
        hold(&mut sides[side], job, false).await.unwrap();
    }
    remove_all(&server).await;
    assert_eq!(server.count("events").await, 0);

    for user in &mut sides {
        let refusal = assert_refused(
            hold(user, free, true).await,
            Code::FailedPrecondition,
            ErrorReason::EventsRemoved,
        );
        assert_eq!(refusal.details.precondition_failure().unwrap().violations[0].subject, free.id);
        assert!(hold(user, free, false).await.unwrap().existed, "nobody holds it");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_job_may_be_held_by_either_name_with_the_scope_append() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    let by_name =
        pb::HoldJobRequest { job: Some(ByKey::ProviderJobId(job.provider_job_id.clone())), held: true };
    let held = provider.jobs.hold_job(by_name.clone()).await.unwrap().into_inner().job.unwrap();
    assert!(held.held_by_provider && !held.held_by_customer);
    let mut of_customer = server.same(&customer);
    assert_refused(
        of_customer.session.jobs.hold_job(by_name).await,
        Code::NotFound,
        ErrorReason::ResourceNotFound,
    );
    let by_id = pb::HoldJobRequest { job: Some(ByKey::JobId(job.id.clone())), held: true };
    let without = of_customer.jobs.hold_job(by_id.clone()).await;
    assert_refused(without, Code::PermissionDenied, ErrorReason::ScopeRequired);
    let (_, secret) = of_customer.create_key(&[ApiKeyScope::Append]).await;
    let mut with = server.with_secret(&secret);
    assert!(!with.jobs.hold_job(by_id).await.unwrap().into_inner().existed);
}
