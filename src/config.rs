//! Every setting: by flag, by environment variable, with default and unit.
//!
//! Plain values; the commands in [`crate::cli`] hand them to the rooms that
//! they are for. Durations are whole seconds and say so in their names.

use std::{
    fmt,
    net::{AddrParseError, IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use clap::{Args, ValueEnum};

use crate::tls::TlsError;

/// Everything that `serve` can be told.
#[derive(Args, Clone, Debug)]
pub struct Config {
    /// The database.
    #[command(flatten)]
    pub database: DatabaseConfig,
    /// Listening and limits.
    #[command(flatten)]
    pub server: ServerConfig,
    /// Users and credentials.
    #[command(flatten)]
    pub auth: AuthConfig,
    /// Metrics and traces.
    #[command(flatten)]
    pub monitoring: MonitoringConfig,
}

/// Which database, and how it is used.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Database")]
pub struct DatabaseConfig {
    /// Postgres 15 or later, as postgresql://USER@HOST/DATABASE. Without it milepost runs a Postgres of its
    /// own, from the binaries installed on this machine
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<DatabaseUrl>,

    /// Authorities of the database at DATABASE_URL, as PEM, instead of this system's; the connection must then be
    /// encrypted, as with sslmode=require
    #[arg(long, env = "MILEPOST_DATABASE_CA", value_name = "FILE")]
    pub database_ca: Option<PathBuf>,

    /// Folder of the embedded Postgres [default: /var/lib/milepost for root, otherwise milepost in
    /// $XDG_DATA_HOME or ~/.local/share]
    #[arg(long, env = "MILEPOST_DATA_DIR", value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,

    /// Most connections of the pool; a server has five more beside it
    #[arg(long, env = "MILEPOST_DATABASE_CONNECTIONS", default_value_t = 16, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub database_connections: u32,

    /// Longest wait for a connection to the database, in seconds
    #[arg(long, env = "MILEPOST_DATABASE_CONNECT_TIMEOUT_S", default_value_t = 5, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=600))]
    pub database_connect_timeout_s: u64,

    /// Longest that a start waits for the database to take connections, in seconds; a wrong password or the name
    /// of no database is told at once
    #[arg(long, env = "MILEPOST_DATABASE_START_TIMEOUT_S", default_value_t = 60, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub database_start_timeout_s: u64,

    /// Longest that one statement, one lock or one idle transaction may take, in seconds
    #[arg(long, env = "MILEPOST_STATEMENT_TIMEOUT_S", default_value_t = 5, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=600))]
    pub statement_timeout_s: u64,

    /// What an event has to survive before it is acknowledged
    #[arg(long, env = "MILEPOST_SYNCHRONOUS_COMMIT", value_enum, default_value_t, value_name = "LEVEL")]
    pub synchronous_commit: SynchronousCommit,
}

/// Where to listen, for how long to work, what to refuse.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub struct ServerConfig {
    /// Address to listen on; port 0 takes any free one
    #[arg(long, env = "MILEPOST_LISTEN", default_value = "127.0.0.1:50051", value_name = "IP:PORT")]
    pub listen: SocketAddr,

    /// Listen beyond loopback although nothing is encrypted
    #[arg(long, env = "MILEPOST_INSECURE_LISTEN")]
    pub insecure_listen: bool,

    /// Bring the schema of DATABASE_URL up to date first; the embedded database always is
    #[arg(long, env = "MILEPOST_MIGRATE")]
    pub migrate: bool,

    /// Serve on a Postgres that loses acknowledged events when it crashes (fsync or full_page_writes off)
    #[arg(long, env = "MILEPOST_UNSAFE_DATABASE")]
    pub unsafe_database: bool,

    /// Encryption.
    #[command(flatten)]
    pub tls: TlsConfig,

    /// Longest that a call may take, in seconds; streams until they start
    #[arg(long, env = "MILEPOST_REQUEST_TIMEOUT_S", default_value_t = 10, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub request_timeout_s: u64,

    /// Longest that calls under way may take to finish on SIGTERM, in seconds
    #[arg(long, env = "MILEPOST_DRAIN_DEADLINE_S", default_value_t = 10, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub drain_deadline_s: u64,

    /// Most calls and streams at once on one HTTP/2 connection
    #[arg(long, env = "MILEPOST_STREAMS_PER_CONNECTION", default_value_t = 1000, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(2..=100_000))]
    pub streams_per_connection: u32,

    /// Most streams of one user, or under watch tokens of one job, that are open on this replica; fewer than one
    /// connection may have
    #[arg(long, env = "MILEPOST_STREAMS_PER_USER", default_value_t = 500, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(1..=99_999))]
    pub streams_per_user: u32,

    /// Addresses of proxies whose x-forwarded-for tells where a call comes from; separated by commas
    #[arg(long, env = "MILEPOST_TRUSTED_PROXY", value_name = "ADDRESSES", value_delimiter = ',',
          value_parser = address)]
    pub trusted_proxy: Vec<IpAddr>,

    /// A connection is asked whether it lives after so many silent seconds
    #[arg(long, env = "MILEPOST_KEEPALIVE_INTERVAL_S", default_value_t = 20, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub keepalive_interval_s: u64,

    /// A connection that does not answer that is closed after so many seconds
    #[arg(long, env = "MILEPOST_KEEPALIVE_TIMEOUT_S", default_value_t = 20, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub keepalive_timeout_s: u64,

    /// Most unanswered batches of one PublishEvents stream; then reading stops
    #[arg(long, env = "MILEPOST_PUBLISH_WINDOW", default_value_t = 64, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pub publish_window: u32,

    /// Remove the events of a job so many seconds after it has closed; the job stays [default: never]
    #[arg(long, env = "MILEPOST_RETENTION_S", value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3_153_600_000))]
    pub retention_s: Option<u64>,
}

