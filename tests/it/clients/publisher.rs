use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use milepost_client::{
    CallError, PublishError, Publisher, Refusal, Refused,
    pb::{self, NewEvent, append_events_request::Job},
};
use tokio::time::timeout;
use tonic::Code;

use super::{Told, by_id, client, names, numbers};
use crate::support::{Mode, Proxy, TestServer, User, complete, info, named, within_timeout};

/// Long enough for a wrong implementation to go on; a right one never does.
const MOMENT: Duration = Duration::from_millis(200);
/// A name that the server refuses.
const TOO_LONG: usize = 300;

/// A server, a provider with a job, and a client of the provider.
struct Scene {
    server: TestServer,
    provider: User,
    customer: User,
    job: pb::Job,
    client: milepost_client::Client,
}

impl Scene {
    async fn new() -> Self {
        let server = TestServer::start().await;
        let (provider, customer, job) = server.job(&[]).await;
        let client = server.client().with_credential(&provider.key_secret).unwrap();
        Self { server, provider, customer, job, client }
    }

    /// Appends events with these names to the job.
    async fn append(&self, publisher: &Publisher, names: &[String]) {
        append(publisher, &self.job, names).await;
    }

    async fn log(&mut self) -> Vec<pb::Event> {
        self.provider.list(&self.job).await
    }
}

async fn append(publisher: &Publisher, job: &pb::Job, names: &[String]) {
    for name in names {
        publisher.append(by_id(job), info(name)).await.unwrap();
    }
}

