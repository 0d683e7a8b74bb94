//! Tests of the checker: a valid history has no violations, and each change to it that
//! breaks a guarantee is detected.

mod availability;
mod credentials;
mod set_backs;

use std::{sync::Arc, time::Duration};

use milepost_client::pb::{self, EventKind, JobStatus};
use tonic::Code;

use super::{Guarantee, check};
use crate::history::{
    Attempt, Batch, Body, Close, Closed, FaultWindow, FinalRead, History, Job, JobFilter, JobRead, Message,
    Moment, Outcome, Refusal, Scope, Start, Stream, StreamEnd, UnknownReason, WatcherRecord,
};

const JOB: usize = 0;
const OTHER_JOB: usize = 1;

fn at(seconds: u64) -> Moment {
    Duration::from_secs(seconds)
}

fn new_event(id: &str, kind: EventKind, step_tag: &str) -> pb::NewEvent {
    let occurred_at = Some(prost_types::Timestamp { seconds: 7, nanos: 1_999 });
    let (id, step_tag) = (id.to_owned(), step_tag.to_owned());
    pb::NewEvent {
        id,
        kind: kind.into(),
        name: "name".to_owned(),
        step_tag,
        metadata: None,
        occurred_at,
        ..Default::default()
    }
}

/// A sequence, and the job's state after it: status, points done of 4, percent.
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
        step_percent: sent.step_percent,
        occurred_at: sent.occurred_at.map(|at| prost_types::Timestamp { nanos: 1_000, ..at }),
        status: state.1.into(),
        progress: progress(state),
        ..Default::default()
    })
}

fn appended(id: &str, existed: bool, state: State) -> pb::AppendedEvent {
    let (sequence, status, ..) = state;
    pb::AppendedEvent {
        id: id.to_owned(),
        sequence,
        existed,
        status: status.into(),
        progress: progress(state),
    }
}

fn attempt(sent_s: u64, ended_s: u64, outcome: Outcome) -> Attempt {
    Attempt { replica: 0, sent_at: at(sent_s), ended_at: at(ended_s), outcome }
}

fn refusal(code: Code, last_sequence: Option<i64>) -> Refusal {
    Refusal { code, reason: String::new(), message: String::new(), last_sequence }
}

fn refused(code: Code, last_sequence: Option<i64>) -> Outcome {
    Outcome::Refused(refusal(code, last_sequence))
}

fn batch(job: usize, events: Vec<pb::NewEvent>, attempts: Vec<Attempt>) -> Batch {
    let writer = "a writer".to_owned();
    Batch { writer, job, expected: None, repeats: 0, events, attempts, order: None }
}

fn message(seconds: u64, body: Body) -> Message {
    Message { received_at: at(seconds), body }
}

fn state(state: State) -> Option<pb::JobState> {
    let (last_sequence, status, ..) = state;
    Some(pb::JobState { last_sequence, status: status.into(), progress: progress(state) })
}

