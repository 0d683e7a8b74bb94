//! The spans that an OpenTelemetry collector receives.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use milepost::{config::TraceSettings, telemetry::traces::Traces};
use milepost_client::pb;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use crate::support::{PASSWORD, TemporaryDir, TestServer, User, info, named, step, within_timeout};

/// A collector that keeps every request.
#[derive(Clone, Debug, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let collector = Self::default();
        let serving = Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(serving);
        (collector, endpoint)
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.0.lock().unwrap().clone();
        let resources = requests.into_iter().flat_map(|request| request.resource_spans);
        resources.flat_map(|spans| spans.scope_spans).flat_map(|spans| spans.spans).collect()
    }

    /// An attribute of the resource in the first request.
    fn resource(&self, name: &str) -> Option<String> {
        let requests = self.0.lock().unwrap().clone();
        attribute(&requests.first()?.resource_spans.first()?.resource.as_ref()?.attributes, name)
    }
}

fn attribute(attributes: &[KeyValue], name: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == name)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        other => panic!("{name}: {other:?}"),
    }
}

#[track_caller]
fn only<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let mut of_name = spans.iter().filter(|span| span.name == name);
    let span = of_name.next().unwrap_or_else(|| panic!("no {name} in {spans:#?}"));
    assert_eq!(of_name.next(), None, "exactly one {name}");
    span
}

fn links(span: &Span) -> Vec<(Vec<u8>, Vec<u8>)> {
    span.links.iter().map(|link| (link.trace_id.clone(), link.span_id.clone())).collect()
}

fn ids(span: &Span) -> (Vec<u8>, Vec<u8>) {
    (span.trace_id.clone(), span.span_id.clone())
}

/// A server that traces the share `sampled` (0 to 1) of the calls without a `traceparent`.
async fn traced(endpoint: &str, sampled: f64) -> (TestServer, Traces) {
    let settings = TraceSettings { otlp_endpoint: Some(endpoint.to_owned()), trace_share: sampled };
    let traces = Traces::start(&settings).unwrap();
    (TestServer::with_traces(traces.clone()).await, traces)
}

async fn job(server: &TestServer) -> (User, pb::Job) {
    let (provider, _, job) = server.job(&[("load", 1)]).await;
    (provider, job)
}

const TRACE: [u8; 16] = [0xab; 16];
const CALLER: [u8; 8] = [0xcd; 8];

fn within_trace<T>(message: T, sampled: bool) -> Request<T> {
    let mut request = Request::new(message);
    let parent = format!("00-{}-{}-0{}", "ab".repeat(16), "cd".repeat(8), u8::from(sampled));
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    request
}

fn appending(job: &pb::Job, events: Vec<pb::NewEvent>) -> pb::AppendEventsRequest {
    let job = Some(pb::append_events_request::Job::JobId(job.id.clone()));
    pb::AppendEventsRequest { job, expected_sequence: None, events }
}

