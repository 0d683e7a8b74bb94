//! What was lost when a standby without the last commits became the primary. The log of
//! before and the log of after are two logs that agree up to the last event kept.

use std::sync::Arc;

use milepost_client::pb::Event;

use super::{Guarantee, IndexedHistory, Violations};
use crate::history::{Batch, History, LostLog, Moment, Outcome, SetBack};

/// What one job lost.
#[derive(Clone, Copy)]
pub(super) struct Loss<'a> {
    /// The number of the set-back in the history.
    pub(super) number: usize,
    pub(super) set_back: &'a SetBack,
    pub(super) log: &'a LostLog,
}

impl<'a> Loss<'a> {
    /// The lost event with this sequence.
    pub(super) fn event(&self, sequence: i64) -> Option<&'a Arc<Event>> {
        let index = usize::try_from(sequence - 1).ok().filter(|&index| index >= self.log.kept)?;
        self.log.events.get(index)
    }

    /// Whether an event with this sequence is lost, and whatever came after it.
    pub(super) fn concerns(&self, sequence: i64) -> bool {
        usize::try_from(sequence).is_ok_and(|sequence| sequence > self.log.kept)
    }

    /// Whether a request sent at this moment may have been executed by the former primary.
    pub(super) fn may_concern_request(&self, sent_at: Moment) -> bool {
        sent_at <= self.set_back.until
    }

    pub(super) fn last(&self) -> Option<&'a Arc<Event>> {
        self.log.events.last()
    }
}

/// The losses of a job, in their order.
pub(super) fn losses(history: &History, job: usize) -> impl Iterator<Item = Loss<'_>> {
    let set_backs = history.set_backs.iter().enumerate();
    set_backs.filter_map(move |(number, set_back)| {
        set_back.logs.get(&job).map(|log| Loss { number, set_back, log })
    })
}

/// Whether a sequence in the answer to a request is of an event that is lost.
pub(super) fn is_lost(history: &History, job: usize, sequence: i64, sent_at: Moment) -> bool {
    losses(history, job).any(|loss| loss.may_concern_request(sent_at) && loss.concerns(sequence))
}

impl<'a> IndexedHistory<'a> {
    pub(super) fn losses(&self, job: usize) -> impl Iterator<Item = Loss<'a>> {
        losses(self.history, job)
    }

    /// The losses that a request sent at this moment, which was executed before, may concern.
    pub(super) fn losses_after(&self, job: usize, sent_at: Moment) -> impl Iterator<Item = Loss<'a>> {
        self.losses(job).filter(move |loss| loss.may_concern_request(sent_at))
    }

    /// Whether the job itself is lost.
    pub(super) fn is_gone(&self, job: usize) -> bool {
        self.losses(job).any(|loss| loss.log.is_gone)
    }

    /// Whether an event of the batch was lost, so that it is not stored, or was sent again.
    pub(super) fn is_touched(&self, batch: &Batch) -> bool {
        let lost = &self.logs[batch.job].lost_ids;
        !lost.is_empty() && batch.events.iter().any(|event| lost.contains(&event.id))
    }

    /// When a batch was first acknowledged without being lost later.
    pub(super) fn acknowledged_at(&self, batch: &Batch) -> Option<Moment> {
        let is_lost = |sequence, sent_at| is_lost(self.history, batch.job, sequence, sent_at);
        batch.attempts.iter().find_map(|attempt| match &attempt.outcome {
            Outcome::Appended(events)
                if !events.iter().any(|event| is_lost(event.sequence, attempt.sent_at)) =>
            {
                Some(attempt.ended_at)
            }
            Outcome::Appended(_) | Outcome::Refused(_) | Outcome::Unknown(_) => None,
        })
    }

    /// The set-backs that may concern a stream or call that was open in this time.
    pub(super) fn set_backs_between(
        &self,
        from: Moment,
        to: Moment,
    ) -> impl Iterator<Item = (usize, &'a SetBack)> {
        let set_backs = self.history.set_backs.iter().enumerate();
        set_backs.filter(move |(_, set_back)| from <= set_back.until && to >= set_back.lost_from)
    }
}

/// Checks that nothing more than the lost events is missing, and each log of before by itself.
pub(super) fn check(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    for job in 0..indexed.logs.len() {
        for Loss { log, .. } in indexed.losses(job) {
            super::log::check_states(indexed, job, &log.events, violations);
            let kept = log.events.iter().take(log.kept);
            // A later loss may have taken what this one left.
            let left = indexed.losses(job).map(|loss| loss.log.kept).min().unwrap_or(0);
            for (index, event) in kept.enumerate().take(left) {
                let stored = indexed.logs[job].events.get(index);
                if !stored.is_some_and(|stored| Arc::ptr_eq(stored, event) || stored == event) {
                    let what = format!("was not lost, but instead of it is stored {stored:?}");
                    violations.add(Guarantee::Durable, Some(&event.id), what);
                }
            }
        }
    }
}
