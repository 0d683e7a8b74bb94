//! The metrics of a server, as Prometheus scrapes them.
//!
//! The values of every label are known when the server starts. Each metric's handle
//! is looked up once and kept, so that counting neither formats nor allocates.
//! Values that need no counting are read at each scrape, see `App::measure`.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock, atomic::AtomicU64},
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Metric, Registry, Unit},
};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::Code;

use super::process::Process;
use crate::{
    pb::{self, ErrorReason},
    quota::Quota,
};

/// Content type of the scraped text: OpenMetrics 1.0.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Histogram bounds for durations that a caller waits, in seconds.
const SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
/// Histogram bounds for delays within this process, in seconds.
const DELAYS: [f64; 13] = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];
/// Histogram bounds for events and batches of a transaction.
const COUNTS: [f64; 11] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0];

/// The file descriptor sets of all services that a server has.
const DESCRIPTORS: [&[u8]; 4] = [
    pb::FILE_DESCRIPTOR_SET,
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
];
/// The label `method` of calls to unknown paths.
const OTHER: &str = "other";

/// How a client calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    #[default]
    Grpc,
    Connect,
}

impl Protocol {
    const ALL: [Self; 2] = [Self::Grpc, Self::Connect];

    fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Connect => "connect",
        }
    }
}

/// The names of the gRPC codes, by number.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

