//! What an operator watches, as Prometheus scrapes it.
//!
//! Every label is of a set that is known when the server starts. A handle is
//! looked up once and then counted with, so that counting neither formats nor
//! allocates. What need not be counted as it happens is read when somebody asks,
//! see `App::measure`.

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

/// Format of the metrics as text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bounds of what a caller waits for, in seconds.
const SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
/// The same of what is passed on within this process.
const DELAYS: [f64; 13] = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];
/// Bounds of what a transaction holds.
const COUNTS: [f64; 11] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0];

/// The descriptors of all that is served.
const DESCRIPTORS: [&[u8]; 4] = [
    pb::FILE_DESCRIPTOR_SET,
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
];
/// What stands for all paths that nothing is served on.
const OTHER: &str = "other";

/// The codes of gRPC, by number.
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
    /// Of appends and their transactions.
    pub(crate) appends: Appends,
    /// From a commit to its watchers.
    pub(crate) watches: Watches,
    /// Read when somebody asks.
    pub(crate) state: State,
}

/// Appends, and the transactions that take them.
#[derive(Debug)]
pub(crate) struct Appends {
    duration: Histogram,
    transaction: Histogram,
    events: Histogram,
    batches: Histogram,
    /// Open publish streams.
    pub(crate) streams: Gauge,
}

/// From a commit to its watchers.
#[derive(Debug)]
pub(crate) struct Watches {
    own: Histogram,
    others: Histogram,
    pub(crate) of_one_job: Gauge,
    pub(crate) of_all_jobs: Gauge,
    pub(crate) overflows: Counter,
    pub(crate) sweep_finds: Counter,
}

/// How things stand; set when somebody asks, but for the first.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) ready: Gauge,
    pub(crate) draining: Gauge,
    pub(crate) watch_lag: Seconds,
    pub(crate) connections_idle: Gauge,
    pub(crate) connections_in_use: Gauge,
    pub(crate) connections_most: Gauge,
    pub(crate) connections_waited_for: Gauge,
    pub(crate) credentials: Gauge,
    pub(crate) credentials_age: Seconds,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// With everything at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("milepost");
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The version of this server", version);
        let families = CallFamilies::new(&mut registry);
        let methods: HashMap<_, _> = served()
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

    /// All of it, as [`CONTENT_TYPE`] says.
    pub(crate) fn text(&self) -> String {
        let mut encoded = String::new();
        // A string takes whatever is written to it.
        let _infallible = text::encode(&mut encoded, &self.registry);
        encoded
    }

    /// The method of this path, `/package.Service/Method`.
    pub(crate) fn method(&self, path: &str) -> &Arc<Method> {
        self.methods.get(path).unwrap_or(&self.other)
    }
}

/// The paths of all methods, and whether each is unary.
fn served() -> impl Iterator<Item = (String, bool)> {
    let files = DESCRIPTORS.into_iter().flat_map(|set| {
        // What protox wrote when this was built.
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
        registry.register("calls", "Calls that are over, by method and code", families.answered.clone());
        registry.register("refusals", "Refusals by method and reason", families.refused.clone());
        registry.register_with_unit(
            "call_duration",
            "From a unary call's headers to its answer, by method",
            Unit::Seconds,
            families.duration.clone(),
        );
        families
    }
}

/// What is counted of one method.
#[derive(Debug)]
pub(crate) struct Method {
    name: Arc<str>,
    /// Of a stream, how long it lasts tells nothing.
    duration: Option<Histogram>,
    /// By code, from the first on.
    answered: [OnceLock<Counter>; CODES.len()],
    answered_family: Family<Labels<2>, Counter>,
    /// By reason, likewise.
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
        // There from 0 on, so that the first of them is a rise.
        for fault in [ErrorReason::Internal, ErrorReason::DatabaseUnavailable] {
            method.refusals(fault);
        }
        method
    }

    /// `package.Service/Method`, or that it is none of ours.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// A call is over that began then.
    pub(crate) fn over(&self, code: Code, began: Instant) {
        let index = code as usize;
        let counter = self.answered[index].get_or_init(|| {
            let labels = [("method", Arc::clone(&self.name)), ("code", CODES[index].into())];
            self.answered_family.get_or_create_owned(&labels)
        });
        counter.inc();
        if let Some(duration) = &self.duration {
            duration.observe(began.elapsed().as_secs_f64());
        }
    }

    /// A call, or a batch of a stream, was refused for this reason.
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
                "From a batch that is handed in to its answer, once durable",
            ),
            transaction: seconds(registry, "transaction_duration", "One transaction of appends"),
            events: registered(
                registry,
                "transaction_events",
                "Events of one transaction",
                Histogram::new(COUNTS),
            ),
            batches: registered(
                registry,
                "transaction_batches",
                "Callers' batches that share one transaction",
                Histogram::new(COUNTS),
            ),
            streams: registered(registry, "publish_streams", "Open publish streams", Gauge::default()),
        }
    }

    /// A batch that was handed in at that time is durable and answered.
    pub(crate) fn answered(&self, waited: Duration) {
        self.duration.observe(waited.as_secs_f64());
    }

    /// A transaction was committed.
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
    /// It is this process's own.
    pub(crate) own: bool,
}

impl Watches {
    fn new(registry: &mut Registry) -> Self {
        let delay: fn() -> Histogram = || Histogram::new(DELAYS);
        let delays = Family::<Labels<1>, Histogram, _>::new_with_constructor(delay);
        registry.register_with_unit(
            "send_delay",
            "From the moment this server knows of a commit to its handing to a watcher's stream",
            Unit::Seconds,
            delays.clone(),
        );
        let watches = Family::<Labels<1>, Gauge>::default();
        registry.register("watches", "Open watches, by scope", watches.clone());
        let label = |name, value: &str| [(name, Arc::from(value))];
        Self {
            own: delays.get_or_create_owned(&label("commit", "own")),
            others: delays.get_or_create_owned(&label("commit", "other")),
            of_one_job: watches.get_or_create_owned(&label("scope", "job")),
            of_all_jobs: watches.get_or_create_owned(&label("scope", "all_jobs")),
            overflows: registered(
                registry,
                "watch_overflows",
                "Watchers that fell behind and read the log again",
                Counter::default(),
            ),
            sweep_finds: registered(
                registry,
                "sweep_finds",
                "Looks at the log that found events which no bell had announced",
                Counter::default(),
            ),
        }
    }

    /// A message was handed on whose first event was heard of then.
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
            "Connections of the pool that are open, by state",
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
            ready: gauge(registry, "ready", "1 while the database answers and the server does not drain"),
            draining: gauge(registry, "draining", "1 once the server shuts down"),
            watch_lag: seconds(
                registry,
                "watch_lag",
                "Age of the oldest event that a watcher which had caught up was not sent yet",
            ),
            connections_idle: state("idle"),
            connections_in_use: state("in_use"),
            connections_most: gauge(registry, "database_connections_max", "Size of the pool"),
            connections_waited_for: gauge(
                registry,
                "database_connections_waiting",
                "Those who wait for a connection of the pool",
            ),
            credentials: gauge(registry, "credentials_cached", "Credentials that are remembered"),
            credentials_age: seconds(
                registry,
                "credentials_confirmed_age",
                "Since the credentials that are remembered were last confirmed",
            ),
        }
    }
}

fn registered<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// Exact as far as any count here goes.
pub(crate) fn float(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

/// As a gauge takes it.
pub(crate) fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Something that is open as long as this lives.
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
