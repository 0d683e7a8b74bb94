//! gRPC, HTTP/2 and HTTP/1: what is on the wire, whatever the method.

mod arbitrary;
mod compression;
mod connect;
mod errors;
mod http1;
mod http2;
mod protos;
mod reflection;
mod shared_connections;

/// A server with these settings notices soon that a peer is gone. A user may have one stream,
/// so that another one shows that the first no longer counts.
const SHORT_KEEPALIVE: [(&str, &str); 3] = [
    ("MILEPOST_KEEPALIVE_INTERVAL_S", "1"),
    ("MILEPOST_KEEPALIVE_TIMEOUT_S", "1"),
    ("MILEPOST_STREAMS_PER_USER", "1"),
];
