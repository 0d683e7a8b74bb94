//! What is watched, from where, and what a watch says.

use std::{sync::Arc, time::Duration};

use uuid::Uuid;

use crate::{
    event_log::{event::LogEvent, job_cache::JobIdentity, position::ResumeToken},
    models::caller::{Viewer, Visibility},
    progress::{EventKind, JobState},
};

/// What is watched.
#[derive(Debug)]
pub(crate) enum Scope {
    /// One job.
    Job(Arc<JobIdentity>),
    /// All jobs in sight.
    All {
        viewer: Viewer,
        /// Only of this configuration tag; empty: all.
        configuration_tag: String,
        /// Only with this user on the other side.
        counterpart_id: Option<Uuid>,
    },
}

impl Scope {
    /// What is compared with the cursor.
    pub(super) fn place(&self, event: &LogEvent) -> i64 {
        match self {
            Self::Job(_) => event.sequence,
            Self::All { .. } => event.position,
        }
    }

    pub(super) fn contains(&self, event: &LogEvent) -> bool {
        let job = &event.job;
        match self {
            Self::Job(own) => own.id == job.id,
            Self::All { viewer, configuration_tag, counterpart_id } => {
                viewer.sees(job.id, job.provider_id, job.customer_id)
                    && (configuration_tag.is_empty() || *configuration_tag == job.configuration.tree.tag)
                    && counterpart_id.is_none_or(|id| match viewer.visibility() {
                        Visibility::Provider(_) => id == job.customer_id,
                        Visibility::Customer(_) | Visibility::Job(_) => id == job.provider_id,
                    })
            }
        }
    }
}

/// Which events a watch asks for.
#[derive(Debug)]
pub(crate) struct Filter {
    pub(crate) scope: Scope,
    /// Empty: all.
    pub(crate) kinds: Vec<EventKind>,
}

impl Filter {
    pub(crate) fn topic(&self) -> Uuid {
        match &self.scope {
            Scope::Job(job) => job.id,
            Scope::All { viewer, .. } => viewer.id(),
        }
    }

    pub(crate) fn wants(&self, event: &LogEvent) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&event.kind)) && self.scope.contains(event)
    }
}

/// Where a watch starts.
#[derive(Debug)]
pub(crate) enum Start {
    Beginning,
    /// Of one job.
    AfterSequence(i64),
    Resume(ResumeToken),
    Now,
}

/// What to watch, and how.
#[derive(Debug)]
pub(crate) struct WatchQuery {
    pub(crate) filter: Filter,
    pub(crate) start: Start,
    pub(crate) heartbeat: Duration,
}

/// A message of a watch.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) resume_token: String,
    pub(crate) body: Body,
}

/// What a message says. The job's state is that of a watch of one job.
#[derive(Debug)]
pub(crate) enum Body {
    Events(Vec<Arc<LogEvent>>),
    CaughtUp(Option<JobState>),
    Heartbeat,
    End(EndReason, Option<JobState>),
}

/// Why a watch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndReason {
    JobClosed,
    Draining,
    CredentialEnded,
    /// Retention removed events before they could be sent.
    EventsExpired,
}
