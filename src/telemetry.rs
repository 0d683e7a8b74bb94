//! What is seen of a server from outside: its log on stderr, its metrics and its
//! traces.

pub mod metrics;
pub mod traces;

use std::{
    io::{self, IsTerminal as _},
    sync::Arc,
};

use tracing_subscriber::{EnvFilter, filter::ParseError};

use self::{metrics::Metrics, traces::Traces};
use crate::config::LogFormat;

/// What one server counts and traces; with others beside it in its process, each
/// has its own.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {
    /// For Prometheus.
    pub metrics: Arc<Metrics>,
    /// For OpenTelemetry.
    pub traces: Traces,
}

/// Sets up the log of this process; `filter` in the syntax of
/// [`EnvFilter`], such as `info` or `info,milepost::server=warn`. An error if
/// that cannot be read. What a library before it set up stays.
pub fn init(format: LogFormat, filter: &str) -> Result<(), ParseError> {
    let filter = EnvFilter::try_new(filter)?;
    let terminal = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let json = match format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !terminal,
    };
    // Tests start many servers in one process: only the first sets the log up.
    let _first = if json {
        log.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
    } else {
        log.with_ansi(terminal).try_init()
    };
    Ok(())
}