/// A valid history of two jobs: one completes with its fifth event, the other is closed
/// by its second. The answer to the first batch was lost once. One watcher watches all
/// jobs, another the first job.
fn history() -> History {
    use EventKind::{Complete, Error, Info, Progress, Step};
    let a = new_event("a", Step, "one");
    let b = pb::NewEvent { step_percent: Some(50), ..new_event("b", Progress, "two") };
    let c = new_event("c", Error, "");
    let d = new_event("d", Step, "two");
    let e = new_event("e", Complete, "");
    let f = new_event("f", Info, "");
    let g = new_event("g", EventKind::Close, "");
    let g = pb::NewEvent { name: "a reason".to_owned(), ..g };
    let states = [
        (1, JobStatus::Running, 1, 25),
        (2, JobStatus::Running, 1, 62),
        (3, JobStatus::Failed, 1, 62),
        (4, JobStatus::Running, 4, 99),
        (5, JobStatus::Complete, 4, 100),
    ];
    let other_states = [(1, JobStatus::Running, 0, 0), (2, JobStatus::Cancelled, 0, 0)];
    let log: Vec<_> = [&a, &b, &c, &d, &e]
        .into_iter()
        .zip(states)
        .map(|(event, state)| stored("job", event, state))
        .collect();
    let other_log: Vec<_> =
        [&f, &g].into_iter().zip(other_states).map(|(event, state)| stored("other", event, state)).collect();
    let lost = Outcome::Unknown(UnknownReason::Broken("lost".to_owned()));
    let first = vec![appended("a", true, states[0]), appended("b", true, states[1])];
    let mut third = batch(
        JOB,
        vec![c.clone(), d.clone()],
        vec![attempt(
            6,
            7,
            Outcome::Appended(vec![appended("c", true, states[2]), appended("d", false, states[3])]),
        )],
    );
    third.repeats = 1;
    let mut stale =
        batch(JOB, vec![new_event("x", Info, "")], vec![attempt(4, 8, refused(Code::Aborted, Some(2)))]);
    stale.expected = Some(1);
    let mut second =
        batch(JOB, vec![c], vec![attempt(4, 5, Outcome::Appended(vec![appended("c", false, states[2])]))]);
    second.expected = Some(2);
    let batches = vec![
        batch(JOB, vec![a, b], vec![attempt(1, 2, lost), attempt(3, 4, Outcome::Appended(first))]),
        second,
        third,
        stale,
        batch(JOB, vec![e], vec![attempt(8, 9, Outcome::Appended(vec![appended("e", false, states[4])]))]),
        batch(
            JOB,
            vec![new_event("y", Info, "")],
            vec![attempt(10, 11, refused(Code::FailedPrecondition, None))],
        ),
        batch(
            OTHER_JOB,
            vec![f],
            vec![attempt(1, 2, Outcome::Appended(vec![appended("f", false, other_states[0])]))],
        ),
    ];
    let events = |events: &[Arc<pb::Event>]| Body::Events(events.to_vec());
    let stream = |start, opened, messages, end| Stream {
        replica: 0,
        start,
        opened_at: at(opened),
        messages,
        end,
        ended_at: at(9),
    };
    let watcher_record = |scope, streams| WatcherRecord {
        name: "a watcher".to_owned(),
        scope,
        filter: JobFilter::default(),
        reads_promptly: true,
        kinds: Vec::new(),
        streams,
        read_to_end: true,
    };
    let all_jobs_watcher = watcher_record(
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
                    message(5, Body::CaughtUp(None, Vec::new())),
                    message(7, events(&log[3..4])),
                ],
                StreamEnd::ClosedByWatcher,
            ),
            stream(
                Start::Resume { stream: 0, messages: 2 },
                8,
                vec![
                    message(8, events(&log[3..4])),
                    message(8, Body::CaughtUp(None, Vec::new())),
                    message(9, events(&[log[4].clone(), other_log[1].clone()])),
                ],
                StreamEnd::ClosedByWatcher,
            ),
        ],
    );
    let step = |tag: &str, status: pb::StepStatus, percent| pb::StepState {
        step_tag: tag.to_owned(),
        status: status.into(),
        percent,
        ..Default::default()
    };
    let steps = vec![step("one", pb::StepStatus::Done, 100), step("two", pb::StepStatus::UnderWay, 50)];
    let job_watcher = watcher_record(
        Scope::Job(JOB),
        vec![stream(
            Start::AfterSequence(1),
            5,
            vec![
                message(5, events(&log[1..3])),
                message(5, Body::CaughtUp(state(states[2]), steps)),
                message(9, events(&log[3..])),
                message(9, Body::End(pb::WatchEndReason::JobClosed, state(states[4]))),
            ],
            StreamEnd::Ok,
        )],
    );
    let job = |id: &str| Job { id: id.to_owned(), configuration: 0, provider: 0, customer: 0 };
    let found = |log: &[Arc<pb::Event>]| {
        let last = log.last().expect("the log has events");
        let closes = matches!(last.kind(), Complete | EventKind::Close);
        let closed_at = closes.then(prost_types::Timestamp::default);
        let (last_sequence, status, progress) = (last.sequence, last.status, last.progress);
        pb::Job { id: last.job_id.clone(), last_sequence, status, progress, closed_at, ..Default::default() }
    };
    let final_reads = (0..2).flat_map(|replica| {
        [(JOB, &log), (OTHER_JOB, &other_log)].map(|(job, log)| FinalRead {
            replica,
            job,
            found: found(log),
            log: log.clone(),
        })
    });
    History {
        configurations: vec![vec![("one".to_owned(), 1), ("two".to_owned(), 3)]],
        jobs: vec![job("job"), job("other")],
        cancellations: Vec::new(),
        closes: vec![Close {
            job: OTHER_JOB,
            reason: "a reason".to_owned(),
            sent_at: at(8),
            ended_at: at(9),
            outcome: Ok(Closed { last_sequence: 2, existed: false }),
        }],
        batches,
        watchers: vec![all_jobs_watcher, job_watcher],
        job_reads: vec![JobRead { replica: 1, sent_at: at(6), ended_at: at(7), found: found(&log[..3]) }],
        final_reads: final_reads.collect(),
        fault_windows: vec![FaultWindow { from: at(0), to: at(3), affects: [true; 2] }],
        ..Default::default()
    }
}

