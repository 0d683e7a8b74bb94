//! Every setting, with its flag, its environment variable, its default and its
//! unit. Parsed once, on the command line; the modules take these structs.

mod quotas;
mod values;

use std::{env, fmt, net::SocketAddr, path::PathBuf, thread, time::Duration};

use clap::{Args, ValueEnum, value_parser};
use ipnet::IpNet;
use tokio_rustls::rustls::{self, ClientConfig};

pub use self::quotas::QuotaSettings;
use self::values::{count, listen_address, log_filter, network, origin, seconds, share};
use crate::tls::{self, TlsError};

/// All settings of `serve`.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// Which Postgres, its pool and its timeouts.
    #[command(flatten)]
    pub database: DatabaseSource,
    /// What only the start of a server needs.
    #[command(flatten)]
    pub start: StartSettings,
    /// Limits, timeouts, credentials and retention.
    #[command(flatten)]
    pub server: ServerSettings,
    /// Where metrics are served and where traces are sent.
    #[command(flatten)]
    pub monitoring: MonitoringSettings,
}

/// Which Postgres a command works on. The `display_order` of these settings and of
/// [`DatabaseSettings`] is their place in `--help`, under one heading.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Database")]
pub struct DatabaseSource {
    /// URL of a Postgres 15 or later, as postgresql://USER@HOST/DATABASE. Without it, or with an empty one,
    /// milepost starts its own (embedded) Postgres from the binaries installed on this machine
    #[arg(
        long = "database-url",
        env = "DATABASE_URL",
        hide_env_values = true,
        value_name = "URL",
        display_order = 1
    )]
    url: Option<DatabaseUrl>,

    /// Data directory of the embedded Postgres [default: /var/lib/milepost for root, otherwise milepost in
    /// $XDG_DATA_HOME or ~/.local/share]
    #[arg(long, env = "MILEPOST_DATA_DIR", value_name = "DIRECTORY", display_order = 3)]
    pub data_dir: Option<PathBuf>,

    /// Longest that a start waits for DATABASE_URL to accept connections, in seconds; what cannot succeed,
    /// such as a wrong password or an unknown parameter of the URL, fails at once
    #[arg(long = "database-start-timeout-s", env = "MILEPOST_DATABASE_START_TIMEOUT_S", default_value = "60",
          value_name = "SECONDS", value_parser = seconds(0..=3600), display_order = 6)]
    pub start_timeout: Duration,

    /// How connections are made.
    #[command(flatten)]
    pub settings: DatabaseSettings,
}

impl DatabaseSource {
    /// DATABASE_URL; none for the embedded Postgres.
    pub fn url(&self) -> Option<&DatabaseUrl> {
        // A variable of a container or a unit file is often set to nothing instead of unset.
        self.url.as_ref().filter(|url| !url.reveal().is_empty())
    }
}

/// How connections are made, and how long their uses may take.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Database")]
pub struct DatabaseSettings {
    /// PEM file of the certificate authorities that DATABASE_URL is verified by, instead of this system's;
    /// the connection must then be encrypted, as with sslmode=require
    #[arg(long = "database-ca", env = "MILEPOST_DATABASE_CA", value_name = "FILE", display_order = 2)]
    pub ca: Option<PathBuf>,

