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
