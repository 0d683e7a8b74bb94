//! Which events a watch asks for.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::{
    models::{
        caller::{Viewer, Visibility},
        job::JobScope,
        job_identity::JobIdentity,
        labels::Labels,
    },
    progress::EventKind,
};

/// The jobs that a watch covers.
#[derive(Debug)]
pub(crate) enum Scope {
    Job(Arc<JobIdentity>),
    /// All jobs that the viewer may see, those created later included.
    All {
        viewer: Viewer,
        /// Only jobs of this configuration tag; empty for all tags.
        configuration_tag: String,
        /// Only jobs with this user on the other side.
        counterpart_id: Option<Uuid>,
        /// Only jobs with all of these labels.
        labels: Labels,
    },
}

impl Scope {
    pub(crate) fn contains(&self, job: &JobIdentity) -> bool {
        match self {
            Self::Job(own) => own.id == job.id,
            Self::All { viewer, configuration_tag, counterpart_id, labels } => {
                viewer.sees(job.id, job.provider_id, job.customer_id)
                    && (configuration_tag.is_empty() || *configuration_tag == job.configuration_tag)
                    && job.labels.contain(labels)
                    && counterpart_id.is_none_or(|id| match viewer.visibility() {
                        Visibility::Provider(_) => id == job.customer_id,
                        Visibility::Customer(_) | Visibility::Job(_) => id == job.provider_id,
                    })
            }
        }
    }

    /// The jobs of a scope of all jobs; none for a scope of one job.
    pub(crate) fn jobs(&self) -> Option<JobScope<'_>> {
        match self {
            Self::Job(_) => None,
            Self::All { viewer, configuration_tag, counterpart_id, labels } => Some(JobScope {
                visibility: viewer.visibility(),
                configuration_tag,
                counterpart_id: *counterpart_id,
                labels,
            }),
        }
    }

    /// The id that mailboxes are found by: of a job, a provider or a customer.
    pub(crate) fn topic(&self) -> Uuid {
        match self {
            Self::Job(job) => job.id,
            Self::All { viewer, .. } => viewer.id(),
        }
    }
}

/// A scope and the kinds of events within it.
#[derive(Debug)]
pub(crate) struct Filter {
    pub(crate) scope: Scope,
    /// Empty for all kinds.
    kinds: Vec<EventKind>,
    binding: Binding,
}

impl Filter {
    pub(crate) fn new(scope: Scope, kinds: Vec<EventKind>) -> Self {
        Self { binding: Binding::new(&scope, &kinds), scope, kinds }
    }

    pub(crate) fn matches(&self, kind: EventKind, job: &JobIdentity) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&kind)) && self.scope.contains(job)
    }

    pub(crate) fn binding(&self) -> Binding {
        self.binding
    }
}

/// What ties a resume token to its filter: the first bytes of the filter's
/// SHA-256. It tells filters apart and protects nothing: a token grants no
/// access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Binding(pub(crate) [u8; 8]);

impl Binding {
    fn new(scope: &Scope, kinds: &[EventKind]) -> Self {
        let mut digest = Sha256::new();
        let mut text = |text: &str| {
            digest.update(text.len().to_be_bytes());
            digest.update(text);
        };
        match scope {
            Scope::Job(job) => text(&format!("job {}", job.id)),
            Scope::All { viewer, configuration_tag, counterpart_id, labels } => {
                let (role, id) = match viewer.visibility() {
                    Visibility::Provider(id) => ("provider", id),
                    Visibility::Customer(id) => ("customer", id),
                    Visibility::Job(id) => ("job", id),
                };
                text(&format!("all {role} {id} {}", counterpart_id.unwrap_or(Uuid::nil())));
                text(configuration_tag);
                text(&labels.0.len().to_string());
                labels.0.iter().for_each(|(key, value)| {
                    text(key);
                    text(value);
                });
            }
        }
        let mut kinds: Vec<String> = kinds.iter().map(|kind| format!("{kind:?}")).collect();
        kinds.sort_unstable();
        kinds.dedup();
        text(&kinds.join(" "));
        let digest = digest.finalize();
        Self(std::array::from_fn(|index| digest[index]))
    }
}