    /// Most database connections in the server's pool; a server opens eight more outside the pool, and for a
    /// moment four more when it starts or listens again
    #[arg(long = "database-connections", env = "MILEPOST_DATABASE_CONNECTIONS", default_value_t = 16,
          value_name = "COUNT", value_parser = count(2..=1000), display_order = 4)]
    pub connections: usize,

    /// Longest wait for a free or a new connection to the database, in seconds
    #[arg(long = "database-connect-timeout-s", env = "MILEPOST_DATABASE_CONNECT_TIMEOUT_S",
          default_value = "5", value_name = "SECONDS", value_parser = seconds(1..=600), display_order = 5)]
    pub connect_timeout: Duration,

    /// Longest that a statement may run, that it may wait for a lock, and that a transaction may be idle,
    /// in seconds
    #[arg(long = "statement-timeout-s", env = "MILEPOST_STATEMENT_TIMEOUT_S", default_value = "5",
          value_name = "SECONDS", value_parser = seconds(1..=600), display_order = 7)]
    pub statement_timeout: Duration,

    /// Postgres's synchronous_commit: where an event must be stored before it is acknowledged
    #[arg(
        long,
        env = "MILEPOST_SYNCHRONOUS_COMMIT",
        value_enum,
        default_value_t,
        value_name = "LEVEL",
        display_order = 8
    )]
    pub synchronous_commit: SynchronousCommit,
}

/// What only the start of a server needs: its address and its certificate, what it
/// does with its database first, and whether its address opens sign-up.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub struct StartSettings {
    /// Address to listen on; port 0 takes any free port
    #[arg(long, env = "MILEPOST_LISTEN", default_value = "127.0.0.1:50051", value_name = "IP:PORT",
          value_parser = listen_address)]
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
    pub tls: TlsSettings,

    /// Whether sign-up without a credential is open
    #[arg(
        long,
        env = "MILEPOST_SIGN_UP",
        value_enum,
        default_value_t,
        value_name = "MODE",
        help_heading = "Users"
    )]
    pub sign_up: SignUp,
}

/// Limits and timeouts of a server, and the settings of its credentials and its event
/// log.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub struct ServerSettings {
    /// Longest that a call may take, in seconds; for a stream, until its response starts
    #[arg(long = "request-timeout-s", env = "MILEPOST_REQUEST_TIMEOUT_S", default_value = "10",
          value_name = "SECONDS", value_parser = seconds(1..=3600))]
    pub request_timeout: Duration,

    /// Longest that calls in progress may take to finish after SIGTERM or SIGINT, in seconds
    #[arg(long = "drain-deadline-s", env = "MILEPOST_DRAIN_DEADLINE_S", default_value = "10",
          value_name = "SECONDS", value_parser = seconds(1..=3600))]
    pub drain_deadline: Duration,

    /// Most concurrent calls and streams on one HTTP/2 connection, of all users whose calls a proxy or a
    /// gateway sends over it; further ones wait in the client until one of them ends
    #[arg(long, env = "MILEPOST_STREAMS_PER_CONNECTION", default_value_t = 10_000, value_name = "COUNT",
          value_parser = value_parser!(u32).range(2..=100_000))]
    pub streams_per_connection: u32,

    /// Origins (scheme, host and port), separated by commas, whose pages may call this server from a
    /// browser, beside those of this server itself
    #[arg(long = "allow-origin", env = "MILEPOST_ALLOW_ORIGIN", value_name = "ORIGINS", value_delimiter = ',',
          value_parser = origin)]
    pub allowed_origins: Vec<String>,

    /// Origins, separated by commas, whose pages may show this server's page in a frame
    #[arg(long, env = "MILEPOST_FRAME_ANCESTORS", value_name = "ORIGINS", value_delimiter = ',', value_parser = origin)]
    pub frame_ancestors: Vec<String>,

    /// Sign-up, sessions, passwords and callers.
    #[command(flatten)]
    pub auth: AuthSettings,

    /// Silence on a connection after which the server sends an HTTP/2 PING, in seconds
    #[arg(long = "keepalive-interval-s", env = "MILEPOST_KEEPALIVE_INTERVAL_S", default_value = "20",
          value_name = "SECONDS", value_parser = seconds(1..=3600), help_heading = "Server")]
    pub keepalive_interval: Duration,

    /// Longest that a client may take to answer the PING of --keepalive-interval-s before its connection is
    /// closed, in seconds
    #[arg(long = "keepalive-timeout-s", env = "MILEPOST_KEEPALIVE_TIMEOUT_S", default_value = "20",
          value_name = "SECONDS", value_parser = seconds(1..=3600), help_heading = "Server")]
    pub keepalive_timeout: Duration,

    /// The publish window and the retention.
    #[command(flatten)]
    pub log: EventLogSettings,

    /// The most that each user may have.
    #[command(flatten)]
    pub quotas: QuotaSettings,
}

