//! A history in which all is well, and what the checker says once one thing in
//! it is broken.

use std::{sync::Arc, time::Duration};

use milepost::pb::{self, EventKind, JobStatus};
use tonic::Code;

use super::{Guarantee, check};
use crate::history::{
    Attempt, Batch, Body, Chain, Close, Closed, Disturbance, End, Glance, History, Job, Lost, Message,
    Moment, Only, Outcome, Read, Refusal, Scope, Start, Stream,
};

const JOB: usize = 0;
const OTHER: usize = 1;

fn at(seconds: u64) -> Moment {
    Duration::from_secs(seconds)
}

fn new_event(id: &str, kind: EventKind, step_tag: &str) -> pb::NewEvent {
    let occurred_at = Some(prost_types::Timestamp { seconds: 7, nanos: 1_999 });
    let (id, step_tag) = (id.to_owned(), step_tag.to_owned());
    pb::NewEvent { id, kind: kind.into(), name: "name".to_owned(), step_tag, metadata: None, occurred_at }
}

/// As of itself: sequence, status, points done of four, percent.
type State = (i64, JobStatus, i64, i32);

fn progress((_, _, points_done, percent): State) -> Option<pb::Progress> {
    Some(pb::Progress { points_done, points_total: 4, percent })
}

fn stored(job: &str, sent: &pb::NewEvent, state: State) -> Arc<pb::Event> {
    Arc::new(pb::Event {
        id: sent.id.clone(),
        job_id: job.to_owned(),
        sequence: state.0,
        kind: sent.kind,
        name: sent.name.clone(),
        step_tag: sent.step_tag.clone(),
        occurred_at: sent.occurred_at.map(|at| prost_types::Timestamp { nanos: 1_000, ..at }),
        status: state.1.into(),
        progress: progress(state),
        ..Default::default()
    })
}

fn told(id: &str, existed: bool, state: State) -> pb::AppendedEvent {
    let (sequence, status, ..) = state;
    pb::AppendedEvent {
        id: id.to_owned(),
        sequence,
        existed,
        status: status.into(),
        progress: progress(state),
    }
}

fn attempt(sent: u64, over: u64, outcome: Outcome) -> Attempt {
    Attempt { replica: 0, sent: at(sent), over: at(over), outcome }
}

fn refused(code: Code, last_sequence: Option<i64>) -> Outcome {
    Outcome::Refused(Refusal { code, message: String::new(), last_sequence })
}

fn batch(job: usize, events: Vec<pb::NewEvent>, attempts: Vec<Attempt>) -> Batch {
    let writer = "a writer".to_owned();
    Batch { writer, job, expected: None, repeats: 0, events, attempts, order: None }
}

fn message(seconds: u64, body: Body) -> Message {
    Message { at: at(seconds), body }
}

fn state(state: State) -> Option<pb::JobState> {
    let (last_sequence, status, ..) = state;
    Some(pb::JobState { last_sequence, status: status.into(), progress: progress(state) })
}