/// The guarantees that the history violates after a change.
fn violated(change: impl FnOnce(&mut History)) -> Vec<Guarantee> {
    let mut history = history();
    change(&mut history);
    let mut violated: Vec<Guarantee> =
        check(&history).into_iter().map(|violation| violation.guarantee).collect();
    violated.sort_unstable();
    violated.dedup();
    violated
}

#[track_caller]
fn assert_detects(guarantee: Guarantee, change: impl FnOnce(&mut History)) {
    let detected = violated(change);
    assert!(detected.contains(&guarantee), "expected a violation of {guarantee}, detected: {detected:?}");
}

/// Changes the log of the first job as both replicas return it.
fn change_log(history: &mut History, change: impl Fn(&mut Vec<Arc<pb::Event>>)) {
    history.final_reads.iter_mut().filter(|read| read.job == JOB).for_each(|read| change(&mut read.log));
}

/// The events of a message to the watcher of all jobs.
fn received(history: &mut History, stream: usize, message: usize) -> &mut Vec<Arc<pb::Event>> {
    match &mut history.watchers[0].streams[stream].messages[message].body {
        Body::Events(events) => events,
        body => panic!("a message with events is expected: {body:?}"),
    }
}

#[test]
fn a_valid_history_has_no_violations() {
    let violations = check(&history());
    assert!(violations.is_empty(), "{violations:#?}");
}

#[test]
fn an_acknowledged_event_that_is_not_stored_is_detected() {
    assert_detects(Guarantee::Durable, |history| change_log(history, |log| _ = log.pop()));
}

#[test]
fn a_received_event_that_is_not_stored_is_detected() {
    assert_detects(Guarantee::Durable, |history| {
        let phantom = pb::Event { id: "z".to_owned(), sequence: 6, ..(*received(history, 0, 0)[0]).clone() };
        received(history, 1, 2).push(Arc::new(phantom));
    });
}

#[test]
fn an_event_stored_with_another_content_is_detected() {
    assert_detects(Guarantee::Durable, |history| {
        history.batches[1].events[0].name = "another".to_owned();
    });
}

#[test]
fn an_event_stored_with_another_sequence_is_detected() {
    assert_detects(Guarantee::Durable, |history| {
        let Outcome::Appended(events) = &mut history.batches[1].attempts[0].outcome else { panic!() };
        events[0].sequence = 4;
    });
}

#[test]
fn a_gap_in_the_sequences_is_detected() {
    assert_detects(Guarantee::Ordered, |history| {
        change_log(history, |log| {
            let last = log.last_mut().expect("the log has events");
            *last = Arc::new(pb::Event { sequence: 6, ..(**last).clone() });
        });
    });
}

#[test]
fn an_event_stored_before_one_acknowledged_earlier_is_detected() {
    assert_detects(Guarantee::Ordered, |history| {
        history.batches[0].attempts = vec![attempt(10, 11, Outcome::Unknown(UnknownReason::Abandoned))];
    });
}

#[test]
fn published_batches_stored_in_another_order_are_detected() {
    assert_detects(Guarantee::Ordered, |history| {
        (history.batches[0].order, history.batches[1].order) = (Some(1), Some(0));
    });
}

#[test]
fn an_event_stored_twice_is_detected() {
    assert_detects(Guarantee::Unique, |history| {
        change_log(history, |log| log.push(Arc::new(pb::Event { sequence: 6, ..(*log[0]).clone() })));
    });
}

#[test]
fn a_stored_event_that_no_request_sent_is_detected() {
    assert_detects(Guarantee::Unique, |history| _ = history.batches.remove(0));
}

#[test]
fn a_refusal_of_a_stored_batch_is_detected() {
    assert_detects(Guarantee::Unique, |history| {
        history.batches[4].attempts.push(attempt(10, 11, refused(Code::FailedPrecondition, None)));
    });
}

