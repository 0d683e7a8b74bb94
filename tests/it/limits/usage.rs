//! Quotas of appended events and bytes, and GetUsage.

use std::time::{Duration, SystemTime};

use milepost::config::QuotaSettings;
use milepost_client::pb::{
    self, ErrorReason, NewEvent, publish_events_request, publish_events_response::Outcome,
};
use prost_types::{Value, value::Kind};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::quotas::Scene;
use crate::support::{
    QUOTAS, ServerProcess, TIMEOUT, TestServer, User, assert_refused, complete, info, step, with_metadata,
    within_timeout,
};

const DAY_S: u64 = 24 * 60 * 60;

/// The bytes of all events and jobs in the database.
async fn stored_bytes(scene: &Scene) -> i64 {
    let bytes = "SELECT (
            (SELECT coalesce(sum(event_bytes(kind, name, event_metadata)), 0) FROM events)
            + (SELECT sum(1024 + octet_length(provider_job_id) + octet_length(provider_job_name)) FROM jobs)
        )::text AS text";
    scene.here.database.texts(bytes).await[0].parse().unwrap()
}

async fn usage(user: &User) -> pb::GetUsageResponse {
    user.clone().auth.get_usage(pb::GetUsageRequest {}).await.unwrap().into_inner()
}

/// Waits while a new day, in which nothing is used up, may begin during the test.
async fn not_before_midnight() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let left = Duration::from_secs(DAY_S - now % DAY_S);
    if left < TIMEOUT {
        tokio::time::sleep(left).await;
    }
}

