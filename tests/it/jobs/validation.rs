//! Invalid requests: each is refused with its code, its reason and every field at fault,
//! and stores nothing.

use std::collections::BTreeMap;

use milepost::limits;
use milepost_client::pb::{self, ErrorReason, EventKind, MetadataKind, NewEvent, watch_events_request};
use prost_types::{Value, value::Kind};
use tonic::Code;

use crate::support::{
    TestServer, User, assert_refused, assert_violations, complete, info, metadata, named, progress,
    registration, step, with_metadata,
};

const LONG: usize = 100_000;

/// A provider and a running job of steps `load` and `report`; `load` declares
/// `mean` (number), `source` (link) and `comment` (text).
async fn running_job(server: &TestServer) -> (User, pb::Job) {
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let mut request = registration("1.0.0", &[("load", 1), ("report", 1)]);
    let kinds =
        [("mean", MetadataKind::Number), ("source", MetadataKind::Link), ("comment", MetadataKind::Text)];
    request.steps[0].metadata = kinds
        .map(|(name, kind)| pb::MetadataConfiguration {
            name: name.to_owned(),
            kind: kind.into(),
            ..Default::default()
        })
        .to_vec();
    provider.register(request).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [info("started")]).await;
    (provider, job)
}

fn nested() -> Value {
    Value::from(BTreeMap::from([("inner".to_owned(), Value::from(1.0))]))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_event_is_refused_with_its_fields_and_no_event_of_its_batch_is_stored() {
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    let before = server.stored().await;
    let with_kind = |kind: i32| NewEvent { kind, ..info("x") };
    let value = |kind| Value { kind: Some(kind) };

    let cases: Vec<(NewEvent, &[&str])> = vec![
        (named(info(""), "a\0b"), &["events[1].name"]),
        (named(info(""), "x".repeat(LONG)), &["events[1].name"]),
        (named(info(""), "ü".repeat(257)), &["events[1].name"]),
        (NewEvent { id: "not-a-uuid".to_owned(), ..info("x") }, &["events[1].id"]),
        (with_kind(EventKind::Unspecified.into()), &["events[1].kind"]),
        (with_kind(EventKind::Close.into()), &["events[1].kind"]),
        (with_kind(77), &["events[1].kind"]),
        (NewEvent { step_tag: "lo\0ad".to_owned(), ..step("load") }, &["events[1].step_tag"]),
        (step("no-such-step"), &["events[1].step_tag"]),
        (NewEvent { step_tag: "no-such-step".to_owned(), ..info("x") }, &["events[1].step_tag"]),
        (progress("", 1), &["events[1].step_tag"]),
        (progress("no-such-step", 1), &["events[1].step_tag"]),
        (progress("load", 100), &["events[1].step_percent"]),
        (progress("load", -1), &["events[1].step_percent"]),
        (NewEvent { step_percent: Some(1), ..step("load") }, &["events[1].step_percent"]),
        (with_metadata(info("x"), [("inner", nested())]), &["events[1].metadata.inner"]),
        (
            with_metadata(info("x"), [("list", Value::from(vec![Value::from(1.0)]))]),
            &["events[1].metadata.list"],
        ),
        (with_metadata(info("x"), [("nothing", value(Kind::NullValue(0)))]), &["events[1].metadata.nothing"]),
        (with_metadata(info("x"), [("kindless", Value { kind: None })]), &["events[1].metadata.kindless"]),
        (with_metadata(info("x"), [("nan", Value::from(f64::NAN))]), &["events[1].metadata.nan"]),
        (with_metadata(info("x"), [("inf", Value::from(f64::NEG_INFINITY))]), &["events[1].metadata.inf"]),
        (with_metadata(info("x"), [("nul", Value::from("a\0b"))]), &["events[1].metadata.nul"]),
        (
            with_metadata(info("x"), [("long", Value::from("x".repeat(limits::METADATA_BYTES)))]),
            &["events[1].metadata"],
        ),
        (with_metadata(step("load"), [("mean", Value::from("much"))]), &["events[1].metadata.mean"]),
        (with_metadata(step("load"), [("source", Value::from("/tmp/scan"))]), &["events[1].metadata.source"]),
        (
            with_metadata(step("load"), [("source", Value::from("ftp://example.com/scan"))]),
            &["events[1].metadata.source"],
        ),
        (with_metadata(step("load"), [("comment", Value::from(true))]), &["events[1].metadata.comment"]),
        (
            NewEvent {
                occurred_at: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
                ..info("x")
            },
            &["events[1].occurred_at"],
        ),
        (
            NewEvent { occurred_at: Some(prost_types::Timestamp { seconds: 0, nanos: -1 }), ..info("x") },
            &["events[1].occurred_at"],
        ),
    ];
    for (event, fields) in cases {
        // The other events of the batch are valid.
        let batch = [info("before"), event.clone(), info("after")];
        let shown = format!("{event:?}").chars().take(300).collect::<String>();
        let answer = provider.try_append(&job, batch).await;
        assert!(answer.is_err(), "{shown}");
        assert_violations(answer, fields);
    }
    assert_eq!(server.stored().await, before);
    assert_eq!(provider.get(&job).await.last_sequence, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_keeps_its_values_and_their_types() {
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    let sent = metadata([
        ("mean", Value::from(-0.1 + 0.3)),
        ("source", Value::from("https://example.com/a?b#c")),
        ("comment", Value::from("")),
        ("undeclared", Value::from(true)),
        ("tiny", Value::from(f64::MIN_POSITIVE)),
        ("largest exact integer", Value::from(9_007_199_254_740_992.0)),
        ("larger integer", Value::from("9007199254740993")),
    ]);
    let event = NewEvent { metadata: Some(sent.clone()), ..step("load") };
    provider.append(&job, [event]).await;
    assert_eq!(provider.list(&job).await[1].metadata, Some(sent));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_has_1_to_500_events_and_each_id_once() {
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    assert_violations(provider.try_append(&job, []).await, &["events"]);
    let many: Vec<_> = (0..=limits::BATCH_EVENTS).map(|_| info("x")).collect();
    assert_violations(provider.try_append(&job, many).await, &["events"]);
    let twice = info("x");
    let in_uppercase = NewEvent { id: twice.id.to_uppercase(), ..info("x") };
    let answer = provider.try_append(&job, [twice, info("y"), in_uppercase]).await;
    assert_violations(answer, &["events[2].id"]);
    assert_eq!(provider.get(&job).await.last_sequence, 1);

    let most: Vec<_> = (0..limits::BATCH_EVENTS).map(|_| info("x")).collect();
    assert_eq!(provider.append(&job, most).await.last().unwrap().sequence, 501);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_has_at_most_64_metadata_names() {
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    let with_names = |count: usize| {
        let fields = (0..count).map(|n| (format!("name {n}"), Value::from(1.0))).collect();
        NewEvent { metadata: Some(prost_types::Struct { fields }), ..info("x") }
    };
    assert_violations(provider.try_append(&job, [with_names(65)]).await, &["events[0].metadata"]);
    provider.append(&job, [with_names(64)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_complete_is_refused() {
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    let refused = provider.try_append(&job, [complete(), complete()]).await;
    assert_refused(refused, Code::FailedPrecondition, ErrorReason::JobClosed);
    assert_eq!(provider.get(&job).await.last_sequence, 1, "all or none");

    provider.append(&job, [complete()]).await;
    let before = server.stored().await;
    let refused = provider.try_append(&job, [complete()]).await;
    let refusal = assert_refused(refused, Code::FailedPrecondition, ErrorReason::JobClosed);
    assert_eq!(refusal.metadata["status"], "COMPLETE");
    assert_eq!(server.stored().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_expected_sequence_is_aborted_with_the_actual_one() {
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    let batch = |expected, event| pb::AppendEventsRequest {
        job: Some(pb::append_events_request::Job::ProviderJobId(job.provider_job_id.clone())),
        expected_sequence: Some(expected),
        events: vec![event],
    };
    for expected in [0, 2, i64::MAX] {
        let answer = provider.events.append_events(batch(expected, info("x"))).await;
        let refusal = assert_refused(answer, Code::Aborted, ErrorReason::SequenceMismatch);
        assert_eq!(refusal.metadata["last_sequence"], "1");
    }
    let answer = provider.events.append_events(batch(-1, info("x"))).await;
    assert_violations(answer, &["expected_sequence"]);

    let event = info("x");
    provider.events.append_events(batch(1, event.clone())).await.unwrap();
    let again = provider.events.append_events(batch(1, event)).await.unwrap().into_inner();
    assert!(again.events[0].existed, "expected_sequence is not checked if every event is stored already");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_configuration_is_refused_with_every_field_at_fault() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let valid = || registration("1.0.0", &[("load", 1), ("report", 1)]);
    let with = |change: &dyn Fn(&mut pb::RegisterJobConfigurationRequest)| {
        let mut request = valid();
        change(&mut request);
        request
    };
    let named = |name: &str| pb::MetadataConfiguration { name: name.to_owned(), ..Default::default() };
    let cases: Vec<(pb::RegisterJobConfigurationRequest, &[&str])> = vec![
        (with(&|r| r.tag = "a\0b".to_owned()), &["tag"]),
        (with(&|r| r.tag = " ct".to_owned()), &["tag"]),
        (with(&|r| r.tag = "ct\u{2003}".to_owned()), &["tag"]),
        (with(&|r| r.name = String::new()), &["name"]),
        (with(&|r| r.name = "x".repeat(LONG)), &["name"]),
        (with(&|r| r.steps[1].points = -1), &["steps[1].points"]),
        (with(&|r| r.steps[1].points = limits::STEP_POINTS + 1), &["steps[1].points"]),
        (with(&|r| r.steps[1].points = i64::MIN), &["steps[1].points"]),
        (with(&|r| r.steps[1].tag = "load".to_owned()), &["steps[1].tag"]),
        (with(&|r| r.steps[0].tag = String::new()), &["steps[0].tag"]),
        (with(&|r| r.steps[0].name = "\0".to_owned()), &["steps[0].name"]),
        (with(&|r| r.steps[0].metadata = vec![named("a"), named("a")]), &["steps[0].metadata[1].name"]),
        (with(&|r| r.steps[0].metadata = vec![named("")]), &["steps[0].metadata[0].name"]),
        (
            with(&|r| r.steps[0].metadata = vec![pb::MetadataConfiguration { kind: 9, ..named("a") }]),
            &["steps[0].metadata[0].kind"],
        ),
        (
            with(&|r| {
                r.steps[0].metadata =
                    vec![pb::MetadataConfiguration { units: "x".repeat(257), ..named("a") }];
            }),
            &["steps[0].metadata[0].units"],
        ),
        (
            with(&|r| r.steps[0].metadata = (0..65).map(|n| named(&n.to_string())).collect()),
            &["steps[0].metadata"],
        ),
        (
            with(&|r| {
                let steps: Vec<_> = (0..201).map(|n| (n.to_string(), 1)).collect();
                let steps: Vec<_> = steps.iter().map(|(tag, points)| (tag.as_str(), *points)).collect();
                r.steps = registration("1.0.0", &steps).steps;
            }),
            &["steps"],
        ),
        (
            with(&|r| {
                r.version = "one".to_owned();
                r.steps[1].points = -1;
                r.tag = String::new();
            }),
            &["tag", "version", "steps[1].points"],
        ),
    ];
    for (request, fields) in cases {
        let answer = provider.configurations.register_job_configuration(request).await;
        assert_violations(answer, fields);
    }
    assert_eq!(server.count("job_configurations").await, 0);
    assert_eq!(server.count("step_configurations").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_error_of_500_invalid_events_is_small_enough_to_arrive() {
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    let name = "\u{1F6A7}\0".repeat(200);
    let wrong: Vec<_> = (0..limits::BATCH_EVENTS).map(|_| named(info(""), name.clone())).collect();
    // `assert_refused` checks that the details have at most 3 KiB.
    let refusal = assert_refused(
        provider.try_append(&job, wrong).await,
        Code::InvalidArgument,
        ErrorReason::FieldInvalid,
    );
    let total: usize = refusal.metadata["violations"].parse().unwrap();
    assert!(total >= limits::BATCH_EVENTS, "{total}");
    assert!(refusal.fields.len() > 3, "the first violations: {:?}", refusal.fields);
    assert_eq!(refusal.fields[0], "events[0].name");
    assert_eq!(provider.get(&job).await.last_sequence, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_watch_request_is_refused() {
    use watch_events_request::{Scope, Start};
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    let one_job = || Some(Scope::JobId(job.id.clone()));
    let all_jobs = || Some(Scope::AllJobs(pb::AllJobs::default()));
    let request = |scope, start| pb::WatchEventsRequest { scope, start, ..Default::default() };

    let of_tag = |tag: &str| {
        Some(Scope::AllJobs(pb::AllJobs { configuration_tag: tag.to_owned(), ..Default::default() }))
    };
    let invalid: [(pb::WatchEventsRequest, &[&str]); 6] = [
        (request(None, None), &["scope"]),
        (request(Some(Scope::JobId("x".to_owned())), None), &["job_id"]),
        (request(all_jobs(), Some(Start::AfterSequence(1))), &["after_sequence"]),
        (request(one_job(), Some(Start::AfterSequence(-1))), &["after_sequence"]),
        (request(one_job(), Some(Start::ResumeToken("nonsense".to_owned()))), &["resume_token"]),
        (request(of_tag(" analysis"), None), &["all_jobs.configuration_tag"]),
    ];
    for (request, fields) in invalid {
        assert_violations(refused_watch(&mut provider, request).await, fields);
    }
    let beyond = request(one_job(), Some(Start::AfterSequence(2)));
    let answer = refused_watch(&mut provider, beyond).await;
    assert_refused(answer, Code::OutOfRange, ErrorReason::PositionBeyondLog);
    let mut other_customer = server.customer().await;
    let answer = refused_watch(&mut other_customer, request(one_job(), None)).await;
    assert_refused(answer, Code::NotFound, ErrorReason::ResourceNotFound);
    let answer = refused_watch(&mut provider, request(of_tag("analysys"), None)).await;
    assert_refused(answer, Code::NotFound, ErrorReason::ResourceNotFound);
}

/// The refusal of a watch. It comes instead of the stream or as its first message.
async fn refused_watch(user: &mut User, request: pb::WatchEventsRequest) -> Result<(), tonic::Status> {
    let message = user.watch_by(request).await?.next().await?;
    panic!("expected a refusal, got {message:?}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_page_size_is_cut_and_a_negative_one_is_refused() {
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    let by_id = Some(pb::list_events_request::Job::JobId(job.id.clone()));
    let request = |page_size| pb::ListEventsRequest { job: by_id.clone(), page_size, ..Default::default() };
    assert_violations(provider.events.list_events(request(-1)).await, &["page_size"]);
    let jobs = pb::ListJobsRequest { page_size: i32::MIN, ..Default::default() };
    assert_violations(provider.jobs.list_jobs(jobs).await, &["page_size"]);

    provider.append(&job, (0..500).map(|_| info("x"))).await;
    for (page_size, events) in [(0, 50), (7, 7), (500, 500), (i32::MAX, 500)] {
        let page = provider.events.list_events(request(page_size)).await.unwrap().into_inner();
        assert_eq!((page.events.len(), page.next_page_token.is_empty()), (events, false));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_step_tag_is_refused_with_the_first_known_tags_and_their_number() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let mut known_tags = async |version: &str, first: String| {
        let mut request = registration(version, &[]);
        let tags = std::iter::once(first).chain((1..100).map(|n| format!("step {n}")));
        request.steps =
            tags.map(|tag| pb::StepConfiguration { name: tag.clone(), tag, ..Default::default() }).collect();
        provider.register(request).await;
        let job = provider.job(&customer).await;
        let answer = provider.try_append(&job, [step("lod")]).await;
        let refusal = assert_violations(answer, &["events[0].step_tag"]);
        assert_eq!(refusal.metadata["known_step_tags"], "100");
        let description = &refusal.details.bad_request().unwrap().field_violations[0].description;
        description.split_once("known: ").unwrap().1.to_owned()
    };
    let short = known_tags("2.0.0", "step 0".to_owned()).await;
    assert!(short.starts_with(r#""step 0", "step 1", "step 2", "#) && short.ends_with(", …"), "{short}");
    let long = known_tags("3.0.0", "\u{1F9E0}".repeat(256)).await;
    assert_eq!(long, format!("\"{}…\", …", "\u{1F9E0}".repeat(64)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kinds_filter_has_at_most_as_many_entries_as_there_are_kinds() {
    let server = TestServer::start().await;
    let (mut provider, job) = running_job(&server).await;
    let kinds = |count: usize| pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(job.id.clone())),
        kinds: vec![EventKind::Step.into(); count],
        ..Default::default()
    };
    let (at, past, far) = (kinds(8), kinds(9), kinds(900_000));
    provider.events.list_events(at).await.unwrap();
    for past in [past, far] {
        let refused = provider.events.list_events(past).await;
        assert_violations(refused, &["kinds"]);
    }
}
