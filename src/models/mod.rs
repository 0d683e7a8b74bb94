//! Rows, their queries, and who may see them. Knows neither tonic nor
//! protobuf; a tenant's data is opened only by what [`caller`] hands out.

pub mod api_key;
pub mod caller;
pub mod event;
pub mod job;
pub mod job_configuration;
mod pg_enum;
pub mod session;
pub mod user;
pub mod version;
