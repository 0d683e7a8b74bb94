//! The limits that are constants. Those that are settings are in
//! [`crate::config`].

use std::time::Duration;

/// Largest message that is read, and largest page or watch message that is
/// sent unless a single item is larger; bytes.
pub const MESSAGE_BYTES: usize = 1024 * 1024;
/// Longest text, in Unicode scalar values.
pub const TEXT_CHARS: usize = 256;
/// Most metadata names of one event.
pub const METADATA_NAMES: usize = 64;
/// Largest metadata of one event, as an encoded `google.protobuf.Struct`.
pub const METADATA_BYTES: usize = 16 * 1024;
/// Most steps of a configuration.
pub const CONFIGURATION_STEPS: usize = 200;
/// Most metadata configurations of a step.
pub const STEP_METADATA: usize = 64;
/// Largest weight of a step.
pub const STEP_POINTS: i64 = 1_000_000;
/// Most events of a batch.
pub const BATCH_EVENTS: usize = 500;
/// Shortest password, in bytes.
pub const PASSWORD_MIN_BYTES: usize = 8;
/// Longest password, in bytes: bcrypt reads 72 and counts a closing NUL.
pub const PASSWORD_MAX_BYTES: usize = 71;
/// Longest wait for a turn to hash or verify a password.
pub const PASSWORD_WAIT: Duration = Duration::from_secs(5);
/// Page size where none is asked for.
pub const PAGE_DEFAULT: i64 = 50;
/// Largest page; more is cut to it.
pub const PAGE_MAX: i64 = 500;
/// Longest page or resume token that is looked at, in bytes.
pub const TOKEN_BYTES: usize = 1024;
/// Encoded size of all details of an error together.
pub const ERROR_DETAILS_BYTES: usize = 4 * 1024;
/// Longest value that an error quotes, in Unicode scalar values.
pub const ERROR_QUOTE_CHARS: usize = 64;
/// Heartbeat interval of a watch: shortest, default, longest.
pub const HEARTBEAT: (Duration, Duration, Duration) =
    (Duration::from_secs(5), Duration::from_secs(15), Duration::from_secs(60));
/// How long an API key stays good after it was rotated: shortest, default,
/// longest.
pub const KEY_OVERLAP: (Duration, Duration, Duration) =
    (Duration::ZERO, Duration::from_secs(60 * 60), Duration::from_secs(30 * 24 * 60 * 60));
/// How long a watch token is good: shortest, default, longest.
pub const WATCH_TOKEN_LIFETIME: (Duration, Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(60 * 60), Duration::from_secs(30 * 24 * 60 * 60));
/// Streams of a connection that the client reset before they were looked at; with
/// one more the connection is closed, since somebody makes us work for nothing.
/// h2's own default.
pub const PENDING_RESET_STREAMS: usize = 20;
/// Streams of a connection that we reset for a fault of the client's; with one
/// more the connection is closed. hyper's own default, which tonic would remove.
pub const FAULTY_STREAMS: usize = 1024;
/// How long a credential may go unconfirmed by the database before nothing is
/// sent or accepted under it.
pub const CREDENTIAL_CONFIRMED_WITHIN: Duration = Duration::from_secs(5);
/// Most connections at once; one more is closed.
pub const CONNECTIONS: usize = 10_000;
/// Longest that a client may take for the handshake of TLS, and then to say that
/// it speaks HTTP/2.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// Most handshakes of TLS under way at once; one more ends the oldest.
pub const HANDSHAKES: usize = 1000;
/// Most sign-ups and log-ins at once, most streams of reflection and health, and most
/// calls whose secret is looked up: as many as connections, each of which may have one.
pub const STRANGERS: usize = CONNECTIONS;
/// Most bytes that a call may send that needs no credential.
pub const STRANGER_BYTES: usize = 64 * 1024;
/// Most credentials that one process remembers.
pub const CREDENTIALS: usize = 65_536;
