//! Users, their credentials and log-ins, and who may see what.

pub mod access;
mod api_keys;
mod audit;
mod auth;
mod emails;
mod ended_credentials;
mod log_in;
mod not_found;
mod throttle;
mod watch_tokens;