impl ServerSettings {
    /// An error for settings that are each valid but contradict each other.
    pub fn check(&self) -> Result<(), String> {
        let (of_user, of_connection) = (self.auth.streams_per_user, self.streams_per_connection);
        if usize::try_from(of_connection).is_ok_and(|of_connection| of_user >= of_connection) {
            // HTTP/2 would let a user's excess stream wait without an answer.
            return Err(format!(
                "--streams-per-user {of_user} must be less than --streams-per-connection {of_connection}, or \
                 a user's excess stream on one connection would wait instead of being refused"
            ));
        }
        let TenantSettings { bytes_in_flight_mib, total_bytes_in_flight_mib, .. } = self.auth.tenants;
        if bytes_in_flight_mib > total_bytes_in_flight_mib {
            return Err(format!(
                "--bytes-in-flight-mib {bytes_in_flight_mib} must be at most --total-bytes-in-flight-mib \
                 {total_bytes_in_flight_mib}, which all users share"
            ));
        }
        Ok(())
    }
}

/// Settings of the event log.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub struct EventLogSettings {
    /// Most unanswered batches of one PublishEvents stream; at this number the server stops reading the
    /// stream
    #[arg(long, env = "MILEPOST_PUBLISH_WINDOW", default_value_t = 64, value_name = "COUNT",
          value_parser = count(2..=10_000))]
    pub publish_window: usize,

    /// Most memory for what never changes about jobs and configurations, and for the states of jobs, in MiB
    #[arg(long, env = "MILEPOST_CACHE_MIB", default_value_t = 64, value_name = "MIB",
          value_parser = value_parser!(u64).range(1..=1_048_576))]
    pub cache_mib: u64,

    /// Remove a job's events this many seconds after the job has closed; the job itself stays [default:
    /// never]
    #[arg(long = "retention-s", env = "MILEPOST_RETENTION_S", value_name = "SECONDS",
          value_parser = seconds(1..=3_153_600_000))]
    pub retention: Option<Duration>,
}

impl EventLogSettings {
    /// `--cache-mib` in bytes.
    pub fn cache_bytes(&self) -> u64 {
        self.cache_mib * 1024 * 1024
    }
}

/// Certificate and key of the server, and authorities of its clients.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Server")]
pub struct TlsSettings {
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

impl TlsSettings {
    /// Whether connections are encrypted. An error if a certificate, key or authority
    /// is set without the others that it needs.
    pub fn is_on(&self) -> Result<bool, &'static str> {
        match (&self.tls_cert, &self.tls_key, &self.tls_client_ca) {
            (Some(_), Some(_), _) => Ok(true),
            (None, None, None) => Ok(false),
            (Some(_), None, _) => Err("--tls-cert needs --tls-key"),
            (None, Some(_), _) => Err("--tls-key needs --tls-cert"),
            (None, None, Some(_)) => Err("--tls-client-ca needs --tls-cert and --tls-key"),
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

impl ClientTls {
    /// Reads the files; none if no flag is set.
    pub async fn load(&self) -> Result<Option<ClientConfig>, TlsError> {
        if *self == Self::default() {
            return Ok(None);
        }
        let unusable = |error: rustls::Error| TlsError(format!("cannot use TLS: {error}"));
        let config = ClientConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(tls::trusted(self.tls_ca.as_deref()).await?);
        match (&self.tls_client_cert, &self.tls_client_key) {
            (Some(certificate), Some(key)) => {
                let chain = tls::certificates(certificate, &tls::read(certificate).await?)?;
                let key = tls::private_key(key, &tls::read(key).await?)?;
                config.with_client_auth_cert(chain, key).map(Some).map_err(unusable)
            }
            (None, None) => Ok(Some(config.with_no_client_auth())),
            (Some(_), None) | (None, Some(_)) => {
                Err(TlsError("--tls-client-cert and --tls-client-key need each other".to_owned()))
            }
        }
    }
}

/// Settings of sign-up, callers, sessions and passwords.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Users")]
pub struct AuthSettings {
    /// Whether unauthenticated callers may sign up; resolved from
    /// [`StartSettings::sign_up`] when the server has its address.
    #[arg(skip)]
    pub sign_up_open: bool,

    /// Most open streams per server of one user, or of the watch tokens of one job; must be less than
    /// --streams-per-connection
    #[arg(long, env = "MILEPOST_STREAMS_PER_USER", default_value_t = 500, value_name = "COUNT",
          value_parser = count(1..=99_999), help_heading = "Server")]
    pub streams_per_user: usize,

