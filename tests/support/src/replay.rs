//! Recomputes a job's status and progress from its events by the documented rules.

use std::collections::HashSet;

use milepost_client::pb::{EventKind, JobStatus, Progress};

/// A job's state after the events applied so far.
pub struct Replay<'a> {
    /// The tag and the points of each step.
    steps: &'a [(String, i64)],
    steps_done: HashSet<String>,
    pub status: JobStatus,
    pub progress: Progress,
    pub closed: bool,
}

impl<'a> Replay<'a> {
    pub fn new(steps: &'a [(String, i64)]) -> Self {
        let mut replay = Self {
            steps,
            steps_done: HashSet::new(),
            status: JobStatus::Pending,
            progress: Progress::default(),
            closed: false,
        };
        replay.progress.points_total = steps.iter().map(|(tag, _)| replay.weight(tag)).sum();
        replay
    }

    /// The points of a step; 1 each if no step of the configuration has points.
    fn weight(&self, tag: &str) -> i64 {
        let weighs_one = self.steps.iter().all(|(_, points)| *points == 0);
        let step = self.steps.iter().find(|(known, _)| known == tag);
        step.map_or(0, |(_, points)| if weighs_one { 1 } else { *points })
    }

    pub fn apply(&mut self, kind: EventKind, step_tag: &str) {
        if kind == EventKind::Step && !step_tag.is_empty() && self.steps_done.insert(step_tag.to_owned()) {
            self.progress.points_done += self.weight(step_tag);
        }
        let failed = self.status == JobStatus::Failed;
        self.status = match kind {
            EventKind::Error => JobStatus::Failed,
            EventKind::Complete => JobStatus::Complete,
            EventKind::Info | EventKind::Close if failed => JobStatus::Failed,
            EventKind::Close => JobStatus::Cancelled,
            EventKind::Step | EventKind::Info => JobStatus::Running,
            EventKind::Unspecified => self.status,
        };
        let Progress { points_done, points_total, .. } = self.progress;
        match kind {
            EventKind::Complete => self.progress.percent = 100,
            EventKind::Close => {}
            _ if points_total > 0 => {
                self.progress.percent = i32::try_from((points_done * 100 / points_total).min(99)).unwrap();
            }
            _ => {}
        }
        self.closed = matches!(kind, EventKind::Complete | EventKind::Close);
    }
}
