//! A bounded memory of jobs.

use std::{collections::HashSet, mem};

use crate::pb::append_events_request::Job;

/// The jobs that were added last. Each is known at least until `count` others were added.
#[derive(Debug)]
pub(super) struct RecentJobs {
    count: usize,
    newer: HashSet<Job>,
    older: HashSet<Job>,
}

impl RecentJobs {
    pub(super) fn new(count: usize) -> Self {
        Self { count, newer: HashSet::new(), older: HashSet::new() }
    }

    /// Returns whether the job was not known.
    pub(super) fn add(&mut self, job: &Job) -> bool {
        if self.newer.contains(job) {
            return false;
        }
        let is_new = !self.older.contains(job);
        self.newer.insert(job.clone());
        if self.newer.len() >= self.count {
            self.older = mem::take(&mut self.newer);
        }
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str) -> Job {
        Job::JobId(id.to_owned())
    }

    #[test]
    fn a_job_is_known_until_so_many_others_were_added_and_their_number_is_bounded() {
        for before in 0..3 {
            let mut jobs = RecentJobs::new(3);
            for n in 0..before {
                assert!(jobs.add(&job(&format!("before {n}"))));
            }
            let added = ["a", "b", "c", "a", "b", "c", "a"].map(|id| jobs.add(&job(id)));
            assert_eq!(added, [true, true, true, false, false, false, false]);
            assert!(jobs.add(&Job::ProviderJobId("a".to_owned())));
            for n in 0..100 {
                assert!(jobs.add(&job(&format!("after {n}"))));
                assert!(jobs.newer.len() + jobs.older.len() <= 6);
            }
            assert!(jobs.add(&job("a")));
        }
    }
}
