//! What `proto/` generates for the server: its messages and services. Those of clients
//! are in the package `milepost-client`.

#![allow(
    missing_docs,
    unreachable_pub,
    rustdoc::all,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::wildcard_enum_match_arm,
    clippy::needless_pass_by_value,
    clippy::too_many_lines,
    reason = "generated code"
)]

mod watched_events;

pub(crate) use self::watched_events::EVENTS_FIELD;
pub use self::watched_events::WatchedEvents;

tonic::include_proto!("milepost.v1");

/// The encoded descriptor set of everything above, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptors");
