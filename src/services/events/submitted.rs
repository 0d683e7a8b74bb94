//! A batch that was submitted to the event log, and its answer.

use std::sync::Arc;

use super::batch::UncheckedBatch;
use crate::{
    auth::{Credential, HeldBytes},
    error::{Error, Resource, Result},
    event_log::{Appended, EventLog, PendingAnswer, StreamOrder},
    models::{
        caller::Provider,
        job::JobKey,
        job_identity::{Configuration, JobIdentity},
    },
};

/// The job of a batch, and its configuration.
pub(super) struct Found {
    job: Arc<JobIdentity>,
    configuration: Arc<Configuration>,
}

impl Found {
    pub(super) async fn by(log: &EventLog, provider: Provider, key: &JobKey) -> Result<Self> {
        let job = log.jobs.find_to_append(provider, key).await?;
        let configuration = log.jobs.configuration(provider.tenant(), job.configuration_id).await?;
        Ok(Self { job, configuration })
    }
}

pub(super) struct Submitted {
    answer: PendingAnswer,
    again: Option<Box<Again>>,
}

/// What submits a batch again whose job was found in memory by the provider's own id. The
/// row of that job may be gone, and another job may have the id now.
struct Again {
    log: EventLog,
    credential: Arc<Credential>,
    provider: Provider,
    batch: UncheckedBatch,
    stream_order: StreamOrder,
    held: Option<HeldBytes>,
}

impl Submitted {
    /// Submits a well-formed batch for the job that its key has found. `held` is kept by the log
    /// until it does not hold the batch any more, also if the caller has left.
    pub(super) async fn new(
        log: &EventLog,
        credential: Arc<Credential>,
        provider: Provider,
        (Found { job, configuration }, batch): (Found, UncheckedBatch),
        stream_order: StreamOrder,
        held: Option<HeldBytes>,
    ) -> Result<Self> {
        let used_up = log.usage.used_up(provider.id());
        let (to_append, order) = (batch.for_job(job, &configuration, used_up), stream_order.clone());
        let answer =
            log.appender.submit(Arc::clone(&credential), to_append, order, Box::new(held.clone())).await?;
        let again = matches!(batch.job, JobKey::ProviderJobId(_))
            .then(|| Box::new(Again { log: log.clone(), credential, provider, batch, stream_order, held }));
        Ok(Self { answer, again })
    }

    /// Returns once the batch is durable or refused.
    pub(super) async fn answer(self) -> Result<Appended> {
        match (self.answer.wait().await, self.again) {
            (Err(Error::NotFound { resource: Resource::Job, .. }), Some(again)) => again.submit().await,
            (answer, _) => answer,
        }
    }
}

impl Again {
    async fn submit(self) -> Result<Appended> {
        let Self { log, credential, provider, batch, stream_order, held } = self;
        let job = log.jobs.find(provider.into(), &batch.job).await?;
        let configuration = log.jobs.configuration(provider.tenant(), job.configuration_id).await?;
        let for_job = batch.for_job(job, &configuration, log.usage.used_up(provider.id()));
        log.appender.submit(credential, for_job, stream_order, Box::new(held)).await?.wait().await
    }
}
