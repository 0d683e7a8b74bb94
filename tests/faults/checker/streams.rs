//! What each watcher saw, stream by stream, against what is stored.

use std::{collections::HashMap, sync::Arc, time::Duration};

use milepost::pb::{Event, JobState, WatchEndReason};

use super::{Case, Guarantee, Violations, log::is_closing};
use crate::{
    history::{Body, Chain, End, Message, Moment, Scope, Start, Stream},
    watchers::SILENCE,
};

/// How recent an event may be that is not there yet when a heartbeat says that all
/// is: far from what is promised, but everybody here shares a small machine.
const LATE: Duration = Duration::from_secs(3);

/// How far each job was watched: the sequence of the last event received, or
/// from where on it was to be.
type Position = HashMap<usize, i64>;

pub fn check(case: &Case<'_>, violations: &mut Violations) {
    for chain in &case.history.chains {
        Watch { case, chain, live_since: None }.check(violations);
    }
}

struct Watch<'a> {
    case: &'a Case<'a>,
    chain: &'a Chain,
    /// For one that started from now: when it first had caught up. What was
    /// sent later is not in its past.
    live_since: Option<Moment>,
}

impl Watch<'_> {
    fn check(&mut self, violations: &mut Violations) {
        // After each message of each stream.
        let mut positions: Vec<HashMap<usize, Position>> = Vec::new();
        let mut wanted = vec![Vec::new(); self.chain.streams.len()];
        for (stream, messages) in self.chain.streams.iter().filter_map(|stream| match stream.start {
            Start::After { stream, messages } => Some((stream, messages)),
            _ => None,
        }) {
            wanted[stream].push(messages);
        }
        let mut last = None;
        for (number, stream) in self.chain.streams.iter().enumerate() {
            let start = match stream.start {
                Start::After { stream, messages } => positions[stream][&messages].clone(),
                Start::AfterSequence(sequence) => match self.chain.scope {
                    Scope::Job(job) => Position::from([(job, sequence)]),
                    Scope::OfProvider(_) | Scope::OfCustomer(_) => Position::new(),
                },
                Start::Beginning | Start::Now => Position::new(),
            };
            let (kept, end) = self.check_stream(stream, start, &wanted[number], violations);
            positions.push(kept);
            last = Some(end);
        }
        if self.chain.whole
            && let Some(position) = last
        {
            self.check_whole(&position, violations);
        }
    }

    fn starts_now(&self) -> bool {
        self.chain.streams.first().is_some_and(|stream| stream.start == Start::Now)
    }

    fn name(&self, stream: &Stream) -> String {
        let opened = stream.opened.as_secs_f64();
        format!("{}'s stream of {opened:.3} s, at server {}", self.chain.name, stream.replica)
    }

    fn check_stream(
        &mut self,
        stream: &Stream,
        mut position: Position,
        wanted: &[usize],
        violations: &mut Violations,
    ) -> (HashMap<usize, Position>, Position) {
        let mut kept = HashMap::new();
        let (mut caught_up, mut ended) = (false, false);
        for (number, message) in stream.messages.iter().enumerate() {
            if ended {
                violations.add(
                    Guarantee::Complete,
                    None,
                    format!("{}: a message after `end`", self.name(stream)),
                );
            }
            match &message.body {
                Body::Events(events) => {
                    for event in events {
                        self.receive(stream, event, &mut position, violations);
                    }
                }
                Body::CaughtUp(state) => {
                    if std::mem::replace(&mut caught_up, true) {
                        let what = format!("{}: `caught_up` comes twice", self.name(stream));
                        violations.add(Guarantee::Complete, None, what);
                    }
                    if stream.start == Start::Now {
                        if let (Scope::Job(job), Some(state)) = (self.chain.scope, state) {
                            position.insert(job, state.last_sequence);
                        }
                    } else {
                        self.check_known(stream, &position, stream.opened, "`caught_up` came", violations);
                    }
                    if self.starts_now() {
                        self.live_since.get_or_insert(message.at);
                    }
                    self.check_state(stream, state.as_ref(), violations);
                }
                Body::Listed => {
                    self.check_known(stream, &position, stream.opened, "the list ended", violations);
                }
                Body::Heartbeat => {
                    self.check_heartbeat(stream, message, caught_up, &position, violations);
                }
                Body::Ended(reason, state) => {
                    ended = true;
                    self.check_state(stream, state.as_ref(), violations);
                    self.check_end(stream, message, *reason, state.as_ref(), &position, violations);
                }
            }
            if wanted.contains(&(number + 1)) {
                kept.insert(number + 1, position.clone());
            }
        }
        match &stream.end {
            End::Refused(refusal) => {
                let what =
                    format!("{} was refused from {:?} by {refusal:?}", self.name(stream), stream.start);
                violations.add(Guarantee::Resumable, None, what);
            }
            End::Ok if !ended => {
                let what = format!("{} is over with OK and without `end`", self.name(stream));
                violations.add(Guarantee::Terminating, None, what);
            }
            End::Silent if ended => {
                let what = format!("{}: is not over after `end`", self.name(stream));
                violations.add(Guarantee::Terminating, None, what);
            }
            End::Silent => {
                let since = stream.messages.last().map_or(stream.opened, |message| message.at);
                if self.case.is_calm(stream.replica, since, stream.over) {
                    let what = format!(
                        "{}: {SILENCE:?} without a heartbeat, from {:.3} s on, {} `caught_up`",
                        self.name(stream),
                        since.as_secs_f64(),
                        if caught_up { "after" } else { "before" },
                    );
                    violations.add(Guarantee::Complete, None, what);
                }
            }
            End::Broken(why) if self.was_calm_at_end(stream, stream.over) => {
                let over = stream.over.as_secs_f64();
                let what =
                    format!("{}: broke off when all was well, at {over:.3} s: {why}", self.name(stream));
                violations.add(Guarantee::Contract, None, what);
            }
            End::Ok | End::Left | End::Broken(_) => {}
        }
        (kept, position)
    }

    /// After `caught_up` it says that all is there; and ever, that more may come.
    fn check_heartbeat(
        &self,
        stream: &Stream,
        message: &Message,
        caught_up: bool,
        position: &Position,
        violations: &mut Violations,
    ) {
        if caught_up && self.chain.prompt {
            let known = message.at.saturating_sub(LATE);
            self.check_known(stream, position, known, "a heartbeat came", violations);
        }
        if let Scope::Job(job) = self.chain.scope
            && let Some(last) = self.case.logs[job].events.last().filter(|event| is_closing(event))
            && position.get(&job) == Some(&last.sequence)
        {
            let what = format!("{}: a heartbeat after the job was closed", self.name(stream));
            violations.add(Guarantee::Terminating, Some(&last.id), what);
        }
    }

    fn receive(
        &self,
        stream: &Stream,
        event: &Arc<Event>,
        position: &mut Position,
        violations: &mut Violations,
    ) {
        let id = Some(event.id.as_str());
        let Some(&job) = self.case.numbers.get(event.job_id.as_str()).filter(|&&job| self.contains(job))
        else {
            let what = format!("{}: {event:?} is not in its scope", self.name(stream));
            return violations.add(Guarantee::Complete, id, what);
        };
        let log = &self.case.logs[job].events;
        let stored = usize::try_from(event.sequence - 1).ok().and_then(|place| log.get(place));
        match stored {
            None => {
                let what = format!("{}: saw {event:?}, which is not stored", self.name(stream));
                return violations.add(Guarantee::Durable, id, what);
            }
            Some(stored) if !Arc::ptr_eq(stored, event) && stored != event => {
                let guarantee =
                    if stored.id == event.id { Guarantee::Deterministic } else { Guarantee::Durable };
                let what = format!("{}: saw {event:?}, stored is {stored:?}", self.name(stream));
                violations.add(guarantee, id, what);
            }
            Some(_) => {}
        }
        if !self.wants(event) {
            violations.add(Guarantee::Complete, id, format!("{}: a kind not asked for", self.name(stream)));
        }
        let before = position.insert(job, event.sequence);
        if before.is_some_and(|before| event.sequence <= before) {
            let what = format!("{}: after {before:?} again {}", self.name(stream), event.sequence);
            return violations.add(Guarantee::Complete, id, what);
        }
        self.check_between(stream, job, before, event.sequence, violations);
    }

    /// Nothing that is wanted lies between the last event received and this one.
    fn check_between(
        &self,
        stream: &Stream,
        job: usize,
        before: Option<i64>,
        sequence: i64,
        violations: &mut Violations,
    ) {
        let log = &self.case.logs[job].events;
        let (from, to) = (before.unwrap_or(0), sequence - 1);
        for place in from..to {
            let place = usize::try_from(place).unwrap();
            let Some(event) = log.get(place) else { return };
            if self.wants(event) && (before.is_some() || !self.is_past(job, place)) {
                let resumed = matches!(stream.start, Start::After { .. } | Start::AfterSequence(_));
                let guarantee = if resumed { Guarantee::Resumable } else { Guarantee::Complete };
                let what = format!(
                    "{}: went from {before:?} to {sequence} without {}",
                    self.name(stream),
                    event.sequence
                );
                return violations.add(guarantee, Some(&event.id), what);
            }
        }
    }

    /// For a watch from now: whether an event may have been there before.
    fn is_past(&self, job: usize, place: usize) -> bool {
        if !self.starts_now() {
            return false;
        }
        let sent = self.case.first_sent(self.case.logs[job].origins[place]);
        self.live_since.is_none_or(|live_since| sent <= live_since)
    }

    /// What was acknowledged before a moment has been received.
    fn check_known(
        &self,
        stream: &Stream,
        position: &Position,
        before: Moment,
        then: &str,
        violations: &mut Violations,
    ) {
        for job in (0..self.case.logs.len()).filter(|&job| self.contains(job)) {
            let through = self.case.acknowledged(job, before);
            self.check_received(stream, job, position.get(&job).copied(), through, then, violations);
        }
    }

    /// Everything that is wanted of a job through this sequence was received.
    fn check_received(
        &self,
        stream: &Stream,
        job: usize,
        last: Option<i64>,
        through: i64,
        then: &str,
        violations: &mut Violations,
    ) {
        let log = &self.case.logs[job].events;
        for place in last.unwrap_or(0)..through {
            let place = usize::try_from(place).unwrap();
            let Some(event) = log.get(place) else { return };
            if self.wants(event) && (last.is_some() || !self.is_past(job, place)) {
                let what = format!("{}: {then} without {}", self.name(stream), event.sequence);
                return violations.add(Guarantee::Complete, Some(&event.id), what);
            }
        }
    }

    /// What a message says of the job is what the log says at that sequence.
    fn check_state(&self, stream: &Stream, state: Option<&JobState>, violations: &mut Violations) {
        let Scope::Job(job) = self.chain.scope else { return };
        let Some(state) = state else {
            let what = format!("{}: does not say where the job is", self.name(stream));
            return violations.add(Guarantee::Deterministic, None, what);
        };
        let mut film = self.case.film(job);
        let log = &self.case.logs[job].events;
        for event in log.iter().take(usize::try_from(state.last_sequence).unwrap()) {
            film.play(event.kind(), &event.step_tag);
        }
        let is_there = usize::try_from(state.last_sequence).is_ok_and(|last| last <= log.len());
        if !is_there || (state.status(), state.progress) != (film.status, Some(film.progress)) {
            let what = format!(
                "{}: says {state:?}, and by the log it is {:?} {:?}",
                self.name(stream),
                film.status,
                film.progress
            );
            violations.add(Guarantee::Deterministic, None, what);
        }
    }

    fn check_end(
        &self,
        stream: &Stream,
        message: &Message,
        reason: WatchEndReason,
        state: Option<&JobState>,
        position: &Position,
        violations: &mut Violations,
    ) {
        match (reason, self.chain.scope) {
            (WatchEndReason::Draining, _) => {
                if self.was_calm_at_end(stream, message.at) || stream.end == End::Ok {
                    let what = format!("{}: drained, and is over with {:?}", self.name(stream), stream.end);
                    violations.add(Guarantee::Terminating, None, what);
                }
            }
            (WatchEndReason::JobClosed, Scope::Job(job)) => {
                let length = i64::try_from(self.case.logs[job].events.len()).unwrap();
                if state.map(|state| state.last_sequence) != Some(length) {
                    let what = format!("{}: ended with {state:?} of {length} events", self.name(stream));
                    violations.add(Guarantee::Terminating, None, what);
                }
                let last = position.get(&job).copied();
                self.check_received(stream, job, last, length, "`end` came", violations);
            }
            (reason, _) => {
                let what = format!("{}: ended by {reason:?}", self.name(stream));
                violations.add(Guarantee::Terminating, None, what);
            }
        }
    }

    /// Whether nothing was broken when the server ended a stream. Who reads slowly
    /// hears of it late, behind all that came before it, and so it may have been
    /// at any time since the last event received was sent.
    fn was_calm_at_end(&self, stream: &Stream, heard: Moment) -> bool {
        let last = || stream.messages.iter().rev().find_map(Message::last_event);
        let from = if self.chain.prompt {
            heard
        } else {
            last().map_or(stream.opened, |event| self.earliest(event)).max(stream.opened)
        };
        self.case.is_calm(stream.replica, from, heard)
    }

    /// When an event can have been there at the earliest.
    fn earliest(&self, event: &Event) -> Moment {
        let log = self.case.numbers.get(event.job_id.as_str()).map(|&job| &self.case.logs[job]);
        let place = usize::try_from(event.sequence - 1).ok();
        log.zip(place).and_then(|(log, place)| log.earliest.get(place)).copied().unwrap_or_default()
    }

    fn check_whole(&self, position: &Position, violations: &mut Violations) {
        let Some(stream) = self.chain.streams.last() else { return };
        for job in (0..self.case.logs.len()).filter(|&job| self.contains(job)) {
            let length = i64::try_from(self.case.logs[job].events.len()).unwrap();
            let last = position.get(&job).copied();
            self.check_received(stream, job, last, length, "all was over", violations);
        }
        if let Scope::Job(job) = self.chain.scope {
            let mut film = self.case.film(job);
            self.case.logs[job].events.iter().for_each(|event| film.play(event.kind(), &event.step_tag));
            let last = stream.messages.last().map(|message| &message.body);
            if film.closed && !matches!(last, Some(Body::Ended(WatchEndReason::JobClosed, _))) {
                let what = format!("{}: the job is closed and the watch did not end", self.name(stream));
                violations.add(Guarantee::Terminating, None, what);
            }
        }
    }

    fn contains(&self, job: usize) -> bool {
        let of = &self.case.history.jobs[job];
        let (visible, counterpart) = match self.chain.scope {
            Scope::OfProvider(provider) => (of.provider == provider, of.customer),
            Scope::OfCustomer(customer) => (of.customer == customer, of.provider),
            Scope::Job(own) => return own == job,
        };
        let only = &self.chain.only;
        visible
            && only.configuration.is_none_or(|configuration| configuration == of.configuration)
            && only.counterpart.is_none_or(|wanted| wanted == counterpart)
    }

    fn wants(&self, event: &Event) -> bool {
        self.chain.kinds.is_empty() || self.chain.kinds.contains(&event.kind())
    }
}
