//! Traces: where the time of a call is spent, exported to an OpenTelemetry collector.
//!
//! Spans are created explicitly in three places rather than derived from every span
//! of the log: without an exporter, and for calls that are not sampled, no span is
//! created.
//!
//! The span of a call continues the trace of its caller. The span of a batch, until
//! its answer, is a child of the call's span. The transaction that appends the batch
//! serves many callers: its span starts a trace of its own and is linked with the
//! span of each batch, in both directions.

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

use super::metrics::{Protocol, gauge_value};
use crate::{config::TraceSettings, error::BoxError};

/// The service's name, unless OTEL_SERVICE_NAME is set.
const SERVICE_NAME: &str = "milepost";
/// Longest that the export of the last spans may take at the shutdown.
const FLUSH: Duration = Duration::from_secs(3);

/// Creates spans and exports them; disabled by default.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Arc<Exporting>>);

#[derive(Debug)]
struct Exporting {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    propagator: TraceContextPropagator,
}

impl Traces {
    /// Starts the exporter if the settings name an endpoint; the current tokio runtime
    /// must outlive it. No call waits for the collector: spans that do not fit into the
    /// queue are dropped. An error for an endpoint that cannot be used.
    pub fn start(settings: &TraceSettings) -> Result<Self, BoxError> {
        let Some(endpoint) = settings.endpoint() else { return Ok(Self::default()) };
        // The exporter takes a URL without a scheme, and then loses every span without an error.
        if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            return Err(format!("{endpoint:?} must be http://HOST:PORT or https://HOST:PORT").into());
        }
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(&endpoint);
        let exporter = if endpoint.starts_with("https:") {
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
        let share = Sampler::TraceIdRatioBased(settings.trace_share);
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Linked(Sampler::ParentBased(Box::new(share))))
            .with_resource(resource.with_attribute(version).build())
            .build();
        let tracer = provider.tracer(SERVICE_NAME);
        let propagator = TraceContextPropagator::new();
        Ok(Self(Some(Arc::new(Exporting { provider, tracer, propagator }))))
    }

    /// Exports the remaining spans, within 3 s.
    pub async fn stop(&self) {
        let Some(exporting) = self.0.clone() else { return };
        // The shutdown blocks until the exporter's own thread has ended.
        let flushed =
            tokio::task::spawn_blocking(move || exporting.provider.shutdown_with_timeout(FLUSH)).await;
        if let Ok(Err(error)) = flushed {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the last traces were not exported to the collector"
            );
        }
    }

    /// The span of a call, if the call is sampled; `method` is
    /// `package.Service/Method`.
    pub(crate) fn call(
        &self,
        headers: &HeaderMap,
        method: &Arc<str>,
        protocol: Protocol,
    ) -> Option<CallSpan> {
        let exporting = self.0.as_deref()?;
        let caller = exporting.propagator.extract_with_context(&Context::new(), &Headers(headers));
        let (service, name) = method.split_once('/').unwrap_or_default();
        // The names of OpenTelemetry's conventions.
        let system = match protocol {
            Protocol::Grpc => "grpc",
            Protocol::Connect => "connect_rpc",
        };
        let span = SpanBuilder::from_name(method.to_string())
            .with_kind(SpanKind::Server)
            .with_attributes([
                KeyValue::new("rpc.system", system),
                KeyValue::new("rpc.service", service.to_owned()),
                KeyValue::new("rpc.method", name.to_owned()),
            ])
            .start_with_context(&exporting.tracer, &caller);
        span.is_recording().then(|| CallSpan(caller.with_span(span)))
    }

    /// The span of a batch, as a child of the current call's span if that is sampled.
    pub(crate) fn append(&self) -> Option<Box<AppendSpan>> {
        let exporting = self.0.as_deref()?;
        let call = Context::current();
        call.span().is_recording().then(|| {
            let span = SpanBuilder::from_name("append").start_with_context(&exporting.tracer, &call);
            Box::new(AppendSpan(span))
        })
    }

    /// The span of a transaction that appends the batches of `appends`, if any of
    /// them is sampled.
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

/// The span of a sampled call.
#[derive(Clone, Debug)]
pub(crate) struct CallSpan(Context);

impl CallSpan {
    /// The context for spans that are children of this call.
    pub(crate) fn context(&self) -> Context {
        self.0.clone()
    }

    pub(crate) fn trace_id(&self) -> TraceId {
        self.0.span().span_context().trace_id()
    }

    /// Ends the span with the call's status code.
    pub(crate) fn end(&self, code: Code) {
        let span = self.0.span();
        span.set_attribute(KeyValue::new("rpc.grpc.status_code", i64::from(i32::from(code))));
        // The codes that OpenTelemetry's conventions for gRPC servers count as errors.
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

/// The span of a batch until its answer; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct AppendSpan(Span);

/// The span of a transaction; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct TransactionSpan {
    context: Context,
    tracer: SdkTracer,
}

impl TransactionSpan {
    /// The span of the statement that appends the batches and commits, in one round
    /// trip.
    pub(crate) fn statement(&self) -> Span {
        SpanBuilder::from_name("SELECT append_events")
            .with_kind(SpanKind::Client)
            .with_attributes([
                KeyValue::new("db.system.name", "postgresql"),
                KeyValue::new("db.query.summary", "SELECT append_events"),
            ])
            .start_with_context(&self.tracer, &self.context)
    }

    /// Records the numbers of events and batches, and the position of the last event.
    pub(crate) fn took(&self, events: usize, batches: usize, position: Option<i64>) {
        let span = self.context.span();
        span.set_attribute(KeyValue::new("milepost.events", gauge_value(events)));
        span.set_attribute(KeyValue::new("milepost.batches", gauge_value(batches)));
        if let Some(position) = position {
            span.set_attribute(KeyValue::new("milepost.position", position));
        }
    }

    /// Records that it is unknown whether the transaction was committed.
    pub(crate) fn failed(&self) {
        self.context.span().set_status(Status::error(""));
    }
}

/// Samples spans that are linked with a sampled span; otherwise asks the inner
/// sampler.
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
