//! Rows, their queries, and who may see them. Knows neither tonic nor
//! protobuf; a tenant's data is opened only by what [`caller`] hands out.

pub mod caller;
mod pg_enum;
