//! PublishEvents: a stream of batches, each of which is answered once.

use std::time::Duration;

use diesel_async::AsyncPgConnection;
use milepost_client::pb::{
    self, ErrorReason, NewEvent, publish_events_request::Job, publish_events_response::Outcome,
};
use prost_types::{Value, value::Kind};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::support::{
    STREAMS_PER_USER, TestDatabase, TestServer, User, assert_refused, complete, info, named, registration,
    step, with_metadata, within_timeout,
};

/// The `publish_window` of [`TestServer`], in batches.
const WINDOW: usize = 8;

/// Both ends of a publish stream.
struct Publisher {
    batches: mpsc::Sender<pb::PublishEventsRequest>,
    answers: Streaming<pb::PublishEventsResponse>,
}

impl Publisher {
    async fn open(provider: &mut User) -> Self {
        let (batches, stream) = mpsc::channel(1);
        let answers = provider.events.publish_events(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Self { batches, answers }
    }

    async fn send(&self, batch: pb::PublishEventsRequest) {
        within_timeout("a batch to be read", self.batches.send(batch)).await.unwrap();
    }

    async fn next(&mut self) -> Result<Option<pb::PublishEventsResponse>, Status> {
        within_timeout("an answer", self.answers.message()).await
    }

    /// The outcome in the next answer, which must be the answer to this batch.
    async fn answer(&mut self, batch_id: &str) -> Outcome {
        let answer = self.next().await.unwrap().expect("the stream stays open");
        assert_eq!(answer.batch_id, batch_id);
        answer.outcome.expect("every answer has an outcome")
    }

    /// Returns once the server has read every batch sent so far. The server reads one
    /// batch after the other. The batch sent here makes it look up a configuration,
    /// which waits for the lock on `job_configurations` until the
    /// returned connection is dropped.
    async fn wait_until_read(&self, database: &TestDatabase, uncached: &pb::Job) -> AsyncPgConnection {
        const WAITING: &str = "SELECT pid::text AS text FROM pg_locks
            WHERE NOT granted AND relation = 'job_configurations'::regclass
              AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        let locker = database.lock("job_configurations").await;
        self.send(batch("last", uncached, [info("last")])).await;
        within_timeout("the last batch to be read", async {
            while database.texts(WAITING).await.is_empty() {}
        })
        .await;
        locker
    }

    /// The sequences in the next answer, which must say that this batch was appended.
    async fn appended(&mut self, batch_id: &str) -> Vec<i64> {
        match self.answer(batch_id).await {
            Outcome::Appended(appended) => appended.events.iter().map(|event| event.sequence).collect(),
            Outcome::Refused(refused) => panic!("{batch_id} was refused: {refused:?}"),
        }
    }
}

fn batch(
    batch_id: impl Into<String>,
    job: &pb::Job,
    events: impl IntoIterator<Item = NewEvent>,
) -> pb::PublishEventsRequest {
    pb::PublishEventsRequest {
        batch_id: batch_id.into(),
        job: Some(Job::JobId(job.id.clone())),
        expected_sequence: None,
        events: events.into_iter().collect(),
    }
}

/// A job of a configuration that the server has not cached yet.
async fn uncached_job(provider: &mut User, customer: &User, version: &str) -> pb::Job {
    provider.register(registration(version, &[])).await;
    provider.job(customer).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_batch_is_answered_once_in_order_and_a_half_close_with_ok() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(provider.job(&customer).await);
    }
    let Publisher { batches, answers } = Publisher::open(&mut provider).await;
    let sent: Vec<_> = (0..60)
        .map(|n| {
            let count = 1 + n % 4;
            batch(format!("batch {n}"), &jobs[n % 3], (0..count).map(|index| info(&format!("{n}/{index}"))))
        })
        .collect();
    // Sent without waiting for answers, and then half-closed.
    let to_send = sent.clone();
    let sending = tokio::spawn(async move {
        for batch in to_send {
            batches.send(batch).await.unwrap();
        }
    });
    let mut publisher = Publisher { batches: mpsc::channel(1).0, answers };
    let mut last = [0; 3];
    for (n, batch) in sent.iter().enumerate() {
        let sequences = publisher.appended(&batch.batch_id).await;
        let expected: Vec<i64> = (last[n % 3] + 1..).take(batch.events.len()).collect();
        assert_eq!(sequences, expected, "the batches of a job are appended in the order sent");
        last[n % 3] += i64::try_from(batch.events.len()).unwrap();
    }
    assert_eq!(publisher.next().await.unwrap(), None, "the stream ends with OK");
    sending.await.unwrap();
    for (index, job) in jobs.iter().enumerate() {
        let names: Vec<String> = provider.list(job).await.into_iter().map(|event| event.name).collect();
        let of_job = sent.iter().skip(index).step_by(3).flat_map(|batch| &batch.events);
        assert_eq!(names, of_job.map(|event| event.name.clone()).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_batch_is_answered_and_the_stream_stays_open() {
    let server = TestServer::start().await;
    let (mut provider, mut other, customer) =
        (server.provider().await, server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    other.configuration(&[("load", 1)]).await;
    let (job, foreign) = (provider.job(&customer).await, other.job(&customer).await);
    let first = info("first");
    let mut publisher = Publisher::open(&mut provider).await;
    let by_name = pb::PublishEventsRequest {
        job: Some(Job::ProviderJobId(job.provider_job_id.clone())),
        ..batch("valid", &job, [first.clone()])
    };
    publisher.send(by_name).await;
    assert_eq!(publisher.appended("valid").await, [1]);
    let ahead = pb::PublishEventsRequest { expected_sequence: Some(7), ..batch("ahead", &job, [info("a")]) };
    for (sent, code, reason) in [
        (batch("empty", &job, []), Code::InvalidArgument, ErrorReason::FieldInvalid),
        (batch("step", &job, [info("a"), step("no")]), Code::InvalidArgument, ErrorReason::FieldInvalid),
        (batch("foreign", &foreign, [info("a")]), Code::NotFound, ErrorReason::ResourceNotFound),
        (
            batch("differs", &job, [info("a"), named(first.clone(), "b")]),
            Code::AlreadyExists,
            ErrorReason::EventDiffers,
        ),
        (ahead, Code::Aborted, ErrorReason::SequenceMismatch),
        (batch("closed", &job, [complete(), info("late")]), Code::FailedPrecondition, ErrorReason::JobClosed),
    ] {
        // A batch sent directly after a refused one is not affected.
        let batch_id = sent.batch_id.clone();
        publisher.send(sent).await;
        publisher.send(batch("again", &job, [first.clone()])).await;
        match publisher.answer(&batch_id).await {
            Outcome::Refused(refused) => {
                let status = Status::with_details(
                    Code::from(refused.code),
                    refused.message.clone(),
                    prost::Message::encode_to_vec(&refused).into(),
                );
                assert_refused::<()>(Err(status), code, reason);
            }
            Outcome::Appended(appended) => panic!("{batch_id}: {appended:?}"),
        }
        assert_eq!(publisher.appended("again").await, [1]);
    }
    publisher.send(batch("last", &job, [step("load"), complete()])).await;
    assert_eq!(publisher.appended("last").await, [2, 3]);
    assert_eq!(provider.list(&job).await.len(), 3, "no event of a refused batch is stored");
    assert_eq!(other.list(&foreign).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_server_answers_every_accepted_batch_and_then_ends_the_stream() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    let uncached = uncached_job(&mut provider, &customer, "2.0.0").await;
    let mut watch = customer.clone().watch(&job).await;
    watch.caught_up().await;
    let database = server.database.clone();
    let lock = database.lock_job(&job).await;
    let mut publisher = Publisher::open(&mut provider).await;
    for n in 0..3 {
        publisher.send(batch(n.to_string(), &job, [info(&format!("{n}"))])).await;
    }
    database.wait_for_locks(1).await;
    drop(publisher.wait_until_read(&database, &uncached).await);

    drop(server);
    // The watch ends once the server drains.
    let last = watch.next().await.unwrap();
    assert!(matches!(last, Some(pb::watch_events_response::Message::End(_))), "{last:?}");
    drop(lock);
    for n in 0..3_i64 {
        assert_eq!(publisher.appended(&n.to_string()).await, [n + 1]);
    }
    assert_eq!(publisher.appended("last").await, [1]);
    assert_refused(publisher.next().await, Code::Unavailable, ErrorReason::Draining);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_is_not_read_while_its_window_is_full() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    let text = Value { kind: Some(Kind::StringValue("x".repeat(15_000))) };
    // 150 KB, so that the buffers of the connection take fewer batches than the window.
    let large = |n: usize| {
        let events =
            (0..10).map(|index| with_metadata(info(&format!("{n}/{index}")), [("text", text.clone())]));
        batch(n.to_string(), &job, events)
    };
    let lock = server.database.lock_job(&job).await;
    let mut publisher = Publisher::open(&mut provider).await;
    let total = 5 * WINDOW;
    let mut sent = 0;
    while sent < total {
        let sending = publisher.batches.send(large(sent));
        if tokio::time::timeout(Duration::from_secs(1), sending).await.is_err() {
            break;
        }
        sent += 1;
    }
    assert!((WINDOW..total / 2 + WINDOW).contains(&sent), "{sent} of {total} batches were read");
    // Each answer frees a slot of the window.
    drop(lock);
    let mut answered = 0;
    while answered < total {
        tokio::select! {
            slot = publisher.batches.reserve(), if sent < total => {
                slot.unwrap().send(large(sent));
                sent += 1;
            }
            answer = publisher.answers.message() => {
                assert_eq!(answer.unwrap().unwrap().batch_id, answered.to_string());
                answered += 1;
            }
        }
    }
    assert_eq!(provider.get(&job).await.last_sequence, i64::try_from(10 * total).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_batch_after_a_failed_one_of_the_same_job_is_committed() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    for round in 0..5 {
        let job = provider.job(&customer).await;
        let uncached = uncached_job(&mut provider, &customer, &format!("2.0.{round}")).await;
        let lock = server.database.lock_job(&job).await;
        let mut publisher = Publisher::open(&mut provider).await;
        let batches: Vec<_> = (0..5).map(|n| batch(n.to_string(), &job, [info(&format!("{n}"))])).collect();
        publisher.send(batches[0].clone()).await;
        let waiting = server.database.wait_for_locks(1).await;
        for batch in &batches[1..] {
            publisher.send(batch.clone()).await;
        }
        drop(publisher.wait_until_read(&server.database, &uncached).await);
        // The transaction of the first batch is lost. The database stays available for
        // the batches that wait behind it.
        for pid in waiting {
            server.database.execute(&format!("SELECT pg_terminate_backend({pid})")).await;
        }
        drop(lock);
        assert_refused(publisher.next().await, Code::Unavailable, ErrorReason::DatabaseUnavailable);
        // All batches are sent again in order; none of them is stored already.
        let mut again = Publisher::open(&mut provider).await;
        for batch in &batches {
            again.send(batch.clone()).await;
        }
        for batch in &batches {
            let Outcome::Appended(appended) = again.answer(&batch.batch_id).await else { panic!("refused") };
            assert!(!appended.events[0].existed, "batch {} was committed without the first", batch.batch_id);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_beyond_the_limit_is_refused_until_another_one_closes() {
    let server = TestServer::start().await;
    let (mut provider, mut other) = (server.provider().await, server.provider().await);
    let mut publishers = Vec::new();
    for _ in 0..STREAMS_PER_USER {
        publishers.push(Publisher::open(&mut provider).await);
    }
    let empty = || ReceiverStream::new(mpsc::channel(1).1);
    let refused = provider.events.publish_events(empty()).await;
    let refusal = assert_refused(refused, Code::ResourceExhausted, ErrorReason::Overloaded);
    assert!(refusal.details.retry_info().is_some() && refusal.details.quota_failure().is_some());
    // Publish streams and watches count towards the same limit.
    let scope = pb::watch_events_request::Scope::AllJobs(pb::AllJobs::default());
    let watch = pb::WatchEventsRequest { scope: Some(scope), ..Default::default() };
    let refused = provider.watch_by(watch).await;
    assert_refused(refused, Code::ResourceExhausted, ErrorReason::Overloaded);
    // The stream of another user is not counted.
    Publisher::open(&mut other).await;

    drop(publishers.pop());
    let freed = async { while provider.events.publish_events(empty()).await.is_err() {} };
    within_timeout("the closed stream no longer to be counted", freed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_too_many_items_or_of_nested_metadata_is_refused_and_the_stream_stays_open() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    let mut publisher = Publisher::open(&mut provider).await;
    let mut nested = Value::from("deep");
    for _ in 0..50 {
        nested = Value { kind: Some(Kind::ListValue(prost_types::ListValue { values: vec![nested] })) };
    }
    let names = (0..60_000).map(|name| (name.to_string(), Value::from(true)));
    let wide = NewEvent { metadata: Some(prost_types::Struct { fields: names.collect() }), ..info("wide") };
    for (batch_id, events, field) in [
        ("many", vec![NewEvent::default(); 400_000], "events"),
        ("nested", vec![with_metadata(info("nested"), [("list", nested)])], "events[0].metadata.list"),
        ("wide", vec![wide], "events[0].metadata"),
    ] {
        publisher.send(batch(batch_id, &job, events)).await;
        match publisher.answer(batch_id).await {
            Outcome::Refused(refused) => {
                let (code, details) = (Code::from(refused.code), prost::Message::encode_to_vec(&refused));
                let status = Status::with_details(code, refused.message, details.into());
                crate::support::assert_violations::<()>(Err(status), &[field]);
            }
            Outcome::Appended(_) => panic!("{batch_id} was appended"),
        }
    }
    publisher.send(batch("valid", &job, [info("valid")])).await;
    assert_eq!(publisher.appended("valid").await, [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_stream_ends_with_its_credential_even_while_a_batch_waits() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let job = uncached_job(&mut provider, &customer, "1.0.0").await;
    let mut publisher = Publisher::open(&mut provider).await;
    let locker = publisher.wait_until_read(&server.database, &job).await;
    provider.expire_key().await.unwrap();
    assert_refused(publisher.next().await, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    assert!(!server.database.waiting_for_locks().await.is_empty(), "the batch no longer waits");
    drop(locker);
    // The refused batch stored nothing: the next event is the only one.
    provider.key = provider.session.clone();
    provider.append(&job, [info("next")]).await;
    let names: Vec<_> = provider.list(&job).await.into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["next"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_id_that_is_too_long_is_echoed_truncated() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let mut publisher = Publisher::open(&mut provider).await;
    for (length, echo) in [
        (256, "ü".repeat(256)),
        (257, format!("{}…", "ü".repeat(64))),
        (400_000, format!("{}…", "ü".repeat(64))),
    ] {
        publisher.send(batch("ü".repeat(length), &job, [info("an event")])).await;
        let outcome = publisher.answer(&echo).await;
        assert_eq!(matches!(outcome, Outcome::Appended(_)), length == 256);
    }
}
