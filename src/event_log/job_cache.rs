//! What never changes about jobs and their configurations, read once.

use std::{collections::HashMap, sync::Arc};

use diesel_async::AsyncPgConnection;
use moka::sync::Cache;
use uuid::Uuid;

use crate::{
    db::Database,
    error::{Error, Resource, Result},
    models::{
        caller::{Viewer, Visibility},
        event::JobHead,
        job::JobKey,
        job_configuration::{JobConfiguration, StepConfiguration},
    },
    progress::Weights,
};

/// Most jobs that are remembered; some 300 bytes each.
const JOBS: u64 = 100_000;
/// Most configurations that are remembered; some 100 bytes a step each.
const CONFIGURATIONS: u64 = 2_000;

/// What never changes about a job.
#[derive(Debug)]
pub(crate) struct JobIdentity {
    pub(crate) id: Uuid,
    pub(crate) provider_id: Uuid,
    pub(crate) customer_id: Uuid,
    pub(crate) provider_job_id: String,
    pub(crate) configuration: Arc<Configuration>,
}

/// A configuration and what follows from it.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) tree: JobConfiguration,
    pub(crate) weights: Weights,
}

impl Configuration {
    /// A step's position and configuration by its tag.
    pub(crate) fn step(&self, tag: &str) -> Option<(usize, &StepConfiguration)> {
        self.tree.steps.iter().enumerate().find(|(_, step)| step.tag == tag)
    }

    /// A step by its id.
    pub(crate) fn step_by_id(&self, id: Uuid) -> Option<&StepConfiguration> {
        self.tree.steps.iter().find(|step| step.id == id)
    }
}

/// Remembers identities of jobs, so that appends and deliveries need no look-up.
#[derive(Clone, Debug)]
pub(crate) struct JobCache {
    database: Database,
    jobs: Cache<Uuid, Arc<JobIdentity>>,
    by_provider_job_id: Cache<(Uuid, String), Uuid>,
    configurations: Cache<Uuid, Arc<Configuration>>,
}

impl JobCache {
    pub(crate) fn new(database: Database) -> Self {
        Self {
            database,
            jobs: Cache::new(JOBS),
            by_provider_job_id: Cache::new(JOBS),
            configurations: Cache::new(CONFIGURATIONS),
        }
    }

    /// A job that the viewer sees; by `provider_job_id` its provider only.
    pub(crate) async fn find(&self, viewer: Viewer, key: &JobKey) -> Result<Arc<JobIdentity>> {
        let found = match key {
            JobKey::Id(id) => self.find_by_id(*id).await?,
            JobKey::ProviderJobId(name) => match viewer.visibility() {
                Visibility::Provider(provider_id) => self.find_by_name(provider_id, name).await?,
                Visibility::Customer(_) | Visibility::Job(_) => None,
            },
        };
        found
            .filter(|job| viewer.sees(job.id, job.provider_id, job.customer_id))
            .ok_or_else(|| Error::not_found(Resource::Job, key))
    }

    /// Those of these jobs that exist. Looks at no tenant.
    pub(crate) async fn list(
        &self,
        connection: &mut AsyncPgConnection,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, Arc<JobIdentity>>> {
        let mut found = HashMap::with_capacity(ids.len());
        let mut missing = Vec::new();
        for id in ids {
            match self.jobs.get(id) {
                Some(job) => drop(found.insert(*id, job)),
                None => missing.push(*id),
            }
        }
        if !missing.is_empty() {
            let heads = JobHead::load(connection, &missing).await?;
            for job in self.remember(connection, heads).await? {
                found.insert(job.id, job);
            }
        }
        Ok(found)
    }

    async fn find_by_id(&self, id: Uuid) -> Result<Option<Arc<JobIdentity>>> {
        match self.jobs.get(&id) {
            Some(job) => Ok(Some(job)),
            None => Ok(self.list(&mut *self.database.get().await?, &[id]).await?.remove(&id)),
        }
    }

    async fn find_by_name(&self, provider_id: Uuid, name: &str) -> Result<Option<Arc<JobIdentity>>> {
        let key = (provider_id, name.to_owned());
        if let Some(id) = self.by_provider_job_id.get(&key) {
            return self.find_by_id(id).await;
        }
        let mut connection = self.database.get().await?;
        let head = JobHead::find_by_provider_job_id(&mut connection, provider_id, name).await?;
        let job = self.remember(&mut connection, Vec::from_iter(head)).await?.pop();
        if let Some(job) = &job {
            self.by_provider_job_id.insert(key, job.id);
        }
        Ok(job)
    }

    /// A configuration that there is.
    pub(crate) async fn configuration(&self, id: Uuid) -> Result<Arc<Configuration>> {
        if let Some(configuration) = self.configurations.get(&id) {
            return Ok(configuration);
        }
        let mut connection = self.database.get().await?;
        let found = self.configurations_of(&mut connection, &[id]).await?.remove(&id);
        found.ok_or_else(|| Error::internal("a job without its configuration"))
    }

    async fn configurations_of(
        &self,
        connection: &mut AsyncPgConnection,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, Arc<Configuration>>> {
        let mut configurations = HashMap::new();
        let mut unknown = Vec::new();
        for id in ids {
            match self.configurations.get(id) {
                Some(configuration) => drop(configurations.insert(*id, configuration)),
                None => unknown.push(*id),
            }
        }
        if !unknown.is_empty() {
            for tree in JobConfiguration::load(connection, &unknown).await? {
                let configuration = Arc::new(Configuration { weights: tree.weights(), tree });
                self.configurations.insert(configuration.tree.id, Arc::clone(&configuration));
                configurations.insert(configuration.tree.id, configuration);
            }
        }
        Ok(configurations)
    }

    async fn remember(
        &self,
        connection: &mut AsyncPgConnection,
        heads: Vec<JobHead>,
    ) -> Result<Vec<Arc<JobIdentity>>> {
        let ids: Vec<Uuid> = heads.iter().map(|head| head.job_configuration_id).collect();
        let configurations = self.configurations_of(connection, &ids).await?;
        let mut jobs = Vec::with_capacity(heads.len());
        for head in heads {
            let configuration = configurations
                .get(&head.job_configuration_id)
                .ok_or_else(|| Error::internal("a job without its configuration"))?;
            let job = Arc::new(JobIdentity {
                id: head.id,
                provider_id: head.provider_id,
                customer_id: head.customer_id,
                provider_job_id: head.provider_job_id,
                configuration: Arc::clone(configuration),
            });
            self.jobs.insert(job.id, Arc::clone(&job));
            jobs.push(job);
        }
        Ok(jobs)
    }
}
