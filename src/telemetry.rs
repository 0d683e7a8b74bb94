//! The log on stderr, the metrics and the traces of a server.

pub mod metrics;
mod process;
pub mod traces;

use std::{
    io::{self, IsTerminal as _},
    sync::Arc,
};

use tracing_subscriber::{EnvFilter, filter::ParseError};

use self::{metrics::Metrics, traces::Traces};
use crate::config::LogFormat;

/// Metrics and traces of one server. Several servers in one process each have
/// their own.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {
    /// Metrics, as Prometheus scrapes them.
    pub metrics: Arc<Metrics>,
    /// Traces, exported by OTLP.
    pub traces: Traces,
}

/// Sets up the log of this process. `filter` has the syntax of [`EnvFilter`], such
/// as `info` or `info,milepost::server=warn`; an error if it cannot be parsed. A
/// global subscriber that is already set stays in use.
pub fn init(format: LogFormat, filter: &str) -> Result<(), ParseError> {
    let filter = EnvFilter::try_new(filter)?;
    let terminal = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let json = format == LogFormat::Json || (format == LogFormat::Auto && !terminal);
    // Fails if a subscriber is already set, as by the first of a test's servers.
    let _already_set = if json {
        log.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
    } else {
        log.with_ansi(terminal).try_init()
    };
    Ok(())
}
