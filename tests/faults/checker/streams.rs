//! Compares the messages that each watcher received, stream by stream, with the logs
//! after the campaign.

use std::{collections::HashMap, sync::Arc, time::Duration};

use milepost_client::pb::{Event, JobState, StepState, WatchEndReason};

use super::{Guarantee, IndexedHistory, Violations, log::is_closing};
use crate::{
    history::{Body, Message, Moment, Scope, Start, Stream, StreamEnd, WatcherRecord},
    watchers::SILENCE,
};

/// An event acknowledged within this time before a heartbeat may be missing. The API
/// promises less than a second, but here all processes share a small machine.
const HEARTBEAT_TOLERANCE: Duration = Duration::from_secs(3);

/// How far a watcher has come.
#[derive(Clone, Default)]
pub(super) struct Cursor {
    /// For each job the sequence of the last received event, or the sequence after which
    /// the watch was asked to start.
    last: HashMap<usize, i64>,
    /// The number of the set-back that took events away which the watcher has received.
    pub(super) lost: Option<usize>,
}

impl Cursor {
    fn last(&self, job: usize) -> Option<i64> {
        self.last.get(&job).copied()
    }
}

pub fn check(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    for record in &indexed.history.watchers {
        WatcherCheck { indexed, record, live_since: None, checked: HashMap::new() }.check(violations);
    }
}

pub(super) struct WatcherCheck<'a> {
    pub(super) indexed: &'a IndexedHistory<'a>,
    pub(super) record: &'a WatcherRecord,
    /// For a watch from now: when it first caught up. It must receive all events that
    /// were sent later.
    live_since: Option<Moment>,
    /// Up to which sequence of each job the current stream was found to have everything.
    checked: HashMap<usize, i64>,
}

