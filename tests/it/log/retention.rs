//! Retention removes the events of a job a set time after the job closed. All
//! guarantees hold for the events that are kept. A read or watch that would miss removed
//! events ends with EVENTS_EXPIRED.

use std::time::Duration;

use milepost_client::pb::{
    self, ErrorReason, Event, WatchEndReason, watch_events_request::Scope, watch_events_request::Start,
    watch_events_response::Message,
};
use prost_types::{Value, value::Kind};
use tonic::Code;

use crate::support::{
    TestDatabase, TestServer, User, Watch, assert_refused, complete, info, registration, step, with_metadata,
    within_timeout,
};

/// One step of the removal, with a retention time of zero. Returns how many jobs were
/// marked and how many events were deleted.
async fn remove(server: &TestServer, most_jobs: u32, most_events: u32) -> (u32, u32) {
    server.database.keep_step_times().await;
    let sql = format!(
        "SELECT unnest(ARRAY[marked, deleted])::text AS text
         FROM remove_expired_events(interval '0', {most_jobs}, {most_events})"
    );
    let step = server.database.texts(&sql).await;
    (step[0].parse().unwrap(), step[1].parse().unwrap())
}

pub(super) async fn remove_all(server: &TestServer) {
    while remove(server, 100, 1_000).await != (0, 0) {}
}

/// A job with this many `info` events and a `complete`.
pub(super) async fn completed(provider: &mut User, customer: &User, events: usize) -> pb::Job {
    let job = provider.job(customer).await;
    let infos: Vec<_> = (0..events).map(|n| info(&format!("{n}"))).collect();
    for batch in infos.chunks(500) {
        provider.append(&job, batch.to_vec()).await;
    }
    provider.append(&job, [complete()]).await;
    job
}

/// Appends more bytes than the buffers of a connection take whose client does not read.
async fn append_large(provider: &mut User, job: &pb::Job, events: usize) {
    let large = || Value { kind: Some(Kind::StringValue("x".repeat(16_000))) };
    for n in 0..events / 40 {
        let batch = (0..40).map(|m| with_metadata(info(&format!("{}", n * 40 + m)), [("large", large())]));
        provider.append(job, batch.collect::<Vec<_>>()).await;
    }
}

fn all_jobs(start: Option<Start>) -> pb::WatchEventsRequest {
    pb::WatchEventsRequest {
        scope: Some(Scope::AllJobs(pb::AllJobs::default())),
        start,
        ..Default::default()
    }
}

fn tagged(tag: &str, token: &str) -> pb::WatchEventsRequest {
    let all = pb::AllJobs { configuration_tag: tag.to_owned(), ..Default::default() };
    let start = (!token.is_empty()).then(|| Start::ResumeToken(token.to_owned()));
    pb::WatchEventsRequest { scope: Some(Scope::AllJobs(all)), start, ..Default::default() }
}

