//! What a watch says besides events: heartbeats, and why it ends.

use std::time::{Duration, Instant};

use milepost::pb::{
    self, ErrorReason, EventKind, WatchEndReason, event_service_client::EventServiceClient,
    get_current_user_response::Credential, watch_events_request::Scope, watch_events_request::Start,
    watch_events_response::Message,
};
use prost_types::{Value, value::Kind};
use tonic::{Code, Request, transport::Endpoint};

use crate::support::{
    STREAMS_PER_USER, TestServer, User, Watch, assert_refused, complete, info, noted, step, within_patience,
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
    within_patience("the database to be back", async {
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
async fn what_is_held_back_while_the_credential_is_not_confirmed_is_not_skipped_by_the_end() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    // Four messages' worth, read from the log at once.
    let text = Value { kind: Some(Kind::StringValue("x".repeat(16_300))) };
    for batch in 0..4 {
        let events = (0..50).map(|n| noted(info(&format!("{batch}/{n}")), [("text", text.clone())]));
        provider.append(&job, events).await;
    }
    // Takes in less than one of them before it is read.
    let endpoint = Endpoint::from_shared(format!("http://{}", server.address)).unwrap();
    let channel = endpoint.initial_stream_window_size(65_535).connect_lazy();
    let mut request = Request::new(every(one(&job), None));
    let bearer = format!("Bearer {}", customer.key_secret).parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    let stream = EventServiceClient::new(channel).watch_events(request).await.unwrap().into_inner();
    let mut watch = Watch::new(stream);
    let mut seen = watch.events(1).await;

    let database = server.database.clone();
    database.take_away().await;
    // Its shape is at fault, which it is told as long as its credential is good.
    within_patience("a credential that is not confirmed", async {
        while customer.watch_by(every(None, None)).await.unwrap_err().code() == Code::InvalidArgument {}
    })
    .await;
    while let Ok(message) = tokio::time::timeout(Duration::from_secs(1), watch.next()).await {
        match message.unwrap().unwrap() {
            Message::Events(watched) => seen.extend(watched.events),
            other => panic!("{other:?}"),
        }
    }
    assert!(seen.len() < 200, "nothing was held back");
    drop(server);
    assert_ends(&mut watch, WatchEndReason::Draining, Code::Unavailable, ErrorReason::Draining).await;

    database.bring_back().await;
    let mut customer = replica.same(&customer);
    let start = Some(Start::ResumeToken(watch.resume_token));
    let mut resumed = within_patience("the database to be back", async {
        loop {
            let request = pb::WatchEventsRequest { start: start.clone(), ..every(one(&job), None) };
            match customer.watch_by(request).await {
                Err(status) if status.code() == Code::Unavailable => {}
                opened => break opened.unwrap(),
            }
        }
    })
    .await;
    seen.extend(resumed.caught_up().await.0);
    let sequences: Vec<i64> = seen.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, (1..=200).collect::<Vec<_>>());
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
    within_patience("room for another stream", room).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_does_not_take_its_end_is_cut() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    // Two streams on one connection: one that nobody reads, whose window is soon
    // full, and one that tells how the connection is.
    let endpoint = Endpoint::from_shared(format!("http://{}", server.address)).unwrap();
    let channel = endpoint.initial_stream_window_size(4_096).connect().await.unwrap();
    let mut streams = Vec::new();
    for secret in [&customer.key_secret, &provider.key_secret] {
        let mut request = Request::new(every(one(&job), None));
        request.metadata_mut().insert("authorization", format!("Bearer {secret}").parse().unwrap());
        let mut client = EventServiceClient::new(channel.clone());
        streams.push(client.watch_events(request).await.unwrap().into_inner());
    }
    let [mut unread, mut other] = streams.try_into().unwrap();
    for _ in 0..20 {
        provider.append(&job, (0..50).map(|_| info("x"))).await;
    }

    let me = customer.auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap().into_inner();
    let Some(Credential::ApiKey(key)) = me.credential else { panic!("{:?}", me.credential) };
    customer.session.auth.expire_api_key(pb::ExpireApiKeyRequest { api_key_id: key.id }).await.unwrap();
    within_patience("the cut", async { while other.message().await.is_ok() {} }).await;
    let mut events = 0;
    let end = loop {
        match unread.message().await {
            Ok(Some(response)) => match response.message.unwrap() {
                Message::Events(watched) => events += watched.events.len(),
                Message::CaughtUp(_) => {}
                more => panic!("it went on after its end: {more:?}"),
            },
            end => break end,
        }
    };
    assert!(end.is_err() && events < 1_000, "{end:?} after {events} events");
}
