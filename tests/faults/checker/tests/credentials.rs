//! Tests of the checks of credentials.

use std::collections::BTreeMap;

use super::{assert_detects, at, history, violated};
use crate::{
    checker::{Guarantee, check},
    history::{
        CredentialEnd, CredentialRecord, CredentialStream, CredentialStreamEnd, CredentialUse, FaultWindow,
        History, SetBack, UseOutcome,
    },
};

const fn used(replica: usize, sent_s: u64, outcome: UseOutcome) -> CredentialUse {
    let (sent_at, ended_at) =
        (std::time::Duration::from_secs(sent_s), std::time::Duration::from_secs(sent_s));
    CredentialUse { replica, sent_at, ended_at, outcome }
}

fn stream(replica: usize, last_s: u64, end: Option<(u64, CredentialStreamEnd)>) -> CredentialStream {
    let end = end.map(|(seconds, end)| (at(seconds), end));
    CredentialStream { replica, opened_at: at(3), last_message_at: Some(at(last_s)), end }
}

/// A credential that server 0 ended at 20 s, and server 1 refused some seconds later.
fn record() -> CredentialRecord {
    use UseOutcome::{Accepted, Refused, Unknown};
    CredentialRecord {
        name: "a session".to_owned(),
        created_from: at(1),
        created_by: at(2),
        end: Some(CredentialEnd { sent_at: at(19), acknowledged_at: at(20), by: Some(0) }),
        uses: vec![
            used(0, 3, Accepted),
            used(1, 3, Accepted),
            used(0, 21, Refused),
            used(1, 21, Accepted),
            used(1, 25, Accepted),
            used(1, 26, Unknown),
            used(1, 27, Refused),
        ],
        streams: vec![
            stream(0, 19, Some((20, CredentialStreamEnd::Told))),
            stream(1, 24, Some((25, CredentialStreamEnd::Told))),
            stream(1, 10, Some((11, CredentialStreamEnd::Broken))),
        ],
    }
}

fn with(change: impl FnOnce(&mut CredentialRecord)) -> impl FnOnce(&mut History) {
    |history| {
        let mut record = record();
        change(&mut record);
        history.credentials.push(record);
    }
}

#[test]
fn a_credential_that_ends_everywhere_within_5_s_violates_nothing() {
    let mut history = history();
    with(|_| {})(&mut history);
    let violations = check(&history);
    assert!(violations.is_empty(), "{violations:#?}");
}

#[test]
fn a_call_accepted_after_the_credential_ended_is_detected() {
    for (replica, sent_s) in [(0, 21), (1, 26)] {
        let accepted = used(replica, sent_s, UseOutcome::Accepted);
        assert_detects(Guarantee::Confined, with(|record| record.uses.push(accepted)));
    }
    // Which server ended it is not known.
    let unknown = |record: &mut CredentialRecord| {
        record.end = Some(CredentialEnd { by: None, ..record.end.expect("it was ended") });
        record.uses.remove(2);
    };
    for (sent_s, expected) in [(25, vec![]), (26, vec![Guarantee::Confined])] {
        let detected = violated(with(|record| {
            unknown(record);
            record.uses.push(used(0, sent_s, UseOutcome::Accepted));
        }));
        assert_eq!(detected, expected, "{sent_s}");
    }
}

#[test]
fn a_call_accepted_after_another_was_refused_is_detected() {
    assert_detects(Guarantee::Confined, with(|record| record.uses[3].outcome = UseOutcome::Refused));
}

#[test]
fn a_refusal_of_a_valid_credential_is_detected() {
    assert_detects(Guarantee::Confined, with(|record| record.uses[0].outcome = UseOutcome::Refused));
    assert_detects(
        Guarantee::Confined,
        with(|record| record.streams[2].end = Some((at(11), CredentialStreamEnd::Told))),
    );
    assert_detects(
        Guarantee::Confined,
        with(|record| {
            record.end = None;
            record.uses.truncate(3);
            record.streams.clear();
        }),
    );
}

#[test]
fn an_end_that_was_lost_may_be_undone_on_a_server_that_has_not_refused() {
    let lost = |history: &mut History, lost_from_s: u64| {
        let (lost_from, until, noticed_at) = (at(lost_from_s), at(22), at(23));
        history.set_backs.push(SetBack { lost_from, until, noticed_at, logs: BTreeMap::new() });
    };
    let undone = |record: &mut CredentialRecord| {
        record.uses.retain(|used| used.replica == 0 || used.outcome == UseOutcome::Accepted);
        record.uses.push(used(1, 40, UseOutcome::Accepted));
        record.streams.push(stream(1, 40, None));
    };
    // The commit was acknowledged at 20 s.
    for (lost_from_s, expected) in [(20, vec![]), (21, vec![Guarantee::Confined])] {
        let detected = violated(|history| {
            lost(history, lost_from_s);
            with(undone)(history);
        });
        assert_eq!(detected, expected, "{lost_from_s}");
    }
    // Server 0 has refused it, and has not forgotten that unless it was restarted.
    for (restarted_s, expected) in [(30, vec![]), (10, vec![Guarantee::Confined])] {
        let detected = violated(|history| {
            lost(history, 20);
            history.restarts[0].push(at(restarted_s));
            with(|record| {
                undone(record);
                record.uses.push(used(0, 40, UseOutcome::Accepted));
            })(history);
        });
        assert_eq!(detected, expected, "{restarted_s}");
    }
    // A credential whose creation was lost is refused from then on.
    let refused = |history: &mut History| {
        with(|record| {
            (record.created_from, record.created_by, record.end) = (at(20), at(21), None);
            record.uses = vec![used(0, 21, UseOutcome::Accepted), used(0, 24, UseOutcome::Refused)];
            record.streams.clear();
        })(history);
    };
    assert_detects(Guarantee::Confined, refused);
    let detected = violated(|history| {
        lost(history, 20);
        refused(history);
    });
    assert_eq!(detected, []);
}

#[test]
fn a_watch_that_does_not_end_with_its_credential_is_detected() {
    let told = |seconds| Some((seconds, CredentialStreamEnd::Told));
    let other = Some((20, CredentialStreamEnd::Other("OK".to_owned())));
    // An end for another reason, a message, no end in time, no end at all.
    let open = [
        (Guarantee::Confined, stream(0, 19, other)),
        (Guarantee::InTime, stream(0, 24, told(24))),
        (Guarantee::InTime, stream(1, 29, told(29))),
        (Guarantee::InTime, stream(0, 19, told(24))),
        (Guarantee::InTime, stream(1, 20, None)),
    ];
    for (guarantee, stream) in open {
        assert_detects(guarantee, with(|record| record.streams.push(stream)));
    }
    // A server that could not ask the database sends nothing, and ends the watch later.
    for (last_s, expected) in [(20, vec![]), (29, vec![Guarantee::InTime])] {
        let detected = violated(|history| {
            with(|record| record.streams.push(stream(1, last_s, told(40))))(history);
            let window = FaultWindow { from: at(18), to: at(40), affects: [false, true] };
            history.fault_windows.push(window);
        });
        assert_eq!(detected, expected, "{last_s}");
    }
}