/// Reads until retention ends the watch. Returns the events that came before the end.
async fn read_until_expired(watch: &mut Watch, first_sequence: Option<&str>) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        match watch.next().await.unwrap().expect("an `end` before the status") {
            Message::Events(watched) => events.extend(watched.events),
            Message::End(end) => {
                assert_eq!(end.reason(), WatchEndReason::EventsExpired);
                break;
            }
            Message::CaughtUp(_) | Message::Heartbeat(_) => {
                panic!("the watch goes on after {} events", events.len())
            }
        }
    }
    let refusal = assert_refused(watch.next().await, Code::OutOfRange, ErrorReason::EventsExpired);
    assert_eq!(refusal.metadata.get("first_sequence").map(String::as_str), first_sequence);
    events
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_removed_a_set_time_after_their_job_closed() {
    let retention = Some(Duration::from_secs(1));
    let server = TestServer::with_retention(TestDatabase::migrated().await, retention).await;
    let _replica = TestServer::with_retention(server.database.clone(), retention).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 3), ("report", 1)]).await;
    let open = provider.job(&customer).await;
    provider.append(&open, [info("goes on"), step("load")]).await;
    let kept = provider.list(&open).await;
    let mut closed = Vec::new();
    for _ in 0..5 {
        closed.push(completed(&mut provider, &customer, 700).await);
    }
    let failed = provider.job(&customer).await;
    provider.append(&failed, [step("load")]).await;
    provider.close(&failed).await.unwrap();
    closed.push(failed);
    let mut finals = Vec::new();
    for job in &closed {
        finals.push(provider.get(job).await);
    }

    let of_closed_jobs = format!("SELECT count(*)::text AS text FROM events WHERE job_id <> '{}'", open.id);
    within_timeout("the events to be removed", async {
        while server.database.texts(&of_closed_jobs).await != ["0"] {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    for job in finals {
        assert_eq!(provider.get(&job).await, job, "the job itself does not change");
    }
    assert_eq!(provider.list(&open).await, kept);
    // No log was removed before its time.
    let early = "SELECT removed_logs.job_id::text AS text FROM removed_logs JOIN jobs ON jobs.id = job_id
                 WHERE removed_logs.created_at < closed_at + interval '1 s'";
    assert_eq!(server.database.texts(early).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_removed_events_of_a_job_is_out_of_range_and_names_the_first_kept_sequence() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = completed(&mut provider, &customer, 9).await;
    let before = provider.get(&job).await;
    let mut opened = customer.watch(&job).await;
    let (_, caught_up) = opened.caught_up().await;
    let Some(Message::End(_)) = opened.next().await.unwrap() else { panic!("the job is closed") };
    let end_token = opened.resume_token;
    remove_all(&server).await;

    let list = |after_sequence| pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(job.id.clone())),
        after_sequence,
        ..Default::default()
    };
    for after in [0, 1, 9] {
        let refusal = assert_refused(
            customer.events.list_events(list(after)).await,
            Code::OutOfRange,
            ErrorReason::EventsExpired,
        );
        assert_eq!(refusal.metadata["first_sequence"], "11");
        let start = (after > 0).then_some(Start::AfterSequence(after));
        let received = read_until_expired(&mut customer.watch_from(&job, start).await, Some("11")).await;
        assert_eq!(received, []);
    }
    let page = customer.events.list_events(list(10)).await.unwrap().into_inner();
    assert_eq!((page.events.len(), page.next_page_token.as_str()), (0, ""));
    for start in [Start::AfterSequence(10), Start::FromNow(pb::FromNow {}), Start::ResumeToken(end_token)] {
        let watched = customer.watch_from(&job, Some(start)).await.read_to_end().await;
        assert_eq!(
            (watched.events.len(), watched.end.job),
            (0, caught_up.job),
            "the state of the job is still sent"
        );
    }
    assert_eq!(provider.get(&job).await, before);
    assert!(provider.close(&job).await.is_err(), "a complete job stays complete");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_event_is_never_appended_a_second_time() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    let (first, last) = (step("load"), complete());
    provider.append(&job, [first.clone()]).await;
    provider.append(&job, [last.clone()]).await;
    remove_all(&server).await;
    for mut caller in [provider.clone(), replica.same(&provider)] {
        for batch in [vec![first.clone()], vec![last.clone()], vec![first.clone(), last.clone()]] {
            let refused = caller.try_append(&job, batch).await;
            assert_refused(refused, Code::FailedPrecondition, ErrorReason::JobClosed);
        }
    }
    assert_eq!(server.count("events").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_all_jobs_from_the_beginning_starts_with_the_oldest_kept_event() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let first = provider.job(&customer).await;
    provider.append(&first, [info("older than what is removed")]).await;
    completed(&mut provider, &customer, 30).await;
    let second = provider.job(&customer).await;
    provider.append(&second, [info("newer")]).await;
    let mut kept = provider.list(&first).await;
    kept.extend(provider.list(&second).await);

    // After each step of the removal, no event of the closed job is sent.
    let mut steps = 0;
    loop {
        let step = remove(&server, 1, 7).await;
        let (received, _) = customer.clone().watch_all().await.caught_up().await;
        assert_eq!(received, kept);
        if step == (0, 0) {
            break;
        }
        steps += 1;
        assert!(step.0 <= 1 && step.1 <= 7, "small steps: {step:?}");
    }
    assert!(steps > 4);
    // The only event left is that of the open job.
    provider.append(&first, [complete()]).await;
    remove_all(&server).await;
    let (received, _) = customer.clone().watch_all().await.caught_up().await;
    assert_eq!(received, kept[1..]);
    // Such a watch continues live, and its resume tokens are valid.
    let mut watch = provider.watch_all().await;
    watch.caught_up().await;
    let start = Start::ResumeToken(watch.resume_token.clone());
    provider.append(&second, [info("live")]).await;
    for mut watch in [watch, provider.watch_by(all_jobs(Some(start))).await.unwrap()] {
        assert_eq!(watch.events(1).await[0].name, "live");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_token_is_refused_if_unread_events_of_its_scope_were_removed() {
    let server = TestServer::start().await;
    let (mut provider, mut other) = (server.provider().await, server.provider().await);
    let (mut customer, mut other_customer) = (server.customer().await, server.customer().await);
    let of_tag = registration("1.0.0", &[("load", 1)]);
    let tag = of_tag.tag.clone();
    let of_other_tag = pb::RegisterJobConfigurationRequest { tag: "other".to_owned(), ..of_tag.clone() };
    for provider in [&mut provider, &mut other] {
        provider.register(of_tag.clone()).await;
        provider.register(of_other_tag.clone()).await;
    }

    let job = provider.job(&customer).await;
    provider.append(&job, [info("read before the removal")]).await;
    let of_other = other.job(&other_customer).await;
    other.append(&of_other, [info("read before the removal")]).await;
    let requests = [tagged("", ""), tagged(&tag, ""), tagged("other", "")];
    let mut before = Vec::new();
    for user in [&mut provider, &mut customer, &mut other, &mut other_customer] {
        for request in &requests {
            let mut watch = user.watch_by(request.clone()).await.unwrap();
            watch.caught_up().await;
            before.push(watch.resume_token);
        }
    }
    provider.append(&job, [complete()]).await;
    let mut read_to_end = provider.watch_all().await;
    read_to_end.caught_up().await;
    remove_all(&server).await;

    let mut tokens = before.iter();
    let expected = [[true, true, false], [true, true, false], [false; 3], [false; 3]];
    for (user, expected) in
        [&mut provider, &mut customer, &mut other, &mut other_customer].into_iter().zip(expected)
    {
        for (tag, lost) in ["", &tag, "other"].into_iter().zip(expected) {
            let mut watch = user.watch_by(tagged(tag, tokens.next().unwrap())).await.unwrap();
            if lost {
                assert_eq!(read_until_expired(&mut watch, None).await, []);
            } else {
                assert_eq!(watch.caught_up().await.0, []);
            }
        }
    }
    // A token after the last removed event is valid.
    let mut resumed = provider.watch_by(tagged("", &read_to_end.resume_token)).await.unwrap();
    assert_eq!(resumed.caught_up().await.0, []);
    // A watch that is limited to another customer is not affected.
    let with = |user: &User, start: &str| {
        let mut request = tagged("", start);
        if let Some(Scope::AllJobs(all)) = &mut request.scope {
            all.counterpart_id = user.id.clone();
        }
        request
    };
    let mut tokens = Vec::new();
    for user in [&customer, &other_customer] {
        let mut watch = provider.watch_by(with(user, "")).await.unwrap();
        watch.caught_up().await;
        tokens.push(watch.resume_token);
    }
    completed(&mut provider, &customer, 1).await;
    remove_all(&server).await;
    assert_eq!(
        read_until_expired(&mut provider.watch_by(with(&customer, &tokens[0])).await.unwrap(), None).await,
        []
    );
    let mut watch = provider.watch_by(with(&other_customer, &tokens[1])).await.unwrap();
    assert_eq!(watch.caught_up().await.0, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_watch_that_is_overtaken_by_retention_ends_with_events_expired() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    let events = 1_200;
    append_large(&mut provider, &job, events).await;
    let reader = || server.other_clients().same(&provider);
    // Both watches have received the first message but not most of the log.
    let (mut all, mut one) = (reader().watch_all().await, reader().watch(&job).await);
    let mut received = [all.events(1).await, one.events(1).await];
    provider.append(&job, [complete()]).await;
    remove_all(&server).await;
    received[0].extend(read_until_expired(&mut all, None).await);
    received[1].extend(read_until_expired(&mut one, Some("1202")).await);
    for received in received {
        assert!(!received.is_empty() && received.len() < events, "{} of {events}", received.len());
        let sequences: Vec<_> = received.iter().map(|event| event.sequence).collect();
        assert_eq!(
            sequences,
            (1..).take(received.len()).collect::<Vec<_>>(),
            "the events before the end have no gap"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_the_beginning_skips_events_removed_before_it_reads_them() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    append_large(&mut provider, &job, 1_200).await;
    let (before, spans) = (completed(&mut provider, &customer, 3).await, provider.job(&customer).await);
    provider.append(&spans, [info("past")]).await;
    let reader = || server.other_clients().same(&provider);
    // All watches have received the first message but not most of the log.
    let mut from_beginning = reader().watch_all().await;
    let mut received = from_beginning.events(1).await;
    let resumed = all_jobs(Some(Start::ResumeToken(from_beginning.resume_token.clone())));
    let mut resumed = reader().watch_by(resumed).await.unwrap();
    resumed.events(1).await;
    let mut overlapped = reader().watch_all().await;
    overlapped.events(1).await;
    remove_all(&server).await;
    received.extend(from_beginning.caught_up().await.0);
    assert!(received.iter().all(|event| event.job_id != before.id), "an event of a removed log is sent");
    assert_eq!(received.len(), 1_201, "no other event is skipped");
    // A watch from a resume token must not skip events.
    read_until_expired(&mut resumed, None).await;

    // The log of `spans` began before `overlapped` was opened and went on after that, so
    // that `overlapped` must not skip it. `from_beginning` receives the last event live.
    provider.append(&spans, [complete()]).await;
    remove_all(&server).await;
    read_until_expired(&mut overlapped, None).await;
    assert_eq!(from_beginning.events(1).await[0].kind(), pb::EventKind::Complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partly_removed_log_is_not_sent_from_its_middle() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = completed(&mut provider, &customer, 999).await;
    assert_eq!((remove(&server, 1, 300).await, remove(&server, 1, 300).await), ((1, 0), (0, 300)));
    let after = |sequence| Some(Start::AfterSequence(sequence));
    for start in [None, after(150), after(299)] {
        let mut watch = customer.clone().watch_from(&job, start).await;
        assert_eq!(read_until_expired(&mut watch, Some("1001")).await, []);
    }
    let watched = customer.clone().watch_from(&job, after(300)).await.read_to_end().await;
    assert_eq!((watched.events.len(), watched.events[0].sequence), (700, 301), "all kept events are sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_if_events_were_appended_and_removed_before_the_tail_read_them() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    let mut other = server.provider().await;
    provider.configuration(&[("load", 1)]).await;
    other.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let other_job = other.job(&server.customer().await).await;
    let (mut one, mut all) = (customer.watch(&job).await, provider.watch_all().await);
    let mut of_other = other.watch_all().await;
    for watch in [&mut one, &mut all, &mut of_other] {
        watch.caught_up().await;
    }
    // As after an outage longer than the retention time: the server finds that the end
    // of the log has moved, but no events.
    let append_and_remove = format!(
        "BEGIN;
         UPDATE job_states SET last_sequence = 2, last_event_id = gen_random_uuid(), status = 'cancelled',
             closed = true WHERE job_id = '{id}';
         UPDATE jobs SET status = 'cancelled', closed_at = clock_timestamp() WHERE id = '{id}';
         UPDATE event_log SET position = position + 2;
         INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status, points_done, percent, created_at)
         SELECT '{id}', n, position - 2 + n, gen_random_uuid(), kind::event_kind, '', '', status::job_status, 0, 0, clock_timestamp()
         FROM event_log, (VALUES (1, 'info', 'running'), (2, 'close', 'cancelled')) AS given (n, kind, status);
         SELECT remove_expired_events(interval '0', 100, 1000);
         SELECT remove_expired_events(interval '0', 100, 1000);
         COMMIT",
        id = job.id
    );
    server.database.execute(&append_and_remove).await;
    assert_eq!(server.count("events").await, 0);
    assert_eq!(read_until_expired(&mut all, None).await, []);
    assert_eq!(read_until_expired(&mut one, Some("3")).await, []);
    other.append(&other_job, [info("of another provider")]).await;
    assert_eq!(of_other.events(1).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_retention_deletes_events() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    completed(&mut provider, &customer, 1).await;
    for sql in ["DELETE FROM events", "TRUNCATE events", "DELETE FROM events WHERE sequence = 2"] {
        let done =
            diesel_async::SimpleAsyncConnection::batch_execute(&mut server.database.connect().await, sql)
                .await;
        assert!(done.is_err(), "{sql}");
    }
    assert_eq!(server.count("events").await, 2);
}
