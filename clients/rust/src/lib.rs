#![doc = include_str!("../README.md")]

mod client;
mod connection;
pub mod pb;

pub use prost_types;
pub use tokio_rustls::rustls;
pub use tonic;

pub use self::client::{Bearer, Client, ClientError, Service, Watch, is_transient, server_url};
