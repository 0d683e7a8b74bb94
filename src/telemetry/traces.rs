//! Traces: where the time of a call went, exported as OpenTelemetry has it.
//!
//! Handed down by value and made by hand at three places rather than derived
//! from every span of the log: without an exporter, and for calls that nobody
//! samples, nothing is made at all.
//!
//! A call's span continues its caller's trace. A batch's wait for its answer is
//! a child of it. The transaction that appends it serves many callers and so is
//! a trace of its own, linked to each of them and they to it.

use std::{sync::Arc, time::Duration};

use http::HeaderMap;
use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{
        Link, Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt as _, TraceId,
        TracerProvider as _,
    },
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{Sampler, SamplingDecision, SamplingResult, SdkTracer, SdkTracerProvider, ShouldSample, Span},
};
use tonic::{Code, transport::ClientTlsConfig};

use crate::error::BoxError;

/// What the service is called unless OTEL_SERVICE_NAME says otherwise.
const SERVICE_NAME: &str = "milepost";
/// Longest that the last spans may take to leave.
const FLUSH: Duration = Duration::from_secs(3);

/// Where traces go, and which.
#[derive(Clone, Debug)]
pub struct TraceSettings {
    /// Of the collector, `http://HOST:PORT`, which speaks OTLP over gRPC.
    pub endpoint: String,
    /// What share of the calls is traced whose callers do not say, 0 to 1.
    pub sampled: f64,
}

/// Makes spans and exports them; off by default.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Arc<Exporting>>);

#[derive(Debug)]
struct Exporting {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    propagator: TraceContextPropagator,
}

impl Traces {
    /// Exports from now on, from a runtime that goes on. Nothing waits for the
    /// collector: what does not fit into the queue is dropped.
    pub fn start(settings: &TraceSettings) -> Result<Self, BoxError> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(&settings.endpoint);
        let exporter = if settings.endpoint.starts_with("https:") {
            exporter.with_tls_config(ClientTlsConfig::new().with_native_roots()).build()?
        } else {
            exporter.build()?
        };
        let mut resource = Resource::builder();
        let named = Resource::builder().build().get(&"service.name".into());
        if named.is_none_or(|name| name.as_str().starts_with("unknown_service")) {
            resource = resource.with_service_name(SERVICE_NAME);
        }
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let share = Sampler::TraceIdRatioBased(settings.sampled);
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Linked(Sampler::ParentBased(Box::new(share))))
            .with_resource(resource.with_attribute(version).build())
            .build();
        let tracer = provider.tracer(SERVICE_NAME);
        let propagator = TraceContextPropagator::new();
        Ok(Self(Some(Arc::new(Exporting { provider, tracer, propagator }))))
    }

    /// Exports what is left, as far as that does not take long.
    pub async fn stop(&self) {
        let Some(exporting) = self.0.clone() else { return };
        // It waits for a thread of its own.
        let flushed =
            tokio::task::spawn_blocking(move || exporting.provider.shutdown_with_timeout(FLUSH)).await;
        if let Ok(Err(error)) = flushed {
            tracing::warn!(error = &error as &dyn std::error::Error, "the last traces were not exported");
        }
    }

    /// The span of a call, if it is sampled; `method` as `package.Service/Method`.
    pub(crate) fn call(&self, headers: &HeaderMap, method: &Arc<str>) -> Option<CallSpan> {
        let exporting = self.0.as_deref()?;
        let caller = exporting.propagator.extract_with_context(&Context::new(), &Headers(headers));
        let (service, name) = method.split_once('/').unwrap_or_default();
        let span = SpanBuilder::from_name(method.to_string())
            .with_kind(SpanKind::Server)
            .with_attributes([
                KeyValue::new("rpc.system", "grpc"),
                KeyValue::new("rpc.service", service.to_owned()),
                KeyValue::new("rpc.method", name.to_owned()),
            ])
            .start_with_context(&exporting.tracer, &caller);
        span.is_recording().then(|| CallSpan(caller.with_span(span)))
    }

    /// The span of a batch on its way, within the call under way if that is
    /// sampled.
    pub(crate) fn append(&self) -> Option<Box<AppendSpan>> {
        let exporting = self.0.as_deref()?;
        let call = Context::current();
        call.span().is_recording().then(|| {
            let span = SpanBuilder::from_name("append").start_with_context(&exporting.tracer, &call);
            Box::new(AppendSpan(span))
        })
    }

    /// The span of a transaction that takes these batches, if any is sampled.
    pub(crate) fn transaction<'a>(
        &self,
        appends: impl Iterator<Item = &'a mut AppendSpan>,
    ) -> Option<TransactionSpan> {
        let exporting = self.0.as_deref()?;
        let mut appends: Vec<_> = appends.collect();
        if appends.is_empty() {
            return None;
        }
        let links = appends.iter().map(|append| Link::with_context(append.0.span_context().clone()));
        let span = SpanBuilder::from_name("append transaction")
            .with_links(links.collect())
            .start_with_context(&exporting.tracer, &Context::new());
        for append in &mut appends {
            append.0.add_link(span.span_context().clone(), Vec::new());
        }
        let tracer = exporting.tracer.clone();
        Some(TransactionSpan { context: Context::new().with_span(span), tracer })
    }
}

