//! milepost and its Postgres: outages, standbys, sessions, schema and plans.

mod outages;
pub mod plans;
mod pool;
mod schema;
mod sessions;
mod starts;
mod synchronous;
mod tls;
