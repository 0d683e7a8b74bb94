//! What a batch does to its job, computed without a database from the job's state
//! and from the events of the batch that are stored already.

use std::{collections::HashMap, sync::Arc};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    error::{Error, Resource, Result, Violations},
    event_log::event::CommittedEvent,
    models::{
        audit_entry::AuditEntry,
        event::{Event, NewRow, event_bytes},
        job_identity::{JobIdentity, StepIdentity},
    },
    progress::{Change, EventKind, JobState, JobStatus, Progress, Refused, Weights},
    quota::QuotaUsed,
};

/// Events for one job: all are appended or none.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) job: Arc<JobIdentity>,
    /// Of the steps of the job's configuration.
    pub(crate) weights: Arc<Weights>,
    /// The last sequence that the caller demands of the job before the batch.
    pub(crate) expected_sequence: Option<i64>,
    /// Their ids, where given, are distinct.
    pub(crate) events: Vec<NewEvent>,
    /// What the job's configuration does not allow. These violations are the last
    /// reason to refuse: a stored id, the sequence and the status come before them.
    pub(crate) violations: Violations,
    /// A quota of the job's provider that is used up: the very last reason to refuse.
    pub(crate) quota_used: Option<QuotaUsed>,
    /// The audit entry that is written in the same transaction.
    pub(crate) audit: Option<Box<AuditEntry>>,
}

#[derive(Clone, Debug)]
pub(crate) struct NewEvent {
    /// The id that the client made, if it made one.
    pub(crate) id: Option<Uuid>,
    pub(crate) kind: EventKind,
    pub(crate) name: String,
    pub(crate) step: Step,
    /// How far a progress event says that its step is, 0 to 99.
    pub(crate) step_percent: Option<u8>,
    /// An encoded `google.protobuf.Struct` with sorted names, so that the same content
    /// has the same bytes.
    pub(crate) metadata: Vec<u8>,
    /// Cut to microseconds.
    pub(crate) occurred_at: Option<DateTime<Utc>>,
}

impl NewEvent {
    fn change(&self) -> Change {
        Change { kind: self.kind, step: self.step.position(), step_percent: self.step_percent }
    }

    /// About how many bytes of memory and of the database this takes.
    pub(crate) fn bytes(&self) -> usize {
        event_bytes(&self.name, &self.metadata)
    }
}

/// The step that an event names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    None,
    /// A step and its position in the job's configuration.
    Known(usize, Arc<StepIdentity>),
    /// The job's configuration has no such step; the batch has a violation.
    Unknown,
}

/// The answer to a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Appended {
    /// One for each event of the batch. None: the job has had the server's event before.
    pub(crate) events: Vec<AppendedEvent>,
    /// When the job's customer asked to stop, if so.
    pub(crate) cancellation_requested_at: Option<DateTime<Utc>>,
}

/// An event of an answered batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AppendedEvent {
    pub(crate) id: Uuid,
    pub(crate) sequence: i64,
    pub(crate) existed: bool,
    pub(crate) status: JobStatus,
    pub(crate) progress: Progress,
}

impl Batch {
    /// An event that only the server writes; its name is the reason for it.
    pub(crate) fn by_server(
        job: Arc<JobIdentity>,
        weights: Arc<Weights>,
        kind: EventKind,
        reason: String,
        audit: Option<AuditEntry>,
    ) -> Self {
        let event = NewEvent {
            id: None,
            kind,
            name: reason,
            step: Step::None,
            step_percent: None,
            metadata: Vec::new(),
            occurred_at: None,
        };
        Self {
            job,
            weights,
            expected_sequence: None,
            events: vec![event],
            violations: Violations::default(),
            // What the server writes counts for nobody.
            quota_used: None,
            audit: audit.map(Box::new),
        }
    }

