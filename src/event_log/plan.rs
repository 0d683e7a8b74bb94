//! What a batch does to a job: decided here, without a database, from the
//! job's state and the events of the batch that are stored already.

use std::{collections::HashMap, sync::Arc};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::job_cache::JobIdentity;
use crate::{
    error::{Error, Resource, Result, Violations},
    models::{
        audit_entry::AuditEntry,
        event::{Event, NewRow},
    },
    progress::{EventKind, JobState, JobStatus, Progress},
};

/// Events for one job, all or none.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) job: Arc<JobIdentity>,
    /// The job's last sequence before the batch, where the caller insists.
    pub(crate) expected_sequence: Option<i64>,
    /// Ids that are given are distinct.
    pub(crate) events: Vec<NewEvent>,
    /// What the job's configuration does not allow. Told last: a stored id, the
    /// sequence and the status come before it.
    pub(crate) at_fault: Violations,
    /// What is written down with what is appended.
    pub(crate) audit: Option<Box<AuditEntry>>,
}

/// An event to append.
#[derive(Debug)]
pub(crate) struct NewEvent {
    /// The client's, or none.
    pub(crate) id: Option<Uuid>,
    pub(crate) kind: EventKind,
    pub(crate) name: String,
    pub(crate) step: Step,
    /// An encoded `google.protobuf.Struct`, whose names are in order, so that
    /// the same content is the same bytes.
    pub(crate) metadata: Vec<u8>,
    /// Cut to microseconds.
    pub(crate) occurred_at: Option<DateTime<Utc>>,
}

/// The step that an event names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    None,
    /// By its position in the job's configuration.
    Known(usize),
    /// None of the job's configuration; the batch is at fault.
    Unknown,
}

/// What became of one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Appended {
    pub(crate) id: Uuid,
    pub(crate) sequence: i64,
    pub(crate) existed: bool,
    pub(crate) status: JobStatus,
    pub(crate) progress: Progress,
}

impl Batch {
    /// The ids that the client made.
    pub(crate) fn client_ids(&self) -> impl Iterator<Item = Uuid> + '_ {
        self.events.iter().filter_map(|event| event.id)
    }

    /// What becomes of each event, and moves `state` on by what the batch
    /// appends. Refused, it leaves the state as it was. The order of the checks
    /// is the API's.
    pub(crate) fn plan(&self, stored: &HashMap<Uuid, Event>, state: &mut JobState) -> Result<Vec<Appended>> {
        self.compare(stored)?;
        let known = |event: &NewEvent| event.id.is_some_and(|id| stored.contains_key(&id));
        let any_new = self.events.iter().any(|event| !known(event));
        if let Some(expected) = self.expected_sequence
            && any_new
            && expected != state.last_sequence
        {
            return Err(Error::SequenceMismatch { last_sequence: state.last_sequence });
        }
        let mut after = *state;
        let mut answer = Vec::with_capacity(self.events.len());
        for event in &self.events {
            if let Some(row) = event.id.and_then(|id| stored.get(&id)) {
                answer.push(self.existing(row));
                continue;
            }
            after
                .apply(event.kind, event.step.position(), &self.job.configuration.weights)
                .map_err(|closed| Error::JobClosed { job_id: self.job.id, status: closed.0 })?;
            answer.push(Appended {
                id: event.id.unwrap_or_else(Uuid::now_v7),
                sequence: after.last_sequence,
                existed: false,
                status: after.status,
                progress: after.progress,
            });
        }
        if any_new && !self.at_fault.is_empty() {
            return Err(Error::Invalid(self.at_fault.clone()));
        }
        *state = after;
        Ok(answer)
    }

    /// The rows to append, where this is what the batch comes to.
    pub(crate) fn rows<'a>(&'a self, answer: &'a [Appended]) -> impl Iterator<Item = NewRow<'a>> {
        let new = self.events.iter().zip(answer).filter(|(_, appended)| !appended.existed);
        new.map(|(event, appended)| NewRow {
            id: appended.id,
            id_is_clients: event.id.is_some(),
            sequence: appended.sequence,
            kind: event.kind,
            name: &event.name,
            step_configuration_id: self.step_id(event),
            event_metadata: &event.metadata,
            occurred_at: event.occurred_at,
            status: appended.status,
            points_done: appended.progress.points_done,
            percent: appended.progress.percent,
        })
    }

    /// The same once they are committed, their positions still to come.
    pub(crate) fn into_events(
        self,
        answer: &[Appended],
        created_at: DateTime<Utc>,
    ) -> impl Iterator<Item = Event> {
        let Self { job, events, .. } = self;
        let new = events.into_iter().zip(answer).filter(|(_, appended)| !appended.existed);
        new.map(move |(event, appended)| Event {
            job_id: job.id,
            sequence: appended.sequence,
            position: 0,
            id: appended.id,
            kind: event.kind,
            step_configuration_id: event.step.id(&job),
            name: event.name,
            event_metadata: event.metadata,
            occurred_at: event.occurred_at,
            status: appended.status,
            points_done: appended.progress.points_done,
            percent: appended.progress.percent,
            created_at,
        })
    }

    /// Stored under the same id must be the same content.
    fn compare(&self, stored: &HashMap<Uuid, Event>) -> Result<()> {
        let mut differences = Violations::default();
        let mut first = None;
        for (index, event) in self.events.iter().enumerate() {
            let Some(row) = event.id.and_then(|id| stored.get(&id)) else { continue };
            let same = [
                ("kind", event.kind == row.kind),
                ("name", event.name == row.name),
                ("step_tag", event.step != Step::Unknown && self.step_id(event) == row.step_configuration_id),
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

    fn step_id(&self, event: &NewEvent) -> Option<Uuid> {
        event.step.id(&self.job)
    }

    fn existing(&self, row: &Event) -> Appended {
        Appended {
            id: row.id,
            sequence: row.sequence,
            existed: true,
            status: row.status,
            progress: Progress {
                points_done: row.points_done,
                points_total: self.job.configuration.weights.total(),
                percent: row.percent,
            },
        }
    }
}

impl Step {
    fn position(self) -> Option<usize> {
        match self {
            Self::Known(position) => Some(position),
            Self::None | Self::Unknown => None,
        }
    }

    fn id(self, job: &JobIdentity) -> Option<Uuid> {
        self.position().map(|position| job.configuration.tree.steps[position].id)
    }
}
