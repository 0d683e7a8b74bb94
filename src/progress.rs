//! Status and progress of a job, computed from nothing but the events of its log.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use diesel::{deserialize::FromSqlRow, expression::AsExpression};
use uuid::Uuid;

use crate::{limits::STEP_PERCENT, schema::sql_types};

/// The status of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::JobStatus)]
pub enum JobStatus {
    /// The job has no event of its provider yet.
    Pending,
    /// The job has events and is neither failed nor closed.
    Running,
    /// The provider has been silent for longer than the job allows.
    Stalled,
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
            Self::Stalled => "STALLED",
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
    /// A step of the job is under way.
    Progress,
    /// The job's customer asked the provider to stop.
    CancellationRequested,
    /// The provider was silent for too long.
    Silent,
}

impl EventKind {
    /// Whether no client can append it. Such an event counts against nobody's quota.
    pub fn is_written_by_server(self) -> bool {
        match self {
            Self::Step | Self::Error | Self::Info | Self::Complete | Self::Progress => false,
            Self::Close | Self::CancellationRequested | Self::Silent => true,
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

/// How far a step of a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepState {
    /// No event names the step.
    ToCome,
    /// An event names the step. The percent is the highest of its progress events, 0 to 99.
    UnderWay(u8),
    /// The step has a step event.
    Done,
}

impl StepState {
    const DONE: u8 = 2 + STEP_PERCENT;

    /// The stored form, which grows with each change of a step.
    fn to_byte(self) -> u8 {
        match self {
            Self::ToCome => 0,
            Self::UnderWay(percent) => 1 + percent,
            Self::Done => Self::DONE,
        }
    }

    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::ToCome,
            Self::DONE.. => Self::Done,
            under_way => Self::UnderWay(under_way - 1),
        }
    }
}

/// How far each step of a configuration is, by position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steps(Arc<[u8]>);

impl Steps {
    /// The stored form: a byte a step, up to the last step that is not to come.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The state of the step at this position.
    pub fn state(&self, step: usize) -> StepState {
        StepState::from_byte(self.0.get(step).copied().unwrap_or_default())
    }

    /// Moves a step on. Returns false if the step is as far already.
    fn move_to(&mut self, step: usize, state: StepState) -> bool {
        let byte = state.to_byte();
        if byte <= self.state(step).to_byte() {
            return false;
        }
        let mut bytes = self.0.to_vec();
        bytes.resize(bytes.len().max(step + 1), StepState::ToCome.to_byte());
        bytes[step] = byte;
        self.0 = bytes.into();
        true
    }

    /// A hundred times the points of the steps under way, each counted by its percent.
    fn hundredths_under_way(&self, weights: &Weights) -> i64 {
        let percents = self.0.iter().map(|&byte| match StepState::from_byte(byte) {
            StepState::UnderWay(percent) => i64::from(percent),
            StepState::ToCome | StepState::Done => 0,
        });
        percents.zip(&weights.0).map(|(percent, points)| percent * points).sum()
    }
}

/// From the stored form.
impl From<Vec<u8>> for Steps {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

/// The state of a job after one of the events of its log, or before the first.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// How far each step is.
    pub steps: Steps,
    /// Sequence of the event that finished a step last; 0 without one.
    pub last_step_sequence: i64,
    /// Whether the provider has been silent for too long since its last event.
    pub silent: bool,
    /// Whether the customer asked to stop.
    pub cancellation: Cancellation,
}

/// Whether the customer of a job asked to stop it, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cancellation {
    #[default]
    NotRequested,
    /// By an event that is being committed, so that its time is not known yet.
    Now,
    RequestedAt(DateTime<Utc>),
}

impl Cancellation {
    /// The same once the events up to now are committed, the last ones at this time.
    pub fn committed(self, at: DateTime<Utc>) -> Self {
        match self {
            Self::Now => Self::RequestedAt(at),
            Self::NotRequested | Self::RequestedAt(_) => self,
        }
    }

    /// When it was requested, as far as that is known.
    pub fn requested_at(self) -> Option<DateTime<Utc>> {
        match self {
            Self::RequestedAt(at) => Some(at),
            Self::NotRequested | Self::Now => None,
        }
    }
}

impl From<Option<DateTime<Utc>>> for Cancellation {
    fn from(at: Option<DateTime<Utc>>) -> Self {
        at.map_or(Self::NotRequested, Self::RequestedAt)
    }
}

