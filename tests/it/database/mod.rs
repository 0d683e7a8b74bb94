//! milepost and its Postgres: outages, standbys, sessions, schema and plans.

mod first_connection;
mod outages;
pub mod plans;
mod pool;
mod schema;
mod sessions;
mod synchronous;
mod tls;
