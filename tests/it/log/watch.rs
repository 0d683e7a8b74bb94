//! The messages of a watch other than events: heartbeats and the end with its reason.

use std::time::{Duration, Instant};

use milepost_client::pb::{
    self, ErrorReason, EventKind, WatchEndReason, watch_events_request::Scope, watch_events_request::Start,
    watch_events_response::Message,
};
use tokio::time::timeout;
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    STREAMS_PER_USER, TestServer, Watch, assert_refused, assert_violations, complete, info, step,
    within_timeout,
};

fn one_job(job: &pb::Job) -> Option<Scope> {
    Some(Scope::JobId(job.id.clone()))
}

fn all_jobs() -> Option<Scope> {
    Some(Scope::AllJobs(pb::AllJobs::default()))
}

fn watch_request(scope: Option<Scope>, heartbeat: Option<Duration>) -> pb::WatchEventsRequest {
    let heartbeat_interval = heartbeat.map(|interval| interval.try_into().unwrap());
    pb::WatchEventsRequest { scope, heartbeat_interval, ..Default::default() }
}

/// Whether no message comes for this time.
async fn silent(watch: &mut Watch, time: Duration) -> bool {
    tokio::time::timeout(time, watch.next()).await.is_err()
}

async fn assert_heartbeat(watch: &mut Watch) {
    let message = watch.next().await.unwrap();
    assert!(matches!(message, Some(Message::Heartbeat(_))), "{message:?}");
}

