//! With any resume token (for one job, also a sequence) a new stream continues
//! exactly after it, on any replica.

use milepost_client::pb::{
    self, ErrorReason, Event, EventKind, watch_events_request::Scope, watch_events_request::Start,
    watch_events_response::Message,
};
use tonic::Code;

use crate::support::{TestServer, User, assert_refused, assert_violations, complete, error, info, step};

fn one_job(job: &pb::Job) -> Option<Scope> {
    Some(Scope::JobId(job.id.clone()))
}

fn all_jobs() -> Option<Scope> {
    Some(Scope::AllJobs(pb::AllJobs::default()))
}

fn watch(scope: Option<Scope>, kinds: &[EventKind], start: Option<Start>) -> pb::WatchEventsRequest {
    let kinds = kinds.iter().map(|&kind| kind.into()).collect();
    pb::WatchEventsRequest { scope, kinds, start, heartbeat_interval: None }
}

/// Every resume token of a watch, with the events received up to it. Reads until
/// `caught_up` and at least `total` events.
async fn tokens(user: &mut User, request: pb::WatchEventsRequest, total: usize) -> Vec<(String, Vec<Event>)> {
    let mut watch = user.watch_by(request).await.unwrap();
    let mut received = Vec::new();
    let mut tokens = Vec::new();
    loop {
        let message = watch.next().await.unwrap();
        if let Some(Message::Events(watched)) = &message {
            received.extend(watched.events.clone());
        }
        tokens.push((watch.resume_token.clone(), received.clone()));
        let caught_up = matches!(message, Some(Message::CaughtUp(_)));
        if caught_up && received.len() >= total || matches!(message, Some(Message::End(_)) | None) {
            return tokens;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_resumes_after_every_sequence_of_a_job() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    for n in 0..15 {
        provider.append(&job, [info(&format!("{n}"))]).await;
    }
    let log = provider.list(&job).await;
    for (after, mut user) in
        (0..=log.len()).flat_map(|n| [(n, customer.clone()), (n, replica.same(&customer))])
    {
        let start = Some(Start::AfterSequence(i64::try_from(after).unwrap()));
        let mut stream = user.watch_from(&job, start).await;
        let (past, caught_up) = stream.caught_up().await;
        assert_eq!(past, log[after..]);
        assert_eq!(caught_up.job.unwrap().last_sequence, 15);
        // A watch from the token of `caught_up` has no past.
        let mut again = user.watch_from(&job, Some(Start::ResumeToken(stream.resume_token))).await;
        assert_eq!(again.caught_up().await.0, []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_resumes_from_every_token_of_every_scope_and_filter_on_either_replica() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let jobs = [provider.job(&customer).await, provider.job(&customer).await, provider.job(&customer).await];
    // Each event is live, so that messages are small and tokens are many.
    let requests = [
        watch(one_job(&jobs[0]), &[], None),
        watch(one_job(&jobs[0]), &[EventKind::Error], None),
        watch(all_jobs(), &[], None),
        watch(all_jobs(), &[EventKind::Error, EventKind::Complete], None),
    ];
    let mut live = Vec::new();
    for request in &requests {
        let mut watch = customer.clone().watch_by(request.clone()).await.unwrap();
        watch.caught_up().await;
        live.push(watch);
    }
    let mut seen: Vec<Vec<(String, Event)>> = vec![Vec::new(); requests.len()];
    for n in 0..24 {
        let event = if n % 3 == 0 { error(&format!("{n}")) } else { info(&format!("{n}")) };
        let mut caller = if n % 2 == 0 { provider.clone() } else { replica.same(&provider) };
        caller.append(&jobs[n % 3], [event]).await;
    }
    let expected: [usize; 4] = [8, 8, 24, 8];
    for ((watch, seen), expected) in live.iter_mut().zip(&mut seen).zip(expected) {
        while seen.len() < expected {
            for event in watch.until(|message| matches!(message, Message::Events(_))).await {
                if let Message::Events(watched) = event {
                    let token = watch.resume_token.clone();
                    seen.extend(watched.events.into_iter().map(|event| (token.clone(), event)));
                }
            }
        }
    }
    for (request, seen) in requests.iter().zip(&seen) {
        for (index, (token, _)) in seen.iter().enumerate() {
            let rest: Vec<&Event> = seen[index + 1..]
                .iter()
                .filter(|(other, _)| other != token)
                .map(|(_, event)| event)
                .collect();
            let mut request = request.clone();
            request.start = Some(Start::ResumeToken(token.clone()));
            let mut user = if index % 2 == 0 { customer.clone() } else { replica.same(&customer) };
            let (past, _) = user.watch_by(request).await.unwrap().caught_up().await;
            assert_eq!(past.iter().collect::<Vec<_>>(), rest, "after token {index}");
        }
    }
    // The tokens of a replay work too.
    for request in requests {
        for (token, received) in tokens(&mut customer.clone(), request.clone(), 0).await {
            let mut resumed = request.clone();
            resumed.start = Some(Start::ResumeToken(token));
            let (past, _) = customer.clone().watch_by(resumed).await.unwrap().caught_up().await;
            let (whole, _) = customer.clone().watch_by(request.clone()).await.unwrap().caught_up().await;
            assert_eq!([received, past].concat(), whole);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_now_skips_the_past_and_misses_nothing_after_caught_up() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [info("past")]).await;
    for scope in [one_job(&job), all_jobs()] {
        let before = provider.get(&job).await.last_sequence;
        let request = watch(scope, &[], Some(Start::FromNow(pb::FromNow {})));
        let mut stream = customer.watch_by(request).await.unwrap();
        let (past, caught_up) = stream.caught_up().await;
        assert_eq!(past, []);
        if let Some(state) = caught_up.job {
            assert_eq!(state.last_sequence, before);
        }
        provider.append(&job, [step("load")]).await;
        assert_eq!(stream.events(1).await[0].sequence, before + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_start_positions_are_refused() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let other = provider.job(&customer).await;
    provider.append(&job, [info("a"), complete()]).await;

    let beyond = watch(one_job(&job), &[], Some(Start::AfterSequence(3)));
    assert_refused(customer.watch_by(beyond).await, Code::OutOfRange, ErrorReason::PositionBeyondLog);
    let negative = watch(one_job(&job), &[], Some(Start::AfterSequence(-1)));
    assert_violations(customer.watch_by(negative).await, &["after_sequence"]);
    let of_all = watch(all_jobs(), &[], Some(Start::AfterSequence(1)));
    assert_violations(customer.watch_by(of_all).await, &["after_sequence"]);

    let mut stream = customer.watch(&job).await;
    stream.caught_up().await;
    let token = Some(Start::ResumeToken(stream.resume_token));
    for request in [
        watch(one_job(&other), &[], token.clone()),
        watch(one_job(&job), &[EventKind::Info], token.clone()),
        watch(all_jobs(), &[], token.clone()),
        watch(one_job(&job), &[], Some(Start::ResumeToken("nonsense".to_owned()))),
        watch(one_job(&job), &[], Some(Start::ResumeToken(String::new()))),
    ] {
        assert_violations(customer.watch_by(request).await, &["resume_token"]);
    }
    // A token alone grants no access.
    let mut other_customer = server.customer().await;
    let refused = other_customer.watch_by(watch(one_job(&job), &[], token)).await;
    assert_refused(refused, Code::NotFound, ErrorReason::ResourceNotFound);
    // A token of a longer log, as after a restore of the database from a backup.
    let mut stream = customer.watch_all().await;
    stream.caught_up().await;
    server.database.execute("UPDATE event_log SET position = 1").await;
    let ahead = watch(all_jobs(), &[], Some(Start::ResumeToken(stream.resume_token)));
    assert_refused(customer.watch_by(ahead).await, Code::OutOfRange, ErrorReason::LogSetBack);
}
