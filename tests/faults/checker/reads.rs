//! Checks the jobs that replicas returned: after the campaign both return the same,
//! and during it only states that the job can have had at that time.

use std::sync::Arc;

use milepost::pb::{self, JobStatus};

use super::{Guarantee, IndexedHistory, Violations};
use crate::history::JobRead;

pub fn check(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    for read in &indexed.history.final_reads {
        let log = &indexed.logs[read.job];
        let job = &read.found;
        let (replica, id) = (read.replica, &indexed.history.jobs[read.job].id);
        if read.log.len() != log.events.len() {
            let what = format!(
                "job {id}: server {replica} lists {} events, server 0 lists {}",
                read.log.len(),
                log.events.len()
            );
            violations.add(Guarantee::Durable, None, what);
        }
        for (event, reference) in read.log.iter().zip(&log.events) {
            if !Arc::ptr_eq(event, reference) && event != reference {
                let what = format!("server {replica} lists {event:?}, server 0 lists {reference:?}");
                violations.add(Guarantee::Deterministic, Some(&event.id), what);
            }
        }
        let last = i64::try_from(log.events.len()).unwrap();
        check_job(indexed, replica, read.job, job, last, violations);
    }
    for JobRead { replica, sent_at, ended_at, found } in &indexed.history.job_reads {
        let Some(&number) = indexed.job_numbers.get(found.id.as_str()) else { continue };
        let (least, most) =
            (indexed.acknowledged_before(number, *sent_at), indexed.possible_by(number, *ended_at));
        let last = found.last_sequence;
        if last < least || last > most {
            let (guarantee, at) = (Guarantee::Durable, sent_at.as_secs_f64());
            let what = format!(
                "job {}: server {replica} answered last sequence {last} at {at:.3} s, possible are {least} to {most}",
                found.id
            );
            violations.add(guarantee, None, what);
        } else {
            check_job(indexed, *replica, number, found, last, violations);
        }
    }
}

/// Checks that a returned job is in the state that its log has after `last` events.
fn check_job(
    indexed: &IndexedHistory<'_>,
    replica: usize,
    number: usize,
    job: &pb::Job,
    last: i64,
    violations: &mut Violations,
) {
    let mut replay = indexed.replay(number);
    for event in indexed.logs[number].events.iter().take(usize::try_from(last).unwrap()) {
        replay.apply(event.kind(), &event.step_tag);
    }
    let answered = (job.last_sequence, job.status(), job.progress, job.closed_at.is_some());
    let expected: (i64, JobStatus, _, bool) = (last, replay.status, Some(replay.progress), replay.closed);
    if answered != expected {
        let id = &indexed.history.jobs[number].id;
        let what = format!("job {id}: server {replica} answered {answered:?}, by its log it is {expected:?}");
        violations.add(Guarantee::Deterministic, None, what);
    }
}
