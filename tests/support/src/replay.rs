//! Recomputes a job's status and progress from its events by the documented rules.

use std::collections::HashMap;

use milepost_client::pb::{EventKind, JobStatus, Progress, StepState, StepStatus};

/// A job's state after the events applied so far.
pub struct Replay<'a> {
    /// The tag and the points of each step.
    steps: &'a [(String, i64)],
    /// How far each step is that an event named, in percent.
    percents: HashMap<String, i64>,
    pub status: JobStatus,
    pub progress: Progress,
    pub closed: bool,
}

impl<'a> Replay<'a> {
    pub fn new(steps: &'a [(String, i64)]) -> Self {
        let mut replay = Self {
            steps,
            percents: HashMap::new(),
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

    /// Whether these are the states of the job's steps, in the order of the configuration.
    pub fn has_steps(&self, states: &[StepState]) -> bool {
        let expected = self.steps.iter().map(|(tag, _)| {
            let percent = self.percents.get(tag).copied();
            let status = match percent {
                None => StepStatus::ToCome,
                Some(100) => StepStatus::Done,
                Some(_) => StepStatus::UnderWay,
            };
            (tag, status, percent.unwrap_or(0))
        });
        states.iter().map(|state| (&state.step_tag, state.status(), i64::from(state.percent))).eq(expected)
    }

    /// `step_percent` is that of a progress event.
    pub fn apply(&mut self, kind: EventKind, step_tag: &str, step_percent: Option<i32>) {
        if !step_tag.is_empty() {
            let percent = if kind == EventKind::Step { 100 } else { i64::from(step_percent.unwrap_or(0)) };
            let known = self.percents.entry(step_tag.to_owned()).or_insert(percent);
            *known = percent.max(*known);
        }
        let points = |least| {
            let counted = self.percents.iter().filter(move |(_, percent)| **percent >= least);
            counted.map(|(tag, percent)| self.weight(tag) * percent).sum::<i64>()
        };
        let (points_done, hundredths) = (points(100) / 100, points(0));
        self.progress.points_done = points_done;
        let failed = self.status == JobStatus::Failed;
        self.status = match kind {
            EventKind::Error => JobStatus::Failed,
            EventKind::Complete => JobStatus::Complete,
            EventKind::Info | EventKind::Close | EventKind::Silent if failed => JobStatus::Failed,
            EventKind::Close => JobStatus::Cancelled,
            EventKind::Silent => JobStatus::Stalled,
            EventKind::Step | EventKind::Progress | EventKind::Info => JobStatus::Running,
            EventKind::CancellationRequested | EventKind::Unspecified => self.status,
        };
        let points_total = self.progress.points_total;
        match kind {
            EventKind::Complete => self.progress.percent = 100,
            EventKind::Close => {}
            _ if points_total > 0 => {
                self.progress.percent = i32::try_from((hundredths / points_total).min(99)).unwrap();
            }
            _ => {}
        }
        self.closed = matches!(kind, EventKind::Complete | EventKind::Close);
    }
}
