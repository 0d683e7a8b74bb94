//! Every setting, with its flag, its environment variable, its default and its
//! unit.
//!
//! The settings are plain values; the commands in [`crate::cli`] hand them to the
//! modules that use them. Durations are whole seconds; their names end in `_s`.

use std::{
    fmt,
    net::{AddrParseError, IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use clap::{Args, ValueEnum};

use crate::tls::TlsError;

/// All settings of `serve`.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// Which Postgres, its pool and its timeouts.
    #[command(flatten)]
    pub database: DatabaseConfig,
    /// Addresses, TLS, limits and retention.
    #[command(flatten)]
    pub server: ServerConfig,
    /// Sign-up, sessions and passwords.
    #[command(flatten)]
    pub auth: AuthConfig,
    /// Where metrics are served and where traces are sent.
    #[command(flatten)]
    pub monitoring: MonitoringConfig,
}

/// Settings of the connections to Postgres, and of the embedded Postgres.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Database")]
pub struct DatabaseConfig {
    /// URL of a Postgres 15 or later, as postgresql://USER@HOST/DATABASE. Without it milepost starts its own
    /// (embedded) Postgres from the binaries installed on this machine
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<DatabaseUrl>,

    /// PEM file of the certificate authorities that DATABASE_URL is verified by, instead of this system's;
    /// the connection must then be encrypted, as with sslmode=require
    #[arg(long, env = "MILEPOST_DATABASE_CA", value_name = "FILE")]
    pub database_ca: Option<PathBuf>,

    /// Data directory of the embedded Postgres [default: /var/lib/milepost for root, otherwise milepost in
    /// $XDG_DATA_HOME or ~/.local/share]
    #[arg(long, env = "MILEPOST_DATA_DIR", value_name = "DIRECTORY")]
    pub data_dir: Option<PathBuf>,

    /// Most database connections in the server's pool; a server opens five more outside the pool
    #[arg(long, env = "MILEPOST_DATABASE_CONNECTIONS", default_value_t = 16, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub database_connections: u32,

    /// Longest wait for a free or a new connection to the database, in seconds
    #[arg(long, env = "MILEPOST_DATABASE_CONNECT_TIMEOUT_S", default_value_t = 5, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=600))]
    pub database_connect_timeout_s: u64,

    /// Longest that a start waits for DATABASE_URL to accept connections, in seconds; with a wrong
    /// password, an unknown user or an unknown database the start fails at once
    #[arg(long, env = "MILEPOST_DATABASE_START_TIMEOUT_S", default_value_t = 60, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub database_start_timeout_s: u64,

    /// Longest that a statement may run, that it may wait for a lock, and that a transaction may be idle,
    /// in seconds
    #[arg(long, env = "MILEPOST_STATEMENT_TIMEOUT_S", default_value_t = 5, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=600))]
    pub statement_timeout_s: u64,

    /// Postgres's synchronous_commit: where an event must be stored before it is acknowledged
    #[arg(long, env = "MILEPOST_SYNCHRONOUS_COMMIT", value_enum, default_value_t, value_name = "LEVEL")]
    pub synchronous_commit: SynchronousCommit,
}

/// Settings of listening, time limits, stream limits and retention.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub struct ServerConfig {
    /// Address to listen on; port 0 takes any free port
    #[arg(long, env = "MILEPOST_LISTEN", default_value = "127.0.0.1:50051", value_name = "IP:PORT")]
    pub listen: SocketAddr,

    /// Allow --listen beyond loopback without TLS; calls and their credentials are then sent unencrypted
    #[arg(long, env = "MILEPOST_INSECURE_LISTEN")]
    pub insecure_listen: bool,

    /// Apply missing migrations to DATABASE_URL before serving; the embedded database is always migrated
    #[arg(long, env = "MILEPOST_MIGRATE")]
    pub migrate: bool,

    /// Serve on a Postgres that can lose acknowledged events when it crashes (fsync or full_page_writes is
    /// off)
    #[arg(long, env = "MILEPOST_UNSAFE_DATABASE")]
    pub unsafe_database: bool,

    /// Certificate and key of the server, and authorities of its clients.
    #[command(flatten)]
    pub tls: TlsConfig,

    /// Longest that a call may take, in seconds; for a stream, until its response starts
    #[arg(long, env = "MILEPOST_REQUEST_TIMEOUT_S", default_value_t = 10, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub request_timeout_s: u64,

    /// Longest that calls in progress may take to finish after SIGTERM or SIGINT, in seconds
    #[arg(long, env = "MILEPOST_DRAIN_DEADLINE_S", default_value_t = 10, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub drain_deadline_s: u64,

    /// Most concurrent calls and streams on one HTTP/2 connection
    #[arg(long, env = "MILEPOST_STREAMS_PER_CONNECTION", default_value_t = 1000, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(2..=100_000))]
    pub streams_per_connection: u32,

    /// Most open streams per server of one user, or of the watch tokens of one job; must be less than
    /// --streams-per-connection
    #[arg(long, env = "MILEPOST_STREAMS_PER_USER", default_value_t = 500, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(1..=99_999))]
    pub streams_per_user: u32,

    /// IP addresses, separated by commas, of proxies whose x-forwarded-for header names a call's client
    /// address
    #[arg(long, env = "MILEPOST_TRUSTED_PROXY", value_name = "ADDRESSES", value_delimiter = ',',
          value_parser = address)]
    pub trusted_proxy: Vec<IpAddr>,

    /// Silence on a connection after which the server sends an HTTP/2 PING, in seconds
    #[arg(long, env = "MILEPOST_KEEPALIVE_INTERVAL_S", default_value_t = 20, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub keepalive_interval_s: u64,

    /// Longest that a client may take to answer the PING of --keepalive-interval-s before its connection is
    /// closed, in seconds
    #[arg(long, env = "MILEPOST_KEEPALIVE_TIMEOUT_S", default_value_t = 20, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub keepalive_timeout_s: u64,

    /// Most unanswered batches of one PublishEvents stream; at this number the server stops reading the
    /// stream
    #[arg(long, env = "MILEPOST_PUBLISH_WINDOW", default_value_t = 64, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pub publish_window: u32,

    /// Remove a job's events this many seconds after the job has closed; the job itself stays [default:
    /// never]
    #[arg(long, env = "MILEPOST_RETENTION_S", value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3_153_600_000))]
    pub retention_s: Option<u64>,
}

