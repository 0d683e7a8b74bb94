//! Checks watches where commits are lost: whoever has received a lost event is told, and
//! nobody goes on from it.

use std::{sync::Arc, time::Duration};

use milepost_client::pb::{Event, JobState, WatchEndReason};
use tonic::Code;

use super::{
    Guarantee, Violations,
    losses::Loss,
    streams::{Cursor, WatcherCheck},
};
use crate::history::{Body, Message, Moment, Refusal, Scope, SetBack, Start, Stream};

/// A watcher may be told so long after a server has used the new primary.
const TOLD_WITHIN: Duration = Duration::from_secs(5);
const SET_BACK: &str = "LOG_SET_BACK";

impl<'a> WatcherCheck<'a> {
    /// The log that a stream with this cursor reads: the one of before a loss if it has
    /// received a lost event.
    pub(super) fn log(&self, cursor: &Cursor, job: usize) -> &'a [Arc<Event>] {
        let lost = self.set_back(cursor).and_then(|set_back| set_back.logs.get(&job));
        match lost {
            Some(lost) => &lost.events,
            None => &self.indexed.logs[job].events,
        }
    }

    fn set_back(&self, cursor: &Cursor) -> Option<&'a SetBack> {
        cursor.lost.map(|number| &self.indexed.history.set_backs[number])
    }

    /// A stream that starts after a lost sequence before the loss has the lost log in view.
    pub(super) fn begin_in_lost_log(&self, stream: &Stream, cursor: &mut Cursor) {
        if let (Start::AfterSequence(sequence), Scope::Job(job)) = (stream.start, self.record.scope)
            && !self.is_list(stream)
        {
            let answered_at = stream.messages.first().map(|message| message.received_at);
            let mut lost = self.indexed.losses_after(job, answered_at.unwrap_or(Moment::MAX));
            cursor.lost = lost.find(|loss| loss.concerns(sequence)).map(|loss| loss.number);
        }
    }

    /// Whether an event is one that was lost. From then on the stream has that log in view.
    pub(super) fn is_lost_event(
        &self,
        stream: &Stream,
        job: usize,
        event: &Arc<Event>,
        cursor: &mut Cursor,
    ) -> bool {
        let is_event = |loss: &Loss<'a>| {
            loss.event(event.sequence).is_some_and(|lost| Arc::ptr_eq(lost, event) || lost == event)
        };
        let loss = self.indexed.losses_after(job, stream.opened_at).find(is_event);
        cursor.lost = cursor.lost.or(loss.map(|loss| loss.number));
        loss.is_some_and(|loss| cursor.lost == Some(loss.number))
    }

    /// Whether a state is one that was lost. From then on the stream has that log in view.
    pub(super) fn is_lost_state(
        &self,
        stream: &Stream,
        job: usize,
        state: &JobState,
        cursor: &mut Cursor,
    ) -> bool {
        let mut losses = self.indexed.losses_after(job, stream.opened_at);
        let loss = losses.find(|loss| {
            let length = usize::try_from(state.last_sequence).unwrap_or(usize::MAX);
            let mut replay = self.indexed.replay(job);
            let events = loss.log.events.iter().take(length);
            events.for_each(|event| replay.apply(event.kind(), &event.step_tag, event.step_percent));
            loss.concerns(state.last_sequence)
                && length <= loss.log.events.len()
                && (state.status(), state.progress) == (replay.status, Some(replay.progress))
        });
        cursor.lost = cursor.lost.or(loss.map(|loss| loss.number));
        loss.is_some()
    }

    /// Checks that a stream that has received a lost event does not go on.
    pub(super) fn check_not_gone_on(
        &self,
        stream: &Stream,
        message: &Message,
        cursor: &Cursor,
        violations: &mut Violations,
    ) {
        let Some(set_back) = self.set_back(cursor) else { return };
        let is_late = self.record.reads_promptly && message.received_at > set_back.noticed_at + TOLD_WITHIN;
        let is_new = |event: &Arc<Event>| {
            let job = self.indexed.job_numbers.get(event.job_id.as_str());
            let log = job.map(|&job| &self.indexed.logs[job]);
            let index = usize::try_from(event.sequence - 1).ok();
            log.zip(index).is_some_and(|(log, index)| {
                log.events.get(index) == Some(event)
                    && self.indexed.first_sent_at(log.origins[index]) > set_back.until
            })
        };
        let goes_on = match &message.body {
            Body::Events(events) if events.iter().any(is_new) => Some(Guarantee::LostCommits),
            Body::Events(_) | Body::CaughtUp(..) | Body::Heartbeat => is_late.then_some(Guarantee::InTime),
            Body::End(..) | Body::ListEnd => None,
        };
        if let Some(guarantee) = goes_on {
            let what = format!(
                "{}: went on at {:.3} s after it had received events that were lost by {:.3} s",
                self.label(stream),
                message.received_at.as_secs_f64(),
                set_back.until.as_secs_f64(),
            );
            violations.add(guarantee, None, what);
        }
    }

    /// Checks that the token of a lost event is refused after the loss.
    pub(super) fn check_resumed(&self, stream: &Stream, cursor: &Cursor, violations: &mut Violations) {
        let Some(set_back) = self.set_back(cursor) else { return };
        if matches!(stream.start, Start::Resume { .. })
            && stream.opened_at > set_back.until
            && !stream.messages.is_empty()
        {
            let what = format!(
                "{}: the token of an event that was lost by {:.3} s was accepted",
                self.label(stream),
                set_back.until.as_secs_f64()
            );
            violations.add(Guarantee::LostCommits, None, what);
        }
    }

    /// Whether the server may end or refuse a stream because of lost commits.
    pub(super) fn may_be_refused(&self, stream: &Stream, refusal: &Refusal) -> bool {
        let is_set_back = refusal.code == Code::OutOfRange && refusal.reason == SET_BACK;
        if let Some(Body::End(reason, _)) = stream.messages.last().map(|message| &message.body) {
            return is_set_back && *reason == WatchEndReason::LogSetBack;
        }
        let mut losses = match self.record.scope {
            Scope::Job(job) => self.indexed.losses(job).collect(),
            Scope::OfProvider(_) | Scope::OfCustomer(_) => Vec::new(),
        };
        losses.retain(|loss| stream.ended_at >= loss.set_back.lost_from);
        match (refusal.code, stream.start) {
            (Code::NotFound, _) => losses.iter().any(|loss| loss.log.is_gone),
            (Code::OutOfRange, Start::AfterSequence(sequence)) => {
                losses.iter().any(|loss| loss.concerns(sequence))
            }
            (Code::OutOfRange, Start::Resume { stream: earlier, messages }) => {
                let earlier = &self.record.streams[earlier];
                let received_at = earlier.messages[messages - 1].received_at;
                is_set_back
                    && self.indexed.set_backs_between(earlier.opened_at, stream.ended_at).any(
                        |(_, set_back)| {
                            !self.record.reads_promptly || received_at <= set_back.noticed_at + TOLD_WITHIN
                        },
                    )
            }
            _ => false,
        }
    }

    /// Whether a stream may receive `end` with LOG_SET_BACK. Also a watcher that has received
    /// no lost event may have come beyond what is left: by events that its filter excludes.
    pub(super) fn may_be_told(&self, stream: &Stream, message: &Message) -> bool {
        self.indexed.set_backs_between(stream.opened_at, message.received_at).next().is_some()
    }

    /// Whether the record is of `ListEvents`, whose pages may be of both logs.
    pub(super) fn is_list(&self, stream: &Stream) -> bool {
        matches!(stream.messages.last().map(|message| &message.body), Some(Body::ListEnd))
    }
}
