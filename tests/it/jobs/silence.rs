//! Silence: a job whose provider sends no event for too long gets one `silent` event.

use std::time::{Duration, Instant};

use milepost_client::pb::{self, ErrorReason, EventKind, JobStatus};
use prost_types::Duration as ProtoDuration;
use tonic::Code;

use crate::support::{
    TestServer, User, assert_refused, assert_violations, complete, error, info, registration, within_timeout,
};

const SHORTEST: ProtoDuration = ProtoDuration { seconds: 10, nanos: 0 };

/// A job that allows its provider to be silent for ten seconds.
async fn job(provider: &mut User, customer: &User) -> pb::Job {
    let request = pb::CreateJobRequest { max_silence: Some(SHORTEST), ..provider.new_job(customer) };
    provider.jobs.create_job(request).await.unwrap().into_inner().job.unwrap()
}

/// Has every silence be due after 200 ms from now on, which no call can ask for.
async fn shorten(server: &TestServer) {
    server.database.execute("UPDATE job_silences SET max_silence = 200000, due_at = now()").await;
}

async fn kinds(provider: &mut User, job: &pb::Job) -> Vec<EventKind> {
    provider.list(job).await.iter().map(pb::Event::kind).collect()
}

/// The due times of all jobs, in the order of the jobs.
async fn due(server: &TestServer) -> Vec<String> {
    let sql =
        "SELECT coalesce(due_at::text, 'none') || ' ' || xmin AS text FROM job_silences ORDER BY job_id";
    server.database.texts(sql).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_job_is_stalled_until_the_next_event_of_its_provider() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, _) = server.job(&[("load", 1)]).await;
    let job = job(&mut provider, &customer).await;
    assert_eq!(job.max_silence, Some(SHORTEST));
    let mut watch = customer.watch(&job).await;
    watch.caught_up().await;
    let created = Instant::now();
    let silent = watch.events(1).await.remove(0);
    let waited = created.elapsed();
    assert!(waited > Duration::from_secs(9), "{waited:?}");
    assert_eq!((silent.kind(), silent.status(), silent.sequence), (EventKind::Silent, JobStatus::Stalled, 1));
    let filter = Some(pb::JobFilter { statuses: vec![JobStatus::Stalled.into()], ..Default::default() });
    let stalled = pb::ListJobsRequest { filter, ..Default::default() };
    let listed = customer.jobs.list_jobs(stalled).await.unwrap().into_inner().jobs;
    assert_eq!(listed.iter().map(|listed| &listed.id).collect::<Vec<_>>(), [&job.id]);

    // However long it goes on, there is one.
    shorten(&server).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(kinds(&mut provider, &job).await, [EventKind::Silent]);
    assert!(due(&server).await[0].starts_with("none "), "nobody looks until there is another event");

    let appended = provider.append(&job, [info("back")]).await;
    assert_eq!((appended[0].status(), appended[0].sequence), (JobStatus::Running, 2));
    let after = watch.events(2).await;
    assert_eq!(after[1].kind(), EventKind::Silent);
    provider.append(&job, [complete()]).await;
    assert_eq!(due(&server).await, [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_write_one_event_a_silence_of_many_jobs() {
    let server = TestServer::start().await;
    let _replicas = [server.replica().await, server.replica().await];
    let (mut provider, customer, _) = server.job(&[("load", 1)]).await;
    let mut jobs = Vec::new();
    for _ in 0..60 {
        jobs.push(job(&mut provider, &customer).await);
    }
    for round in 1..=3 {
        shorten(&server).await;
        within_timeout("all jobs to be silent", async {
            let sql = "SELECT count(*)::text AS text FROM job_states WHERE silent";
            while server.database.texts(sql).await != ["60"] {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        for job in &jobs {
            let kinds = kinds(&mut provider, job).await;
            let silent = kinds.iter().filter(|kind| **kind == EventKind::Silent).count();
            assert_eq!((kinds.len(), silent), (2 * round - 1, round), "{kinds:?}");
            provider.append(job, [info("back")]).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn appends_leave_the_due_times_as_they_are() {
    let server = TestServer::start().await;
    let (mut provider, customer, _) = server.job(&[("load", 1)]).await;
    let job = job(&mut provider, &customer).await;
    let before = due(&server).await;
    for n in 0..5 {
        provider.append(&job, [info(&format!("{n}"))]).await;
    }
    assert_eq!(due(&server).await, before);
    // When the time is reached, it is set anew by the last event.
    server.database.execute("UPDATE job_silences SET due_at = now() - interval '1 s'").await;
    let again =
        "SELECT (due_at - events.created_at)::text AS text FROM job_silences JOIN events USING (job_id)
                 WHERE sequence = 5 AND due_at > now()";
    let left = within_timeout("the next time to look", async {
        loop {
            match server.database.texts(again).await.pop() {
                Some(left) => return left,
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    })
    .await;
    assert_eq!(left, "00:00:10");
    assert_eq!(kinds(&mut provider, &job).await, [EventKind::Info; 5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_counts_from_the_end_of_a_gap_without_servers_and_a_jump_of_the_clock_is_one() {
    let server = TestServer::start().await;
    let (mut provider, customer, _) = server.job(&[("load", 1)]).await;
    let job = job(&mut provider, &customer).await;
    provider.append(&job, [info("before")]).await;
    for seen in ["now() - interval '6 s'", "now() + interval '1 h'"] {
        let sql = format!("UPDATE server_times SET seen_at = {seen}, gap_ended_at = '-infinity'");
        server.database.execute(&sql).await;
        let ended = "SELECT 'yes' AS text FROM server_times WHERE gap_ended_at > now() - interval '5 s'";
        within_timeout("the end of the gap to be noted", async {
            while server.database.texts(ended).await.is_empty() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        // By its last event the job is silent for too long.
        server.database.execute("UPDATE job_silences SET max_silence = 4000000, due_at = now()").await;
        let moved = "SELECT (due_at - gap_ended_at)::text AS text FROM job_silences, server_times
                     WHERE due_at > gap_ended_at";
        let left = within_timeout("the next time to look", async {
            loop {
                match server.database.texts(moved).await.pop() {
                    Some(left) if left == "00:00:04" => return left,
                    _ => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        })
        .await;
        assert_eq!(left, "00:00:04");
        assert_eq!(kinds(&mut provider, &job).await, [EventKind::Info]);
    }
    // And then it is.
    within_timeout("the silent event", async {
        while kinds(&mut provider, &job).await != [EventKind::Info, EventKind::Silent] {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_job_stays_failed_and_a_closed_one_is_never_silent() {
    let server = TestServer::start().await;
    let (mut provider, customer, _) = server.job(&[("load", 1)]).await;
    let failed = job(&mut provider, &customer).await;
    let closed = job(&mut provider, &customer).await;
    provider.append(&failed, [error("lost")]).await;
    provider.close(&closed).await.unwrap();
    shorten(&server).await;
    let mut watch = provider.watch(&failed).await;
    let events = watch.events(2).await;
    let last = events.last().unwrap();
    assert_eq!((last.kind(), last.status()), (EventKind::Silent, JobStatus::Failed));
    assert_eq!(kinds(&mut provider, &closed).await, [EventKind::Close]);
    let appended = provider.append(&failed, [info("still here")]).await;
    assert_eq!(appended[0].status(), JobStatus::Failed);
    // The next silence is found, although the status did not change.
    shorten(&server).await;
    let kinds: Vec<_> = watch.events(2).await.iter().map(pb::Event::kind).collect();
    assert_eq!(kinds, [EventKind::Info, EventKind::Silent]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_silence_that_a_job_allows_is_that_of_its_configuration_unless_it_has_one() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let half_a_minute = ProtoDuration { seconds: 30, nanos: 500 };
    let request = pb::RegisterJobConfigurationRequest {
        max_silence: Some(half_a_minute),
        ..registration("1.0.0", &[("load", 1)])
    };
    let registered = provider.register(request.clone()).await;
    assert_eq!(registered.max_silence, Some(ProtoDuration { seconds: 30, nanos: 0 }), "cut to microseconds");
    assert_eq!(provider.register(request.clone()).await, registered);
    let other = pb::RegisterJobConfigurationRequest { max_silence: None, ..request };
    let refused = provider.configurations.register_job_configuration(other).await;
    let refusal = assert_refused(refused, Code::AlreadyExists, ErrorReason::JobConfigurationDiffers);
    assert_eq!(refusal.fields, ["max_silence"]);

    let inherited = provider.job(&customer).await;
    assert_eq!(inherited.max_silence, registered.max_silence);
    let own = pb::CreateJobRequest { max_silence: Some(SHORTEST), ..provider.new_job(&customer) };
    let created = provider.jobs.create_job(own.clone()).await.unwrap().into_inner().job.unwrap();
    assert_eq!(created.max_silence, Some(SHORTEST));
    for same in [own.clone(), pb::CreateJobRequest { max_silence: None, ..own.clone() }] {
        assert!(provider.jobs.create_job(same).await.unwrap().into_inner().existed);
    }
    let other = pb::CreateJobRequest { max_silence: Some(half_a_minute), ..own.clone() };
    let refused = provider.jobs.create_job(other).await;
    let refusal = assert_refused(refused, Code::AlreadyExists, ErrorReason::JobDiffers);
    assert_eq!(refusal.fields, ["max_silence"]);

    for (seconds, nanos) in [(9, 999_999_999), (2_592_000, 1), (-1, 0), (i64::MAX, 0)] {
        let max_silence = Some(ProtoDuration { seconds, nanos });
        let request = pb::CreateJobRequest { max_silence, ..own.clone() };
        assert_violations(provider.jobs.create_job(request).await, &["max_silence"]);
    }
}
