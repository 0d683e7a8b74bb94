//! What a watch says besides events: heartbeats, and why it ends.

use std::time::{Duration, Instant};

use milepost::pb::{
    self, ErrorReason, EventKind, WatchEndReason, watch_events_request::Scope, watch_events_request::Start,
    watch_events_response::Message,
};
use tonic::Code;

use crate::support::{
    STREAMS_PER_USER, TestServer, User, Watch, assert_refused, complete, info, step, within_timeout,
};

fn one(job: &pb::Job) -> Option<Scope> {
    Some(Scope::JobId(job.id.clone()))
}

fn all() -> Option<Scope> {
    Some(Scope::AllJobs(pb::AllJobs::default()))
}

fn every(scope: Option<Scope>, heartbeat: Option<Duration>) -> pb::WatchEventsRequest {
    let heartbeat_interval = heartbeat.map(|interval| interval.try_into().unwrap());
    pb::WatchEventsRequest { scope, heartbeat_interval, ..Default::default() }
}

/// Whether nothing comes for so long.
async fn silent(watch: &mut Watch, time: Duration) -> bool {
    tokio::time::timeout(time, watch.next()).await.is_err()
}

async fn assert_heartbeat(watch: &mut Watch) {
    let message = watch.next().await.unwrap();
    assert!(matches!(message, Some(Message::Heartbeat(_))), "{message:?}");
}