/// What an event says, as far as status and progress follow from it.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub kind: EventKind,
    /// The position of the event's step, if it names one.
    pub step: Option<usize>,
    /// How far a progress event says that its step is, 0 to 99.
    pub step_percent: Option<u8>,
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
            steps: Steps::default(),
            last_step_sequence: 0,
            silent: false,
            cancellation: Cancellation::NotRequested,
        }
    }

    /// Applies the next event, which has this id. Fails and changes nothing if the job does
    /// not take such an event.
    pub fn apply(&mut self, id: Uuid, change: Change, weights: &Weights) -> Result<(), Refused> {
        let Change { kind, step, step_percent } = change;
        match kind {
            EventKind::CancellationRequested if self.cancellation != Cancellation::NotRequested => {
                return Err(Refused::CancellationRequested);
            }
            _ if self.closed => return Err(Refused::Closed(self.status)),
            EventKind::Silent if self.silent => return Err(Refused::Silent),
            EventKind::CancellationRequested => self.cancellation = Cancellation::Now,
            EventKind::Silent => self.silent = true,
            EventKind::Step
            | EventKind::Error
            | EventKind::Info
            | EventKind::Complete
            | EventKind::Close
            | EventKind::Progress => self.silent = false,
        }
        let is_done = kind == EventKind::Step;
        let moved = step.is_some_and(|step| {
            let percent = step_percent.unwrap_or(0).min(STEP_PERCENT);
            self.steps.move_to(step, if is_done { StepState::Done } else { StepState::UnderWay(percent) })
        });
        if let (true, true, Some(step)) = (moved, is_done, step) {
            self.progress.points_done += weights.0[step];
            self.last_step_sequence = self.last_sequence + 1;
        }
        self.status = match (kind, self.status) {
            (EventKind::Info | EventKind::Close | EventKind::Silent, JobStatus::Failed)
            | (EventKind::Error, _) => JobStatus::Failed,
            (EventKind::Step | EventKind::Progress | EventKind::Info, _) => JobStatus::Running,
            (EventKind::Complete, _) => JobStatus::Complete,
            (EventKind::Close, _) => JobStatus::Cancelled,
            (EventKind::Silent, _) => JobStatus::Stalled,
            (EventKind::CancellationRequested, status) => status,
        };
        self.closed = matches!(kind, EventKind::Complete | EventKind::Close);
        if kind == EventKind::Complete {
            self.progress.percent = 100;
        } else if moved {
            self.progress.percent = self.progress.percent.max(self.percent(weights));
        }
        self.last_sequence += 1;
        self.last_event_id = Some(id);
        Ok(())
    }

    /// At most 99: only a complete event makes it 100.
    fn percent(&self, weights: &Weights) -> i16 {
        let Progress { points_done, points_total, .. } = self.progress;
        let hundredths = 100 * points_done + self.steps.hundredths_under_way(weights);
        let percent = hundredths.checked_div(points_total);
        percent.map_or(0, |percent| i16::try_from(percent.min(99)).unwrap_or(99))
    }
}