impl ServerConfig {
    /// An error for settings that are each fine but contradict each other.
    pub fn check(&self) -> Result<(), String> {
        let Self { streams_per_user: of_user, streams_per_connection: of_connection, .. } = self;
        if of_user >= of_connection {
            // HTTP/2 would keep the one too many waiting without a word.
            return Err(format!(
                "--streams-per-user {of_user} must be less than --streams-per-connection {of_connection}, or \
                 nobody would be told that they have too many"
            ));
        }
        Ok(())
    }
}

/// What the server shows of itself and asks of its clients.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Server")]
pub struct TlsConfig {
    /// Certificate of the server, with those between it and its authority, as PEM: switches encryption on. This
    /// file and the next two are looked at every 3 seconds and on SIGHUP, and apply to new connections
    #[arg(long, env = "MILEPOST_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// Private key of the certificate, as PEM
    #[arg(long, env = "MILEPOST_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// Authorities of clients, as PEM: only who has a certificate of theirs may connect; credentials are needed all
    /// the same
    #[arg(long, env = "MILEPOST_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
}

impl TlsConfig {
    /// Whether connections are encrypted. An error for half of what that needs.
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

/// Whom a client believes to be its server, and what it shows of itself.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Encryption")]
pub struct ClientTls {
    /// Authorities of the server, as PEM [default: those of this system]
    #[arg(long, env = "MILEPOST_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// Certificate to show to a server that asks for one, as PEM
    #[arg(long, env = "MILEPOST_TLS_CLIENT_CERT", value_name = "FILE")]
    pub tls_client_cert: Option<PathBuf>,

    /// Private key of that certificate, as PEM
    #[arg(long, env = "MILEPOST_TLS_CLIENT_KEY", value_name = "FILE")]
    pub tls_client_key: Option<PathBuf>,
}

/// Who may have an account, and what passwords cost.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Users")]
pub struct AuthConfig {
    /// Whether strangers may sign up; auto: only while the server listens on loopback
    #[arg(long, env = "MILEPOST_SIGN_UP", value_enum, default_value_t, value_name = "WHO")]
    pub sign_up: SignUp,