/// Asks until the answer is as wanted.
async fn wait_for_usage(user: &User, wanted: impl Fn(&pb::GetUsageResponse) -> bool) -> pb::GetUsageResponse {
    within_timeout("the usage", async {
        loop {
            let usage = usage(user).await;
            if wanted(&usage) {
                return usage;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

/// Appends single events until one is refused, as one is soon after the quota is used up.
async fn append_until_refused(provider: &mut User, job: &pb::Job) -> Status {
    within_timeout("a refusal", async {
        loop {
            match provider.try_append(job, [info("more")]).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                Err(status) => return status,
            }
        }
    })
    .await
}

/// Appends until an event is accepted.
async fn append_until_accepted(provider: &mut User, job: &pb::Job) {
    within_timeout("an append", async {
        while provider.try_append(job, [info("again")]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
}

fn large() -> NewEvent {
    let text = Value { kind: Some(Kind::StringValue("x".repeat(16_000))) };
    with_metadata(info("large"), [("text", text)])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_events_of_a_day_are_limited_on_every_server() {
    not_before_midnight().await;
    let scene = Scene::new(QuotaSettings { events_per_user_day: 10, ..QUOTAS }).await;
    let (mut here, mut there) = (scene.provider.clone(), scene.there.same(&scene.provider));
    let stored = vec![step("load"), info("stored")];
    here.append(&scene.job, stored.clone()).await;
    let open = here.job(&scene.customer).await;
    here.append(&open, (0..8).map(|n| info(&format!("{n}")))).await;
    for (provider, server) in [(&mut here, "here"), (&mut there, "there")] {
        let status = append_until_refused(provider, &open).await;
        let refusal =
            assert_refused(Err::<(), _>(status), Code::ResourceExhausted, ErrorReason::QuotaExceeded);
        assert_eq!((&*refusal.metadata["quota"], &*refusal.metadata["limit"]), ("events_per_day", "10"));
        assert!(refusal.metadata["used"].parse::<u64>().unwrap() >= 10, "{server}");
        let wait = refusal.details.retry_info().unwrap().retry_delay.unwrap();
        assert!((1..=DAY_S).contains(&(wait.as_secs() + 1)), "until the next day: {wait:?}");
        // What is stored is answered, and what is wrong is told first.
        let again = provider.append(&scene.job, stored.clone()).await;
        assert!(again.iter().all(|event| event.existed));
        let unknown = provider.try_append(&scene.job, [step("unknown")]).await;
        assert_refused(unknown, Code::InvalidArgument, ErrorReason::FieldInvalid);
        let mixed = provider.try_append(&scene.job, [stored[0].clone(), info("new")]).await;
        assert_refused(mixed, Code::ResourceExhausted, ErrorReason::QuotaExceeded);
    }
    // Other providers are not concerned, and the server's own events neither.
    let mut other = scene.there.provider().await;
    other.configuration(&[("load", 1)]).await;
    let others = other.job(&scene.customer).await;
    other.append(&others, [info("another provider's")]).await;
    here.close(&scene.job).await.unwrap();

    scene.here.database.execute("UPDATE event_usage SET day = day - 1").await;
    append_until_accepted(&mut here, &open).await;
    append_until_accepted(&mut there, &open).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_quota_ends_a_publish_stream_and_nothing_later_is_stored() {
    not_before_midnight().await;
    let scene = Scene::new(QuotaSettings { events_per_user_day: 3, ..QUOTAS }).await;
    let mut provider = scene.provider.clone();
    let stored = info("stored");
    provider.append(&scene.job, [stored.clone(), info("2"), info("3")]).await;
    append_until_refused(&mut provider, &scene.job).await;
    let (batches, stream) = mpsc::channel(8);
    for (batch_id, event) in [("replay", stored.clone()), ("new", info("new")), ("later", info("new"))] {
        let batch = pb::PublishEventsRequest {
            batch_id: batch_id.to_owned(),
            job: Some(publish_events_request::Job::JobId(scene.job.id.clone())),
            expected_sequence: None,
            events: vec![event],
        };
        batches.send(batch).await.unwrap();
    }
    let answers = provider.events.publish_events(ReceiverStream::new(stream)).await.unwrap();
    let mut answers = answers.into_inner();
    let replay = within_timeout("an answer", answers.message()).await.unwrap().unwrap();
    assert_eq!(replay.batch_id, "replay");
    assert!(matches!(replay.outcome, Some(Outcome::Appended(_))), "{replay:?}");
    let ended = within_timeout("the end", answers.message()).await;
    assert_refused(ended, Code::ResourceExhausted, ErrorReason::QuotaExceeded);
    assert_eq!(scene.here.count("events WHERE name = 'new'").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_bytes_are_limited_on_every_server_and_retention_gives_them_back() {
    let scene = Scene::new(QuotaSettings { stored_mib_per_user: 1, ..QUOTAS }).await;
    let (mut here, mut there) = (scene.provider.clone(), scene.there.same(&scene.provider));
    let open = here.job(&scene.customer).await;
    here.append(&scene.job, (0..33).map(|_| large())).await;
    here.append(&scene.job, (0..33).map(|_| large())).await;
    for provider in [&mut here, &mut there] {
        let status = append_until_refused(provider, &open).await;
        let refusal =
            assert_refused(Err::<(), _>(status), Code::ResourceExhausted, ErrorReason::QuotaExceeded);
        let metadata = |key: &str| refusal.metadata[key].as_str();
        assert_eq!((metadata("quota"), metadata("limit")), ("stored_bytes", "1048576"));
        assert!(refusal.details.retry_info().is_none(), "waiting does not help");
    }
    // What both servers know of is written soon, and is what is stored.
    let before = stored_bytes(&scene).await;
    wait_for_usage(&here, |usage| usage.stored_bytes.unwrap().used == before).await;
    let more = here.new_job(&scene.customer);
    let refused = there.jobs.create_job(more).await;
    assert_refused(refused, Code::ResourceExhausted, ErrorReason::QuotaExceeded);

    here.close(&scene.job).await.unwrap();
    scene.here.database.keep_step_times().await;
    let step = "SELECT (remove_expired_events(interval '0', 100, 40)).deleted::text AS text";
    for deleted in ["0", "40", "27", "0"] {
        assert_eq!(scene.here.database.texts(step).await, [deleted]);
    }
    let left = stored_bytes(&scene).await;
    assert!(left < before - 1_000_000);
    assert_eq!(usage(&here).await.stored_bytes.unwrap().used, left);
    append_until_accepted(&mut here, &open).await;
    append_until_accepted(&mut there, &open).await;
    there.job(&scene.customer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_has_what_the_user_has_and_the_quotas() {
    not_before_midnight().await;
    let scene = Scene::new(QUOTAS).await;
    let (mut here, mut there) = (scene.provider.clone(), scene.there.same(&scene.provider));
    let job = here.job(&scene.customer).await;
    here.append(&scene.job, [step("load"), large()]).await;
    there.append(&job, [info("é"), complete()]).await;
    here.close(&scene.job).await.unwrap();
    let open = there.job(&scene.customer).await;
    here.create_watch_token(&open).await;
    scene.there.log_in(&here).await;

    let seen = wait_for_usage(&there, |usage| usage.events_per_day.unwrap().used == 4).await;
    let used = |usage: Option<pb::QuotaUsage>| usage.unwrap().used;
    assert_eq!(used(seen.configurations), 1);
    assert_eq!(used(seen.open_jobs), 1);
    assert_eq!((used(seen.api_keys), used(seen.sessions), used(seen.watch_tokens)), (1, 2, 1));
    assert_eq!(used(seen.stored_bytes), stored_bytes(&scene).await);
    let limit = |usage: Option<pb::QuotaUsage>| usage.unwrap().limit;
    assert_eq!(limit(seen.stored_bytes), QUOTAS.stored_mib_per_user * 1024 * 1024);
    assert_eq!(
        [seen.configurations, seen.open_jobs, seen.api_keys, seen.sessions, seen.watch_tokens].map(limit),
        [10_000, 1_000_000, 1_000, 1_000, 1_000_000]
    );
    let now = "SELECT extract(epoch FROM now())::bigint::text AS text";
    let now: i64 = scene.here.database.texts(now).await[0].parse().unwrap();
    let left = seen.day_ends_at.unwrap().seconds - now;
    assert!((0..=86_400).contains(&left) && seen.day_ends_at.unwrap().seconds % 86_400 == 0, "{left}");

    let customers = usage(&scene.customer).await;
    assert_eq!([customers.open_jobs, customers.stored_bytes, customers.events_per_day].map(used), [0, 0, 0]);
    assert_eq!((used(customers.api_keys), used(customers.sessions)), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_appended_before_it_stopped_is_counted() {
    not_before_midnight().await;
    let server = TestServer::start().await;
    let (provider, _, job) = server.job(&[("load", 1)]).await;
    let mut stopping = ServerProcess::on(&server.database).await;
    // Over a connection that is closed at once, so that the drain waits for nothing.
    let mut there = stopping.other_clients().same(&provider);
    there.append(&job, [info("1"), info("2")]).await;
    drop(there);
    stopping.terminate();
    assert_eq!(stopping.exit().await.code(), Some(0));
    assert_eq!(usage(&provider).await.events_per_day.unwrap().used, 2);
}
