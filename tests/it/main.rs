//! Integration tests: a real server on a real Postgres. One test binary, one
//! folder for each subject, one database for each test.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    clippy::too_many_lines,
    unreachable_pub,
    reason = "a test fails by a panic, and the other lints do not help in test code"
)]

use milepost_testing as support;

mod accounts;
mod clients;
mod database;
mod guarantees;
mod jobs;
mod limits;
mod log;
mod operations;
mod protocol;
