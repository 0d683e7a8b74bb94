//! Checks that credentials are refused after their end: at once by the server that ended
//! them, and by every server soon after.

use std::time::Duration;

use super::{Guarantee, IndexedHistory, Violations};
use crate::history::{
    CredentialEnd, CredentialRecord, CredentialStream, CredentialStreamEnd, CredentialUse, Moment, UseOutcome,
};

/// A server that did not end the credential itself may accept it for so long.
const EVERYWHERE: Duration = Duration::from_secs(5);
/// A message may come so much later than it was due to be the last: here all processes
/// share a small machine.
const TOLERANCE: Duration = Duration::from_secs(3);

pub fn check(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    for record in &indexed.history.credentials {
        CredentialCheck { indexed, record }.check(violations);
    }
}

struct CredentialCheck<'a> {
    indexed: &'a IndexedHistory<'a>,
    record: &'a CredentialRecord,
}

impl CredentialCheck<'_> {
    fn check(&self, violations: &mut Violations) {
        for used in &self.record.uses {
            if let Some(what) = self.wrong_use(used) {
                let (sent_s, replica) = (used.sent_at.as_secs_f64(), used.replica);
                self.add(&format!("a call sent to server {replica} at {sent_s:.3} s was {what}"), violations);
            }
        }
        for stream in &self.record.streams {
            if let Some(what) = self.wrong_stream(stream) {
                let (opened_s, replica) = (stream.opened_at.as_secs_f64(), stream.replica);
                self.add(
                    &format!("a watch of server {replica}, opened at {opened_s:.3} s, {what}"),
                    violations,
                );
            } else if let Some(what) = self.late_stream(stream) {
                let mut late = Violations::default();
                self.add(&format!("a watch of server {}, {what}", stream.replica), &mut late);
                violations.add_late(late);
            }
        }
    }

    fn add(&self, what: &str, violations: &mut Violations) {
        let CredentialRecord { name, end, .. } = self.record;
        let ended = end.map_or("not ended".to_owned(), |CredentialEnd { acknowledged_at, by, .. }| {
            let by = by.map_or("a server".to_owned(), |by| format!("server {by}"));
            format!("ended by {by}, acknowledged at {:.3} s", acknowledged_at.as_secs_f64())
        });
        violations.add(Guarantee::Confined, None, format!("{name}, {ended}: {what}"));
    }

    fn wrong_use(&self, used: &CredentialUse) -> Option<String> {
        if used.outcome == UseOutcome::Refused && self.was_valid_at(used.ended_at) {
            return Some("refused although the credential was valid".to_owned());
        }
        if used.outcome != UseOutcome::Accepted {
            return None;
        }
        let refused_at = self.refused_at(used.replica, used.sent_at);
        if let Some(refused_at) = refused_at
            && !(self.may_be_undone() && self.restarted(used.replica, refused_at, used.ended_at))
        {
            return Some(format!("accepted after one was refused at {:.3} s", refused_at.as_secs_f64()));
        }
        let accepted_until = self.accepted_until(used.replica)?;
        (used.sent_at > accepted_until).then(|| "accepted".to_owned())
    }

    fn wrong_stream(&self, stream: &CredentialStream) -> Option<String> {
        if let Some((ended_at, end)) = &stream.end {
            if let CredentialStreamEnd::Other(how) = end {
                return Some(format!("ended with {how}"));
            }
            if *end == CredentialStreamEnd::Told && self.was_valid_at(*ended_at) {
                return Some("ended with CREDENTIAL_ENDED although the credential was valid".to_owned());
            }
        }
        None
    }

    /// How a stream outlived its credential.
    fn late_stream(&self, stream: &CredentialStream) -> Option<String> {
        let due_at = self.accepted_until(stream.replica)?.max(stream.opened_at) + TOLERANCE;
        if let Some(last) = stream.last_message_at.filter(|last| *last > due_at) {
            return Some(format!("received a message at {:.3} s", last.as_secs_f64()));
        }
        let ended_in_time = stream.end.as_ref().is_some_and(|(ended_at, _)| *ended_at <= due_at);
        let acknowledged_at = self.record.end?.acknowledged_at;
        (!ended_in_time && self.indexed.is_fault_free(stream.replica, acknowledged_at, due_at))
            .then(|| format!("had not ended at {:.3} s", due_at.as_secs_f64()))
    }

    /// Whether the credential had not been ended at this moment, and was not lost.
    fn was_valid_at(&self, moment: Moment) -> bool {
        let creation_lost = self.may_be_lost(self.record.created_from, self.record.created_by);
        !creation_lost && self.record.end.is_none_or(|end| moment < end.sent_at)
    }

    /// Until when a server may accept the credential; none if it may go on to do so.
    fn accepted_until(&self, replica: usize) -> Option<Moment> {
        let end = self.record.end.filter(|_| !self.may_be_undone())?;
        Some(end.acknowledged_at + if end.by == Some(replica) { Duration::ZERO } else { EVERYWHERE })
    }

    /// Whether the commit that ended the credential may have been lost. A server that has
    /// refused the credential refuses it all the same.
    fn may_be_undone(&self) -> bool {
        self.record.end.is_some_and(|end| self.may_be_lost(end.sent_at, end.acknowledged_at))
    }

    /// Whether a commit between these moments may have been lost.
    fn may_be_lost(&self, from: Moment, to: Moment) -> bool {
        self.indexed.set_backs_between(from, to).next().is_some()
    }

    /// When the server first refused the credential, if that was before this moment.
    fn refused_at(&self, replica: usize, before: Moment) -> Option<Moment> {
        let refusals = self.record.uses.iter().filter(|used| {
            used.replica == replica && used.outcome == UseOutcome::Refused && used.ended_at < before
        });
        refusals.map(|used| used.ended_at).min()
    }

    /// Whether the server lost its memory in this time.
    fn restarted(&self, replica: usize, from: Moment, to: Moment) -> bool {
        self.indexed.history.restarts[replica].iter().any(|&at| from <= at && at <= to)
    }
}
