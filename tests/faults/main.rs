//! The fault campaign: two replicas on one Postgres serve writers, readers and
//! watchers, and a hostile tenant, while faults are injected. Afterwards a checker compares all
//! requests, answers and received events with the guarantees.
//!
//! `cargo test --test faults` is the short form. `MILEPOST_FAULTS_SECONDS` sets
//! for how long faults are injected. `MILEPOST_FAULTS_SEED` repeats the random
//! choices of a run, but not the timing of the machine. `MILEPOST_FAULTS_ONLY` leaves out
//! the faults whose name, as the report has it, does not contain this text.
//! `MILEPOST_FAULTS_HOSTILE=1` has the hostile tenant take part, which it does by itself only
//! with servers of a release build. `MILEPOST_FAULTS_STRICT=1` has the run fail, too, if
//! something took too long; a run of more than five minutes does so by itself.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    clippy::too_many_lines,
    unreachable_pub,
    reason = "in a test a panic is a failure, and the other lints serve code that is published"
)]

mod campaign;
mod checker;
mod clients;
mod context;
mod database_faults;
mod event_interner;
mod failovers;
mod fault;
mod fault_injector;
mod history;
mod hostile;
mod memory;
mod postgres;
mod probes;
mod publishers;
mod readers;
mod replica;
mod report;
mod revokers;
mod watchers;
mod writers;

use std::{env, str::FromStr, time::Duration};

use milepost_testing::print_line;

/// Default for how long faults are injected, in seconds. A run takes longer if
/// some fault has not been injected by then.
const SECONDS: u64 = 45;
/// A run is aborted after twice the time for which faults are injected, plus this.
const SLACK: Duration = Duration::from_secs(1_200);

fn number_from_env<T: FromStr>(name: &str) -> Option<T> {
    let value = env::var(name).ok()?;
    let Ok(value) = value.parse() else { panic!("{name} must be a whole number from 0, and is {value:?}") };
    Some(value)
}

/// Exits this process once `limit` has passed. Its child processes are then
/// killed by the watchdog of the temporary directory.
fn exit_after(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        print_line(format!("the campaign did not finish within {limit:?}"));
        std::process::exit(1);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn guarantees_hold_while_faults_are_injected() {
    let seed = number_from_env("MILEPOST_FAULTS_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let seconds = number_from_env("MILEPOST_FAULTS_SECONDS").unwrap_or(SECONDS);
    print_line(format!("\nMILEPOST_FAULTS_SEED={seed} MILEPOST_FAULTS_SECONDS={seconds}"));
    exit_after(Duration::from_secs(seconds * 2) + SLACK);
    let strict =
        number_from_env("MILEPOST_FAULTS_STRICT").unwrap_or(u8::from(seconds > campaign::LONG_RUN_S));
    let result = campaign::run(seed, seconds, strict > 0).await;
    print_line(report::report(&result));
    assert!(!result.has_failed(), "guarantees were violated, or a strict run was slow: see the report above");
}
