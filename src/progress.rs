//! Status and progress of a job: a pure function of its log.

use diesel::{deserialize::FromSqlRow, expression::AsExpression};

use crate::schema::sql_types;

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::JobStatus)]
pub enum JobStatus {
    /// No event yet.
    Pending,
    /// Under way.
    Running,
    /// The last word was an error.
    Failed,
    /// Done; closed.
    Complete,
    /// Given up; closed.
    Cancelled,
}

impl JobStatus {
    /// As the API spells it.
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

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A step is done.
    Step,
    /// Something went wrong.
    Error,
    /// Something worth telling.
    Info,
    /// All is done.
    Complete,
    /// Sealed by `CloseJob`.
    Close,
}

/// How far a job is, in the points of its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Points of the distinct steps that are done.
    pub points_done: i64,
    /// Points of all steps.
    pub points_total: i64,
    /// Whole percent, 0 to 100.
    pub percent: i16,
}

/// How much each step of a configuration weighs, by position: its points, or 1
/// each where all of them are zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weights {
    steps: Vec<i64>,
    total: i64,
}

impl Weights {
    /// From the steps' points, in order.
    pub fn new(points: impl IntoIterator<Item = i64>) -> Self {
        let mut steps: Vec<i64> = points.into_iter().collect();
        if steps.iter().all(|&points| points == 0) {
            steps.fill(1);
        }
        let total = steps.iter().sum();
        Self { steps, total }
    }

    /// Of all steps.
    pub fn total(&self) -> i64 {
        self.total
    }
}

/// A job after some prefix of its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobState {
    /// Sequence of the last event; 0 for none.
    pub last_sequence: i64,
    /// After that event.
    pub status: JobStatus,
    /// Whether the log is sealed.
    pub closed: bool,
    /// After that event.
    pub progress: Progress,
    /// One bit a step, by position, lowest bit of each byte first; as long as
    /// the highest step that is done needs.
    pub steps_done: Vec<u8>,
}

impl JobState {
    /// A job without events.
    pub fn pending(weights: &Weights) -> Self {
        Self {
            last_sequence: 0,
            status: JobStatus::Pending,
            closed: false,
            progress: Progress { points_done: 0, points_total: weights.total, percent: 0 },
            steps_done: Vec::new(),
        }
    }

    /// Moves on by one event; `step` is the position of its step. A closed job
    /// does not move, and says so.
    pub fn apply(&mut self, kind: EventKind, step: Option<usize>, weights: &Weights) -> Result<(), Closed> {
        if self.closed {
            return Err(Closed(self.status));
        }
        if let (EventKind::Step, Some(step)) = (kind, step)
            && self.mark_done(step)
        {
            self.progress.points_done += weights.steps[step];
        }
        let failed = self.status == JobStatus::Failed;
        self.status = match kind {
            EventKind::Step => JobStatus::Running,
            EventKind::Info => {
                if failed {
                    JobStatus::Failed
                } else {
                    JobStatus::Running
                }
            }
            EventKind::Error => JobStatus::Failed,
            EventKind::Complete => JobStatus::Complete,
            EventKind::Close => {
                if failed {
                    JobStatus::Failed
                } else {
                    JobStatus::Cancelled
                }
            }
        };
        self.closed = matches!(kind, EventKind::Complete | EventKind::Close);
        self.progress.percent = match kind {
            EventKind::Complete => 100,
            EventKind::Close => self.progress.percent,
            EventKind::Step | EventKind::Info | EventKind::Error => percent(&self.progress),
        };
        self.last_sequence += 1;
        Ok(())
    }

    /// Whether the step was not done before.
    fn mark_done(&mut self, step: usize) -> bool {
        let (byte, bit) = (step / 8, 1 << (step % 8));
        if self.steps_done.len() <= byte {
            self.steps_done.resize(byte + 1, 0);
        }
        let fresh = self.steps_done[byte] & bit == 0;
        self.steps_done[byte] |= bit;
        fresh
    }
}

/// The job's log never changes again; it ended with this status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed(pub JobStatus);

/// At most 99: only `complete` makes it 100.
fn percent(progress: &Progress) -> i16 {
    if progress.points_total == 0 {
        return 0;
    }
    let percent = progress.points_done.saturating_mul(100) / progress.points_total;
    i16::try_from(percent.min(99)).unwrap_or(99)
}
