//! Checks the jobs that replicas returned: after the campaign both return the same,
//! and during it only states that the job can have had at that time.

use std::{collections::HashSet, sync::Arc};

use milepost_client::pb::{self, JobStatus};

use super::{Guarantee, IndexedHistory, Violations};
use crate::history::JobRead;

pub fn check(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    check_found(indexed, violations);
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
        check_job(indexed, replica, read.job, job, &log.events, violations);
    }
    for JobRead { replica, sent_at, ended_at, found } in &indexed.history.job_reads {
        let Some(&number) = indexed.job_numbers.get(found.id.as_str()) else { continue };
        let (least, most) =
            (indexed.acknowledged_before(number, *sent_at), indexed.possible_by(number, *ended_at));
        let last = found.last_sequence;
        // The read may be of a time before events were lost.
        let mut losses = indexed.losses_after(number, *sent_at);
        if losses.any(|loss| loss.concerns(last) && is_state(indexed, number, found, &loss.log.events)) {
            continue;
        }
        if last < least || last > most {
            let (guarantee, at) = (Guarantee::Durable, sent_at.as_secs_f64());
            let what = format!(
                "job {}: server {replica} answered last sequence {last} at {at:.3} s, possible are {least} to {most}",
                found.id
            );
            violations.add(guarantee, None, what);
        } else {
            let log = &indexed.logs[number].events;
            check_job(indexed, *replica, number, found, &log[..usize::try_from(last).unwrap()], violations);
        }
    }
}

/// Checks that each server finds all jobs, except for those that are lost.
fn check_found(indexed: &IndexedHistory<'_>, violations: &mut Violations) {
    for replica in 0..2 {
        let reads = indexed.history.final_reads.iter().filter(|read| read.replica == replica);
        let found: HashSet<usize> = reads.map(|read| read.job).collect();
        for (number, job) in indexed.history.jobs.iter().enumerate() {
            let (found, is_gone) = (found.contains(&number), indexed.is_gone(number));
            if found == is_gone {
                let what = format!(
                    "job {}: its creation was {}, but server {replica} {} it",
                    job.id,
                    if is_gone { "lost" } else { "acknowledged" },
                    if found { "finds" } else { "does not find" },
                );
                let guarantee = if is_gone { Guarantee::LostCommits } else { Guarantee::Durable };
                violations.add(guarantee, None, what);
            }
        }
    }
}

/// Whether a returned job is in a state that it has in a log.
fn is_state(indexed: &IndexedHistory<'_>, number: usize, job: &pb::Job, log: &[Arc<pb::Event>]) -> bool {
    usize::try_from(job.last_sequence)
        .ok()
        .and_then(|last| log.get(..last))
        .is_some_and(|log| answered(job) == expected(indexed, number, log))
}

/// What is compared of a job: its last sequence, status and progress, and whether it is closed.
type State = (i64, JobStatus, Option<pb::Progress>, bool);

fn answered(job: &pb::Job) -> State {
    (job.last_sequence, job.status(), job.progress, job.closed_at.is_some())
}

/// The state of a job after all events of a log.
fn expected(indexed: &IndexedHistory<'_>, number: usize, log: &[Arc<pb::Event>]) -> State {
    let mut replay = indexed.replay(number);
    for event in log {
        replay.apply(event.kind(), &event.step_tag, event.step_percent);
    }
    (i64::try_from(log.len()).unwrap(), replay.status, Some(replay.progress), replay.closed)
}

/// Checks that a returned job is in the state after all events of a log.
fn check_job(
    indexed: &IndexedHistory<'_>,
    replica: usize,
    number: usize,
    job: &pb::Job,
    log: &[Arc<pb::Event>],
    violations: &mut Violations,
) {
    let (answered, expected) = (answered(job), expected(indexed, number, log));
    if answered != expected {
        let id = &indexed.history.jobs[number].id;
        let what = format!("job {id}: server {replica} answered {answered:?}, by its log it is {expected:?}");
        violations.add(Guarantee::Deterministic, None, what);
    }
}
