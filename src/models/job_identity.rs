//! What never changes about a job and its configuration.

use std::sync::Arc;

use uuid::Uuid;

use super::job_configuration::{JobConfiguration, StepConfiguration};
use crate::progress::Weights;

/// The columns of a job that never change.
#[derive(Debug)]
pub(crate) struct JobIdentity {
    pub(crate) id: Uuid,
    pub(crate) provider_id: Uuid,
    pub(crate) customer_id: Uuid,
    pub(crate) provider_job_id: String,
    pub(crate) configuration: Arc<Configuration>,
}

/// A configuration and the weights of its steps.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) tree: JobConfiguration,
    pub(crate) weights: Weights,
}

impl Configuration {
    /// A step and its position among the steps, by its tag.
    pub(crate) fn step(&self, tag: &str) -> Option<(usize, &StepConfiguration)> {
        self.tree.steps.iter().enumerate().find(|(_, step)| step.tag == tag)
    }

    /// A step by its id.
    pub(crate) fn step_by_id(&self, id: Uuid) -> Option<&StepConfiguration> {
        self.tree.steps.iter().find(|step| step.id == id)
    }
}

impl From<JobConfiguration> for Configuration {
    fn from(tree: JobConfiguration) -> Self {
        Self { weights: tree.weights(), tree }
    }
}