    /// How long a session lives, in seconds; not extended by use
    #[arg(long, env = "MILEPOST_SESSION_LIFETIME_S", default_value_t = 12 * 60 * 60, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub session_lifetime_s: u64,

    /// What hashing a password costs.
    #[command(flatten)]
    pub bcrypt: BcryptConfig,
}

/// What hashing a password costs.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Users")]
pub struct BcryptConfig {
    /// bcrypt's cost: each step doubles the work of a log-in. After it was lowered, users with an older hash are told by the time of a refusal, until they log in
    #[arg(long, env = "MILEPOST_BCRYPT_COST", default_value_t = 12, value_name = "COST",
          value_parser = clap::value_parser!(u32).range(4..=31))]
    pub bcrypt_cost: u32,

    /// Most passwords that are hashed at once [default: half of the processors]
    #[arg(long, env = "MILEPOST_BCRYPT_PARALLEL", value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub bcrypt_parallel: Option<u32>,
}

/// Where metrics are served and traces are sent; nowhere by default.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Monitoring")]
pub struct MonitoringConfig {
    /// Address on which Prometheus finds /metrics, over HTTP without encryption or credentials; off by default
    #[arg(long, env = "MILEPOST_METRICS_LISTEN", value_name = "IP:PORT")]
    pub metrics_listen: Option<SocketAddr>,

    /// Serve metrics beyond loopback, to whoever reaches that address
    #[arg(long, env = "MILEPOST_INSECURE_METRICS_LISTEN")]
    pub insecure_metrics_listen: bool,

    /// Collector that is sent traces by OTLP over gRPC, as http://HOST:PORT; off by default [env also:
    /// OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT]
    #[arg(long, env = "MILEPOST_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,

    /// Share of the calls that are traced, 0 to 1, of those whose callers did not decide it
    #[arg(long, env = "MILEPOST_TRACE_SHARE", default_value_t = 1.0, value_name = "SHARE", value_parser = share)]
    pub trace_share: f64,
}

/// An IPv4 address that is written as one of IPv6 is that of IPv4.
fn address(text: &str) -> Result<IpAddr, AddrParseError> {
    text.parse().map(|address: IpAddr| address.to_canonical())
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "not a number from 0 to 1".to_owned())
}

/// What the log on stderr looks like.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Log")]
pub struct TelemetryConfig {
    /// How log lines are written; auto: text on a terminal, otherwise JSON
    #[arg(
        long,
        env = "MILEPOST_LOG_FORMAT",
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        global = true
    )]
    pub log_format: LogFormat,

    /// What is logged: error, warn, info, debug or trace, also by target, such as
    /// info,milepost::server=warn [default: info to serve, warn or error for the other commands]
    #[arg(long, env = "MILEPOST_LOG_LEVEL", value_name = "FILTER", global = true)]
    pub log_level: Option<String>,
}

/// A database URL, which may hold a password and so is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// The URL itself, for those who connect.
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

/// Levels of Postgres's `synchronous_commit` at which nothing acknowledged is
/// lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum SynchronousCommit {
    /// On this server's disk, and on that of synchronous standbys if it has any
    #[default]
    On,
    /// The same, but only written out, not flushed, by the standbys
    RemoteWrite,
    /// Also applied by the standbys
    RemoteApply,
}

impl SynchronousCommit {
    /// As Postgres spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::RemoteWrite => "remote_write",
            Self::RemoteApply => "remote_apply",
        }
    }
}

/// Whether strangers may sign up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SignUp {
    /// Anybody may
    Open,
    /// Only the operator makes users
    Closed,
    /// Open while the server listens on loopback
    #[default]
    Auto,
}

impl SignUp {
    /// Whether sign-up is open on a server that listens there.
    pub fn is_open(self, listen: SocketAddr) -> bool {
        match self {
            Self::Open => true,
            Self::Closed => false,
            Self::Auto => listen.ip().is_loopback(),
        }
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, otherwise JSON
    #[default]
    Auto,
    /// For people
    Text,
    /// One object a line
    Json,
}
