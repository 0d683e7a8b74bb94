//! Rows, their queries, and who may see them. Knows neither tonic nor
//! protobuf; a tenant's data is opened only by what [`caller`] hands out.

pub mod caller;
pub mod event;
pub mod job;
pub mod job_configuration;
mod pg_enum;
pub mod version;
