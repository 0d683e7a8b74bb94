//! What each server says of each job in the end: the same.

use std::sync::Arc;

use milepost::pb::JobStatus;

use super::{Case, Guarantee, Violations};

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
        let mut film = case.film(read.job);
        for event in &log.events {
            film.play(event.kind(), &event.step_tag);
        }
        let last = i64::try_from(log.events.len()).unwrap();
        let said = (job.last_sequence, job.status(), job.progress, job.closed_at.is_some());
        let due: (i64, JobStatus, _, bool) = (last, film.status, Some(film.progress), film.closed);
        if said != due {
            let what = format!("job {id}: server {server} says {said:?}, and by its log it is {due:?}");
            violations.add(Guarantee::Deterministic, None, what);
        }
    }
}
