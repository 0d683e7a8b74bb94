//! The limits that are constants. Limits that are settings are in
//! [`crate::config`].

use std::time::Duration;

/// Largest message that a server reads, in bytes. Also the largest page or watch
/// message that it sends, unless a single item is larger.
pub const MESSAGE_BYTES: usize = 1024 * 1024;
/// What a smaller message counts as among its user's bytes in flight, since it may take as
/// much memory once it is decoded.
pub const MESSAGE_CHARGE_BYTES: usize = 16 * 1024;
/// Largest answer of a unary call that does not count among its user's bytes in flight while
/// it is sent; of a larger one, what is beyond it counts.
pub const ANSWER_BYTES: usize = 64 * 1024;
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
/// Most kinds in a filter of events: each kind once.
pub const EVENT_KINDS: usize = 8;
/// Highest percent of a step under way.
pub const STEP_PERCENT: u8 = 99;
/// Shortest and longest time that a job may allow its provider to be silent.
pub const MAX_SILENCE: (Duration, Duration) =
    (Duration::from_secs(10), Duration::from_secs(30 * 24 * 60 * 60));
/// Most statuses in a filter of jobs: each status once.
pub const JOB_STATUSES: usize = 6;
/// Most labels of a job, and of a filter.
pub const JOB_LABELS: usize = 16;
/// Longest key of a label, in Unicode scalar values.
pub const LABEL_KEY_CHARS: usize = 64;
/// Shortest text that jobs are searched by, in Unicode scalar values.
pub const SEARCH_TEXT_CHARS: usize = 3;
/// Most scopes in a request for an API key: each scope once.
pub const API_KEY_SCOPES: usize = 3;
/// Most paths of an update mask. Two are valid; the others are reported as violations.
pub const UPDATE_MASK_PATHS: usize = 64;
/// Shortest password, in bytes.
pub const PASSWORD_MIN_BYTES: usize = 8;
/// Longest password, in bytes: bcrypt reads 72 bytes, including a closing NUL.
pub const PASSWORD_MAX_BYTES: usize = 71;
/// Longest wait for a permit to hash or verify a password.
pub const PASSWORD_WAIT: Duration = Duration::from_secs(5);
/// Page size of a request that gives none.
pub const PAGE_DEFAULT: i64 = 50;
/// Largest page size; a larger one in a request is reduced to it.
pub const PAGE_MAX: i64 = 500;
/// Longest page token or resume token that is decoded, in bytes.
pub const TOKEN_BYTES: usize = 2048;
/// Largest size of all details of an error together, in bytes of the base64 in which
/// they travel. nginx, with its default buffers, answers 502 instead if the headers of an
/// error take more than 4 KiB; the rest of them is for the message and for HTTP/2.
pub const ERROR_DETAILS_BYTES: usize = 3 * 1024;
/// Longest value that an error quotes, in Unicode scalar values.
pub const ERROR_QUOTE_CHARS: usize = 64;
/// Heartbeat interval of a watch: shortest, default, longest.
pub const HEARTBEAT: (Duration, Duration, Duration) =
    (Duration::from_secs(5), Duration::from_secs(15), Duration::from_secs(60));
/// How long an API key stays valid after its rotation: shortest, default, longest.
pub const KEY_OVERLAP: (Duration, Duration, Duration) =
    (Duration::ZERO, Duration::from_secs(60 * 60), Duration::from_secs(30 * 24 * 60 * 60));
/// Lifetime of a watch token: shortest, default, longest.
pub const WATCH_TOKEN_LIFETIME: (Duration, Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(60 * 60), Duration::from_secs(30 * 24 * 60 * 60));
/// Most bytes of a request that wait until the server reads them: the flow-control window of
/// a stream. The window of a connection has room for all of its streams, so that a stream
/// that the server does not read, as a publish stream whose answers its client does not take,
/// holds up no other user's.
pub const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// Most streams of a connection that the client has reset before the server accepted
/// them. With one more the connection is closed, because such streams only cost work. A
/// proxy that loses a client resets all streams of this client at once, which must not
/// close the connection that others share: h2's own default of 20 would.
pub const PENDING_RESET_STREAMS: usize = 1000;
/// Most streams of a connection, in all its time, that the server has reset because of an
/// error of HTTP/2. With one more the connection is closed: each costs memory until the
/// client has taken the reset. This is hyper's own default. A user behind a proxy causes
/// none by what the calls contain; but h2 forgets a stream that was reset when more than 50
/// are reset within a second, and takes what the proxy sent of it meanwhile for an error.
pub const FAULTY_STREAMS: usize = 1024;
/// Longest time that a credential may go without confirmation by the database. After
/// it nothing is accepted or sent under the credential until it is confirmed.
pub const CREDENTIAL_CONFIRMED_WITHIN: Duration = Duration::from_secs(5);
/// Most open connections of a server; one more is closed.
pub const CONNECTIONS: usize = 10_000;
/// Longest time for the TLS handshake, after it for the HTTP/2 preface, and for the head of
/// an HTTP/1.1 request from its first byte on.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// Longest time that an HTTP/1.1 connection is idle between two requests.
pub const IDLE: Duration = Duration::from_secs(60);
/// Most HTTP/1.1 connections of one client address (for IPv6, of one /64 network); one more is
/// closed. A client needs one for each watch.
pub const HTTP1_CONNECTIONS_PER_ADDRESS: usize = 1000;
/// Most TLS handshakes under way at once; one more aborts the oldest.
pub const HANDSHAKES: usize = 1000;
/// Most sign-ups and log-ins under way, most open streams of reflection and health, and
/// most secret look-ups under way, each counted by itself. There are as many as
/// connections, so that each connection may have one.
pub const UNAUTHENTICATED_CALLS: usize = CONNECTIONS;
/// Most bytes that a call without a credential may send.
pub const UNAUTHENTICATED_CALL_BYTES: usize = 64 * 1024;
/// Most credentials in the cache of one process.
pub const CREDENTIALS: usize = 65_536;
/// Most bytes of descriptors that one stream of reflection sends: four times as many as a
/// call without a credential may send. All descriptors have 76 kB.
pub const REFLECTION_STREAM_BYTES: usize = 4 * UNAUTHENTICATED_CALL_BYTES;
/// Most bytes of descriptors that reflection sends to one caller at once. A call of
/// grpcurl reads some 20 kB of them, so that a script can make a hundred calls.
pub const REFLECTION_BYTES: usize = 2 * 1024 * 1024;
/// How many of [`REFLECTION_BYTES`] come back in each second.
pub const REFLECTION_BYTES_PER_SECOND: usize = 128 * 1024;
/// Largest request of reflection, in bytes. The answer repeats the request, and an error
/// quotes the name in it, which must fit into headers.
pub const REFLECTION_REQUEST_BYTES: usize = 1024;