/// A call that is traced.
#[derive(Clone, Debug)]
pub(crate) struct CallSpan(Context);

impl CallSpan {
    /// For what works for this call.
    pub(crate) fn context(&self) -> Context {
        self.0.clone()
    }

    /// For the log.
    pub(crate) fn trace_id(&self) -> TraceId {
        self.0.span().span_context().trace_id()
    }

    /// The call is over.
    pub(crate) fn end(&self, code: Code) {
        let span = self.0.span();
        span.set_attribute(KeyValue::new("rpc.grpc.status_code", i64::from(i32::from(code))));
        // Those that are a server's fault, as OpenTelemetry has it.
        if matches!(
            code,
            Code::Unknown
                | Code::DeadlineExceeded
                | Code::Unimplemented
                | Code::Internal
                | Code::Unavailable
                | Code::DataLoss
        ) {
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

/// A batch from its handing in to its answer; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct AppendSpan(Span);

/// A transaction under way; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct TransactionSpan {
    context: Context,
    tracer: SdkTracer,
}

impl TransactionSpan {
    /// The statement that appends, and with it the commit: one round trip.
    pub(crate) fn statement(&self) -> Span {
        SpanBuilder::from_name("SELECT append_events")
            .with_kind(SpanKind::Client)
            .with_attributes([
                KeyValue::new("db.system.name", "postgresql"),
                KeyValue::new("db.query.summary", "SELECT append_events"),
            ])
            .start_with_context(&self.tracer, &self.context)
    }

    /// What it came to: events and batches, and the position of the last event.
    pub(crate) fn took(&self, events: usize, batches: usize, position: Option<i64>) {
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let span = self.context.span();
        span.set_attribute(KeyValue::new("milepost.events", count(events)));
        span.set_attribute(KeyValue::new("milepost.batches", count(batches)));
        if let Some(position) = position {
            span.set_attribute(KeyValue::new("milepost.position", position));
        }
    }

    /// Whether it was committed is not known.
    pub(crate) fn failed(&self) {
        self.context.span().set_status(Status::error(""));
    }
}

/// Samples what is linked to something sampled.
#[derive(Clone, Debug)]
struct Linked(Sampler);

impl ShouldSample for Linked {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        if links.iter().any(|link| link.span_context.is_sampled()) {
            let trace_state = SpanContext::NONE.trace_state().clone();
            let decision = SamplingDecision::RecordAndSample;
            return SamplingResult { decision, attributes: Vec::new(), trace_state };
        }
        self.0.should_sample(parent, trace_id, name, kind, attributes, links)
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
