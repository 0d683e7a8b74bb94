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

use crate::pb::{self, ErrorReason};

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

/// The metrics of one server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    methods: HashMap<String, Arc<Method>>,
    other: Arc<Method>,
    pub(crate) appends: Appends,
    pub(crate) watches: Watches,
    /// Set at each scrape, except `ready`.
    pub(crate) state: State,
}

/// Metrics of appended batches and of their transactions.
#[derive(Debug)]
pub(crate) struct Appends {
    duration: Histogram,
    transaction: Histogram,
    events: Histogram,
    batches: Histogram,
    pub(crate) streams: Gauge,
}

/// Metrics of the way from a commit to the watches.
#[derive(Debug)]
pub(crate) struct Watches {
    own: Histogram,
    others: Histogram,
    pub(crate) of_one_job: Gauge,
    pub(crate) of_all_jobs: Gauge,
    pub(crate) overflows: Counter,
    pub(crate) sweep_finds: Counter,
}

/// Gauges of the server's state. `ready` is set on each change, all others at each
/// scrape.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) ready: Gauge,
    pub(crate) draining: Gauge,
    pub(crate) watch_lag: Seconds,
    pub(crate) connections_idle: Gauge,
    pub(crate) connections_in_use: Gauge,
    pub(crate) connections_max: Gauge,
    pub(crate) connections_waiting: Gauge,
    pub(crate) credentials: Gauge,
    pub(crate) credentials_age: Seconds,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("milepost");
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The version of this server", version);
        let families = CallFamilies::new(&mut registry);
        let methods: HashMap<_, _> = served_methods()
            .map(|(path, unary)| {
                let method = Method::new(path.trim_start_matches('/'), unary, &families);
                (path, Arc::new(method))
            })
            .collect();
        let other = Arc::new(Method::new(OTHER, false, &families));
        let (appends, watches) = (Appends::new(&mut registry), Watches::new(&mut registry));
        let state = State::new(&mut registry);
        Self { registry, methods, other, appends, watches, state }
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

#[derive(Clone)]
struct CallFamilies {
    answered: Family<Labels<2>, Counter>,
    refused: Family<Labels<2>, Counter>,
    duration: Family<Labels<1>, Histogram, fn() -> Histogram>,
}

impl CallFamilies {
    fn new(registry: &mut Registry) -> Self {
        let duration: fn() -> Histogram = || Histogram::new(SECONDS);
        let families = Self {
            answered: Family::default(),
            refused: Family::default(),
            duration: Family::new_with_constructor(duration),
        };
        registry.register("calls", "Finished calls, by method and status code", families.answered.clone());
        registry.register(
            "refusals",
            "Refused calls and refused batches of publish streams, by method and reason",
            families.refused.clone(),
        );
        registry.register_with_unit(
            "call_duration",
            "Time from the request headers of a unary call to the end of its response, by method",
            Unit::Seconds,
            families.duration.clone(),
        );
        families
    }
}

/// The metrics of one method.
#[derive(Debug)]
pub(crate) struct Method {
    name: Arc<str>,
    /// None for a stream, whose length says nothing about the server.
    duration: Option<Histogram>,
    /// By code; a counter is created by the first call that ends with its code.
    answered: [OnceLock<Counter>; CODES.len()],
    answered_family: Family<Labels<2>, Counter>,
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
    pub(crate) fn finished(&self, code: Code, started: Instant) {
        let index = code as usize;
        let counter = self.answered[index].get_or_init(|| {
            let labels = [("method", Arc::clone(&self.name)), ("code", CODES[index].into())];
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
    fn new(registry: &mut Registry) -> Self {
        let seconds = |registry: &mut Registry, name, help| {
            let metric = Histogram::new(SECONDS);
            registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
            metric
        };
        Self {
            duration: seconds(
                registry,
                "append_duration",
                "Time from when a batch is received until it is durable and answered",
            ),
            transaction: seconds(
                registry,
                "transaction_duration",
                "Time of one transaction that appends batches, including its commit",
            ),
            events: registered(
                registry,
                "transaction_events",
                "Events appended by one transaction",
                Histogram::new(COUNTS),
            ),
            batches: registered(
                registry,
                "transaction_batches",
                "Batches appended by one transaction",
                Histogram::new(COUNTS),
            ),
            streams: registered(registry, "publish_streams", "Open PublishEvents streams", Gauge::default()),
        }
    }

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
    fn new(registry: &mut Registry) -> Self {
        let delay: fn() -> Histogram = || Histogram::new(DELAYS);
        let delays = Family::<Labels<1>, Histogram, _>::new_with_constructor(delay);
        registry.register_with_unit(
            "send_delay",
            "Time from when this server learns of a commit, its own or another server's, until a watch stream \
             has the message",
            Unit::Seconds,
            delays.clone(),
        );
        let watches = Family::<Labels<1>, Gauge>::default();
        registry.register("watches", "Open watches, by scope: one job or all jobs", watches.clone());
        let label = |name, value: &str| [(name, Arc::from(value))];
        Self {
            own: delays.get_or_create_owned(&label("commit", "own")),
            others: delays.get_or_create_owned(&label("commit", "other")),
            of_one_job: watches.get_or_create_owned(&label("scope", "job")),
            of_all_jobs: watches.get_or_create_owned(&label("scope", "all_jobs")),
            overflows: registered(
                registry,
                "watch_overflows",
                "Times that a watch fell behind the live events and read the log again",
                Counter::default(),
            ),
            sweep_finds: registered(
                registry,
                "sweep_finds",
                "Periodic reads of the log that found events without a notification",
                Counter::default(),
            ),
        }
    }

    /// Observes a message, by when this process learned of the message's first event.
    pub(crate) fn sent(&self, received: Received, at: Instant) {
        let delay = at.saturating_duration_since(received.at).as_secs_f64();
        if received.own { &self.own } else { &self.others }.observe(delay);
    }
}

impl State {
    fn new(registry: &mut Registry) -> Self {
        let connections = Family::<Labels<1>, Gauge>::default();
        registry.register(
            "database_connections",
            "Open connections of the pool, by state",
            connections.clone(),
        );
        let state = |name: &str| connections.get_or_create_owned(&[("state", name.into())]);
        let seconds = |registry: &mut Registry, name, help| {
            let metric = Seconds::default();
            registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
            metric
        };
        let gauge = |registry: &mut Registry, name, help| registered(registry, name, help, Gauge::default());
        Self {
            ready: gauge(
                registry,
                "ready",
                "1 while the database answers and the server is not draining, otherwise 0",
            ),
            draining: gauge(registry, "draining", "1 from the start of the shutdown, otherwise 0"),
            watch_lag: seconds(
                registry,
                "watch_lag",
                "Age of the oldest event that a caught-up watch has not sent yet",
            ),
            connections_idle: state("idle"),
            connections_in_use: state("in_use"),
            connections_max: gauge(registry, "database_connections_max", "Most connections of the pool"),
            connections_waiting: gauge(
                registry,
                "database_connections_waiting",
                "Callers that wait for a connection of the pool",
            ),
            credentials: gauge(registry, "credentials_cached", "Credentials in this server's memory"),
            credentials_age: seconds(
                registry,
                "credentials_confirmed_age",
                "Time since the cached credentials were last confirmed by the database",
            ),
        }
    }
}

fn registered<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
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