impl ServerConfig {
    /// An error for settings that are each valid but contradict each other.
    pub fn check(&self) -> Result<(), String> {
        let Self { streams_per_user: of_user, streams_per_connection: of_connection, .. } = self;
        if of_user >= of_connection {
            // HTTP/2 would let a user's excess stream wait without an answer.
            return Err(format!(
                "--streams-per-user {of_user} must be less than --streams-per-connection {of_connection}, or \
                 a user's excess stream on one connection would wait instead of being refused"
            ));
        }
        Ok(())
    }
}

/// Certificate and key of the server, and authorities of its clients.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Server")]
pub struct TlsConfig {
    /// PEM file of the server's certificate, followed by intermediate certificates: switches TLS on. This
    /// file and the next two are read again every 3 seconds and on SIGHUP; changes apply to new connections
    #[arg(long, env = "MILEPOST_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// PEM file of the certificate's private key
    #[arg(long, env = "MILEPOST_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// PEM file of the authorities of client certificates: only clients with such a certificate may
    /// connect; calls need their credential all the same
    #[arg(long, env = "MILEPOST_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
}

impl TlsConfig {
    /// Whether connections are encrypted. An error if a certificate, key or authority
    /// is set without the others that it needs.
    pub fn is_on(&self) -> Result<bool, TlsError> {
        match (&self.tls_cert, &self.tls_key, &self.tls_client_ca) {
            (Some(_), Some(_), _) => Ok(true),
            (None, None, None) => Ok(false),
            (Some(_), None, _) => Err(TlsError("--tls-cert needs --tls-key".to_owned())),
            (None, Some(_), _) => Err(TlsError("--tls-key needs --tls-cert".to_owned())),
            (None, None, Some(_)) => {
                Err(TlsError("--tls-client-ca needs --tls-cert and --tls-key".to_owned()))
            }
        }
    }
}

/// How a client verifies its server, and the certificate that it presents.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Encryption")]
pub struct ClientTls {
    /// PEM file of the authorities that the server is verified by [default: those of this system]
    #[arg(long, env = "MILEPOST_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// PEM file of the client certificate for a server that asks for one
    #[arg(long, env = "MILEPOST_TLS_CLIENT_CERT", value_name = "FILE")]
    pub tls_client_cert: Option<PathBuf>,

    /// PEM file of the client certificate's private key
    #[arg(long, env = "MILEPOST_TLS_CLIENT_KEY", value_name = "FILE")]
    pub tls_client_key: Option<PathBuf>,
}

/// Settings of sign-up, sessions and passwords.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Users")]
pub struct AuthConfig {
    /// Whether sign-up without a credential is open
    #[arg(long, env = "MILEPOST_SIGN_UP", value_enum, default_value_t, value_name = "MODE")]
    pub sign_up: SignUp,

