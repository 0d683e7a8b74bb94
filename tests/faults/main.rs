//! The fault campaign: two servers on one Postgres under load, while what can
//! fail does; then everything that was sent, told and seen is held against the
//! guarantees.
//!
//! `cargo test --test faults` is the short form. `MILEPOST_FAULTS_SECONDS` sets
//! how long things fail, `MILEPOST_FAULTS_SEED` repeats a run's choices, though
//! not what the machine makes of them.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    clippy::too_many_lines,
    unreachable_pub,
    reason = "a test that panics has failed, as it should; the rest would only be in the way"
)]

mod campaign;
mod checker;
mod cluster;
mod history;
mod nemesis;
#[path = "../it/support/port.rs"]
mod port;
mod probes;
mod proxy;
mod publishers;
mod readers;
mod replica;
mod report;
#[path = "../it/support/temporary.rs"]
mod temporary;
mod watchers;
mod world;
mod writers;

use std::{env, io::Write as _, str::FromStr, time::Duration};

/// How long things fail unless told otherwise; longer if not everything has
/// failed once by then.
const SECONDS: u64 = 45;
/// What all else may take, beside what fails: twice as much in a long run.
const SLACK: Duration = Duration::from_secs(240);

/// A line past the test harness, which would keep it to itself.
fn say(line: impl AsRef<str>) {
    // Whether anybody reads it is their affair.
    let _ = writeln!(std::io::stdout(), "{}", line.as_ref());
}

fn variable<T: FromStr>(name: &str) -> Option<T> {
    let value = env::var(name).ok()?;
    let Ok(value) = value.parse() else { panic!("{name} is no number: {value}") };
    Some(value)
}

/// Ends this process, and with it all that it started, if it takes too long.
fn limit_time(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        say(format!("the campaign took longer than {limit:?}"));
        std::process::exit(1);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guarantees_hold_whatever_fails() {
    let seed = variable("MILEPOST_FAULTS_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let seconds = variable("MILEPOST_FAULTS_SECONDS").unwrap_or(SECONDS);
    say(format!("\nMILEPOST_FAULTS_SEED={seed} MILEPOST_FAULTS_SECONDS={seconds}"));
    limit_time(Duration::from_secs(seconds * 2) + SLACK);
    let outcome = campaign::run(seed, seconds).await;
    say(report::report(&outcome));
    assert!(outcome.violations.is_empty() && outcome.late().is_empty(), "see above");
}
