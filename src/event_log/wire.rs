//! A row of the log to the message that watchers receive, once for all of
//! them.

use std::sync::Arc;

use prost::Message as _;

use super::directory::JobIdentity;
use crate::{
    error::{Error, Result},
    models::event::Event,
    pb,
    progress::{EventKind, JobStatus, Progress},
};

/// A committed event, as the tail hands it to every watcher.
#[derive(Debug)]
pub(crate) struct LogEvent {
    pub(crate) job: Arc<JobIdentity>,
    pub(crate) position: i64,
    pub(crate) sequence: i64,
    pub(crate) kind: EventKind,
    pub(crate) status: JobStatus,
    pub(crate) progress: Progress,
    /// What is sent.
    pub(crate) message: pb::Event,
    /// Of the message, encoded.
    pub(crate) bytes: usize,
}

impl LogEvent {
    /// Whether nothing can come after it in its job's log.
    pub(crate) fn closes(&self) -> bool {
        matches!(self.kind, EventKind::Complete | EventKind::Close)
    }

    /// From its row.
    pub(crate) fn new(row: Event, job: Arc<JobIdentity>) -> Result<Self> {
        let progress = Progress {
            points_done: row.points_done,
            points_total: job.configuration.weights.total(),
            percent: row.percent,
        };
        let step = row.step_configuration_id.and_then(|id| job.configuration.step_by_id(id));
        let metadata = if row.event_metadata.is_empty() {
            None
        } else {
            Some(prost_types::Struct::decode(&row.event_metadata[..]).map_err(Error::internal)?)
        };
        let message = pb::Event {
            id: row.id.to_string(),
            job_id: row.job_id.to_string(),
            sequence: row.sequence,
            kind: pb::EventKind::from(row.kind).into(),
            name: row.name,
            step_tag: step.map(|step| step.tag.clone()).unwrap_or_default(),
            step_name: step.map(|step| step.name.clone()).unwrap_or_default(),
            metadata,
            occurred_at: row.occurred_at.map(timestamp),
            created_at: Some(timestamp(row.created_at)),
            status: pb::JobStatus::from(row.status).into(),
            progress: Some(progress.into()),
            provider_job_id: job.provider_job_id.clone(),
        };
        Ok(Self {
            position: row.position,
            sequence: row.sequence,
            kind: row.kind,
            status: row.status,
            progress,
            bytes: message.encoded_len(),
            message,
            job,
        })
    }
}

/// Microseconds are all that the database keeps, so that nothing is lost here.
pub(crate) fn timestamp(at: chrono::DateTime<chrono::Utc>) -> prost_types::Timestamp {
    let nanos = i32::try_from(at.timestamp_subsec_nanos()).unwrap_or_default();
    prost_types::Timestamp { seconds: at.timestamp(), nanos }
}

impl From<EventKind> for pb::EventKind {
    fn from(kind: EventKind) -> Self {
        match kind {
            EventKind::Step => Self::Step,
            EventKind::Error => Self::Error,
            EventKind::Info => Self::Info,
            EventKind::Complete => Self::Complete,
            EventKind::Close => Self::Close,
        }
    }
}

impl From<JobStatus> for pb::JobStatus {
    fn from(status: JobStatus) -> Self {
        match status {
            JobStatus::Pending => Self::Pending,
            JobStatus::Running => Self::Running,
            JobStatus::Failed => Self::Failed,
            JobStatus::Complete => Self::Complete,
            JobStatus::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Progress> for pb::Progress {
    fn from(progress: Progress) -> Self {
        Self {
            points_done: progress.points_done,
            points_total: progress.points_total,
            percent: progress.percent.into(),
        }
    }
}
