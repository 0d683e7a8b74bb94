//! EstimateJob: when a job will probably be complete, by the jobs before it.

use std::time::Duration;

use milepost_client::pb::{
    self, NoEstimateReason, estimate_job_request::Job as ByKey, estimate_job_response::Outcome,
};
use prost_types::Timestamp;

use crate::support::{
    Caller, TestDatabase, TestServer, User, complete, info, registration, step, within_timeout,
};

async fn estimate(caller: &mut Caller, job: &pb::Job) -> pb::EstimateJobResponse {
    let request = pb::EstimateJobRequest { job: Some(ByKey::JobId(job.id.clone())) };
    caller.jobs.estimate_job(request).await.unwrap().into_inner()
}

/// Completed jobs of the provider's configuration.
async fn completed(provider: &mut User, customer: &User, count: usize) {
    for _ in 0..count {
        let job = provider.job(customer).await;
        provider.append(&job, [step("load"), info("on"), step("report"), step("load"), complete()]).await;
    }
}

/// Waits until the server has kept the times of all completed jobs.
async fn kept(database: &TestDatabase) {
    within_timeout("the step times", async {
        while database.texts("SELECT job_id::text AS text FROM untimed_jobs").await != [] as [&str; 0] {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

fn seconds(from: Option<Timestamp>, to: Option<Timestamp>) -> f64 {
    let (from, to) = (from.unwrap(), to.unwrap());
    (to.seconds - from.seconds) as f64 + f64::from(to.nanos - from.nanos) / 1e9
}

fn none(reason: NoEstimateReason) -> Option<Outcome> {
    Some(Outcome::NoEstimate(reason.into()))
}

/// The seconds from now to both percentiles, and the number of jobs.
fn estimated(answer: &pb::EstimateJobResponse) -> (f64, f64, i32) {
    let Some(Outcome::Estimate(estimate)) = &answer.outcome else { panic!("{answer:?}") };
    let left = |at| seconds(answer.estimated_at, at);
    (left(estimate.p50), left(estimate.p90), answer.jobs)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_estimate_rests_on_what_the_jobs_before_took_from_the_same_step() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.register(registration("1.0.0", &[("load", 1), ("report", 1)])).await;
    completed(&mut provider, &customer, 9).await;
    kept(&server.database).await;
    let job = provider.job(&customer).await;
    let answer = estimate(&mut customer, &job).await;
    // The jobs took no time at all: they are shorter than the age of this one.
    assert_eq!(answer.outcome, none(NoEstimateReason::TooFewJobs));
    assert!(answer.estimated_at.is_some());
    completed(&mut provider, &customer, 11).await;
    kept(&server.database).await;

    // The jobs took 100, 200 … 2000 s in all, a tenth of that after `load`.
    let times = "UPDATE step_times SET total = n * 100000000, remaining = ARRAY[n * 10000000, NULL]
                 FROM (SELECT job_id, row_number() OVER (ORDER BY completed_at) AS n FROM step_times) AS numbered
                 WHERE numbered.job_id = step_times.job_id";
    server.database.execute(times).await;
    let near = |found: (f64, f64, i32), p50: f64, p90: f64, jobs: i32| {
        let (a, b, count) = found;
        assert!(
            (p50 - 30.0..=p50).contains(&a) && (p90 - 30.0..=p90).contains(&b) && count == jobs,
            "{found:?}"
        );
    };
    near(estimated(&estimate(&mut customer, &job).await), 1_000.0, 1_800.0, 20);
    // An info of the step changes nothing, its end does.
    provider.append(&job, [pb::NewEvent { step_tag: "load".to_owned(), ..info("began") }]).await;
    near(estimated(&estimate(&mut customer, &job).await), 1_000.0, 1_800.0, 20);
    provider.append(&job, [step("load")]).await;
    near(estimated(&estimate(&mut customer, &job).await), 100.0, 180.0, 20);
    // Half of the jobs took less than has passed since.
    let earlier = format!(
        "BEGIN; ALTER TABLE events DISABLE TRIGGER USER;
         UPDATE events SET created_at = created_at - interval '100 s' WHERE job_id = '{}';
         ALTER TABLE events ENABLE TRIGGER USER; COMMIT",
        job.id
    );
    server.database.execute(&earlier).await;
    near(estimated(&estimate(&mut customer, &job).await), 50.0, 90.0, 10);

    // Another version is looked at after this one; its step of this tag stands elsewhere.
    provider.register(registration("2.0.0", &[("report", 1), ("load", 1)])).await;
    let newer = provider.job(&customer).await;
    provider.append(&newer, [step("load")]).await;
    near(estimated(&estimate(&mut customer, &newer).await), 100.0, 180.0, 20);
    // No job before finished this step.
    provider.append(&newer, [step("report")]).await;
    let answer = estimate(&mut customer, &newer).await;
    assert_eq!((answer.jobs, answer.outcome), (0, none(NoEstimateReason::TooFewJobs)));

    let (_, token) = provider.create_watch_token(&job).await;
    near(estimated(&estimate(&mut server.with_secret(&token), &job).await), 50.0, 90.0, 10);
    let by_name = pb::EstimateJobRequest { job: Some(ByKey::ProviderJobId(job.provider_job_id.clone())) };
    near(estimated(&provider.jobs.estimate_job(by_name).await.unwrap().into_inner()), 50.0, 90.0, 10);
    provider.append(&job, [complete()]).await;
    let answer = estimate(&mut customer, &job).await;
    assert_eq!((answer.jobs, answer.outcome), (0, none(NoEstimateReason::JobClosed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_step_times_of_a_completed_job_are_kept_before_its_events_are_removed() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1), ("skipped", 1), ("report", 1)]).await;
    provider.append(&job, [step("load"), step("report"), step("load"), complete()]).await;
    let closed = provider.job(&customer).await;
    provider.close(&closed).await.unwrap();
    kept(&server.database).await;
    // Jobs that did not complete say nothing.
    let times = "SELECT format('%s %s %s', job_id, remaining[2] IS NULL, remaining[1] >= remaining[3]
                     AND total >= remaining[1]) AS text FROM step_times";
    assert_eq!(server.database.texts(times).await, [format!("{} t t", job.id)]);

    // Retention waits for it. Without a server, the test is the one that does both.
    let database = server.database.clone();
    drop((provider, server));
    let untimed = "INSERT INTO untimed_jobs (job_id) SELECT job_id FROM step_times; DELETE FROM step_times";
    database.execute(untimed).await;
    let mark = "SELECT marked::text AS text FROM remove_expired_events(interval '0', 10, 10)";
    assert_eq!(database.texts(mark).await, ["1"], "the job that was closed");
    // Of three of its four events, nothing is kept yet.
    let keep = |most: i64| format!("SELECT keep_step_times({most})::text AS text");
    assert_eq!(database.texts(&keep(3)).await, ["3"]);
    assert_eq!(database.texts(times).await, [] as [&str; 0]);
    assert_eq!(database.texts(&keep(3)).await, ["1"]);
    assert_eq!(database.texts(times).await, [format!("{} t t", job.id)]);
    let step = "SELECT (marked + deleted)::text AS text FROM remove_expired_events(interval '0', 10, 10)";
    while database.texts(step).await != ["0"] {}
    assert_eq!(database.texts("SELECT id::text AS text FROM events").await, [] as [&str; 0]);
    assert_eq!(database.texts(times).await, [format!("{} t t", job.id)]);
}