#[test]
fn a_repeated_event_answered_without_existed_is_detected() {
    assert_detects(Guarantee::Unique, |history| {
        let again = history.batches[1].attempts[0].clone();
        history.batches[1].attempts.push(again);
    });
}

#[test]
fn a_partly_stored_batch_is_detected() {
    assert_detects(Guarantee::Atomic, |history| {
        history.batches[4].events.push(new_event("w", EventKind::Info, ""));
    });
}

#[test]
fn an_event_of_another_batch_within_a_batch_is_detected() {
    assert_detects(Guarantee::Atomic, |history| {
        history.batches.remove(2);
        history.batches[1].events[0].id = "b".to_owned();
        history.batches[0].events[1].id = "c".to_owned();
    });
}

#[test]
fn an_event_missing_in_a_watch_is_detected() {
    assert_detects(Guarantee::Complete, |history| _ = received(history, 0, 0).remove(0));
    assert_detects(Guarantee::Complete, |history| _ = received(history, 0, 0).remove(1));
    assert_detects(Guarantee::Complete, |history| _ = received(history, 1, 2).pop());
}

/// The heartbeat alone, which lacks the event as well, came too late at worst.
#[test]
fn an_event_missing_at_the_end_of_a_watch_after_a_heartbeat_is_detected() {
    assert_detects(Guarantee::Complete, |history| {
        received(history, 1, 2).remove(0);
        history.watchers[0].streams[1].messages.push(message(20, Body::Heartbeat));
    });
}

#[test]
fn an_event_received_twice_is_detected() {
    assert_detects(Guarantee::Complete, |history| {
        let event = received(history, 0, 0)[0].clone();
        received(history, 0, 2).push(event);
    });
}

#[test]
fn events_received_out_of_order_are_detected() {
    assert_detects(Guarantee::Complete, |history| received(history, 0, 0).swap(0, 2));
}

#[test]
fn caught_up_before_all_earlier_events_is_detected() {
    assert_detects(Guarantee::Complete, |history| {
        let event = received(history, 0, 0).pop().expect("the message has events");
        history.watchers[0].streams[0].opened_at = at(6);
        received(history, 0, 2).insert(0, event);
    });
}

#[test]
fn a_live_event_missing_in_a_watch_from_now_is_detected() {
    let from_now = |history: &mut History| {
        let streams = &mut history.watchers[0].streams;
        streams.truncate(1);
        streams[0].start = Start::Now;
        streams[0].messages.remove(0);
        streams[0].messages[1].body = Body::Events(history.final_reads[JOB].log[3..].to_vec());
        let other = history.final_reads[OTHER_JOB].log[1].clone();
        let Body::Events(events) = &mut streams[0].messages[1].body else { panic!() };
        events.push(other);
    };
    assert_eq!(violated(from_now), []);
    assert_detects(Guarantee::Complete, |history| {
        from_now(history);
        received(history, 0, 1).remove(1);
    });
    assert_detects(Guarantee::Complete, |history| {
        from_now(history);
        received(history, 0, 1).remove(0);
    });
}

#[test]
fn a_stream_that_does_not_resume_after_its_token_is_detected() {
    assert_detects(Guarantee::Resumable, |history| _ = received(history, 1, 0).pop());
    assert_detects(Guarantee::Resumable, |history| {
        history.watchers[0].streams[1].end = StreamEnd::Refused(refusal(Code::OutOfRange, None));
    });
    assert_detects(Guarantee::Resumable, |history| {
        let Body::Events(events) = &mut history.watchers[1].streams[0].messages[0].body else { panic!() };
        events.remove(0);
    });
}

#[test]
fn a_missing_or_early_end_of_a_watch_is_detected() {
    assert_detects(Guarantee::Terminating, |history| {
        let stream = &mut history.watchers[1].streams[0];
        stream.messages.pop();
        stream.end = StreamEnd::Broken("the connection broke".to_owned());
    });
    assert_detects(Guarantee::Terminating, |history| _ = history.watchers[1].streams[0].messages.pop());
    assert_detects(Guarantee::Complete, |history| {
        let end = history.watchers[1].streams[0].messages.remove(3);
        history.watchers[1].streams[0].messages.insert(2, end);
    });
}

#[test]
fn an_event_stored_after_the_job_was_closed_is_detected() {
    assert_detects(Guarantee::Terminating, |history| {
        change_log(history, |log| {
            log.push(stored("job", &new_event("y", EventKind::Info, ""), (6, JobStatus::Running, 4, 99)));
        });
    });
}

