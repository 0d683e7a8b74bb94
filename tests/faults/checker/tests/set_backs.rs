//! Tests of the checks of what holds when commits are lost.

use std::{collections::BTreeMap, sync::Arc};

use milepost_client::pb::{self, EventKind, JobStatus, WatchEndReason};
use tonic::Code;

use super::{
    JOB, OTHER_JOB, appended, at, attempt, batch, history, message, new_event, progress, refusal, refused,
    stored,
};
use crate::{
    checker::{Guarantee, check},
    history::{
        Body, Close, Closed, History, JobFilter, JobRead, LostLog, Scope, SetBack, Start, Stream, StreamEnd,
        WatcherRecord,
    },
};

const LOST: (i64, JobStatus, i64, i32) = (6, JobStatus::Running, 3, 75);

/// The event that was lost, which job `JOB` had instead of its last two events.
fn lost_event() -> pb::NewEvent {
    new_event("lost", EventKind::Step, "two")
}

/// A history in which the last two events of the first job were appended after a set-back at
/// 7 s, which took away an event with the sequence 4 and a job.
fn set_back() -> History {
    let mut history = history();
    let log = history.final_reads[0].log.clone();
    let gone = stored("gone", &new_event("g1", EventKind::Info, ""), (1, JobStatus::Running, 0, 0));
    let mut before = log[..3].to_vec();
    before.push(lost());
    let logs = BTreeMap::from([
        (JOB, LostLog { kept: 3, events: before, is_gone: false }),
        (2, LostLog { kept: 0, events: vec![gone], is_gone: true }),
    ]);
    let (lost_from, until, noticed_at) = (at(6), at(7), at(7));
    history.set_backs.push(SetBack { lost_from, until, noticed_at, logs });
    let mut gone_job = history.jobs[JOB].clone();
    gone_job.id = "gone".to_owned();
    history.jobs.push(gone_job);
    // The later events come after the set-back.
    let third = &mut history.batches[2].attempts[0];
    (third.sent_at, third.ended_at) = (at(8), at(8));
    history.watchers.clear();
    history.job_reads.clear();
    history.closes[0].sent_at = at(8);
    let answer = vec![appended("lost", false, (4, JobStatus::Running, 4, 99))];
    let acknowledged = attempt(6, 7, super::Outcome::Appended(answer));
    history.batches.push(batch(JOB, vec![lost_event()], vec![acknowledged]));
    history.watchers.push(watcher(vec![lost_stream(), refused_stream(9, 2)]));
    history
}

/// The lost event as it was stored.
fn lost() -> Arc<pb::Event> {
    stored("job", &lost_event(), (4, JobStatus::Running, 4, 99))
}

fn watcher(streams: Vec<Stream>) -> WatcherRecord {
    WatcherRecord {
        name: "a watcher".to_owned(),
        scope: Scope::Job(JOB),
        filter: JobFilter::default(),
        reads_promptly: true,
        kinds: Vec::new(),
        streams,
        read_to_end: false,
    }
}

/// A stream that received the lost event, and was told.
fn lost_stream() -> Stream {
    let log = super::history().final_reads[0].log.clone();
    let end = Body::End(WatchEndReason::LogSetBack, None);
    Stream {
        replica: 0,
        start: Start::AfterSequence(2),
        opened_at: at(5),
        messages: vec![
            message(6, Body::Events(vec![log[2].clone()])),
            message(6, Body::Events(vec![lost()])),
            message(8, end),
        ],
        end: StreamEnd::Refused(set_back_refusal()),
        ended_at: at(8),
    }
}

fn set_back_refusal() -> crate::history::Refusal {
    let reason = "LOG_SET_BACK".to_owned();
    crate::history::Refusal { reason, ..refusal(Code::OutOfRange, None) }
}

/// A stream that was refused when it tried to resume after so many messages of the first one.
fn refused_stream(opened_s: u64, messages: usize) -> Stream {
    Stream {
        replica: 1,
        start: Start::Resume { stream: 0, messages },
        opened_at: at(opened_s),
        messages: Vec::new(),
        end: StreamEnd::Refused(set_back_refusal()),
        ended_at: at(opened_s),
    }
}