type Labels<const N: usize> = [(&'static str, Arc<str>); N];
type Seconds = Gauge<f64, AtomicU64>;

/// Declares a group of metrics and registers each, with its doc comment as its help. A
/// `family` has one label, and the group a handle for each of the label's values.
macro_rules! metrics {
    (
        $(#[doc = $about:literal])+
        $group_visible:vis struct $group:ident {
            $(
                $(#[doc = $help:literal])+
                $visible:vis $metric:ident: $type:ty = $register:ident($name:literal, $new:expr),
            )*
        }
        $(
            $(#[doc = $family_help:literal])+
            family $family_register:ident($family_name:literal, $label:literal, $constructor:expr) {
                $($handle_visible:vis $handle:ident: $handle_type:ty = $value:literal,)+
            }
        )*
    ) => {
        $(#[doc = $about])+
        #[derive(Debug)]
        $group_visible struct $group {
            $($(#[doc = $help])+ $visible $metric: $type,)*
            $($($handle_visible $handle: $handle_type,)+)*
        }

        impl $group {
            fn new(registry: &mut Registry) -> Self {
                $(
                    let $metric: $type = $new;
                    $register(registry, $name, concat!($($help),+), $metric.clone());
                )*
                $(
                    let constructor: fn() -> _ = $constructor;
                    let family = Family::<Labels<1>, _, _>::new_with_constructor(constructor);
                    $family_register(registry, $family_name, concat!($($family_help),+), family.clone());
                    $(let $handle = family.get_or_create_owned(&[($label, $value.into())]);)+
                )*
                Self { $($metric,)* $($($handle,)+)* }
            }
        }
    };
}

fn plain(registry: &mut Registry, name: &str, help: &str, metric: impl Metric) {
    registry.register(name, help.trim_start(), metric);
}

fn seconds(registry: &mut Registry, name: &str, help: &str, metric: impl Metric) {
    registry.register_with_unit(name, help.trim_start(), Unit::Seconds, metric);
}

/// The metrics of one server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    methods: HashMap<String, Arc<Method>>,
    other: Arc<Method>,
    pub(crate) appends: Appends,
    pub(crate) watches: Watches,
    pub(crate) removals: Removals,
    pub(crate) quota_refusals: QuotaRefusals,
    /// Set at each scrape, except `ready` and `jobs_stalled`.
    pub(crate) state: State,
}

metrics! {
    /// Metrics of finished calls and of refusals.
    struct CallFamilies {
        /// Finished calls, by method, status code and protocol
        answered: Family<Labels<3>, Counter> = plain("calls", Family::default()),
        /// Refused calls and refused batches of publish streams, by method and reason
        refused: Family<Labels<2>, Counter> = plain("refusals", Family::default()),
        /// Time from the request headers of a unary call to the end of its response, by method
        duration: Family<Labels<1>, Histogram, fn() -> Histogram> =
            seconds("call_duration", Family::new_with_constructor(|| Histogram::new(SECONDS))),
    }
}

metrics! {
    /// Metrics of appended batches and of their transactions.
    pub(crate) struct Appends {
        /// Time from when a batch is received until it is durable and answered
        duration: Histogram = seconds("append_duration", Histogram::new(SECONDS)),
        /// Time of one transaction that appends batches, including its commit
        transaction: Histogram = seconds("transaction_duration", Histogram::new(SECONDS)),
        /// Events appended by one transaction
        events: Histogram = plain("transaction_events", Histogram::new(COUNTS)),
        /// Batches appended by one transaction
        batches: Histogram = plain("transaction_batches", Histogram::new(COUNTS)),
        /// Open PublishEvents streams
        pub(crate) streams: Gauge = plain("publish_streams", Gauge::default()),
    }
}

metrics! {
    /// Metrics of the way from a commit to the watches.
    pub(crate) struct Watches {
        /// Times that a watch fell behind the live events and read the log again
        pub(crate) overflows: Counter = plain("watch_overflows", Counter::default()),
        /// Periodic reads of the log that found events without a notification
        pub(crate) sweep_finds: Counter = plain("sweep_finds", Counter::default()),
        /// Events that the tail could not read and went on behind
        pub(crate) unreadable: Counter = plain("unreadable_events", Counter::default()),
    }
    /// Time from when this server learns of a commit, its own or another server's, until a watch
    /// stream has the message
    family seconds("send_delay", "commit", || Histogram::new(DELAYS)) {
        own: Histogram = "own",
        others: Histogram = "other",
    }
    /// Open watches, by scope: one job or all jobs
    family plain("watches", "scope", Gauge::default) {
        pub(crate) of_one_job: Gauge = "job",
        pub(crate) of_all_jobs: Gauge = "all_jobs",
    }
}

metrics! {
    /// Metrics of the removals by retention.
    pub(crate) struct Removals {
        /// Jobs whose events this server began to remove because of --retention-s
        pub(crate) jobs: Counter = plain("removals", Counter::default()),
        /// Events that this server removed because of --retention-s
        pub(crate) events: Counter = plain("removed_events", Counter::default()),
    }
}

metrics! {
    /// Calls and publish streams that were refused because a quota is used up.
    pub(crate) struct QuotaRefusals {}
    /// Calls and publish streams that were refused because a user's quota is used up, by quota
    family plain("quota_refusals", "quota", Counter::default) {
        configurations: Counter = "configurations",
        open_jobs: Counter = "open_jobs",
        api_keys: Counter = "api_keys",
        watch_tokens: Counter = "watch_tokens",
        stored_bytes: Counter = "stored_bytes",
        events_per_day: Counter = "events_per_day",
    }
}

impl QuotaRefusals {
    /// Counts a refusal.
    pub(crate) fn count(&self, quota: Quota) {
        let counter = match quota {
            Quota::Configurations => &self.configurations,
            Quota::OpenJobs => &self.open_jobs,
            Quota::ApiKeys => &self.api_keys,
            Quota::WatchTokens => &self.watch_tokens,
            Quota::StoredBytes => &self.stored_bytes,
            Quota::EventsPerDay => &self.events_per_day,
        };
        counter.inc();
    }
}

metrics! {
    /// Gauges of the server's state. `ready` is set on each change, `jobs_stalled` every ten
    /// seconds, all others at each scrape.
    pub(crate) struct State {
        /// 1 while the database answers, the log is read to its end and the server is not draining,
        /// otherwise 0
        pub(crate) ready: Gauge = plain("ready", Gauge::default()),
        /// 1 from the start of the shutdown, otherwise 0
        pub(crate) draining: Gauge = plain("draining", Gauge::default()),
        /// Age of the oldest event that a caught-up watch has not sent yet
        pub(crate) watch_lag: Seconds = seconds("watch_lag", Seconds::default()),
        /// Time since the tail last had read the log to its end
        pub(crate) tail_lag: Seconds = seconds("tail_lag", Seconds::default()),
        /// Most connections of the pool
        pub(crate) connections_max: Gauge = plain("database_connections_max", Gauge::default()),
        /// Callers that wait for a connection of the pool
        pub(crate) connections_waiting: Gauge = plain("database_connections_waiting", Gauge::default()),
        /// Credentials in this server's memory
        pub(crate) credentials: Gauge = plain("credentials_cached", Gauge::default()),
        /// Time since the cached credentials were last confirmed by the database
        pub(crate) credentials_age: Seconds = seconds("credentials_confirmed_age", Seconds::default()),
        /// Stalled jobs in the database, whichever server serves them
        pub(crate) jobs_stalled: Gauge = plain("jobs_stalled", Gauge::default()),
    }
    /// Open connections of the pool, by state
    family plain("database_connections", "state", Gauge::default) {
        pub(crate) connections_idle: Gauge = "idle",
        pub(crate) connections_in_use: Gauge = "in_use",
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process::new()));
        let own = registry.sub_registry_with_prefix("milepost");
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        own.register("build", "The version of this server", version);
        let families = CallFamilies::new(own);
        let methods: HashMap<_, _> = served_methods()
            .map(|(path, unary)| {
                let method = Method::new(path.trim_start_matches('/'), unary, &families);
                (path, Arc::new(method))
            })
            .collect();
        let other = Arc::new(Method::new(OTHER, false, &families));
        let (appends, watches) = (Appends::new(own), Watches::new(own));
        let (removals, quota_refusals) = (Removals::new(own), QuotaRefusals::new(own));
        let state = State::new(own);
        Self { registry, methods, other, appends, watches, removals, quota_refusals, state }
    }

    /// All metrics as text of the [`CONTENT_TYPE`].
    pub(crate) fn text(&self) -> String {
        let mut encoded = String::new();
        // Writing to a string cannot fail.
        let _infallible = text::encode(&mut encoded, &self.registry);
        encoded
    }

    /// The metrics of the method at a path `/package.Service/Method`, or those of
    /// all unknown paths.
    pub(crate) fn method(&self, path: &str) -> &Arc<Method> {
        self.methods.get(path).unwrap_or(&self.other)
    }
}

/// The paths of all methods that a server has, and whether each is unary.
fn served_methods() -> impl Iterator<Item = (String, bool)> {
    let files = DESCRIPTORS.into_iter().flat_map(|set| {
        // Decoding cannot fail: the build script wrote these descriptors.
        FileDescriptorSet::decode(set).map(|set| set.file).unwrap_or_default()
    });
    files.flat_map(|file| {
        let package = file.package().to_owned();
        file.service.into_iter().flat_map(move |service| {
            let name = format!("/{package}.{}", service.name());
            service.method.into_iter().map(move |method| {
                let unary = !method.client_streaming() && !method.server_streaming();
                (format!("{name}/{}", method.name()), unary)
            })
        })
    })
}

/// The metrics of one method.
#[derive(Debug)]
pub(crate) struct Method {
    name: Arc<str>,
    /// None for a stream, whose length says nothing about the server.
    duration: Option<Histogram>,
    /// By protocol and code; a counter is created by the first call that ends with its code.
    answered: [[OnceLock<Counter>; CODES.len()]; Protocol::ALL.len()],
    answered_family: Family<Labels<3>, Counter>,
    /// By reason; a counter is created by the first refusal for its reason.
    refused: Box<[OnceLock<Counter>]>,
    refused_family: Family<Labels<2>, Counter>,
}

impl Method {
    fn new(name: &str, unary: bool, families: &CallFamilies) -> Self {
        let name: Arc<str> = name.into();
        let labels = [("method", Arc::clone(&name))];
        let method = Self {
            duration: unary.then(|| families.duration.get_or_create_owned(&labels)),
            answered: Default::default(),
            answered_family: families.answered.clone(),
            // The enum's values are numbered without gaps, from 0.
            refused: (0..).map_while(|n| ErrorReason::try_from(n).ok()).map(|_| OnceLock::new()).collect(),
            refused_family: families.refused.clone(),
            name,
        };
        // These two start at 0: Prometheus does not count a series that starts at 1 as
        // an increase, and a method's first fault must raise an alert.
        for fault in [ErrorReason::Internal, ErrorReason::DatabaseUnavailable] {
            method.refusals(fault);
        }
        method
    }

    /// `package.Service/Method`, or `other` for unknown paths.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Counts a finished call.
    pub(crate) fn finished(&self, protocol: Protocol, code: Code, started: Instant) {
        let index = code as usize;
        let counter = self.answered[protocol as usize][index].get_or_init(|| {
            let labels = [
                ("method", Arc::clone(&self.name)),
                ("code", CODES[index].into()),
                ("protocol", protocol.name().into()),
            ];
            self.answered_family.get_or_create_owned(&labels)
        });
        counter.inc();
        if let Some(duration) = &self.duration {
            duration.observe(started.elapsed().as_secs_f64());
        }
    }

    /// Counts a refused call, or a refused batch of a publish stream.
    pub(crate) fn refused(&self, reason: ErrorReason) {
        if let Some(counter) = self.refusals(reason) {
            counter.inc();
        }
    }

    fn refusals(&self, reason: ErrorReason) -> Option<&Counter> {
        let counter = usize::try_from(i32::from(reason)).ok().and_then(|n| self.refused.get(n))?;
        Some(counter.get_or_init(|| {
            let name = reason.as_str_name().trim_start_matches("ERROR_REASON_");
            let labels = [("method", Arc::clone(&self.name)), ("reason", name.into())];
            self.refused_family.get_or_create_owned(&labels)
        }))
    }
}

impl Appends {
    /// Observes a durable and answered batch.
    pub(crate) fn answered(&self, waited: Duration) {
        self.duration.observe(waited.as_secs_f64());
    }

    /// Observes a committed transaction.
    pub(crate) fn committed(&self, took: Duration, events: usize, batches: usize) {
        self.transaction.observe(took.as_secs_f64());
        self.events.observe(float(events));
        self.batches.observe(float(batches));
    }
}

/// When this process learned of a commit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    pub(crate) at: Instant,
    /// This process made the commit.
    pub(crate) own: bool,
}

impl Watches {
    /// Observes a message, by when this process learned of the message's first event.
    pub(crate) fn sent(&self, received: Received, at: Instant) {
        let delay = at.saturating_duration_since(received.at).as_secs_f64();
        if received.own { &self.own } else { &self.others }.observe(delay);
    }
}

/// Exact up to `u32::MAX`, which no count here reaches.
pub(crate) fn float(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

pub(crate) fn gauge_value(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Counts something open in a gauge until it is dropped.
#[derive(Debug)]
pub(crate) struct Open(Gauge);

impl Open {
    pub(crate) fn of(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}