/// Asserts that the next message is an `end` with this reason and that only this status
/// follows.
async fn assert_ends(
    watch: &mut Watch,
    end_reason: WatchEndReason,
    code: Code,
    reason: ErrorReason,
) -> pb::WatchEnd {
    let last = watch.next().await.unwrap();
    let Some(Message::End(end)) = last else { panic!("{last:?}") };
    assert_eq!(end.reason(), end_reason);
    assert_refused(watch.next().await, code, reason);
    end
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_is_sent_after_an_interval_without_messages_of_at_least_5_seconds() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let (job, quiet) = (provider.job(&customer).await, provider.job(&customer).await);
    let shortest = Duration::from_secs(5);
    let mut by_default = customer.watch_by(watch_request(all_jobs(), None)).await.unwrap();
    let mut busy = customer.watch_by(watch_request(one_job(&job), Some(shortest))).await.unwrap();
    let mut watches = [
        customer.watch_by(watch_request(one_job(&quiet), Some(Duration::from_millis(1)))).await.unwrap(),
        customer.watch_by(watch_request(one_job(&quiet), Some(shortest))).await.unwrap(),
    ];
    for watch in watches.iter_mut().chain([&mut busy, &mut by_default]) {
        watch.caught_up().await;
    }
    let at = Instant::now();
    assert!(silent(&mut busy, shortest / 2).await);
    // A sent event restarts the interval.
    provider.append(&job, [info("a")]).await;
    busy.events(1).await;
    let sent_at = Instant::now();
    for watch in &mut watches {
        assert_heartbeat(watch).await;
        // The interval may have begun a moment before `at`.
        assert!(at.elapsed() > shortest - Duration::from_millis(500), "{:?}", at.elapsed());
    }
    assert_heartbeat(&mut busy).await;
    assert!(sent_at.elapsed() > shortest - Duration::from_millis(500), "{:?}", sent_at.elapsed());
    by_default.events(1).await;
    assert!(silent(&mut by_default, Duration::ZERO).await, "the default interval is longer");
    for watch in &mut watches {
        assert_heartbeat(watch).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_heartbeat_is_sent_during_an_outage() {
    let server = TestServer::start().await;
    let (provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let mut watches = Vec::new();
    for scope in [one_job(&job), all_jobs()] {
        let mut watch = customer.watch_by(watch_request(scope, Some(Duration::from_secs(5)))).await.unwrap();
        watch.caught_up().await;
        watches.push(watch);
    }
    // The database is unavailable when the heartbeat is due, but too briefly for the
    // credential to count as unconfirmed.
    assert!(silent(&mut watches[0], Duration::from_millis(3_000)).await);
    server.database.make_unavailable().await;
    for watch in &mut watches {
        assert!(
            silent(watch, Duration::from_millis(1_500)).await,
            "a heartbeat would claim that every committed event was sent"
        );
    }
    server.database.make_available().await;
    for watch in &mut watches {
        assert_heartbeat(watch).await;
    }
    // The same watches continue.
    let mut provider = server.other_clients().same(&provider);
    within_timeout("the database to be available again", async {
        while provider.try_append(&job, [step("load")]).await.is_err() {}
    })
    .await;
    for watch in &mut watches {
        watch.events(1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_outside_the_filter_do_not_suppress_heartbeats() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    for scope in [one_job(&job), all_jobs()] {
        let mut request = watch_request(scope, Some(Duration::from_secs(5)));
        request.kinds = vec![EventKind::Complete.into()];
        let mut watch = customer.watch_by(request.clone()).await.unwrap();
        watch.caught_up().await;
        let before = watch.resume_token.clone();
        tokio::select! {
            () = assert_heartbeat(&mut watch) => {}
            () = async { loop { provider.append(&job, [info("passes")]).await; } } => unreachable!("endless"),
        }
        assert_ne!(watch.resume_token, before, "the token moves past the filtered events");
        request.start = Some(Start::ResumeToken(watch.resume_token.clone()));
        assert_eq!(customer.watch_by(request).await.unwrap().caught_up().await.0, []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_at_once_with_its_credential_and_is_resumed_with_another() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [info("past")]).await;
    let mut watches =
        [customer.watch(&job).await, customer.watch_all().await].map(|watch| (watch, Vec::new()));
    for (watch, seen) in &mut watches {
        seen.extend(watch.caught_up().await.0);
    }
    let mut by_session = customer.session.clone();
    customer.expire_key().await.unwrap();
    let at = Instant::now();
    for (watch, _) in &mut watches {
        let (end_reason, reason) = (WatchEndReason::CredentialEnded, ErrorReason::CredentialInvalid);
        let end = assert_ends(watch, end_reason, Code::Unauthenticated, reason).await;
        assert!(end.job.is_none_or(|job| job.last_sequence == 1));
    }
    assert!(at.elapsed() < Duration::from_millis(500), "{:?}", at.elapsed());
    let refused = customer.watch_by(watch_request(one_job(&job), None)).await;
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);

    provider.append(&job, [step("load"), complete()]).await;
    for (scope, (watch, _)) in [one_job(&job), all_jobs()].into_iter().zip(watches) {
        let start = Some(Start::ResumeToken(watch.resume_token));
        let request = pb::WatchEventsRequest { start, ..watch_request(scope, None) };
        let stream = by_session.events.watch_events(request).await.unwrap().into_inner();
        let rest = Watch::new(stream).caught_up().await.0;
        assert_eq!(rest.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2, 3]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watches_of_a_draining_server_end_and_resume_on_another_replica() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [info("past")]).await;
    let mut watches = [customer.watch(&job).await, customer.watch_all().await];
    for watch in &mut watches {
        watch.caught_up().await;
    }
    drop(server);
    for watch in &mut watches {
        let (end_reason, reason) = (WatchEndReason::Draining, ErrorReason::Draining);
        assert_ends(watch, end_reason, Code::Unavailable, reason).await;
    }
    replica.same(&provider).append(&job, [step("load"), complete()]).await;
    for (scope, watch) in [one_job(&job), all_jobs()].into_iter().zip(watches) {
        let start = Some(Start::ResumeToken(watch.resume_token));
        let request = pb::WatchEventsRequest { start, ..watch_request(scope, None) };
        let rest = replica.same(&customer).watch_by(request).await.unwrap().caught_up().await.0;
        assert_eq!(rest.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2, 3]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_beyond_the_limit_is_refused_until_another_one_closes() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let mut watches = Vec::new();
    for _ in 0..STREAMS_PER_USER {
        watches.push(customer.watch(&job).await);
    }
    let request = || watch_request(one_job(&job), None);
    let refused = customer.watch_by(request()).await;
    let refusal = assert_refused(refused, Code::ResourceExhausted, ErrorReason::Overloaded);
    assert!(refusal.details.retry_info().is_some() && refusal.details.quota_failure().is_some());
    // The stream of another user is not counted.
    provider.watch(&job).await.caught_up().await;

    drop(watches.pop());
    let freed = async { while customer.watch_by(request()).await.is_err() {} };
    within_timeout("the closed stream no longer to be counted", freed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_watches_a_job_by_its_provider_job_id() {
    let server = TestServer::start().await;
    let (mut provider, mut other) = (server.provider().await, server.provider().await);
    let mut customer = server.customer().await;
    let mut jobs = Vec::new();
    for (user, past) in [(&mut provider, "past"), (&mut other, "another's past")] {
        user.configuration(&[]).await;
        let scan = pb::CreateJobRequest { provider_job_id: "scan".to_owned(), ..user.new_job(&customer) };
        let job = user.jobs.create_job(scan).await.unwrap().into_inner().job.unwrap();
        user.append(&job, [info(past)]).await;
        jobs.push(job);
    }
    let scan = || watch_request(Some(Scope::ProviderJobId("scan".to_owned())), None);
    let mut watch = provider.watch_by(scan()).await.unwrap();
    let (past, caught_up) = watch.caught_up().await;
    assert_eq!(past.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["past"]);
    assert_eq!(caught_up.job.unwrap().last_sequence, 1);
    other.append(&jobs[1], [info("another's")]).await;
    provider.append(&jobs[0], [info("live"), complete()]).await;
    let watched = watch.read_to_end().await;
    assert!(watched.events.iter().all(|event| event.job_id == jobs[0].id));
    assert_eq!(watched.events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2, 3]);
    // The provider_job_id is valid for the provider only.
    let refused = customer.watch_by(scan()).await;
    assert_refused(refused, Code::NotFound, ErrorReason::ResourceNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_resume_token_is_refused_before_the_job_is_looked_up() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let mut watch = provider.watch(&job).await;
    watch.caught_up().await;
    let from = |scope: Scope, token: &str| pb::WatchEventsRequest {
        scope: Some(scope),
        start: Some(pb::watch_events_request::Start::ResumeToken(token.to_owned())),
        ..Default::default()
    };
    let unknown_job = Scope::JobId(Uuid::now_v7().to_string());
    let truncated = &watch.resume_token[1..];
    let mut open = async |request| provider.watch_by(request).await.map(|_watch| ());
    for bad in ["nonsense", "", truncated] {
        assert_violations(open(from(unknown_job.clone(), bad)).await, &["resume_token"]);
    }
    let wrong = pb::WatchEventsRequest { kinds: vec![77], ..from(unknown_job.clone(), "nonsense") };
    assert_violations(open(wrong).await, &["kinds[0]", "resume_token"]);
    // A valid token of another job: the job is looked up before both are compared.
    let of_other_job = open(from(unknown_job, &watch.resume_token)).await;
    assert_refused(of_other_job, Code::NotFound, ErrorReason::ResourceNotFound);

    let mut watches = vec![watch];
    while watches.len() < STREAMS_PER_USER {
        watches.push(provider.watch(&job).await);
    }
    let bad = provider.watch_by(from(Scope::JobId(job.id), "nonsense")).await.map(drop);
    assert_violations(bad, &["resume_token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_finds_no_events_sends_heartbeats() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    provider.append(&job, [info("first")]).await;
    // A long log, in which the watch looks for events of many jobs, each of which takes the
    // database some time. There are none.
    let many_jobs = format!(
        "UPDATE event_log SET position = 10000000000;
         INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                           provider_job_id, provider_job_name, points_total)
         SELECT gen_random_uuid(), provider_id, customer_id, job_configuration_id, configuration_tag,
                'scan-' || n, '', points_total
         FROM jobs, generate_series(1, 1000) AS n WHERE id = '{}';
         CREATE OR REPLACE FUNCTION sequence_at(job uuid, last_sequence bigint, log_position bigint)
         RETURNS bigint LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.01); RETURN 0; END'",
        job.id
    );
    server.database.execute(&many_jobs).await;
    let replica = server.replica().await;
    let request = pb::WatchEventsRequest {
        scope: Some(Scope::AllJobs(pb::AllJobs::default())),
        heartbeat_interval: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
        ..Default::default()
    };
    let mut watch = replica.same(&customer).watch_by(request).await.unwrap();
    let mut token = String::new();
    for _ in 0..2 {
        match timeout(Duration::from_secs(8), watch.next()).await.expect("a heartbeat").unwrap() {
            Some(Message::Heartbeat(_)) => assert_ne!(watch.resume_token, token, "the resume token advances"),
            other => panic!("{other:?}"),
        }
        token.clone_from(&watch.resume_token);
    }
}
