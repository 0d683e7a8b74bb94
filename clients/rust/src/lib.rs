#![doc = include_str!("../README.md")]

mod client;
mod connection;
mod error;
pub mod pb;
mod publisher;
mod retry;
mod watch;

pub use prost_types;
pub use tokio_rustls::rustls;
pub use tonic;
pub use tonic_types;

pub use self::{
    client::{Bearer, Client, ClientError, Service, server_url},
    error::{CallError, is_transient},
    publisher::{
        PublishError, Publisher, PublisherBuilder, Refusal, Refused, Spool, SpoolError, SpoolSettings,
    },
    watch::Watch,
};
