//! Tests of the checks of what everybody is promised beside the hostile tenant.

use milepost_client::pb::EventKind;

use super::{OTHER_JOB, at, attempt, batch, new_event, violated};
use crate::{
    checker::Guarantee,
    history::{FailedCall, FaultWindow, History, MemoryPeak, Outcome, UnknownReason},
    hostile::{Answers, Load},
};

const NOTHING: [Guarantee; 0] = [];

fn fault(history: &mut History, from_s: u64, to_s: u64) {
    let window = FaultWindow { from: at(from_s), to: at(to_s), affects: [true, false] };
    history.fault_windows.push(window);
}

#[test]
fn a_call_may_fail_only_while_a_fault_affects_the_server() {
    let fail = |history: &mut History| {
        history.failed_calls.push(FailedCall {
            replica: 0,
            method: "GetJob",
            sent_at: at(100),
            ended_at: at(103),
            reason: UnknownReason::Abandoned,
        });
    };
    assert_eq!(violated(fail), [Guarantee::InTime]);
    let excused = violated(|history| {
        fail(history);
        fault(history, 102, 102);
    });
    assert_eq!(excused, NOTHING);
}

#[test]
fn an_append_may_wait_long_only_while_a_fault_affects_the_server() {
    let wait = |history: &mut History, until_s: u64| {
        let attempt = attempt(100, until_s, Outcome::Unknown(UnknownReason::Abandoned));
        history.batches.push(batch(OTHER_JOB, vec![new_event("z", EventKind::Info, "")], vec![attempt]));
    };
    assert_eq!(violated(|history| wait(history, 101)), NOTHING);
    assert_eq!(violated(|history| wait(history, 106)), [Guarantee::InTime]);
    let excused = violated(|history| {
        wait(history, 106);
        fault(history, 99, 100);
    });
    assert_eq!(excused, NOTHING);
}

#[test]
fn the_memory_of_each_process_is_bounded() {
    let peaks = |bytes: [usize; 2]| {
        violated(|history| {
            history.memory_bound_bytes = 1_000;
            history.memory_peaks = bytes.map(|bytes| MemoryPeak { replica: 1, bytes }).into();
        })
    };
    assert_eq!(peaks([1, 1_000]), NOTHING);
    assert_eq!(peaks([1_001, 1]), [Guarantee::Contract]);
}

#[test]
fn each_load_of_the_hostile_tenant_is_answered() {
    let with = |answers| violated(|history| _ = history.hostile.insert(Load::Replays, answers));
    assert_eq!(with(Answers { refused: 1, ..Answers::default() }), NOTHING);
    let never = Answers { limited: 9, unanswered: 9, ..Answers::default() };
    assert_eq!(with(never), [Guarantee::Contract]);
}