const APPEND: &str = "milepost.v1.EventService/AppendEvents";

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_no_url_is_refused_with_the_form_of_one() {
    for endpoint in ["localhost:4317", "ftp://localhost:4317", "http://"] {
        let settings = TraceSettings { otlp_endpoint: Some(endpoint.to_owned()), trace_share: 1.0 };
        let error = Traces::start(&settings).unwrap_err().to_string();
        assert!(error.contains(endpoint), "{error}");
        assert!(endpoint == "http://" || error.contains("https://HOST:PORT"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_continues_its_callers_trace_and_is_linked_to_its_transaction() {
    let (collector, endpoint) = Collector::start().await;
    let (server, traces) = traced(&endpoint, 0.0).await;
    let (mut provider, job) = job(&server).await;
    let events = vec![step("load"), named(info("x"), "a private name")];
    provider.events.append_events(within_trace(appending(&job, events), true)).await.unwrap();
    // The `traceparent` of the next call is not sampled, so that the call has no spans.
    provider.events.append_events(within_trace(appending(&job, vec![info("y")]), false)).await.unwrap();
    // The span of a call ends a moment after the answer.
    within_timeout("the call's end", async {
        while collector.spans().iter().all(|span| span.name != APPEND) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    traces.stop().await;

    let spans = collector.spans();
    assert_eq!(spans.len(), 4, "{spans:#?}");
    let call = only(&spans, APPEND);
    assert_eq!((call.trace_id.as_slice(), call.parent_span_id.as_slice()), (&TRACE[..], &CALLER[..]));
    assert_eq!(call.kind(), SpanKind::Server);
    let of_call = |name| attribute(&call.attributes, name);
    assert_eq!(of_call("rpc.system").unwrap(), "grpc");
    assert_eq!(of_call("rpc.service").unwrap(), "milepost.v1.EventService");
    assert_eq!(of_call("rpc.method").unwrap(), "AppendEvents");
    assert_eq!(of_call("rpc.grpc.status_code").unwrap(), "0");
    let append = only(&spans, "append");
    assert_eq!((&append.trace_id, &append.parent_span_id), (&call.trace_id, &call.span_id));
    let transaction = only(&spans, "append transaction");
    assert_ne!(transaction.trace_id, call.trace_id, "a transaction serves many callers");
    assert_eq!(links(transaction), [ids(append)]);
    assert_eq!(links(append), [ids(transaction)]);
    let of_transaction = |name| attribute(&transaction.attributes, name);
    assert_eq!(of_transaction("milepost.events").unwrap(), "2");
    assert_eq!(of_transaction("milepost.batches").unwrap(), "1");
    assert_eq!(of_transaction("milepost.position").unwrap(), "2");
    let statement = only(&spans, "SELECT append_events");
    assert_eq!(statement.parent_span_id, transaction.span_id);
    assert_eq!(statement.kind(), SpanKind::Client);
    assert!(call.start_time_unix_nano <= append.start_time_unix_nano);
    assert!(statement.end_time_unix_nano <= append.end_time_unix_nano);
    assert_eq!(collector.resource("service.name").unwrap(), "milepost");

    let sent = format!("{spans:?}");
    for private in [&provider.email, &provider.key_secret, "a private name", PASSWORD, "Bearer"] {
        assert!(!sent.contains(private), "{private}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_span_of_a_call_by_connect_says_so_and_continues_its_callers_trace() {
    let (collector, endpoint) = Collector::start().await;
    let (server, traces) = traced(&endpoint, 0.0).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let request = format!(
        "POST /milepost.v1.JobService/GetJob HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         traceparent: 00-{}-{}-01\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{{}}",
        "ab".repeat(16),
        "cd".repeat(8)
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within_timeout("the whole answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    within_timeout("the call's end", async {
        while collector.spans().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    traces.stop().await;
    let spans = collector.spans();
    let call = only(&spans, "milepost.v1.JobService/GetJob");
    assert_eq!((call.trace_id.as_slice(), call.parent_span_id.as_slice()), (&TRACE[..], &CALLER[..]));
    assert_eq!(attribute(&call.attributes, "rpc.system").unwrap(), "connect_rpc");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_append_in_a_transaction_is_linked_with_it() {
    let (collector, endpoint) = Collector::start().await;
    let (server, traces) = traced(&endpoint, 0.0).await;
    let (provider, job) = job(&server).await;
    let callers = (0..48).map(|n| {
        let (mut provider, request) = (provider.clone(), appending(&job, vec![info(&format!("{n}"))]));
        async move { provider.events.append_events(within_trace(request, true)).await.unwrap() }
    });
    futures_util::future::join_all(callers).await;
    traces.stop().await;
    let spans = collector.spans();
    let named = |name| spans.iter().filter(move |span| span.name == name);
    assert_eq!(named("append").count(), 48);
    let transactions: Vec<_> = named("append transaction").collect();
    assert!(transactions.len() < 48, "some appends share a transaction");
    let events = transactions.iter().map(|span| attribute(&span.attributes, "milepost.events").unwrap());
    assert_eq!(events.map(|count| count.parse::<usize>().unwrap()).sum::<usize>(), 48);
    for append in named("append") {
        assert!(!append.links.is_empty());
        for link in links(append) {
            let transaction = transactions
                .iter()
                .find(|span| ids(span) == link)
                .expect("the linked transaction was exported");
            assert!(links(transaction).contains(&ids(append)));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_batches_of_a_publish_stream_are_child_spans_of_its_call() {
    let (collector, endpoint) = Collector::start().await;
    let (server, traces) = traced(&endpoint, 0.0).await;
    let (mut provider, job) = job(&server).await;
    let (batches, stream) = mpsc::channel(1);
    let stream = within_trace(ReceiverStream::new(stream), true);
    let mut answers = provider.events.publish_events(stream).await.unwrap().into_inner();
    for n in 0..2 {
        let batch = pb::PublishEventsRequest {
            batch_id: n.to_string(),
            job: Some(pb::publish_events_request::Job::JobId(job.id.clone())),
            expected_sequence: None,
            events: vec![info("one")],
        };
        batches.send(batch).await.unwrap();
        answers.message().await.unwrap().unwrap();
    }
    drop(batches);
    assert_eq!(answers.message().await.unwrap(), None);
    let name = "milepost.v1.EventService/PublishEvents";
    within_timeout("the call's end", async {
        while collector.spans().iter().all(|span| span.name != name) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    traces.stop().await;
    let spans = collector.spans();
    let call = only(&spans, name);
    assert_eq!(call.trace_id, TRACE);
    let appends: Vec<_> = spans.iter().filter(|span| span.name == "append").collect();
    assert_eq!(appends.len(), 2);
    assert!(appends.iter().all(|span| span.parent_span_id == call.span_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_path_of_an_unknown_method_is_not_exported() {
    let (collector, endpoint) = Collector::start().await;
    let (server, traces) = traced(&endpoint, 1.0).await;
    let mut grpc = tonic::client::Grpc::new(server.channel.clone());
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    grpc.unary(Request::new(()), "/a.private/Path".parse().unwrap(), codec).await.unwrap_err();
    within_timeout("the call's end", async {
        while collector.spans().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    traces.stop().await;
    let spans = collector.spans();
    assert!(!format!("{spans:?}").contains("private"));
    assert_eq!(only(&spans, "other").status.as_ref().unwrap().code, 2, "the status of the span is an error");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_delays_neither_calls_nor_the_exit() {
    // The listener accepts connections and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (server, traces) = traced(&endpoint, 1.0).await;
    let (mut provider, job) = job(&server).await;
    // More spans than the queue of the exporter holds.
    for _ in 0..30 {
        let callers = (0..32).map(|_| {
            let (mut provider, job) = (provider.clone(), job.clone());
            async move { provider.append(&job, [info("one")]).await }
        });
        futures_util::future::join_all(callers).await;
    }
    assert_eq!(provider.list(&job).await.len(), 30 * 32);
    let at = Instant::now();
    traces.stop().await;
    assert!(at.elapsed() < Duration::from_secs(5), "{:?}", at.elapsed());
    // Calls still succeed once the exporter has stopped.
    provider.append(&job, [info("last")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_standard_variables_enable_traces_and_the_last_spans_are_exported() {
    let (collector, endpoint) = Collector::start().await;
    let dir = TemporaryDir::new();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_milepost"));
    demo.args(["demo", "--seconds", "1"])
        .env_remove("DATABASE_URL")
        .env("MILEPOST_DATA_DIR", dir.path())
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
        .env("OTEL_SERVICE_NAME", "milepost-of-a-test")
        .kill_on_drop(true);
    let output = within_timeout("the demo's end", demo.output()).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    let spans = collector.spans();
    assert_eq!(collector.resource("service.name").unwrap(), "milepost-of-a-test");
    assert_eq!(collector.resource("service.version").unwrap(), env!("CARGO_PKG_VERSION"));
    let appends = spans.iter().filter(|span| span.name == APPEND).count();
    assert!(appends >= 6, "{appends}");
    assert!(spans.iter().any(|span| span.name == "milepost.v1.JobService/CreateJob"));
}
