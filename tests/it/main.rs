//! Integration tests: a real server on a real Postgres. One test binary, one
//! file for each subject, one database for each test.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    clippy::too_many_lines,
    unreachable_pub,
    reason = "a test fails by a panic, and the other lints do not help in test code"
)]

use milepost_testing as support;

mod access;
mod arbitrary;
mod audit;
mod auth;
mod backup;
mod cli;
mod clocks;
mod compression;
mod configurations;
mod connect;
mod database_tls;
mod documentation;
mod drain;
mod edges;
mod emails;
mod embedded;
mod ended_credentials;
mod errors;
mod fairness;
mod floors;
mod guarantees;
mod histories;
mod http1;
mod http2;
mod idempotency;
mod in_flight;
mod interop;
mod jobs;
mod key_expiry;
mod limits;
mod log_in;
mod memory;
mod metrics;
mod not_found;
mod operations;
mod outages;
mod past;
mod plans;
mod poolers;
mod progress;
mod protos;
mod publish;
mod quotas;
mod reflection;
mod retention;
mod rolling;
mod schema;
mod sessions;
mod settings;
mod shared_connections;
mod shares;
mod silence;
mod starts;
mod synchronous;
mod tail;
mod throttle;
mod tls;
mod traces;
mod upgrades;
mod usage;
mod validation;
mod watch;
mod watch_tokens;
