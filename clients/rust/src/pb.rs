//! The messages of `milepost.v1` and a client for each service, as `proto/` has them.
//! Their comments are those of the proto files.

#![allow(
    missing_docs,
    rustdoc::all,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

include!("generated/milepost.v1.rs");