#[track_caller]
fn assert_stopped<T: std::fmt::Debug>(answer: Result<T, PublishError>, code: Code, reason: &str) {
    let Err(PublishError::Stopped(error)) = answer else { panic!("{answer:?}") };
    assert_eq!((error.code(), error.reason()), (code, Some(reason)));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_each_job_are_stored_once_in_their_order_and_told() {
    let mut scene = Scene::new().await;
    let jobs = [scene.job.clone(), scene.provider.job(&scene.customer).await];
    let stored = Told::new();
    let told = stored.clone();
    let publisher = scene
        .client
        .publisher()
        .on_stored(move |job, event| told.push((job.clone(), event.sequence, event.id.clone())))
        .start();
    // More than one batch.
    let names_of_all = numbers(1200);
    join_all(jobs.iter().map(|job| append(&publisher, job, &names_of_all))).await;
    within_timeout("the events to be stored", publisher.close()).await.unwrap();
    for job in &jobs {
        let log = scene.provider.list(job).await;
        assert_eq!(names(&log), names_of_all);
        let stored = stored.all().into_iter().filter(|(of, _, _)| *of == by_id(job));
        let stored: Vec<(i64, String)> = stored.map(|(_, sequence, id)| (sequence, id)).collect();
        let expected: Vec<(i64, String)> = log.into_iter().map(|event| (event.sequence, event.id)).collect();
        assert_eq!(stored, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_without_an_id_gets_one_and_a_job_is_created_before_its_events() {
    let mut scene = Scene::new().await;
    let publisher = scene.client.publisher().start();
    let request = scene.provider.new_job(&scene.customer);
    let job = Job::ProviderJobId(request.provider_job_id.clone());
    publisher.create_job(request.clone()).await.unwrap();
    for name in numbers(3) {
        let event = NewEvent { id: String::new(), ..info(&name) };
        publisher.append(job.clone(), event).await.unwrap();
    }
    within_timeout("the events to be stored", publisher.close()).await.unwrap();
    let created = scene.provider.jobs.create_job(request).await.unwrap().into_inner();
    assert!(created.existed);
    let log = scene.provider.list(&created.job.unwrap()).await;
    assert_eq!(names(&log), numbers(3));
    assert!(log.iter().all(|event| event.id.as_bytes()[14] == b'7'), "the ids are of version 7");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_answer_is_lost_is_stored_once() {
    let mut scene = Scene::new().await;
    let proxy = Proxy::to_server(scene.server.address).await;
    let (stored, interruptions) = (Told::new(), Told::new());
    let (tell_stored, tell_interruption) = (stored.clone(), interruptions.clone());
    let publisher = client(&proxy.url, &scene.provider)
        .await
        .publisher()
        .on_stored(move |_, event| tell_stored.push((event.sequence, event.existed)))
        .on_interruption(move |error, pause| tell_interruption.push((error.code(), pause)))
        .start();
    scene.append(&publisher, &numbers(1)).await;
    publisher.flush().await.unwrap();

    let locker = scene.server.database.lock_job(&scene.job).await;
    scene.append(&publisher, &["a".to_owned(), "b".to_owned()]).await;
    scene.server.database.wait_for_locks(1).await;
    // The server has the batch and can no longer answer it. It commits it nevertheless.
    proxy.cut();
    drop(locker);
    within_timeout("the events to be stored", publisher.close()).await.unwrap();
    assert_eq!(names(&scene.log().await), ["0", "a", "b"]);
    assert_eq!(stored.all().iter().map(|(sequence, _)| *sequence).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(stored.all()[1].1, "the first event of the batch was stored before its second attempt");
    assert!(!interruptions.all().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_an_answer_is_sent_again() {
    let mut scene = Scene::new().await;
    let proxy = Proxy::to_server(scene.server.address).await;
    let interruptions = Told::new();
    let told = interruptions.clone();
    let publisher = client(&proxy.url, &scene.provider)
        .await
        .publisher()
        .attempt_timeout(Duration::from_millis(300))
        .on_interruption(move |error, _| told.push(error.code()))
        .start();
    proxy.set(Mode::Hold);
    scene.append(&publisher, &numbers(3)).await;
    within_timeout("two interruptions", async {
        while interruptions.all().len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(interruptions.all()[0], Code::DeadlineExceeded);
    proxy.set(Mode::Pass);
    within_timeout("the events to be stored", publisher.close()).await.unwrap();
    assert_eq!(names(&scene.log().await), numbers(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_events_at_fault_of_a_batch_are_refused() {
    let mut scene = Scene::new().await;
    let refused = Told::<Refusal>::new();
    let told = refused.clone();
    let publisher = scene.client.publisher().on_refused(move |refusal| told.push(refusal.clone())).start();
    let locker = scene.server.database.lock_job(&scene.job).await;
    scene.append(&publisher, &numbers(1)).await;
    scene.server.database.wait_for_locks(1).await;
    // These wait for the first one, and become one batch.
    let mut expected = numbers(1);
    for n in 1..40 {
        let is_wrong = [1, 17, 18, 39].contains(&n);
        let name = if is_wrong { "x".repeat(TOO_LONG) } else { n.to_string() };
        let event = NewEvent { step_tag: if n == 18 { "unknown" } else { "" }.to_owned(), ..info(&name) };
        publisher.append(by_id(&scene.job), event).await.unwrap();
        if !is_wrong {
            expected.push(name);
        }
    }
    drop(locker);
    within_timeout("the events to be stored", publisher.flush()).await.unwrap();
    assert_eq!(names(&scene.log().await), expected);
    let refused = refused.all();
    assert_eq!(refused.len(), 4);
    for Refusal { refused, error } in refused {
        let Refused::Event { job, event } = refused else { panic!("{refused:?}") };
        assert_eq!((job, event.name.len()), (by_id(&scene.job), TOO_LONG));
        assert_eq!((error.code(), error.reason()), (Code::InvalidArgument, Some("FIELD_INVALID")));
        assert_eq!(error.violations()[0].field, "events[0].name", "{error}");
    }
    publisher.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_requested_cancellation_is_told_once_for_each_name_of_a_job() {
    let mut scene = Scene::new().await;
    let (job, other) = (by_id(&scene.job), by_id(&scene.provider.job(&scene.customer).await));
    let by_provider = Job::ProviderJobId(scene.job.provider_job_id.clone());
    let (told, client) = (Told::<(Job, SystemTime)>::new(), scene.client.clone());
    let start = || {
        let told = told.clone();
        client.publisher().on_cancellation_requested(move |job, at| told.push((job.clone(), at))).start()
    };
    let append = async |publisher: &Publisher, name: &str| {
        for job in [&job, &by_provider, &other] {
            publisher.append(job.clone(), info(name)).await.unwrap();
            within_timeout("the event to be stored", publisher.flush()).await.unwrap();
        }
    };
    let publisher = start();
    append(&publisher, "before").await;
    assert!(told.all().is_empty());

    let request = pb::RequestCancellationRequest { job_id: scene.job.id.clone(), reason: String::new() };
    let answer = scene.customer.session.jobs.request_cancellation(request).await.unwrap().into_inner();
    let at = answer.job.unwrap().cancellation_requested_at.unwrap();
    let at = SystemTime::try_from(at).unwrap();
    for name in ["after", "later"] {
        append(&publisher, name).await;
        assert_eq!(told.all(), [(job.clone(), at), (by_provider.clone(), at)]);
    }
    publisher.close().await.unwrap();

    let restarted = start();
    restarted.append(job.clone(), info("restarted")).await.unwrap();
    within_timeout("the event to be stored", restarted.close()).await.unwrap();
    assert_eq!(told.all()[2..], [(job, at)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_reports_the_first_refusal_once_if_no_callback_is_told() {
    let mut scene = Scene::new().await;
    let publisher = scene.client.publisher().start();
    scene.append(&publisher, &["first".repeat(100), "stored".to_owned(), "second".repeat(100)]).await;
    let flushed = within_timeout("the flush", publisher.flush()).await;
    let Err(PublishError::Refused(refusal)) = flushed else { panic!("{flushed:?}") };
    let Refused::Event { event, .. } = refusal.refused else { panic!("{refusal:?}") };
    assert!(event.name.starts_with("first"));
    publisher.flush().await.unwrap();

    publisher.append(by_id(&scene.job), complete()).await.unwrap();
    publisher.flush().await.unwrap();
    scene.append(&publisher, &["late".to_owned()]).await;
    let closed = within_timeout("the close", publisher.close()).await;
    let Err(PublishError::Refused(refusal)) = closed else { panic!("{closed:?}") };
    assert_eq!(refusal.error.reason(), Some("JOB_CLOSED"));
    assert_eq!(names(&scene.log().await), ["stored", "done"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_waits_while_the_publisher_holds_its_most_events_or_bytes() {
    let mut scene = Scene::new().await;
    let large = || named(info(""), "x".repeat(200));
    for publisher in
        [scene.client.publisher().max_events(5).start(), scene.client.publisher().max_bytes(1200).start()]
    {
        let locker = scene.server.database.lock_job(&scene.job).await;
        let mut held = 0;
        // Each event has some 240 bytes.
        while timeout(MOMENT, publisher.append(by_id(&scene.job), large())).await.is_ok() {
            held += 1;
            assert!(held <= 5, "the publisher holds {held} events");
        }
        assert!(held >= 4, "the publisher holds only {held} events");
        drop(locker);
        within_timeout("room", publisher.append(by_id(&scene.job), large())).await.unwrap();
        within_timeout("the events to be stored", publisher.close()).await.unwrap();
        assert_eq!(scene.log().await.len(), held + 1, "an append that was given up has appended nothing");
        scene.job = scene.provider.job(&scene.customer).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_waits_for_what_was_appended_before_and_no_job_for_another() {
    let mut scene = Scene::new().await;
    let other = scene.provider.job(&scene.customer).await;
    let publisher = scene.client.publisher().start();
    let locker = scene.server.database.lock_job(&scene.job).await;
    scene.append(&publisher, &numbers(1)).await;
    scene.server.database.wait_for_locks(1).await;
    append(&publisher, &other, &numbers(2)).await;
    within_timeout("the events of the other job", async {
        while scene.provider.get(&other).await.last_sequence < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(timeout(MOMENT, publisher.flush()).await.is_err());
    drop(locker);
    within_timeout("the flush", publisher.flush()).await.unwrap();
    assert_eq!(scene.log().await.len(), 1);
    publisher.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_stops_the_publisher() {
    let mut scene = Scene::new().await;
    let wrong = scene.client.with_credential("mpk_wrong").unwrap();
    let publisher = wrong.publisher().max_events(1).start();
    scene.append(&publisher, &numbers(1)).await;
    let (code, reason) = (Code::Unauthenticated, "CREDENTIAL_INVALID");
    // Also one that waits for room.
    let waiting = publisher.append(by_id(&scene.job), info("waiting"));
    assert_stopped(within_timeout("the append", waiting).await, code, reason);
    assert_stopped(within_timeout("the flush", publisher.flush()).await, code, reason);
    assert_stopped(publisher.append(by_id(&scene.job), info("later")).await, code, reason);
    assert_stopped(publisher.close().await, code, reason);
    assert_eq!(scene.log().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callback_that_panics_stops_the_publisher() {
    let scene = Scene::new().await;
    let publisher = scene.client.publisher().on_stored(|_, _| panic!("the callback fails")).start();
    scene.append(&publisher, &numbers(1)).await;
    let flushed = within_timeout("the flush", publisher.flush()).await;
    assert!(matches!(flushed, Err(PublishError::Callback)), "{flushed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_has_its_details_decoded() {
    let mut scene = Scene::new().await;
    let refused = scene.provider.try_append(&scene.job, [named(info(""), "x".repeat(TOO_LONG))]).await;
    let error = CallError::from(refused.unwrap_err());
    assert_eq!(error.code(), Code::InvalidArgument);
    assert_eq!(error.reason(), Some("FIELD_INVALID"));
    assert_eq!(error.violations()[0].field, "events[0].name");
    assert_eq!(error.retry_delay(), None);
    assert!(error.details().error_info().is_some() && !error.is_transient());
    scene.server.database.make_unavailable().await;
    let error = within_timeout("the outage", async {
        loop {
            if let Err(status) = scene.provider.try_append(&scene.job, [info("")]).await {
                return CallError::from(status);
            }
        }
    })
    .await;
    assert!(error.is_transient() && error.retry_delay().is_some(), "{error}");
}