/// The next message says that this is why the watch is over, and nothing but
/// that status follows it.
async fn assert_ends(
    watch: &mut Watch,
    why: WatchEndReason,
    code: Code,
    reason: ErrorReason,
) -> pb::WatchEnd {
    let last = watch.next().await.unwrap();
    let Some(Message::End(end)) = last else { panic!("{last:?}") };
    assert_eq!(end.reason(), why);
    assert_refused(watch.next().await, code, reason);
    end
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_comes_when_nothing_was_sent_for_the_interval_which_is_5_seconds_at_least() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let (job, quiet) = (provider.job(&customer).await, provider.job(&customer).await);
    let shortest = Duration::from_secs(5);
    let mut by_default = customer.watch_by(every(all(), None)).await.unwrap();
    let mut busy = customer.watch_by(every(one(&job), Some(shortest))).await.unwrap();
    let mut watches = [
        customer.watch_by(every(one(&quiet), Some(Duration::from_millis(1)))).await.unwrap(),
        customer.watch_by(every(one(&quiet), Some(shortest))).await.unwrap(),
    ];
    for watch in watches.iter_mut().chain([&mut busy, &mut by_default]) {
        watch.caught_up().await;
    }
    let at = Instant::now();
    assert!(silent(&mut busy, shortest / 2).await);
    // Whoever was sent something needs no heartbeat yet.
    provider.append(&job, [info("a")]).await;
    busy.events(1).await;
    let sent_at = Instant::now();
    for watch in &mut watches {
        assert_heartbeat(watch).await;
        // It may have been due a moment before the clock here was read.
        assert!(at.elapsed() > shortest - Duration::from_millis(500), "{:?}", at.elapsed());
    }
    assert_heartbeat(&mut busy).await;
    assert!(sent_at.elapsed() > shortest - Duration::from_millis(500), "{:?}", sent_at.elapsed());
    by_default.events(1).await;
    assert!(silent(&mut by_default, Duration::ZERO).await, "its interval is longer");
    for watch in &mut watches {
        assert_heartbeat(watch).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_no_heartbeat_while_the_database_is_away() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let mut watches = Vec::new();
    for scope in [one(&job), all()] {
        let mut watch = customer.watch_by(every(scope, Some(Duration::from_secs(5)))).await.unwrap();
        watch.caught_up().await;
        watches.push(watch);
    }
    // Away when the heartbeat is due; not yet for so long that the credential
    // would need to be confirmed.
    assert!(silent(&mut watches[0], Duration::from_millis(3_000)).await);
    server.database.take_away().await;
    for watch in &mut watches {
        assert!(silent(watch, Duration::from_millis(1_500)).await, "who knows what has been committed?");
    }
    server.database.bring_back().await;
    for watch in &mut watches {
        assert_heartbeat(watch).await;
    }
    // It is the same watch that goes on.
    let mut provider = server.other_clients().same(&provider);
    within_timeout("the database to be back", async {
        while provider.try_append(&job, [step("load")]).await.is_err() {}
    })
    .await;
    for watch in &mut watches {
        watch.events(1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_are_filtered_do_not_silence_heartbeats() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    for scope in [one(&job), all()] {
        let mut request = every(scope, Some(Duration::from_secs(5)));
        request.kinds = vec![EventKind::Complete.into()];
        let mut watch = customer.watch_by(request.clone()).await.unwrap();
        watch.caught_up().await;
        let before = watch.resume_token.clone();
        tokio::select! {
            () = assert_heartbeat(&mut watch) => {}
            () = async { loop { provider.append(&job, [info("passes")]).await; } } => unreachable!("endless"),
        }
        assert_ne!(watch.resume_token, before, "the token moves past what is filtered");
        request.start = Some(Start::ResumeToken(watch.resume_token.clone()));
        assert_eq!(customer.watch_by(request).await.unwrap().caught_up().await.0, []);
    }
}

async fn expire_key(user: &mut User) {
    let keys = user.session.auth.list_api_keys(pb::ListApiKeysRequest::default()).await.unwrap();
    let api_key_id = keys.into_inner().api_keys[0].id.clone();
    user.session.auth.expire_api_key(pb::ExpireApiKeyRequest { api_key_id }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_at_once_with_its_credential_and_is_resumed_with_another() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("past")]).await;
    let mut watches =
        [customer.watch(&job).await, customer.watch_all().await].map(|watch| (watch, Vec::new()));
    for (watch, seen) in &mut watches {
        seen.extend(watch.caught_up().await.0);
    }
    let mut by_session = customer.session.clone();
    expire_key(&mut customer).await;
    let at = Instant::now();
    for (watch, _) in &mut watches {
        let (why, reason) = (WatchEndReason::CredentialEnded, ErrorReason::CredentialInvalid);
        let end = assert_ends(watch, why, Code::Unauthenticated, reason).await;
        assert!(end.job.is_none_or(|job| job.last_sequence == 1));
    }
    assert!(at.elapsed() < Duration::from_millis(500), "{:?}", at.elapsed());
    let refused = customer.watch_by(every(one(&job), None)).await;
    assert_refused(refused, Code::Unauthenticated, ErrorReason::CredentialInvalid);

    provider.append(&job, [step("load"), complete()]).await;
    for (scope, (watch, _)) in [one(&job), all()].into_iter().zip(watches) {
        let start = Some(Start::ResumeToken(watch.resume_token));
        let request = pb::WatchEventsRequest { start, ..every(scope, None) };
        let stream = by_session.events.watch_events(request).await.unwrap().into_inner();
        let rest = Watch::new(stream).caught_up().await.0;
        assert_eq!(rest.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2, 3]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_drains_tells_its_watchers_who_go_on_at_another() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("past")]).await;
    let mut watches = [customer.watch(&job).await, customer.watch_all().await];
    for watch in &mut watches {
        watch.caught_up().await;
    }
    drop(server);
    for watch in &mut watches {
        let (why, reason) = (WatchEndReason::Draining, ErrorReason::Draining);
        assert_ends(watch, why, Code::Unavailable, reason).await;
    }
    replica.same(&provider).append(&job, [step("load"), complete()]).await;
    for (scope, watch) in [one(&job), all()].into_iter().zip(watches) {
        let start = Some(Start::ResumeToken(watch.resume_token));
        let request = pb::WatchEventsRequest { start, ..every(scope, None) };
        let rest = replica.same(&customer).watch_by(request).await.unwrap().caught_up().await.0;
        assert_eq!(rest.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2, 3]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_too_many_is_refused_with_an_answer_and_makes_room_when_it_closes() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let mut watches = Vec::new();
    for _ in 0..STREAMS_PER_USER {
        watches.push(customer.watch(&job).await);
    }
    let request = || every(one(&job), None);
    let refused = customer.watch_by(request()).await;
    let refusal = assert_refused(refused, Code::ResourceExhausted, ErrorReason::Overloaded);
    assert!(refusal.details.retry_info().is_some() && refusal.details.quota_failure().is_some());
    // Somebody else's is not counted.
    provider.watch(&job).await.caught_up().await;

    drop(watches.pop());
    let room = async { while customer.watch_by(request()).await.is_err() {} };
    within_timeout("room for another stream", room).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_watches_a_job_under_its_own_name_for_it() {
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
    let scan = || every(Some(Scope::ProviderJobId("scan".to_owned())), None);
    let mut watch = provider.watch_by(scan()).await.unwrap();
    let (past, caught_up) = watch.caught_up().await;
    assert_eq!(past.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["past"]);
    assert_eq!(caught_up.job.unwrap().last_sequence, 1);
    other.append(&jobs[1], [info("another's")]).await;
    provider.append(&jobs[0], [info("live"), complete()]).await;
    let film = watch.film().await;
    assert!(film.events.iter().all(|event| event.job_id == jobs[0].id));
    assert_eq!(film.events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2, 3]);
    // Nobody else knows it by that name.
    let refused = customer.watch_by(scan()).await;
    assert_refused(refused, Code::NotFound, ErrorReason::ResourceNotFound);
}