#[test]
fn a_wrong_status_or_progress_is_detected() {
    assert_detects(Guarantee::Deterministic, |history| {
        let Outcome::Appended(events) = &mut history.batches[1].attempts[0].outcome else { panic!() };
        events[0].status = JobStatus::Running.into();
    });
    assert_detects(Guarantee::Deterministic, |history| {
        let event = &mut received(history, 0, 0)[0];
        *event = Arc::new(pb::Event { progress: None, ..(**event).clone() });
    });
    assert_detects(Guarantee::Deterministic, |history| {
        change_log(history, |log| log[0] = Arc::new(pb::Event { status: 3, ..(*log[0]).clone() }));
    });
    assert_detects(Guarantee::Deterministic, |history| history.final_reads[2].found.last_sequence = 4);
    assert_detects(Guarantee::Deterministic, |history| {
        let Body::CaughtUp(Some(state), _) = &mut history.watchers[1].streams[0].messages[1].body else {
            panic!()
        };
        state.last_sequence = 2;
    });
    assert_detects(Guarantee::Deterministic, |history| {
        let Body::CaughtUp(_, steps) = &mut history.watchers[1].streams[0].messages[1].body else { panic!() };
        steps[1].percent = 49;
    });
}

#[test]
fn a_wrong_check_of_expected_sequence_is_detected() {
    assert_detects(Guarantee::Contract, |history| history.batches[1].expected = Some(1));
    assert_detects(Guarantee::Contract, |history| history.batches[3].expected = Some(2));
    // Sequence 2 was acknowledged before the first request was sent, and sequence 4 was
    // sent only after the second was answered.
    for (sent_s, ended_s, last_sequence) in [(5, 6, 1), (4, 5, 4)] {
        assert_detects(Guarantee::Contract, |history| {
            history.batches[3].expected = Some(9);
            history.batches[3].attempts[0] =
                attempt(sent_s, ended_s, refused(Code::Aborted, Some(last_sequence)));
        });
    }
}

#[test]
fn a_refusal_without_a_reason_is_detected() {
    assert_detects(Guarantee::Contract, |history| {
        history.batches[5].attempts[0].outcome = refused(Code::NotFound, None);
    });
    assert_detects(Guarantee::Contract, |history| {
        history.batches[5].attempts[0] = attempt(1, 2, refused(Code::FailedPrecondition, None));
    });
    assert_detects(Guarantee::Contract, |history| {
        history.closes[0].outcome = Err(refusal(Code::FailedPrecondition, None));
    });
}

#[test]
fn a_wrong_answer_to_close_job_is_detected() {
    let closed = |last_sequence, existed| Ok(Closed { last_sequence, existed });
    assert_eq!(violated(|history| history.closes[0].outcome = closed(2, true)), []);
    assert_detects(Guarantee::Terminating, |history| history.closes[0].outcome = closed(1, false));
    assert_detects(Guarantee::Unique, |history| {
        let again = Close { reason: "another".to_owned(), ..history.closes[0].clone() };
        history.closes.push(again);
    });
    // The other event was sent only after the job was closed.
    assert_detects(Guarantee::Ordered, |history| {
        history.batches[6].attempts = vec![attempt(10, 11, Outcome::Unknown(UnknownReason::Abandoned))];
    });
    assert_detects(Guarantee::Complete, |history| {
        history.closes[0].ended_at = at(8);
        history.watchers[0].streams[1].opened_at = at(9);
        let event = received(history, 1, 2).pop().expect("the message has events");
        history.watchers[0].streams[1].messages.push(message(9, Body::Events(vec![event])));
        history.watchers[0].streams[1].messages.swap(1, 2);
    });
}

#[test]
fn a_job_state_impossible_at_its_time_is_detected() {
    assert_detects(Guarantee::Durable, |history| history.job_reads[0].found.last_sequence = 2);
    assert_detects(Guarantee::Durable, |history| {
        history.job_reads[0].found = history.final_reads[0].found.clone();
    });
    assert_detects(Guarantee::Deterministic, |history| {
        history.job_reads[0].found.status = JobStatus::Running.into();
    });
}

