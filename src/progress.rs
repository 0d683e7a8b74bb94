//! Status and progress of a job, computed from nothing but the events of its log.

use diesel::{deserialize::FromSqlRow, expression::AsExpression};
use uuid::Uuid;

use crate::{limits::CONFIGURATION_STEPS, schema::sql_types};

/// The status of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::JobStatus)]
pub enum JobStatus {
    /// The job has no event yet.
    Pending,
    /// The job has events and is neither failed nor closed.
    Running,
    /// An error is the last event, apart from infos and a close.
    Failed,
    /// A complete event closed the job.
    Complete,
    /// A close event closed the job before it was complete.
    Cancelled,
}

impl JobStatus {
    /// The name in the API, without the enum's prefix.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Running => "RUNNING",
            Self::Failed => "FAILED",
            Self::Complete => "COMPLETE",
            Self::Cancelled => "CANCELLED",
        }
    }
}

/// The kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::EventKind)]
pub enum EventKind {
    /// A step of the job is done; without a step, it counts nothing.
    Step,
    /// The job failed; a later step event recovers it.
    Error,
    /// Information that does not change a failed job.
    Info,
    /// The whole job is done.
    Complete,
    /// `CloseJob` closed the job.
    Close,
}

impl EventKind {
    /// Whether no client can append it. Such an event counts against nobody's quota.
    pub fn is_written_by_server(self) -> bool {
        match self {
            Self::Step | Self::Error | Self::Info | Self::Complete => false,
            Self::Close => true,
        }
    }
}

/// Progress of a job in the points of its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Sum of the points of the distinct steps that are done.
    pub points_done: i64,
    /// Sum of the points of all steps.
    pub points_total: i64,
    /// Whole percent, 0 to 100.
    pub percent: i16,
}

/// The weight of each step of a configuration, by position. It is the step's points,
/// or 1 for every step if all points are zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weights(Vec<i64>);

impl Weights {
    /// Takes the points of the steps, in order.
    pub fn new(points: impl IntoIterator<Item = i64>) -> Self {
        let mut steps: Vec<i64> = points.into_iter().collect();
        if steps.iter().all(|&points| points == 0) {
            steps.fill(1);
        }
        Self(steps)
    }

    /// The sum of all weights.
    pub fn total(&self) -> i64 {
        self.0.iter().sum()
    }
}

/// The set of the steps of a configuration that are done, by position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSet([u8; CONFIGURATION_STEPS / 8]);

impl StepSet {
    /// Decodes the stored form. Bits beyond the largest number of steps are dropped.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(std::array::from_fn(|index| bytes.get(index).copied().unwrap_or_default()))
    }

    /// The stored form: one bit a step, lowest bit of each byte first, without zero
    /// bytes at the end.
    pub fn as_bytes(&self) -> &[u8] {
        let end = self.0.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        &self.0[..end]
    }

    /// Returns true if the set did not contain the step.
    fn insert(&mut self, step: usize) -> bool {
        let (byte, bit) = (step / 8, 1 << (step % 8));
        let inserted = self.0[byte] & bit == 0;
        self.0[byte] |= bit;
        inserted
    }
}

/// The state of a job after one of the events of its log, or before the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobState {
    /// Sequence of the last event; 0 if there is none.
    pub last_sequence: i64,
    /// Id of that event.
    pub last_event_id: Option<Uuid>,
    /// Status after that event.
    pub status: JobStatus,
    /// Whether the log takes no further event.
    pub closed: bool,
    /// Progress after that event.
    pub progress: Progress,
    /// The steps that have a step event.
    pub steps_done: StepSet,
}

impl JobState {
    /// The state of a job without events.
    pub fn pending(weights: &Weights) -> Self {
        Self {
            last_sequence: 0,
            last_event_id: None,
            status: JobStatus::Pending,
            closed: false,
            progress: Progress { points_done: 0, points_total: weights.total(), percent: 0 },
            steps_done: StepSet::default(),
        }
    }

    /// Applies the next event, which has this id; `step` is the position of its step. Fails
    /// and changes nothing if the job is closed.
    pub fn apply(
        &mut self,
        id: Uuid,
        kind: EventKind,
        step: Option<usize>,
        weights: &Weights,
    ) -> Result<(), Closed> {
        if self.closed {
            return Err(Closed(self.status));
        }
        if let (EventKind::Step, Some(step)) = (kind, step)
            && self.steps_done.insert(step)
        {
            self.progress.points_done += weights.0[step];
        }
        self.status = match (kind, self.status) {
            (EventKind::Info | EventKind::Close, JobStatus::Failed) | (EventKind::Error, _) => {
                JobStatus::Failed
            }
            (EventKind::Step | EventKind::Info, _) => JobStatus::Running,
            (EventKind::Complete, _) => JobStatus::Complete,
            (EventKind::Close, _) => JobStatus::Cancelled,
        };
        self.closed = matches!(kind, EventKind::Complete | EventKind::Close);
        self.progress.percent = match kind {
            EventKind::Complete => 100,
            EventKind::Close => self.progress.percent,
            EventKind::Step | EventKind::Info | EventKind::Error => {
                self.progress.percent.max(percent(&self.progress))
            }
        };
        self.last_sequence += 1;
        self.last_event_id = Some(id);
        Ok(())
    }
}

/// The job is closed with this status, so that its log never changes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed(pub JobStatus);

