//! A batch that was submitted to the event log, and its answer.

use std::sync::Arc;

use super::batch::UncheckedBatch;
use crate::{
    auth::Credential,
    error::{Error, Resource, Result},
    event_log::{AppendedEvent, EventLog, PendingAnswer, StreamOrder},
    models::{caller::Provider, job::JobKey},
};

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
}

impl Submitted {
    /// Submits a well-formed batch.
    pub(super) async fn new(
        log: &EventLog,
        credential: Arc<Credential>,
        provider: Provider,
        batch: UncheckedBatch,
        stream_order: StreamOrder,
    ) -> Result<Self> {
        let job = log.jobs.find_to_append(provider, &batch.job).await?;
        let configuration = log.jobs.configuration(job.configuration_id).await?;
        let for_job = batch.for_job(job, &configuration, log.usage.used_up(provider.id()));
        let answer =
            log.appender.submit(Arc::clone(&credential), for_job, stream_order.clone(), Box::new(())).await?;
        let again = matches!(batch.job, JobKey::ProviderJobId(_))
            .then(|| Box::new(Again { log: log.clone(), credential, provider, batch, stream_order }));
        Ok(Self { answer, again })
    }

    /// Returns once the batch is durable or refused.
    pub(super) async fn answer(self) -> Result<Vec<AppendedEvent>> {
        match (self.answer.wait().await, self.again) {
            (Err(Error::NotFound { resource: Resource::Job, .. }), Some(again)) => again.submit().await,
            (answer, _) => answer,
        }
    }
}

impl Again {
    async fn submit(self) -> Result<Vec<AppendedEvent>> {
        let Self { log, credential, provider, batch, stream_order } = self;
        let job = log.jobs.find(provider.into(), &batch.job).await?;
        let configuration = log.jobs.configuration(job.configuration_id).await?;
        let for_job = batch.for_job(job, &configuration, log.usage.used_up(provider.id()));
        log.appender.submit(credential, for_job, stream_order, Box::new(())).await?.wait().await
    }
}