    pub(crate) fn client_ids(&self) -> impl Iterator<Item = Uuid> + '_ {
        self.events.iter().filter_map(|event| event.id)
    }

    /// What becomes of each event; moves `state` on by what the batch appends. A
    /// refusal leaves the state as it was. The order of the checks is the API's. Of an event of
    /// the server that the job has already, nothing becomes.
    pub(crate) fn plan(
        &self,
        stored: &HashMap<Uuid, Event>,
        state: &mut JobState,
    ) -> Result<Vec<AppendedEvent>> {
        self.compare(stored)?;
        let is_stored = |event: &NewEvent| event.id.is_some_and(|id| stored.contains_key(&id));
        let any_new = self.events.iter().any(|event| !is_stored(event));
        if let Some(expected) = self.expected_sequence
            && any_new
            && expected != state.last_sequence
        {
            return Err(Error::SequenceMismatch { last_sequence: state.last_sequence });
        }
        let mut after = state.clone();
        let mut answer = Vec::with_capacity(self.events.len());
        for event in &self.events {
            if let Some(row) = event.id.and_then(|id| stored.get(&id)) {
                answer.push(self.existing(row));
                continue;
            }
            let id = event.id.unwrap_or_else(Uuid::now_v7);
            match after.apply(id, event.change(), &self.weights) {
                Ok(()) => {}
                // There is nothing to append.
                Err(Refused::CancellationRequested | Refused::Silent) => return Ok(Vec::new()),
                Err(Refused::Closed(status)) => {
                    return Err(Error::JobClosed { job_id: self.job.id, status });
                }
            }
            answer.push(AppendedEvent {
                id,
                sequence: after.last_sequence,
                existed: false,
                status: after.status,
                progress: after.progress,
            });
        }
        if any_new && !self.violations.is_empty() {
            return Err(Error::Invalid(self.violations.clone()));
        }
        if let Some(used) = self.quota_used.filter(|_| any_new) {
            return Err(Error::QuotaExceeded(used));
        }
        *state = after;
        Ok(answer)
    }

    /// The rows to append for this answer.
    pub(crate) fn rows<'a>(&'a self, answer: &'a [AppendedEvent]) -> impl Iterator<Item = NewRow<'a>> {
        let new = self.events.iter().zip(answer).filter(|(_, appended)| !appended.existed);
        new.map(|(event, appended)| NewRow {
            id: appended.id,
            id_is_clients: event.id.is_some(),
            sequence: appended.sequence,
            kind: event.kind,
            name: &event.name,
            step_configuration_id: event.step.id(),
            step_percent: event.step_percent.map(i16::from),
            event_metadata: &event.metadata,
            occurred_at: event.occurred_at,
            status: appended.status,
            points_done: appended.progress.points_done,
            percent: appended.progress.percent,
        })
    }

    /// The events of these rows once they are committed; their positions are still to
    /// be set.
    pub(crate) fn into_events(
        self,
        answer: &[AppendedEvent],
        created_at: DateTime<Utc>,
    ) -> impl Iterator<Item = CommittedEvent> {
        let Self { job, events, .. } = self;
        let new = events.into_iter().zip(answer).filter(|(_, appended)| !appended.existed);
        new.map(move |(event, appended)| {
            let row = Event {
                job_id: job.id,
                sequence: appended.sequence,
                position: 0,
                id: appended.id,
                kind: event.kind,
                step_configuration_id: event.step.id(),
                step_percent: event.step_percent.map(i16::from),
                name: event.name,
                event_metadata: event.metadata,
                occurred_at: event.occurred_at,
                status: appended.status,
                points_done: appended.progress.points_done,
                percent: appended.progress.percent,
                created_at,
            };
            CommittedEvent { row, job: Arc::clone(&job), step: event.step.identity() }
        })
    }

    /// Refuses an event whose id is stored with other content.
    fn compare(&self, stored: &HashMap<Uuid, Event>) -> Result<()> {
        let mut differences = Violations::default();
        let mut first = None;
        for (index, event) in self.events.iter().enumerate() {
            let Some(row) = event.id.and_then(|id| stored.get(&id)) else { continue };
            let same = [
                ("kind", event.kind == row.kind),
                ("name", event.name == row.name),
                ("step_tag", event.step != Step::Unknown && event.step.id() == row.step_configuration_id),
                ("step_percent", event.step_percent.map(i16::from) == row.step_percent),
                ("metadata", event.metadata == row.event_metadata),
                ("occurred_at", event.occurred_at == row.occurred_at),
            ];
            for (field, _) in same.into_iter().filter(|(_, same)| !same) {
                first.get_or_insert(row.id);
                differences.add(
                    format!("events[{index}].{field}"),
                    format!("differs from the event of this id that is stored as sequence {}", row.sequence),
                );
            }
        }
        match first {
            None => Ok(()),
            Some(id) => Err(Error::Differs { resource: Resource::Event, name: id.to_string(), differences }),
        }
    }

    fn existing(&self, row: &Event) -> AppendedEvent {
        AppendedEvent {
            id: row.id,
            sequence: row.sequence,
            existed: true,
            status: row.status,
            progress: Progress {
                points_done: row.points_done,
                points_total: self.job.points_total,
                percent: row.percent,
            },
        }
    }
}

impl Step {
    fn position(&self) -> Option<usize> {
        match self {
            Self::Known(position, _) => Some(*position),
            Self::None | Self::Unknown => None,
        }
    }

    fn identity(self) -> Option<Arc<StepIdentity>> {
        match self {
            Self::Known(_, step) => Some(step),
            Self::None | Self::Unknown => None,
        }
    }

    fn id(&self) -> Option<Uuid> {
        match self {
            Self::Known(_, step) => Some(step.id),
            Self::None | Self::Unknown => None,
        }
    }
}