/// Why a job does not take an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The job is closed with this status, so that its log never changes again.
    Closed(JobStatus),
    /// Its cancellation was requested before.
    CancellationRequested,
    /// It is silent since its provider's last event.
    Silent,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CONFIGURATION_STEPS;

    fn weights(points: &[i64]) -> Weights {
        Weights::new(points.iter().copied())
    }

    /// The state of a job after these events.
    fn job(events: &[(EventKind, Option<usize>)], weights: &Weights) -> JobState {
        let mut state = JobState::pending(weights);
        for &(kind, step) in events {
            state.apply(Uuid::nil(), Change { kind, step, step_percent: None }, weights).expect("open");
        }
        state
    }

    /// A progress event of a step.
    fn progress(step: usize, percent: u8) -> Change {
        Change { kind: EventKind::Progress, step: Some(step), step_percent: Some(percent) }
    }

    #[test]
    fn every_kind_of_event_moves_every_status_as_documented() {
        use EventKind::{CancellationRequested, Close, Complete, Error, Info, Progress, Silent, Step};
        use JobStatus::{Cancelled, Failed, Pending, Running, Stalled};
        let weights = weights(&[1, 1]);
        let kinds = [Step, Progress, Info, Error, Complete, Close, Silent, CancellationRequested];
        let change = |kind| Change { kind, step: Some(0), step_percent: None };
        let done = JobStatus::Complete;
        let open: [(&[_], _, [_; 8]); 3] = [
            (&[], Pending, [Running, Running, Running, Failed, done, Cancelled, Stalled, Pending]),
            (
                &[(Info, None)],
                Running,
                [Running, Running, Running, Failed, done, Cancelled, Stalled, Running],
            ),
            (&[(Error, None)], Failed, [Running, Running, Failed, Failed, done, Failed, Failed, Failed]),
        ];
        for (events, status, then) in open {
            let before = job(events, &weights);
            assert_eq!((before.status, before.closed), (status, false));
            for (kind, expected) in kinds.into_iter().zip(then) {
                let mut after = before.clone();
                assert_eq!(
                    after.apply(Uuid::nil(), change(kind), &weights),
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
            for kind in kinds {
                let mut after = closed.clone();
                assert_eq!(
                    after.apply(Uuid::nil(), change(kind), &weights),
                    Err(Refused::Closed(closed.status))
                );
                assert_eq!(after, closed, "a refused event changes nothing");
            }
        }
    }

    #[test]
    fn a_job_is_silent_once_between_two_events_of_its_provider_and_stalled_until_the_next() {
        use EventKind::{CancellationRequested, Close, Error, Info, Silent};
        let weights = weights(&[1]);
        let apply = |state: &mut JobState, kind| {
            state.apply(Uuid::nil(), Change { kind, step: None, step_percent: None }, &weights)
        };
        for (first, stalled) in [(Info, JobStatus::Stalled), (Error, JobStatus::Failed)] {
            let mut state = job(&[(first, None)], &weights);
            apply(&mut state, Silent).expect("open");
            assert_eq!((state.status, state.silent), (stalled, true));
            apply(&mut state, CancellationRequested).expect("open");
            assert_eq!(
                apply(&mut state, Silent),
                Err(Refused::Silent),
                "the request is none of the provider's"
            );
            assert_eq!((state.status, state.last_sequence), (stalled, 3));
            apply(&mut state, Info).expect("open");
            let recovered = if first == Error { JobStatus::Failed } else { JobStatus::Running };
            assert_eq!((state.status, state.silent), (recovered, false));
            apply(&mut state, Silent).expect("open");
            apply(&mut state, Close).expect("open");
            assert!(state.closed && !state.silent);
        }
    }

    #[test]
    fn a_cancellation_is_requested_once_and_known_on_a_closed_job() {
        use EventKind::{CancellationRequested, Complete};
        let weights = weights(&[]);
        let request = Change { kind: CancellationRequested, step: None, step_percent: None };
        let mut state = job(&[(CancellationRequested, None)], &weights);
        assert_eq!((state.status, state.cancellation), (JobStatus::Pending, Cancellation::Now));
        assert_eq!(state.apply(Uuid::nil(), request, &weights), Err(Refused::CancellationRequested));
        state.apply(Uuid::nil(), Change { kind: Complete, ..request }, &weights).expect("open");
        assert_eq!(state.apply(Uuid::nil(), request, &weights), Err(Refused::CancellationRequested));
        let mut closed = job(&[(Complete, None)], &weights);
        let refused = Refused::Closed(JobStatus::Complete);
        assert_eq!(closed.apply(Uuid::nil(), request, &weights), Err(refused));
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
            state.apply(Uuid::nil(), Change { kind, step, step_percent: None }, &weights).expect("open");
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
    fn the_percent_moves_within_steps_and_a_repeated_or_lower_one_changes_nothing() {
        let weights = weights(&[10, 30, 60]);
        let mut state = JobState::pending(&weights);
        let mut seen = Vec::new();
        for change in [
            Change { kind: EventKind::Info, step: Some(2), step_percent: None },
            progress(2, 50),
            progress(2, 49),
            Change { kind: EventKind::Progress, step: Some(2), step_percent: None },
            progress(1, 99),
            Change { kind: EventKind::Step, step: Some(2), step_percent: None },
            progress(2, 99),
        ] {
            state.apply(Uuid::nil(), change, &weights).expect("open");
            let Progress { points_done, percent, .. } = state.progress;
            seen.push((state.steps.state(2), points_done, percent));
        }
        let under_way = StepState::UnderWay;
        assert_eq!(
            seen,
            [
                (under_way(0), 0, 0),
                (under_way(50), 0, 30),
                (under_way(50), 0, 30),
                (under_way(50), 0, 30),
                // 59.7 %: one division.
                (under_way(50), 0, 59),
                (StepState::Done, 60, 89),
                (StepState::Done, 60, 89),
            ]
        );
        assert_eq!([0, 1].map(|step| state.steps.state(step)), [StepState::ToCome, under_way(99)]);
    }

    #[test]
    fn the_shares_of_steps_are_added_before_the_division() {
        let weights = weights(&[1, 1, 1]);
        let mut state = JobState::pending(&weights);
        for (step, percent) in [(0, 50), (1, 50), (2, 50)] {
            state.apply(Uuid::nil(), progress(step, percent), &weights).expect("open");
        }
        assert_eq!(state.progress.percent, 50);
    }

    #[test]
    fn the_states_of_steps_are_equal_after_encoding_and_decoding() {
        let mut steps = Steps::default();
        assert_eq!(steps.as_bytes(), b"");
        let last = CONFIGURATION_STEPS - 1;
        for (step, state) in
            [(0, StepState::UnderWay(99)), (8, StepState::UnderWay(0)), (last, StepState::Done)]
        {
            assert!(steps.move_to(step, state));
            assert!(!steps.move_to(step, state));
            assert_eq!(Steps::from(steps.as_bytes().to_vec()), steps);
            assert_eq!(steps.state(step), state);
        }
        assert_eq!((steps.as_bytes().len(), steps.state(1)), (CONFIGURATION_STEPS, StepState::ToCome));
        assert!(steps.move_to(0, StepState::Done));
    }
}