/// A job that completes in five events, of which the first batch's answer was
/// lost; one that is closed in two; and those who watched.
fn history() -> History {
    use EventKind::{Complete, Error, Info, Step};
    let a = new_event("a", Step, "one");
    let b = new_event("b", Info, "");
    let c = new_event("c", Error, "");
    let d = new_event("d", Step, "two");
    let e = new_event("e", Complete, "");
    let f = new_event("f", Info, "");
    let g = new_event("g", EventKind::Close, "");
    let g = pb::NewEvent { name: "a reason".to_owned(), ..g };
    let film = [
        (1, JobStatus::Running, 1, 25),
        (2, JobStatus::Running, 1, 25),
        (3, JobStatus::Failed, 1, 25),
        (4, JobStatus::Running, 4, 99),
        (5, JobStatus::Complete, 4, 100),
    ];
    let other_film = [(1, JobStatus::Running, 0, 0), (2, JobStatus::Cancelled, 0, 0)];
    let log: Vec<_> = [&a, &b, &c, &d, &e]
        .into_iter()
        .zip(film)
        .map(|(event, state)| stored("job", event, state))
        .collect();
    let other_log: Vec<_> =
        [&f, &g].into_iter().zip(other_film).map(|(event, state)| stored("other", event, state)).collect();
    let lost = Outcome::Unknown(Lost::Broken("lost".to_owned()));
    let first = vec![told("a", true, film[0]), told("b", true, film[1])];
    let mut third = batch(
        JOB,
        vec![c.clone(), d.clone()],
        vec![attempt(6, 7, Outcome::Appended(vec![told("c", true, film[2]), told("d", false, film[3])]))],
    );
    third.repeats = 1;
    let mut stale =
        batch(JOB, vec![new_event("x", Info, "")], vec![attempt(4, 8, refused(Code::Aborted, Some(2)))]);
    stale.expected = Some(1);
    let mut second =
        batch(JOB, vec![c], vec![attempt(4, 5, Outcome::Appended(vec![told("c", false, film[2])]))]);
    second.expected = Some(2);
    let batches = vec![
        batch(JOB, vec![a, b], vec![attempt(1, 2, lost), attempt(3, 4, Outcome::Appended(first))]),
        second,
        third,
        stale,
        batch(JOB, vec![e], vec![attempt(8, 9, Outcome::Appended(vec![told("e", false, film[4])]))]),
        batch(
            JOB,
            vec![new_event("y", Info, "")],
            vec![attempt(10, 11, refused(Code::FailedPrecondition, None))],
        ),
        batch(OTHER, vec![f], vec![attempt(1, 2, Outcome::Appended(vec![told("f", false, other_film[0])]))]),
    ];
    let events = |events: &[Arc<pb::Event>]| Body::Events(events.to_vec());
    let stream = |start, opened, messages, end| Stream {
        replica: 0,
        start,
        opened: at(opened),
        messages,
        end,
        over: at(9),
    };
    let chain = |scope, streams| Chain {
        name: "a watcher".to_owned(),
        scope,
        only: Only::default(),
        prompt: true,
        kinds: Vec::new(),
        streams,
        whole: true,
    };
    let of_all = chain(
        Scope::OfProvider(0),
        vec![
            stream(
                Start::Beginning,
                5,
                vec![
                    message(
                        5,
                        events(&[log[0].clone(), other_log[0].clone(), log[1].clone(), log[2].clone()]),
                    ),
                    message(5, Body::CaughtUp(None)),
                    message(7, events(&log[3..4])),
                ],
                End::Left,
            ),
            stream(
                Start::After { stream: 0, messages: 2 },
                8,
                vec![
                    message(8, events(&log[3..4])),
                    message(8, Body::CaughtUp(None)),
                    message(9, events(&[log[4].clone(), other_log[1].clone()])),
                ],
                End::Left,
            ),
        ],
    );
    let of_job = chain(
        Scope::Job(JOB),
        vec![stream(
            Start::AfterSequence(1),
            5,
            vec![
                message(5, events(&log[1..3])),
                message(5, Body::CaughtUp(state(film[2]))),
                message(9, events(&log[3..])),
                message(9, Body::Ended(pb::WatchEndReason::JobClosed, state(film[4]))),
            ],
            End::Ok,
        )],
    );
    let job = |id: &str| Job { id: id.to_owned(), configuration: 0, provider: 0, customer: 0 };
    let found = |log: &[Arc<pb::Event>]| {
        let last = log.last().expect("an event");
        let closes = matches!(last.kind(), Complete | EventKind::Close);
        let closed_at = closes.then(prost_types::Timestamp::default);
        let (last_sequence, status, progress) = (last.sequence, last.status, last.progress);
        pb::Job { id: last.job_id.clone(), last_sequence, status, progress, closed_at, ..Default::default() }
    };
    let reads = (0..2).flat_map(|replica| {
        [(JOB, &log), (OTHER, &other_log)].map(|(job, log)| Read {
            replica,
            job,
            found: found(log),
            log: log.clone(),
        })
    });
    History {
        configurations: vec![vec![("one".to_owned(), 1), ("two".to_owned(), 3)]],
        jobs: vec![job("job"), job("other")],
        closes: vec![Close {
            job: OTHER,
            reason: "a reason".to_owned(),
            sent: at(8),
            over: at(9),
            outcome: Ok(Closed { last_sequence: 2, existed: false }),
        }],
        batches,
        chains: vec![of_all, of_job],
        glances: vec![Glance { replica: 1, sent: at(6), over: at(7), found: found(&log[..3]) }],
        reads: reads.collect(),
        disturbances: vec![Disturbance { from: at(0), to: at(3), touches: [true; 2] }],
        unexcused: Vec::new(),
    }
}