    /// Most open streams per server of the watch tokens of all jobs of one provider
    #[arg(long, env = "MILEPOST_TOKEN_STREAMS_PER_USER", default_value_t = 5_000, value_name = "COUNT",
          value_parser = count(1..=1_000_000), help_heading = "Server")]
    pub token_streams_per_user: usize,

    /// What one user may have in flight, and how fast.
    #[command(flatten)]
    pub tenants: TenantSettings,

    /// IP addresses and CIDR ranges, separated by commas, of proxies whose x-forwarded-for header names a
    /// call's client address
    #[arg(long = "trusted-proxy", env = "MILEPOST_TRUSTED_PROXY", value_name = "ADDRESSES",
          value_delimiter = ',', value_parser = network, help_heading = "Server")]
    pub trusted_proxies: Vec<IpNet>,

    /// Lifetime of a session, in seconds; use does not extend it
    #[arg(long = "session-lifetime-s", env = "MILEPOST_SESSION_LIFETIME_S", default_value = "43200",
          value_name = "SECONDS", value_parser = seconds(1..=31_536_000))]
    pub session_lifetime: Duration,

    /// Most sign-ups in an hour from one client address (for IPv6, from one /64 network), on all servers
    /// together; sign-ups from loopback are not counted
    #[arg(long, env = "MILEPOST_SIGN_UPS_PER_HOUR", default_value_t = 100, value_name = "COUNT",
          value_parser = value_parser!(i32).range(1..))]
    pub sign_ups_per_hour: i32,

    /// Cost and parallelism of password hashing.
    #[command(flatten)]
    pub bcrypt: BcryptSettings,
}

/// What one user, or the watch tokens of the user's jobs, may have in flight on a server, and how
/// fast.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Server")]
pub struct TenantSettings {
    /// Most calls a second of one user on a server, opened streams included; a second's worth at once
    #[arg(long, env = "MILEPOST_CALLS_PER_SECOND", default_value_t = 5_000, value_name = "COUNT",
          value_parser = value_parser!(u32).range(1..=1_000_000_000))]
    pub calls_per_second: u32,

    /// Most calls of one user under way at once on a server, without streams
    #[arg(long, env = "MILEPOST_CALLS_IN_FLIGHT", default_value_t = 1_024, value_name = "COUNT",
          value_parser = count(1..=1_000_000))]
    pub calls_in_flight: usize,

    /// Most events a second that one user may append on a server, a second's worth at once; AppendEvents is
    /// refused beyond it, and a PublishEvents stream is read more slowly
    #[arg(long, env = "MILEPOST_EVENTS_PER_SECOND", default_value_t = 50_000, value_name = "COUNT",
          value_parser = value_parser!(u32).range(500..=1_000_000_000))]
    pub events_per_second: u32,

    /// Most bytes of unanswered messages of one user on a server, in MiB; a message counts as 16 KiB at
    /// least. A unary call is refused beyond it, and a PublishEvents stream is read more slowly
    #[arg(long, env = "MILEPOST_BYTES_IN_FLIGHT_MIB", default_value_t = 16, value_name = "MIB",
          value_parser = count(1..=1_048_576))]
    pub bytes_in_flight_mib: usize,

    /// Most bytes of unanswered messages of all users on a server, in MiB; users who wait get them in turns
    #[arg(long, env = "MILEPOST_TOTAL_BYTES_IN_FLIGHT_MIB", default_value_t = 256, value_name = "MIB",
          value_parser = count(1..=1_048_576))]
    pub total_bytes_in_flight_mib: usize,
}