impl WatcherCheck<'_> {
    fn check(&mut self, violations: &mut Violations) {
        // By stream, and by how many of its messages a later stream resumes after.
        let mut cursors: Vec<HashMap<usize, Cursor>> = Vec::new();
        let mut resumed_after = vec![Vec::new(); self.record.streams.len()];
        for (stream, messages) in self.record.streams.iter().filter_map(|stream| match stream.start {
            Start::Resume { stream, messages } => Some((stream, messages)),
            _ => None,
        }) {
            resumed_after[stream].push(messages);
        }
        let mut last = None;
        for (number, stream) in self.record.streams.iter().enumerate() {
            let mut start = match stream.start {
                Start::Resume { stream, messages } => cursors[stream][&messages].clone(),
                Start::AfterSequence(sequence) => match self.record.scope {
                    Scope::Job(job) => Cursor { last: HashMap::from([(job, sequence)]), lost: None },
                    Scope::OfProvider(_) | Scope::OfCustomer(_) => Cursor::default(),
                },
                Start::Beginning | Start::Now => Cursor::default(),
            };
            // Pages of `ListEvents` may be of the log of before a loss and of the one after.
            if self.is_list(stream)
                && self.indexed.set_backs_between(stream.opened_at, stream.ended_at).next().is_some()
            {
                return;
            }
            self.begin_in_lost_log(stream, &mut start);
            self.check_resumed(stream, &start, violations);
            let (kept, end) = self.check_stream(stream, start, &resumed_after[number], violations);
            cursors.push(kept);
            last = Some(end);
        }
        if self.record.read_to_end
            && let Some(cursor) = last
        {
            self.check_read_to_end(&cursor, violations);
        }
    }

    fn started_from_now(&self) -> bool {
        self.record.streams.first().is_some_and(|stream| stream.start == Start::Now)
    }

    pub(super) fn label(&self, stream: &Stream) -> String {
        let (name, opened_s) = (&self.record.name, stream.opened_at.as_secs_f64());
        format!("watcher {name:?}, stream opened at {opened_s:.3} s at server {}", stream.replica)
    }

    /// Checks one stream from its start. Returns the cursor at its end, and those after
    /// the messages in `resumed_after`.
    fn check_stream(
        &mut self,
        stream: &Stream,
        mut cursor: Cursor,
        resumed_after: &[usize],
        violations: &mut Violations,
    ) -> (HashMap<usize, Cursor>, Cursor) {
        self.checked.clear();
        let mut kept = HashMap::new();
        let (mut caught_up, mut ended) = (false, false);
        for (number, message) in stream.messages.iter().enumerate() {
            if ended {
                violations.add(
                    Guarantee::Complete,
                    None,
                    format!("{}: a message after `end`", self.label(stream)),
                );
            }
            self.check_not_gone_on(stream, message, &cursor, violations);
            match &message.body {
                Body::Events(events) => {
                    for event in events {
                        self.receive(stream, event, &mut cursor, violations);
                    }
                }
                Body::CaughtUp(state, steps) => {
                    if std::mem::replace(&mut caught_up, true) {
                        let what = format!("{}: `caught_up` comes twice", self.label(stream));
                        violations.add(Guarantee::Complete, None, what);
                    }
                    if stream.start == Start::Now {
                        if let (Scope::Job(job), Some(state)) = (self.record.scope, state) {
                            cursor.last.insert(job, state.last_sequence);
                        }
                    } else {
                        self.check_acknowledged(
                            stream,
                            &cursor,
                            stream.opened_at,
                            "`caught_up` came",
                            violations,
                        );
                    }
                    if self.started_from_now() {
                        self.live_since.get_or_insert(message.received_at);
                        self.checked.clear();
                    }
                    self.check_state(stream, state.as_ref(), Some(steps), &mut cursor, violations);
                }
                Body::ListEnd => {
                    self.check_acknowledged(
                        stream,
                        &cursor,
                        stream.opened_at,
                        "the last page came",
                        violations,
                    );
                }
                Body::Heartbeat => {
                    self.check_heartbeat(stream, message, caught_up, &cursor, violations);
                }
                Body::End(reason, state) => {
                    ended = true;
                    if *reason != WatchEndReason::LogSetBack {
                        self.check_state(stream, state.as_ref(), None, &mut cursor, violations);
                    }
                    self.check_end(stream, message, *reason, state.as_ref(), &cursor, violations);
                }
            }
            if resumed_after.contains(&(number + 1)) {
                kept.insert(number + 1, cursor.clone());
            }
        }
        match &stream.end {
            StreamEnd::Refused(refusal) if self.may_be_refused(stream, refusal) => {}
            StreamEnd::Refused(refusal) => {
                let what = format!(
                    "{}: the start {:?} was refused by {refusal:?}",
                    self.label(stream),
                    stream.start
                );
                violations.add(Guarantee::Resumable, None, what);
            }
            StreamEnd::Ok if !ended => {
                let what = format!("{}: ended with OK without the message `end`", self.label(stream));
                violations.add(Guarantee::Terminating, None, what);
            }
            StreamEnd::Silent if ended => {
                let what = format!("{}: did not end after the message `end`", self.label(stream));
                violations.add(Guarantee::Terminating, None, what);
            }
            StreamEnd::Silent => {
                let since = stream.messages.last().map_or(stream.opened_at, |message| message.received_at);
                if self.indexed.is_fault_free(stream.replica, since, stream.ended_at) {
                    let what = format!(
                        "{}: no message for {SILENCE:?} from {:.3} s on, {} `caught_up`, although no fault affected the server",
                        self.label(stream),
                        since.as_secs_f64(),
                        if caught_up { "after" } else { "before" },
                    );
                    violations.add(Guarantee::InTime, None, what);
                }
            }
            StreamEnd::Broken(why) if self.was_fault_free_at_end(stream, stream.ended_at) => {
                let ended_s = stream.ended_at.as_secs_f64();
                let what = format!(
                    "{}: broke at {ended_s:.3} s although no fault affected the server: {why}",
                    self.label(stream)
                );
                violations.add(Guarantee::InTime, None, what);
            }
            StreamEnd::Ok | StreamEnd::ClosedByWatcher | StreamEnd::Broken(_) => {}
        }
        (kept, cursor)
    }

    /// A heartbeat after `caught_up` means that all earlier events were sent. Any
    /// heartbeat means that the job is not closed.
    fn check_heartbeat(
        &mut self,
        stream: &Stream,
        message: &Message,
        caught_up: bool,
        cursor: &Cursor,
        violations: &mut Violations,
    ) {
        if caught_up && self.record.reads_promptly {
            let before = message.received_at.saturating_sub(HEARTBEAT_TOLERANCE);
            let mut late = Violations::default();
            self.check_acknowledged(stream, cursor, before, "a heartbeat came", &mut late);
            violations.add_late(late);
        }
        if let Scope::Job(job) = self.record.scope
            && let Some(last) = self.log(cursor, job).last().filter(|event| is_closing(event))
            && cursor.last(job) == Some(last.sequence)
        {
            let what = format!("{}: a heartbeat after the job was closed", self.label(stream));
            violations.add(Guarantee::Terminating, Some(&last.id), what);
        }
    }

    fn receive(&self, stream: &Stream, event: &Arc<Event>, cursor: &mut Cursor, violations: &mut Violations) {
        let id = Some(event.id.as_str());
        let Some(&job) =
            self.indexed.job_numbers.get(event.job_id.as_str()).filter(|&&job| self.is_in_scope(job))
        else {
            let what = format!("{}: received {event:?}, which is not in its scope", self.label(stream));
            return violations.add(Guarantee::Complete, id, what);
        };
        let stored = self.log(cursor, job);
        let stored = usize::try_from(event.sequence - 1).ok().and_then(|index| stored.get(index));
        match stored {
            Some(stored) if Arc::ptr_eq(stored, event) || stored == event => {}
            _ if self.is_lost_event(stream, job, event, cursor) => {}
            None => {
                let what = format!("{}: received {event:?}, which is not stored", self.label(stream));
                return violations.add(Guarantee::Durable, id, what);
            }
            Some(stored) => {
                let guarantee =
                    if stored.id == event.id { Guarantee::Deterministic } else { Guarantee::Durable };
                let what = format!("{}: received {event:?}, stored is {stored:?}", self.label(stream));
                violations.add(guarantee, id, what);
            }
        }
        if !self.wants(event) {
            violations.add(
                Guarantee::Complete,
                id,
                format!("{}: received a kind that its filter excludes", self.label(stream)),
            );
        }
        let before = cursor.last.insert(job, event.sequence);
        if before.is_some_and(|before| event.sequence <= before) {
            let what =
                format!("{}: received sequence {} after {before:?}", self.label(stream), event.sequence);
            return violations.add(Guarantee::Complete, id, what);
        }
        self.check_no_gap(stream, job, before, event.sequence, cursor, violations);
    }

    /// Checks that the stream skipped no event between the last one and `sequence`.
    fn check_no_gap(
        &self,
        stream: &Stream,
        job: usize,
        before: Option<i64>,
        sequence: i64,
        cursor: &Cursor,
        violations: &mut Violations,
    ) {
        let log = self.log(cursor, job);
        let (from, to) = (before.unwrap_or(0), sequence - 1);
        for index in from..to {
            let index = usize::try_from(index).unwrap();
            let Some(event) = log.get(index) else { return };
            if self.wants(event) && (before.is_some() || !self.may_be_past(cursor, job, index)) {
                let resumed = matches!(stream.start, Start::Resume { .. } | Start::AfterSequence(_));
                let guarantee = if resumed { Guarantee::Resumable } else { Guarantee::Complete };
                let what = format!(
                    "{}: received sequence {sequence} after {before:?} without {}",
                    self.label(stream),
                    event.sequence
                );
                return violations.add(guarantee, Some(&event.id), what);
            }
        }
    }

    /// Whether an event may have been stored before a watch from now caught up.
    fn may_be_past(&self, cursor: &Cursor, job: usize, index: usize) -> bool {
        if !self.started_from_now() || cursor.lost.is_some() {
            return self.started_from_now();
        }
        let sent_at = self.indexed.first_sent_at(self.indexed.logs[job].origins[index]);
        self.live_since.is_none_or(|live_since| sent_at <= live_since)
    }

    fn jobs_in_scope(&self) -> Vec<usize> {
        (0..self.indexed.logs.len()).filter(|&job| self.is_in_scope(job)).collect()
    }

    /// Checks that all events acknowledged before this moment were received.
    fn check_acknowledged(
        &mut self,
        stream: &Stream,
        cursor: &Cursor,
        before: Moment,
        milestone: &str,
        violations: &mut Violations,
    ) {
        // What was acknowledged may be of the log after the loss.
        if cursor.lost.is_some() {
            return;
        }
        for job in self.jobs_in_scope() {
            let through = self.indexed.acknowledged_before(job, before);
            self.check_received_through(stream, job, cursor, through, milestone, violations);
        }
    }

    /// Checks that all events of a job through this sequence were received, except
    /// those that the filter of kinds excludes.
    fn check_received_through(
        &mut self,
        stream: &Stream,
        job: usize,
        cursor: &Cursor,
        through: i64,
        milestone: &str,
        violations: &mut Violations,
    ) {
        let (log, last) = (self.log(cursor, job), cursor.last(job));
        let checked = self.checked.get(&job).copied().unwrap_or_default();
        for index in last.unwrap_or(0).max(checked)..through {
            let index = usize::try_from(index).unwrap();
            let Some(event) = log.get(index) else { return };
            if self.wants(event) && (last.is_some() || !self.may_be_past(cursor, job, index)) {
                let what = format!(
                    "{}: {milestone}, but sequence {} was not received",
                    self.label(stream),
                    event.sequence
                );
                return violations.add(Guarantee::Complete, Some(&event.id), what);
            }
        }
        // Only without a violation: the check at the end must find again what a heartbeat lacked.
        self.checked.insert(job, through);
    }

    /// Checks the job state in a message against the log at the same sequence.
    fn check_state(
        &self,
        stream: &Stream,
        state: Option<&JobState>,
        steps: Option<&[StepState]>,
        cursor: &mut Cursor,
        violations: &mut Violations,
    ) {
        let Scope::Job(job) = self.record.scope else { return };
        let Some(state) = state else {
            let what = format!("{}: `caught_up` or `end` has no job state", self.label(stream));
            return violations.add(Guarantee::Deterministic, None, what);
        };
        let mut replay = self.indexed.replay(job);
        let log = self.log(cursor, job);
        for event in log.iter().take(usize::try_from(state.last_sequence).unwrap()) {
            replay.apply(event.kind(), &event.step_tag, event.step_percent);
        }
        let exists = usize::try_from(state.last_sequence).is_ok_and(|last| last <= log.len());
        let is_right = exists
            && (state.status(), state.progress) == (replay.status, Some(replay.progress))
            && steps.is_none_or(|steps| replay.has_steps(steps));
        if !is_right && !self.is_lost_state(stream, job, state, cursor) {
            let what = format!(
                "{}: received {state:?} {steps:?}, by the log it is {:?} {:?}",
                self.label(stream),
                replay.status,
                replay.progress
            );
            violations.add(Guarantee::Deterministic, None, what);
        }
    }

    fn check_end(
        &mut self,
        stream: &Stream,
        message: &Message,
        reason: WatchEndReason,
        state: Option<&JobState>,
        cursor: &Cursor,
        violations: &mut Violations,
    ) {
        match (reason, self.record.scope) {
            (WatchEndReason::Draining, _) => {
                if self.was_fault_free_at_end(stream, message.received_at) || stream.end == StreamEnd::Ok {
                    let what = format!(
                        "{}: `end` DRAINING without a fault, or followed by OK: {:?}",
                        self.label(stream),
                        stream.end
                    );
                    violations.add(Guarantee::Terminating, None, what);
                }
            }
            (WatchEndReason::JobClosed, Scope::Job(job)) => {
                let length = i64::try_from(self.log(cursor, job).len()).unwrap();
                if state.map(|state| state.last_sequence) != Some(length) {
                    let what = format!(
                        "{}: received `end` with {state:?}, but {length} events are stored",
                        self.label(stream)
                    );
                    violations.add(Guarantee::Terminating, None, what);
                }
                self.check_received_through(stream, job, cursor, length, "`end` came", violations);
            }
            (WatchEndReason::LogSetBack, _) if self.may_be_told(stream, message) => {}
            (reason, _) => {
                let what = format!("{}: received `end` with the reason {reason:?}", self.label(stream));
                violations.add(Guarantee::Terminating, None, what);
            }
        }
    }

    /// Whether no fault affected the replica when it ended a stream. A watcher that
    /// reads slowly learns of the end late, after all earlier messages. The end may then
    /// have been at any time since its last event was sent.
    fn was_fault_free_at_end(&self, stream: &Stream, learned_at: Moment) -> bool {
        let last = || stream.messages.iter().rev().find_map(Message::last_event);
        let from = if self.record.reads_promptly {
            learned_at
        } else {
            last().map_or(stream.opened_at, |event| self.earliest_stored(event)).max(stream.opened_at)
        };
        self.indexed.is_fault_free(stream.replica, from, learned_at)
    }

    /// The earliest moment at which an event can have been stored.
    fn earliest_stored(&self, event: &Event) -> Moment {
        let log = self.indexed.job_numbers.get(event.job_id.as_str()).map(|&job| &self.indexed.logs[job]);
        let index = usize::try_from(event.sequence - 1).ok();
        log.zip(index).and_then(|(log, index)| log.earliest.get(index)).copied().unwrap_or_default()
    }

    /// Checks that a watcher that read to the end received all events and, for a closed
    /// job, the message `end`.
    fn check_read_to_end(&mut self, cursor: &Cursor, violations: &mut Violations) {
        let Some(stream) = self.record.streams.last() else { return };
        let last = stream.messages.last().map(|message| &message.body);
        let is_closed = matches!(last, Some(Body::End(WatchEndReason::JobClosed, _)));
        if cursor.lost.is_some() {
            if !is_closed {
                let what = format!("{}: was never told that events are lost", self.label(stream));
                violations.add(Guarantee::LostCommits, None, what);
            }
            return;
        }
        for job in self.jobs_in_scope() {
            let length = i64::try_from(self.indexed.logs[job].events.len()).unwrap();
            self.check_received_through(
                stream,
                job,
                cursor,
                length,
                "the watcher read to the end",
                violations,
            );
        }
        if let Scope::Job(job) = self.record.scope {
            let mut replay = self.indexed.replay(job);
            self.indexed.logs[job]
                .events
                .iter()
                .for_each(|event| replay.apply(event.kind(), &event.step_tag, event.step_percent));
            if replay.closed && !is_closed {
                let what = format!(
                    "{}: the job is closed, but the watch did not end with JOB_CLOSED",
                    self.label(stream)
                );
                violations.add(Guarantee::Terminating, None, what);
            }
        }
    }

    fn is_in_scope(&self, job: usize) -> bool {
        let job_of = &self.indexed.history.jobs[job];
        let (visible, counterpart) = match self.record.scope {
            Scope::OfProvider(provider) => (job_of.provider == provider, job_of.customer),
            Scope::OfCustomer(customer) => (job_of.customer == customer, job_of.provider),
            Scope::Job(own) => return own == job,
        };
        let filter = &self.record.filter;
        visible
            && filter.configuration.is_none_or(|configuration| configuration == job_of.configuration)
            && filter.counterpart.is_none_or(|wanted| wanted == counterpart)
    }

    fn wants(&self, event: &Event) -> bool {
        self.record.kinds.is_empty() || self.record.kinds.contains(&event.kind())
    }
}