/// Returns at most 99: only a complete event makes it 100.
fn percent(progress: &Progress) -> i16 {
    let percent = progress.points_done.saturating_mul(100).checked_div(progress.points_total);
    percent.map_or(0, |percent| i16::try_from(percent.min(99)).unwrap_or(99))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(points: &[i64]) -> Weights {
        Weights::new(points.iter().copied())
    }

    /// The state of a job after these events.
    fn job(events: &[(EventKind, Option<usize>)], weights: &Weights) -> JobState {
        let mut state = JobState::pending(weights);
        for &(kind, step) in events {
            state.apply(Uuid::nil(), kind, step, weights).expect("open");
        }
        state
    }

    #[test]
    fn every_kind_of_event_moves_every_status_as_documented() {
        use EventKind::{Close, Complete, Error, Info, Step};
        use JobStatus::{Cancelled, Failed, Pending, Running};
        let weights = weights(&[1, 1]);
        let open: [(&[_], _, [_; 5]); 3] = [
            (&[], Pending, [Running, Running, Failed, JobStatus::Complete, Cancelled]),
            (&[(Info, None)], Running, [Running, Running, Failed, JobStatus::Complete, Cancelled]),
            (&[(Error, None)], Failed, [Running, Failed, Failed, JobStatus::Complete, Failed]),
        ];
        for (events, status, then) in open {
            let before = job(events, &weights);
            assert_eq!((before.status, before.closed), (status, false));
            for (kind, expected) in [Step, Info, Error, Complete, Close].into_iter().zip(then) {
                let mut after = before;
                assert_eq!(
                    after.apply(Uuid::nil(), kind, Some(0), &weights),
                    Ok(()),
                    "{kind:?} on {status:?}"
                );
                assert_eq!(after.status, expected, "{kind:?} on {status:?}");
                assert_eq!(after.closed, matches!(kind, Complete | Close), "{kind:?} on {status:?}");
                assert_eq!(after.last_sequence, before.last_sequence + 1);
            }
        }
        for (end, before) in [(Complete, Running), (Close, Running), (Close, Failed)] {
            let first = if before == Failed { Error } else { Info };
            let closed = job(&[(first, None), (end, None)], &weights);
            for kind in [Step, Info, Error, Complete, Close] {
                let mut after = closed;
                assert_eq!(after.apply(Uuid::nil(), kind, Some(0), &weights), Err(Closed(closed.status)));
                assert_eq!(after, closed, "a refused event changes nothing");
            }
        }
    }

    #[test]
    fn a_repeated_step_counts_once_and_percent_never_falls() {
        let weights = weights(&[10, 30, 60]);
        let mut state = JobState::pending(&weights);
        let mut seen = Vec::new();
        for (kind, step) in [
            (EventKind::Step, Some(1)),
            (EventKind::Step, Some(1)),
            (EventKind::Error, Some(2)),
            (EventKind::Step, Some(0)),
            (EventKind::Step, Some(2)),
            (EventKind::Complete, None),
        ] {
            state.apply(Uuid::nil(), kind, step, &weights).expect("open");
            seen.push((state.progress.points_done, state.progress.percent));
        }
        assert_eq!(seen, [(30, 30), (30, 30), (30, 30), (40, 40), (100, 99), (100, 100)]);
    }

    #[test]
    fn percent_is_rounded_down() {
        let weights = weights(&[1, 1, 1]);
        assert_eq!(job(&[(EventKind::Step, Some(0))], &weights).progress.percent, 33);
        let most = job(&[(EventKind::Step, Some(0)), (EventKind::Step, Some(2))], &weights);
        assert_eq!(most.progress.percent, 66);
    }

    #[test]
    fn steps_without_points_weigh_one_each() {
        let weights = weights(&[0, 0, 0, 0]);
        assert_eq!(weights.total(), 4);
        let state = job(&[(EventKind::Step, Some(3))], &weights);
        assert_eq!(state.progress, Progress { points_done: 1, points_total: 4, percent: 25 });
    }

    #[test]
    fn a_job_without_steps_has_zero_percent_until_complete() {
        let weights = weights(&[]);
        let state = job(&[(EventKind::Info, None)], &weights);
        assert_eq!(state.progress, Progress { points_done: 0, points_total: 0, percent: 0 });
        let state = job(&[(EventKind::Step, None)], &weights);
        assert_eq!(state.progress, Progress { points_done: 0, points_total: 0, percent: 0 });
        let state = job(&[(EventKind::Info, None), (EventKind::Complete, None)], &weights);
        assert_eq!(state.progress, Progress { points_done: 0, points_total: 0, percent: 100 });
    }

    #[test]
    fn close_does_not_change_percent() {
        let weights = weights(&[1, 3]);
        let state = job(&[(EventKind::Step, Some(0)), (EventKind::Close, None)], &weights);
        assert_eq!((state.status, state.progress.percent), (JobStatus::Cancelled, 25));
    }

    #[test]
    fn a_step_set_is_equal_after_encoding_and_decoding() {
        let mut set = StepSet::default();
        assert_eq!(set.as_bytes(), b"");
        for step in [0, 8, CONFIGURATION_STEPS - 1] {
            assert!(set.insert(step));
            assert!(!set.insert(step));
            assert_eq!(StepSet::from_bytes(set.as_bytes()), set);
        }
        assert_eq!(set.as_bytes().len(), 25);
    }
}