/// Cost and parallelism of password hashing.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Users")]
pub struct BcryptSettings {
    /// bcrypt cost of new password hashes: each step doubles the work of a log-in. Users whose hash was
    /// made with a higher cost are refused more slowly until their next log-in, which reveals that they
    /// exist
    #[arg(long, env = "MILEPOST_BCRYPT_COST", default_value_t = 12, value_name = "COST",
          value_parser = value_parser!(u32).range(4..=31))]
    pub bcrypt_cost: u32,

    /// Most passwords that are hashed at once [default: half of the processors, rounded up]
    #[arg(long, env = "MILEPOST_BCRYPT_PARALLEL", value_name = "COUNT", value_parser = count(1..=1024),
          default_value_t = half_of_processors(), hide_default_value = true)]
    pub bcrypt_parallel: usize,
}

/// Where metrics are served and where traces are sent; both are off by default.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Monitoring")]
pub struct MonitoringSettings {
    /// Address that serves Prometheus metrics at /metrics, over HTTP without encryption or credentials; off
    /// by default
    #[arg(long, env = "MILEPOST_METRICS_LISTEN", value_name = "IP:PORT", value_parser = listen_address)]
    pub metrics_listen: Option<SocketAddr>,

    /// Allow --metrics-listen beyond loopback, where every client that reaches the address can read the
    /// metrics
    #[arg(long, env = "MILEPOST_INSECURE_METRICS_LISTEN")]
    pub insecure_metrics_listen: bool,

    /// Where traces are sent.
    #[command(flatten)]
    pub traces: TraceSettings,
}

/// The collector of traces, and which calls are sampled.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Monitoring")]
pub struct TraceSettings {
    /// OpenTelemetry collector that receives traces by OTLP over gRPC, as http://HOST:PORT or
    /// https://HOST:PORT; off by default [env also: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    /// OTEL_EXPORTER_OTLP_ENDPOINT]
    #[arg(long, env = "MILEPOST_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,

    /// Share of calls to trace, from 0 to 1, among calls whose client sent no sampling decision (traceparent)
    #[arg(long, env = "MILEPOST_TRACE_SHARE", default_value_t = 1.0, value_name = "SHARE", value_parser = share)]
    pub trace_share: f64,
}

impl TraceSettings {
    /// The collector's endpoint: `--otlp-endpoint`, or else the one of OpenTelemetry's own
    /// variables. None if none is set, or an empty one.
    pub fn endpoint(&self) -> Option<String> {
        let standard_variables = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
        let standard = || standard_variables.into_iter().find_map(|name| env::var(name).ok());
        self.otlp_endpoint.clone().or_else(standard).filter(|endpoint| !endpoint.is_empty())
    }
}

/// Half of the processors, rounded up, within the range of `--bcrypt-parallel`.
fn half_of_processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from).div_ceil(2).min(1024)
}

/// Format and filter of the log on stderr.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Log")]
pub struct TelemetrySettings {
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

    /// Lowest level that is logged: error, warn, info, debug, trace or off, also by target, such as
    /// info,milepost::server=warn [default: info for serve, error for demo, warn for the other commands]
    #[arg(long, env = "MILEPOST_LOG_LEVEL", value_name = "FILTER", value_parser = log_filter, global = true)]
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

impl From<String> for DatabaseUrl {
    fn from(url: String) -> Self {
        Self(url)
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
