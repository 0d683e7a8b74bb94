//! What each server says of each job: the same in the end, and before that what
//! can be.

use std::sync::Arc;

use milepost::pb::{self, JobStatus};

use super::{Case, Guarantee, Violations};
use crate::history::Glance;

pub fn check(case: &Case<'_>, violations: &mut Violations) {
    for read in &case.history.reads {
        let log = &case.logs[read.job];
        let job = &read.found;
        let (server, id) = (read.replica, &case.history.jobs[read.job].id);
        if read.log.len() != log.events.len() {
            let what = format!(
                "job {id}: server {server} lists {} events, server 0 {}",
                read.log.len(),
                log.events.len()
            );
            violations.add(Guarantee::Durable, None, what);
        }
        for (one, other) in read.log.iter().zip(&log.events) {
            if !Arc::ptr_eq(one, other) && one != other {
                let what = format!("server {server} lists {one:?}, server 0 {other:?}");
                violations.add(Guarantee::Deterministic, Some(&one.id), what);
            }
        }
        let last = i64::try_from(log.events.len()).unwrap();
        check_job(case, server, read.job, job, last, violations);
    }
    for Glance { replica, sent, over, found } in &case.history.glances {
        let Some(&number) = case.numbers.get(found.id.as_str()) else { continue };
        let (least, most) = (case.acknowledged(number, *sent), case.possible(number, *over));
        let last = found.last_sequence;
        if last < least || last > most {
            let (guarantee, at) = (Guarantee::Durable, sent.as_secs_f64());
            let what = format!(
                "job {}: server {replica} said {last} at {at:.3} s, and it was between {least} and {most}",
                found.id
            );
            violations.add(guarantee, None, what);
        } else {
            check_job(case, *replica, number, found, last, violations);
        }
    }
}

/// What a server says of a job is what its log says at a sequence.
fn check_job(
    case: &Case<'_>,
    server: usize,
    number: usize,
    job: &pb::Job,
    last: i64,
    violations: &mut Violations,
) {
    let mut film = case.film(number);
    for event in case.logs[number].events.iter().take(usize::try_from(last).unwrap()) {
        film.play(event.kind(), &event.step_tag);
    }
    let said = (job.last_sequence, job.status(), job.progress, job.closed_at.is_some());
    let due: (i64, JobStatus, _, bool) = (last, film.status, Some(film.progress), film.closed);
    if said != due {
        let id = &case.history.jobs[number].id;
        let what = format!("job {id}: server {server} says {said:?}, and by its log it is {due:?}");
        violations.add(Guarantee::Deterministic, None, what);
    }
}