#[track_caller]
fn assert_valid(change: impl FnOnce(&mut History)) {
    let mut history = set_back();
    change(&mut history);
    let violations = check(&history);
    assert!(violations.is_empty(), "{violations:#?}");
}

#[track_caller]
fn assert_detects(guarantee: Guarantee, change: impl FnOnce(&mut History)) {
    let mut history = set_back();
    change(&mut history);
    let detected: Vec<Guarantee> = check(&history).iter().map(|violation| violation.guarantee).collect();
    assert!(detected.contains(&guarantee), "expected a violation of {guarantee}, detected: {detected:?}");
}

fn streams(history: &mut History) -> &mut Vec<Stream> {
    &mut history.watchers[0].streams
}

#[test]
fn lost_events_violate_nothing_if_watchers_are_told() {
    assert_valid(|_| {});
    // A token from before the lost event is good.
    assert_valid(|history| {
        let log = history.final_reads[0].log.clone();
        let resumed = Stream {
            messages: vec![message(10, Body::Events(log[3..].to_vec()))],
            end: StreamEnd::ClosedByWatcher,
            ..refused_stream(10, 1)
        };
        streams(history).push(resumed);
    });
}

#[test]
fn an_event_that_is_missing_though_it_was_not_lost_is_detected() {
    assert_detects(Guarantee::Durable, |history| {
        history.set_backs[0].logs.get_mut(&JOB).expect("a lost log").kept = 4;
    });
    // It was acknowledged after the set-back.
    assert_detects(Guarantee::Durable, |history| {
        let last = history.batches.last_mut().expect("a batch");
        (last.attempts[0].sent_at, last.attempts[0].ended_at) = (at(8), at(9));
    });
    assert_detects(Guarantee::Durable, |history| history.set_backs.clear());
}

#[test]
fn an_event_with_a_state_from_before_the_loss_is_detected() {
    // The steps of the lost event are counted.
    assert_detects(Guarantee::Deterministic, |history| {
        for read in history.final_reads.iter_mut().filter(|read| read.job == JOB) {
            let first = Arc::make_mut(&mut read.log[2]);
            first.progress = progress(LOST);
        }
    });
    let read = |sent_s| {
        move |history: &mut History| {
            let found = pb::Job {
                id: "job".to_owned(),
                last_sequence: 4,
                status: JobStatus::Running.into(),
                progress: progress((4, JobStatus::Running, 4, 99)),
                ..Default::default()
            };
            // By the new log, the fourth event does not complete the steps.
            let mut other = found.clone();
            other.progress = progress((4, JobStatus::Running, 1, 25));
            for read in history.final_reads.iter_mut().filter(|read| read.job == JOB) {
                Arc::make_mut(&mut read.log[3]).kind = EventKind::Info.into();
            }
            history.job_reads.push(JobRead { replica: 0, sent_at: at(sent_s), ended_at: at(9), found });
        }
    };
    let found = |change: &dyn Fn(&mut History)| {
        let mut history = set_back();
        change(&mut history);
        check(&history).iter().filter(|violation| violation.what.contains("server 0 answered (4")).count()
    };
    assert_eq!((found(&read(6)), found(&read(8))), (0, 1));
}

#[test]
fn a_watch_that_goes_on_after_lost_events_is_detected() {
    // Without an event between, with the next event of the new log, and much later.
    let next = Body::Events(vec![set_back().final_reads[0].log[4].clone()]);
    for (guarantee, seconds, body) in
        [(Guarantee::LostCommits, 9, next), (Guarantee::InTime, 20, Body::Heartbeat)]
    {
        assert_detects(guarantee, |history| {
            let stream = &mut streams(history)[0];
            stream.messages[2] = message(seconds, body);
            stream.end = StreamEnd::ClosedByWatcher;
        });
    }
    assert_detects(Guarantee::LostCommits, |history| {
        streams(history)[0].messages.pop();
        streams(history)[0].end = StreamEnd::ClosedByWatcher;
        streams(history).pop();
        history.watchers[0].read_to_end = true;
    });
}