    /// Lifetime of a session, in seconds; use does not extend it
    #[arg(long, env = "MILEPOST_SESSION_LIFETIME_S", default_value_t = 12 * 60 * 60, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub session_lifetime_s: u64,

    /// Cost and parallelism of password hashing.
    #[command(flatten)]
    pub bcrypt: BcryptConfig,
}

/// Cost and parallelism of password hashing.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Users")]
pub struct BcryptConfig {
    /// bcrypt cost of new password hashes: each step doubles the work of a log-in. Users whose hash was
    /// made with a higher cost are refused more slowly until their next log-in, which reveals that they
    /// exist
    #[arg(long, env = "MILEPOST_BCRYPT_COST", default_value_t = 12, value_name = "COST",
          value_parser = clap::value_parser!(u32).range(4..=31))]
    pub bcrypt_cost: u32,

    /// Most passwords that are hashed at once [default: half of the processors, rounded up]
    #[arg(long, env = "MILEPOST_BCRYPT_PARALLEL", value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub bcrypt_parallel: Option<u32>,
}

/// Where metrics are served and where traces are sent; both are off by default.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Monitoring")]
pub struct MonitoringConfig {
    /// Address that serves Prometheus metrics at /metrics, over HTTP without encryption or credentials; off
    /// by default
    #[arg(long, env = "MILEPOST_METRICS_LISTEN", value_name = "IP:PORT")]
    pub metrics_listen: Option<SocketAddr>,

    /// Allow --metrics-listen beyond loopback, where every client that reaches the address can read the
    /// metrics
    #[arg(long, env = "MILEPOST_INSECURE_METRICS_LISTEN")]
    pub insecure_metrics_listen: bool,

    /// OpenTelemetry collector that receives traces by OTLP over gRPC, as http://HOST:PORT or
    /// https://HOST:PORT; off by default [env also: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    /// OTEL_EXPORTER_OTLP_ENDPOINT]
    #[arg(long, env = "MILEPOST_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,

    /// Share of calls to trace, from 0 to 1, among calls whose client sent no sampling decision (traceparent)
    #[arg(long, env = "MILEPOST_TRACE_SHARE", default_value_t = 1.0, value_name = "SHARE", value_parser = share)]
    pub trace_share: f64,
}

/// Parses an IP address; an IPv4-mapped IPv6 address becomes the IPv4 address.
fn address(text: &str) -> Result<IpAddr, AddrParseError> {
    text.parse().map(|address: IpAddr| address.to_canonical())
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

/// Format and filter of the log on stderr.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Log")]
pub struct TelemetryConfig {
    /// Format of log lines
    #[arg(
        long,
        env = "MILEPOST_LOG_FORMAT",
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        global = true
    )]
    pub log_format: LogFormat,

    /// Lowest level that is logged: error, warn, info, debug or trace, also by target, such as
    /// info,milepost::server=warn [default: info for serve, error for demo, warn for the other commands]
    #[arg(long, env = "MILEPOST_LOG_LEVEL", value_name = "FILTER", global = true)]
    pub log_level: Option<String>,
}

/// A database URL. It may contain a password, so `Debug` does not print it.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// The URL in plain text, for connecting only.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DatabaseUrl(…)")
    }
}

impl FromStr for DatabaseUrl {
    type Err = std::convert::Infallible;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        Ok(Self(url.to_owned()))
    }
}

/// Levels of Postgres's `synchronous_commit` at which no acknowledged event is
/// lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum SynchronousCommit {
    /// Flushed to the primary's disk, and to the disks of its synchronous standbys if it has any
    #[default]
    On,
    /// Flushed to the primary's disk; written but not flushed by its synchronous standbys
    RemoteWrite,
    /// As with `on`, and applied by the synchronous standbys
    RemoteApply,
}

impl SynchronousCommit {
    /// The value of Postgres's `synchronous_commit`.
    pub fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::RemoteWrite => "remote_write",
            Self::RemoteApply => "remote_apply",
        }
    }
}

/// Whether sign-up without a credential is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SignUp {
    /// Every caller may sign up
    Open,
    /// Only the operator creates users, with `milepost user create`
    Closed,
    /// Open only while the server listens on loopback
    #[default]
    Auto,
}

impl SignUp {
    /// Whether sign-up is open on a server that listens on the address `listen`.
    pub fn is_open(self, listen: SocketAddr) -> bool {
        match self {
            Self::Open => true,
            Self::Closed => false,
            Self::Auto => listen.ip().is_loopback(),
        }
    }
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, otherwise JSON
    #[default]
    Auto,
    /// Lines of text
    Text,
    /// One JSON object per line
    Json,
}
