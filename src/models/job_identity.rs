//! What never changes about a job, its steps and its configuration.

use std::sync::Arc;

use uuid::Uuid;

use super::{
    job_configuration::{JobConfiguration, MetadataConfiguration, StepConfiguration},
    labels::Labels,
};
use crate::progress::Weights;

/// Bytes that an allocation and its place in a cache take beside the content.
const OVERHEAD: usize = 64;

/// The columns of a job that never change. The configuration is not among them: a
/// configuration may have a thousand times the size of a job.
#[derive(Debug)]
pub(crate) struct JobIdentity {
    pub(crate) id: Uuid,
    pub(crate) provider_id: Uuid,
    pub(crate) customer_id: Uuid,
    pub(crate) provider_job_id: String,
    pub(crate) configuration_id: Uuid,
    pub(crate) configuration_tag: String,
    pub(crate) labels: Labels,
    /// The sum of the weights of the configuration's steps.
    pub(crate) points_total: i64,
}

impl JobIdentity {
    /// About how many bytes of memory this takes.
    pub(crate) fn bytes(&self) -> usize {
        let labels = self.labels.bytes() + self.labels.0.len() * 2 * OVERHEAD;
        size_of::<Self>() + OVERHEAD + self.provider_job_id.len() + self.configuration_tag.len() + labels
    }
}

/// What the events of a step carry of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StepIdentity {
    pub(crate) id: Uuid,
    pub(crate) tag: String,
    pub(crate) name: String,
}

impl StepIdentity {
    /// About how many bytes of memory this takes.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + OVERHEAD + self.tag.len() + self.name.len()
    }
}

/// A configuration, and what appends need of it. A batch that waits keeps the weights and
/// its steps, and not the whole configuration.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) tree: JobConfiguration,
    pub(crate) weights: Arc<Weights>,
    /// In the order of the tree's steps.
    pub(crate) steps: Vec<Arc<StepIdentity>>,
}

impl Configuration {
    /// A step and its position among the steps, by its tag.
    pub(crate) fn step(&self, tag: &str) -> Option<(usize, &StepConfiguration)> {
        self.tree.steps.iter().enumerate().find(|(_, step)| step.tag == tag)
    }

    /// About how many bytes of memory this takes.
    pub(crate) fn bytes(&self) -> usize {
        let metadata = |metadata: &MetadataConfiguration| {
            size_of::<MetadataConfiguration>() + metadata.name.len() + metadata.units.len() + OVERHEAD / 2
        };
        let step = |step: &StepConfiguration| {
            let texts = step.tag.len() + step.name.len() + OVERHEAD;
            size_of::<StepConfiguration>() + texts + step.metadata.iter().map(metadata).sum::<usize>()
        };
        let JobConfiguration { tag, name, version, steps, .. } = &self.tree;
        let head = size_of::<Self>() + OVERHEAD + tag.len() + name.len() + version.len();
        let identities = self.steps.iter().map(|step| step.bytes() + size_of::<i64>());
        head + steps.iter().map(step).sum::<usize>() + identities.sum::<usize>()
    }
}

impl From<JobConfiguration> for Configuration {
    fn from(tree: JobConfiguration) -> Self {
        let steps = tree.steps.iter().map(|step| {
            Arc::new(StepIdentity { id: step.id, tag: step.tag.clone(), name: step.name.clone() })
        });
        Self { weights: Arc::new(tree.weights()), steps: steps.collect(), tree }
    }
}