#[test]
fn an_accepted_token_of_a_lost_event_is_detected() {
    assert_detects(Guarantee::LostCommits, |history| {
        let caught_up = Body::CaughtUp(None, Vec::new());
        streams(history)[1].messages.push(message(9, caught_up));
        streams(history)[1].end = StreamEnd::ClosedByWatcher;
    });
}

#[test]
fn an_event_of_the_new_log_that_is_skipped_is_detected() {
    let stays = |skipped: usize| {
        move |history: &mut History| {
            let log = history.final_reads[0].log.clone();
            let events = Body::Events(log[3 + skipped..].to_vec());
            streams(history)[0].messages[1..]
                .clone_from_slice(&[message(9, events), message(9, Body::Heartbeat)]);
            streams(history)[0].end = StreamEnd::ClosedByWatcher;
            streams(history).truncate(1);
            streams(history)[0].messages.pop();
        }
    };
    assert_valid(stays(0));
    assert_detects(Guarantee::Resumable, stays(1));
}

#[test]
fn a_set_back_of_which_nothing_explains_is_detected() {
    let only_told = |history: &mut History| {
        streams(history)[0].messages.drain(..2);
        streams(history).truncate(1);
    };
    assert_valid(only_told);
    // The stream was opened after the set-back.
    assert_detects(Guarantee::Terminating, |history| {
        only_told(history);
        streams(history)[0].opened_at = at(8);
    });
    // The token is of the time after it.
    assert_detects(Guarantee::Resumable, |history| {
        let stream = &mut streams(history)[0];
        stream.opened_at = at(8);
        stream.messages = vec![message(20, Body::Events(vec![history_event(2)]))];
        stream.end = StreamEnd::ClosedByWatcher;
        streams(history)[1] = refused_stream(21, 1);
    });
}

fn history_event(index: usize) -> Arc<pb::Event> {
    super::history().final_reads[0].log[index].clone()
}

#[test]
fn refusals_and_closes_are_explained_by_what_was_lost() {
    let of_gone = |code| {
        batch(2, vec![new_event("late", EventKind::Info, "")], vec![attempt(8, 9, refused(code, None))])
    };
    assert_valid(|history| history.batches.push(of_gone(Code::NotFound)));
    assert_detects(Guarantee::Contract, |history| history.batches.push(of_gone(Code::FailedPrecondition)));
    // The lost event sent again: stored anew, or refused since the job is closed.
    assert_valid(|history| {
        let mut again =
            batch(JOB, vec![lost_event()], vec![attempt(10, 11, refused(Code::FailedPrecondition, None))]);
        again.repeats = 1;
        history.batches.push(again);
    });
    let closed = |sent_s| Close {
        job: OTHER_JOB,
        reason: "lost".to_owned(),
        sent_at: at(sent_s),
        ended_at: at(sent_s + 1),
        outcome: Ok(Closed { last_sequence: 1, existed: false }),
    };
    let lost_close = |history: &mut History| {
        let close = pb::NewEvent { name: "lost".to_owned(), ..new_event("lc", EventKind::Close, "") };
        let close = stored("other", &close, (1, JobStatus::Cancelled, 0, 0));
        let log = LostLog { kept: 0, events: vec![close], is_gone: false };
        history.set_backs[0].logs.insert(OTHER_JOB, log);
        // The job's events are all of the new log.
        history.batches[6].attempts[0].sent_at = at(8);
        history.batches[6].attempts[0].ended_at = at(8);
    };
    assert_valid(|history| {
        lost_close(history);
        history.closes.push(closed(6));
    });
    assert_detects(Guarantee::Terminating, |history| {
        lost_close(history);
        history.closes.push(closed(8));
    });
}

#[test]
fn a_job_that_is_lost_and_found_or_missing_without_a_loss_is_detected() {
    assert_detects(Guarantee::LostCommits, |history| {
        let mut read = history.final_reads[0].clone();
        (read.job, read.log) = (2, Vec::new());
        history.final_reads.push(read);
    });
    assert_detects(Guarantee::Durable, |history| history.final_reads.truncate(3));
}