/// The guarantees that a history violates once it was broken.
fn found(break_it: impl FnOnce(&mut History)) -> Vec<Guarantee> {
    let mut history = history();
    break_it(&mut history);
    let mut found: Vec<Guarantee> =
        check(&history).into_iter().map(|violation| violation.guarantee).collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[track_caller]
fn assert_caught(guarantee: Guarantee, break_it: impl FnOnce(&mut History)) {
    let found = found(break_it);
    assert!(found.contains(&guarantee), "{guarantee} is violated, and what was found is {found:?}");
}

/// What the stored log of the first job looks like to everybody.
fn change_log(history: &mut History, change: impl Fn(&mut Vec<Arc<pb::Event>>)) {
    history.reads.iter_mut().filter(|read| read.job == JOB).for_each(|read| change(&mut read.log));
}

/// The events of a message of the watcher of all jobs.
fn seen(history: &mut History, stream: usize, message: usize) -> &mut Vec<Arc<pb::Event>> {
    match &mut history.chains[0].streams[stream].messages[message].body {
        Body::Events(events) => events,
        body => panic!("{body:?}"),
    }
}

#[test]
fn a_history_in_which_all_is_well_is_found_so() {
    let violations = check(&history());
    assert!(violations.is_empty(), "{violations:#?}");
}

#[test]
fn an_acknowledged_event_that_is_gone_is_caught() {
    assert_caught(Guarantee::Durable, |history| change_log(history, |log| _ = log.pop()));
}

#[test]
fn an_event_that_was_seen_and_is_not_stored_is_caught() {
    assert_caught(Guarantee::Durable, |history| {
        let phantom = pb::Event { id: "z".to_owned(), sequence: 6, ..(*seen(history, 0, 0)[0]).clone() };
        seen(history, 1, 2).push(Arc::new(phantom));
    });
}

#[test]
fn other_content_than_was_sent_is_caught() {
    assert_caught(Guarantee::Durable, |history| {
        history.batches[1].events[0].name = "another".to_owned();
    });
}

#[test]
fn another_sequence_than_was_acknowledged_is_caught() {
    assert_caught(Guarantee::Durable, |history| {
        let Outcome::Appended(told) = &mut history.batches[1].attempts[0].outcome else { panic!() };
        told[0].sequence = 4;
    });
}

#[test]
fn a_gap_in_the_numbers_is_caught() {
    assert_caught(Guarantee::Ordered, |history| {
        change_log(history, |log| {
            let last = log.last_mut().expect("an event");
            *last = Arc::new(pb::Event { sequence: 6, ..(**last).clone() });
        });
    });
}

#[test]
fn an_event_before_one_that_had_been_acknowledged_is_caught() {
    assert_caught(Guarantee::Ordered, |history| {
        history.batches[0].attempts = vec![attempt(10, 11, Outcome::Unknown(Lost::GaveUp))];
    });
}

#[test]
fn batches_of_a_stream_in_another_order_are_caught() {
    assert_caught(Guarantee::Ordered, |history| {
        (history.batches[0].order, history.batches[1].order) = (Some(1), Some(0));
    });
}

#[test]
fn an_event_that_is_stored_twice_is_caught() {
    assert_caught(Guarantee::Unique, |history| {
        change_log(history, |log| log.push(Arc::new(pb::Event { sequence: 6, ..(*log[0]).clone() })));
    });
}

#[test]
fn an_event_that_nobody_sent_is_caught() {
    assert_caught(Guarantee::Unique, |history| _ = history.batches.remove(0));
}

#[test]
fn a_refusal_of_what_is_stored_is_caught() {
    assert_caught(Guarantee::Unique, |history| {
        history.batches[4].attempts.push(attempt(10, 11, refused(Code::FailedPrecondition, None)));
    });
}

#[test]
fn a_replay_that_did_not_exist_is_caught() {
    assert_caught(Guarantee::Unique, |history| {
        let again = history.batches[1].attempts[0].clone();
        history.batches[1].attempts.push(again);
    });
}

#[test]
fn half_a_batch_is_caught() {
    assert_caught(Guarantee::Atomic, |history| {
        history.batches[4].events.push(new_event("w", EventKind::Info, ""));
    });
}

#[test]
fn a_stranger_within_a_batch_is_caught() {
    assert_caught(Guarantee::Atomic, |history| {
        history.batches.remove(2);
        history.batches[1].events[0].id = "b".to_owned();
        history.batches[0].events[1].id = "c".to_owned();
    });
}

#[test]
fn an_event_that_a_watcher_missed_is_caught() {
    assert_caught(Guarantee::Complete, |history| _ = seen(history, 0, 0).remove(0));
    assert_caught(Guarantee::Complete, |history| _ = seen(history, 0, 0).remove(1));
    assert_caught(Guarantee::Complete, |history| _ = seen(history, 1, 2).pop());
}

#[test]
fn an_event_that_a_watcher_saw_twice_is_caught() {
    assert_caught(Guarantee::Complete, |history| {
        let event = seen(history, 0, 0)[0].clone();
        seen(history, 0, 2).push(event);
    });
}

#[test]
fn events_out_of_order_are_caught() {
    assert_caught(Guarantee::Complete, |history| seen(history, 0, 0).swap(0, 2));
}

#[test]
fn caught_up_before_the_past_is_over_is_caught() {
    assert_caught(Guarantee::Complete, |history| {
        let event = seen(history, 0, 0).pop().expect("an event");
        history.chains[0].streams[0].opened = at(6);
        seen(history, 0, 2).insert(0, event);
    });
}

#[test]
fn an_event_after_caught_up_that_a_watcher_from_now_missed_is_caught() {
    let from_now = |history: &mut History| {
        let streams = &mut history.chains[0].streams;
        streams.truncate(1);
        streams[0].start = Start::Now;
        streams[0].messages.remove(0);
        streams[0].messages[1].body = Body::Events(history.reads[JOB].log[3..].to_vec());
        let other = history.reads[OTHER].log[1].clone();
        let Body::Events(events) = &mut streams[0].messages[1].body else { panic!() };
        events.push(other);
    };
    assert_eq!(found(from_now), []);
    assert_caught(Guarantee::Complete, |history| {
        from_now(history);
        seen(history, 0, 1).remove(1);
    });
    assert_caught(Guarantee::Complete, |history| {
        from_now(history);
        seen(history, 0, 1).remove(0);
    });
}

#[test]
fn a_stream_that_does_not_go_on_after_its_token_is_caught() {
    assert_caught(Guarantee::Resumable, |history| _ = seen(history, 1, 0).pop());
    assert_caught(Guarantee::Resumable, |history| {
        let refusal = Refusal { code: Code::OutOfRange, message: String::new(), last_sequence: None };
        history.chains[0].streams[1].end = End::Refused(refusal);
    });
    assert_caught(Guarantee::Resumable, |history| {
        let Body::Events(events) = &mut history.chains[1].streams[0].messages[0].body else { panic!() };
        events.remove(0);
    });
}

#[test]
fn a_watch_that_does_not_end_as_it_should_is_caught() {
    assert_caught(Guarantee::Terminating, |history| {
        let stream = &mut history.chains[1].streams[0];
        stream.messages.pop();
        stream.end = End::Broken("all was over".to_owned());
    });
    assert_caught(Guarantee::Terminating, |history| _ = history.chains[1].streams[0].messages.pop());
    assert_caught(Guarantee::Complete, |history| {
        let end = history.chains[1].streams[0].messages.remove(3);
        history.chains[1].streams[0].messages.insert(2, end);
    });
}

#[test]
fn an_event_after_the_job_was_closed_is_caught() {
    assert_caught(Guarantee::Terminating, |history| {
        change_log(history, |log| {
            log.push(stored("job", &new_event("y", EventKind::Info, ""), (6, JobStatus::Running, 4, 99)));
        });
    });
}

#[test]
fn another_status_or_progress_is_caught() {
    assert_caught(Guarantee::Deterministic, |history| {
        let Outcome::Appended(told) = &mut history.batches[1].attempts[0].outcome else { panic!() };
        told[0].status = JobStatus::Running.into();
    });
    assert_caught(Guarantee::Deterministic, |history| {
        let event = &mut seen(history, 0, 0)[0];
        *event = Arc::new(pb::Event { progress: None, ..(**event).clone() });
    });
    assert_caught(Guarantee::Deterministic, |history| {
        change_log(history, |log| log[0] = Arc::new(pb::Event { status: 3, ..(*log[0]).clone() }));
    });
    assert_caught(Guarantee::Deterministic, |history| history.reads[2].found.last_sequence = 4);
    assert_caught(Guarantee::Deterministic, |history| {
        let Body::CaughtUp(Some(state)) = &mut history.chains[1].streams[0].messages[1].body else {
            panic!()
        };
        state.last_sequence = 2;
    });
}

#[test]
fn an_expected_sequence_that_was_not_is_caught() {
    assert_caught(Guarantee::Contract, |history| history.batches[1].expected = Some(1));
    assert_caught(Guarantee::Contract, |history| history.batches[3].expected = Some(2));
    // More had been acknowledged by then; so much had not even been sent.
    for (sent, over, said) in [(5, 6, 1), (4, 5, 4)] {
        assert_caught(Guarantee::Contract, |history| {
            history.batches[3].expected = Some(9);
            history.batches[3].attempts[0] = attempt(sent, over, refused(Code::Aborted, Some(said)));
        });
    }
}

#[test]
fn a_refusal_without_a_reason_is_caught() {
    assert_caught(Guarantee::Contract, |history| {
        history.batches[5].attempts[0].outcome = refused(Code::NotFound, None);
    });
    assert_caught(Guarantee::Contract, |history| {
        history.batches[5].attempts[0] = attempt(1, 2, refused(Code::FailedPrecondition, None));
    });
    assert_caught(Guarantee::Contract, |history| {
        history.closes[0].outcome =
            Err(Refusal { code: Code::FailedPrecondition, message: String::new(), last_sequence: None });
    });
}

#[test]
fn a_close_that_was_answered_falsely_is_caught() {
    let closed = |last_sequence, existed| Ok(Closed { last_sequence, existed });
    assert_eq!(found(|history| history.closes[0].outcome = closed(2, true)), []);
    assert_caught(Guarantee::Terminating, |history| history.closes[0].outcome = closed(1, false));
    assert_caught(Guarantee::Unique, |history| {
        let again = Close { reason: "another".to_owned(), ..history.closes[0].clone() };
        history.closes.push(again);
    });
    // It was closed before the other event was sent.
    assert_caught(Guarantee::Ordered, |history| {
        history.batches[6].attempts = vec![attempt(10, 11, Outcome::Unknown(Lost::GaveUp))];
    });
    assert_caught(Guarantee::Complete, |history| {
        history.closes[0].over = at(8);
        history.chains[0].streams[1].opened = at(9);
        let event = seen(history, 1, 2).pop().expect("an event");
        history.chains[0].streams[1].messages.push(message(9, Body::Events(vec![event])));
        history.chains[0].streams[1].messages.swap(1, 2);
    });
}

#[test]
fn what_cannot_be_at_a_time_and_is_said_is_caught() {
    assert_caught(Guarantee::Durable, |history| history.glances[0].found.last_sequence = 2);
    assert_caught(Guarantee::Durable, |history| {
        history.glances[0].found = history.reads[0].found.clone();
    });
    assert_caught(Guarantee::Deterministic, |history| {
        history.glances[0].found.status = JobStatus::Running.into();
    });
}

#[test]
fn a_watch_that_is_stuck_when_all_is_well_is_caught() {
    let stuck = |history: &mut History| {
        let stream = &mut history.chains[0].streams[1];
        (stream.end, stream.over) = (End::Silent, at(20));
        history.chains[0].whole = false;
    };
    assert_caught(Guarantee::Complete, stuck);
    let disturbance = |server| Disturbance { from: at(15), to: at(16), touches: [server == 0, server == 1] };
    for (server, expected) in [(0, vec![]), (1, vec![Guarantee::Complete])] {
        let found = found(|history| {
            stuck(history);
            history.disturbances.push(disturbance(server));
        });
        assert_eq!(found, expected);
    }
}

#[test]
fn what_fails_when_all_is_well_is_caught() {
    assert_caught(Guarantee::Contract, |history| {
        history.chains[0].streams[1].end = End::Broken("UNAVAILABLE".to_owned());
    });
    assert_caught(Guarantee::Contract, |history| {
        let lost = Outcome::Unknown(Lost::Broken("UNAVAILABLE".to_owned()));
        history.batches[3].attempts.insert(0, attempt(4, 5, lost));
    });
    assert_caught(Guarantee::Terminating, |history| {
        let drained = Body::Ended(pb::WatchEndReason::Draining, None);
        history.chains[0].streams[1].messages.push(message(9, drained));
    });
}

#[test]
fn who_reads_slowly_may_hear_late_of_what_broke() {
    // Its last event was sent at 6 s, and it heard of the end at 9 s.
    let cases = [(false, 7, 0, true), (false, 7, 1, false), (false, 5, 0, false)];
    for (prompt, second, server, excused) in
        cases.into_iter().chain([(true, 7, 0, false), (true, 9, 0, true)])
    {
        for (drained, guarantee) in [(false, Guarantee::Contract), (true, Guarantee::Terminating)] {
            let found = found(|history| {
                history.chains[0].prompt = prompt;
                let stream = &mut history.chains[0].streams[0];
                stream.end = End::Broken("UNAVAILABLE".to_owned());
                if drained {
                    stream.messages.push(message(9, Body::Ended(pb::WatchEndReason::Draining, None)));
                }
                let (from, touches) = (at(second), [server == 0, server == 1]);
                history.disturbances.push(Disturbance { from, to: from, touches });
            });
            assert_eq!(!found.contains(&guarantee), excused, "{prompt} {second} {server} {drained}");
        }
    }
}

#[test]
fn a_heartbeat_that_lies_is_caught() {
    let beat = |seconds| message(seconds, Body::Heartbeat);
    assert_eq!(found(|history| history.chains[1].streams[0].messages.insert(2, beat(6))), []);
    assert_eq!(found(|history| history.chains[1].streams[0].messages.insert(0, beat(20))), []);
    assert_caught(Guarantee::Complete, |history| {
        history.chains[1].streams[0].messages.insert(2, beat(20));
    });
    assert_caught(Guarantee::Terminating, |history| {
        history.chains[1].streams[0].messages.insert(3, beat(9));
    });
}

#[test]
fn an_event_of_another_scope_is_caught() {
    for (configuration, counterpart) in [(Some(1), None), (None, Some(1))] {
        assert_caught(Guarantee::Complete, |history| {
            history.chains[0].only = Only { configuration, counterpart };
        });
    }
    assert_caught(Guarantee::Complete, |history| history.jobs[OTHER].provider = 1);
    assert_eq!(
        found(|history| {
            history.chains[0].only = Only { configuration: Some(0), counterpart: Some(0) };
        }),
        []
    );
}

#[test]
fn events_without_an_id_are_told_apart_by_their_names() {
    let nameless = |name: &str| {
        let event = pb::NewEvent { id: String::new(), name: name.to_owned(), ..Default::default() };
        batch(OTHER, vec![event], vec![attempt(2, 3, Outcome::Unknown(Lost::GaveUp))])
    };
    let mut history = history();
    history.batches.extend([nameless("a reason"), nameless("elsewhere")]);
    history.name_nameless();
    let ids: Vec<&str> = history.batches[7..].iter().map(|batch| batch.events[0].id.as_str()).collect();
    assert_eq!(ids, ["g", ""]);
}