#[test]
fn a_silent_watch_without_a_fault_is_detected() {
    let silence = |history: &mut History| {
        let stream = &mut history.watchers[0].streams[1];
        (stream.end, stream.ended_at) = (StreamEnd::Silent, at(20));
        history.watchers[0].read_to_end = false;
    };
    assert_detects(Guarantee::InTime, silence);
    let fault_window = |server| FaultWindow { from: at(15), to: at(16), affects: [server == 0, server == 1] };
    for (server, expected) in [(0, vec![]), (1, vec![Guarantee::InTime])] {
        let detected = violated(|history| {
            silence(history);
            history.fault_windows.push(fault_window(server));
        });
        assert_eq!(detected, expected);
    }
}

#[test]
fn a_failure_without_a_fault_is_detected() {
    assert_detects(Guarantee::InTime, |history| {
        history.watchers[0].streams[1].end = StreamEnd::Broken("UNAVAILABLE".to_owned());
    });
    assert_detects(Guarantee::InTime, |history| {
        let lost = Outcome::Unknown(UnknownReason::Broken("UNAVAILABLE".to_owned()));
        history.batches[3].attempts.insert(0, attempt(4, 5, lost));
    });
    assert_detects(Guarantee::Terminating, |history| {
        let drained = Body::End(pb::WatchEndReason::Draining, None);
        history.watchers[0].streams[1].messages.push(message(9, drained));
    });
}

#[test]
fn a_slow_reader_may_learn_late_that_its_stream_broke() {
    // The watcher's last event was sent at 6 s, and it learned of the end at 9 s.
    let cases = [(false, 7, 0, true), (false, 7, 1, false), (false, 5, 0, false)];
    for (reads_promptly, fault_s, server, excused) in
        cases.into_iter().chain([(true, 7, 0, false), (true, 9, 0, true)])
    {
        for (drained, guarantee) in [(false, Guarantee::InTime), (true, Guarantee::Terminating)] {
            let detected = violated(|history| {
                history.watchers[0].reads_promptly = reads_promptly;
                let stream = &mut history.watchers[0].streams[0];
                stream.end = StreamEnd::Broken("UNAVAILABLE".to_owned());
                if drained {
                    stream.messages.push(message(9, Body::End(pb::WatchEndReason::Draining, None)));
                }
                let (from, affects) = (at(fault_s), [server == 0, server == 1]);
                history.fault_windows.push(FaultWindow { from, to: from, affects });
            });
            assert_eq!(
                !detected.contains(&guarantee),
                excused,
                "{reads_promptly} {fault_s} {server} {drained}"
            );
        }
    }
}

#[test]
fn a_wrong_heartbeat_is_detected() {
    let heartbeat = |seconds| message(seconds, Body::Heartbeat);
    assert_eq!(violated(|history| history.watchers[1].streams[0].messages.insert(2, heartbeat(6))), []);
    assert_eq!(violated(|history| history.watchers[1].streams[0].messages.insert(0, heartbeat(20))), []);
    assert_detects(Guarantee::InTime, |history| {
        history.watchers[1].streams[0].messages.insert(2, heartbeat(20));
    });
    assert_detects(Guarantee::Terminating, |history| {
        history.watchers[1].streams[0].messages.insert(3, heartbeat(9));
    });
}

#[test]
fn an_event_outside_the_scope_or_filter_is_detected() {
    for (configuration, counterpart) in [(Some(1), None), (None, Some(1))] {
        assert_detects(Guarantee::Complete, |history| {
            history.watchers[0].filter = JobFilter { configuration, counterpart };
        });
    }
    assert_detects(Guarantee::Complete, |history| history.jobs[OTHER_JOB].provider = 1);
    assert_eq!(
        violated(|history| {
            history.watchers[0].filter = JobFilter { configuration: Some(0), counterpart: Some(0) };
        }),
        []
    );
}

#[test]
fn events_sent_without_an_id_are_found_by_name() {
    let without_id = |name: &str| {
        let event = pb::NewEvent { id: String::new(), name: name.to_owned(), ..Default::default() };
        batch(OTHER_JOB, vec![event], vec![attempt(2, 3, Outcome::Unknown(UnknownReason::Abandoned))])
    };
    let mut history = history();
    history.batches.extend([without_id("a reason"), without_id("a name that is not stored")]);
    history.resolve_missing_ids();
    let ids: Vec<&str> = history.batches[7..].iter().map(|batch| batch.events[0].id.as_str()).collect();
    assert_eq!(ids, ["g", ""]);
}
