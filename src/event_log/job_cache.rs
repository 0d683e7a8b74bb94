//! Remembers what never changes about jobs and configurations, so that appends
//! and deliveries need no query for it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use moka::sync::Cache;
use parking_lot::RwLock;
use uuid::Uuid;

use crate::{
    db::{Connection, Database, Identified, Identity, read},
    error::{Error, Resource, Result},
    models::{
        caller::{Provider, Viewer, Visibility},
        event::{Event, JobHead},
        job::JobKey,
        job_configuration::JobConfiguration,
        job_identity::{Configuration, JobIdentity},
    },
};

/// Most jobs in the cache; some 300 bytes each.
const JOBS: u64 = 100_000;
/// Most configurations in the cache; some 100 bytes a step each.
const CONFIGURATIONS: u64 = 2_000;

/// How long a provider's own id for a job is remembered: an operator may delete a job's row,
/// and the provider may create another job of that id.
const NAME_LIFETIME: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(crate) struct JobCache {
    database: Database,
    remembered: Arc<RwLock<Arc<Remembered>>>,
}

/// What is remembered of one database.
#[derive(Debug)]
struct Remembered {
    identity: Option<Identity>,
    jobs: Cache<Uuid, Arc<JobIdentity>>,
    by_provider_job_id: Cache<(Uuid, String), Uuid>,
    configurations: Cache<Uuid, Arc<Configuration>>,
}

impl Remembered {
    fn nothing(identity: Option<Identity>) -> Self {
        Self {
            identity,
            jobs: Cache::new(JOBS),
            by_provider_job_id: Cache::builder().max_capacity(JOBS).time_to_live(NAME_LIFETIME).build(),
            configurations: Cache::new(CONFIGURATIONS),
        }
    }
}

/// The cached values of these ids, and the ids that are not cached.
fn cached<V: Clone + Send + Sync + 'static>(
    cache: &Cache<Uuid, V>,
    ids: &[Uuid],
) -> (HashMap<Uuid, V>, Vec<Uuid>) {
    let found: HashMap<_, _> = ids.iter().filter_map(|id| Some((*id, cache.get(id)?))).collect();
    let missing = ids.iter().filter(|id| !found.contains_key(id)).copied().collect();
    (found, missing)
}

impl JobCache {
    pub(crate) fn new(database: Database) -> Self {
        Self { database, remembered: Arc::new(RwLock::new(Arc::new(Remembered::nothing(None)))) }
    }

    /// What is remembered of this database. What was remembered of another one is forgotten:
    /// a job or a configuration of it may be lost.
    fn of(&self, identity: Option<Identity>) -> Arc<Remembered> {
        let remembered = Arc::clone(&self.remembered.read());
        if remembered.identity == identity {
            return remembered;
        }
        let nothing = Arc::new(Remembered::nothing(identity));
        self.remembered.write().clone_from(&nothing);
        nothing
    }

    fn of_present(&self) -> Arc<Remembered> {
        self.of(self.database.identity())
    }

    /// A job that the viewer may see. Only its provider finds it by `provider_job_id`, which
    /// is looked up in the database.
    pub(crate) async fn find(&self, viewer: Viewer, key: &JobKey) -> Result<Arc<JobIdentity>> {
        let found = match (key, viewer.visibility()) {
            (JobKey::Id(id), _) => self.find_by_id(*id).await?,
            (JobKey::ProviderJobId(name), Visibility::Provider(provider_id)) => {
                read!(self.database, |conn| self.find_by_name(conn, provider_id, name))?
            }
            (JobKey::ProviderJobId(_), Visibility::Customer(_) | Visibility::Job(_)) => None,
        };
        found
            .filter(|job| viewer.sees(job.id, job.provider_id, job.customer_id))
            .ok_or_else(|| Error::not_found(Resource::Job, key))
    }

    /// A job of the provider, from memory if this process remembers it. Its row may be gone:
    /// an append to it fails with [`Error::NotFound`] then, and [`Self::find`] looks again.
    pub(crate) async fn find_to_append(&self, provider: Provider, key: &JobKey) -> Result<Arc<JobIdentity>> {
        let remembered = self.of_present();
        let job = match key {
            JobKey::Id(_) => None,
            JobKey::ProviderJobId(name) => {
                let id = remembered.by_provider_job_id.get(&(provider.id(), name.clone()));
                id.and_then(|id| remembered.jobs.get(&id))
            }
        };
        match job {
            Some(job) => Ok(job),
            None => self.find(provider.into(), key).await,
        }
    }

    /// The existing jobs among these, whosever they are.
    pub(crate) async fn list(
        &self,
        connection: &mut impl Identified,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, Arc<JobIdentity>>> {
        let (mut found, missing) = cached(&self.of(Some(connection.identity())).jobs, ids);
        if !missing.is_empty() {
            let heads = JobHead::load(connection, &missing).await?;
            for job in self.remember(connection, heads).await? {
                found.insert(job.id, job);
            }
        }
        Ok(found)
    }

    async fn find_by_id(&self, id: Uuid) -> Result<Option<Arc<JobIdentity>>> {
        match self.of_present().jobs.get(&id) {
            Some(job) => Ok(Some(job)),
            None => Ok(read!(self.database, |conn| self.list(conn, &[id]))?.remove(&id)),
        }
    }

    async fn find_by_name(
        &self,
        connection: &mut Connection,
        provider_id: Uuid,
        name: &str,
    ) -> Result<Option<Arc<JobIdentity>>> {
        let head = JobHead::find_by_provider_job_id(connection, provider_id, name).await?;
        let job = self.remember(connection, Vec::from_iter(head)).await?.pop();
        if let Some(job) = &job {
            let key = (provider_id, name.to_owned());
            self.of(Some(connection.identity())).by_provider_job_id.insert(key, job.id);
        }
        Ok(job)
    }

    /// The configuration of a job.
    pub(crate) async fn configuration(&self, id: Uuid) -> Result<Arc<Configuration>> {
        if let Some(configuration) = self.of_present().configurations.get(&id) {
            return Ok(configuration);
        }
        let found = read!(self.database, |conn| self.configurations_of(conn, &[id]))?;
        let found = found.get(&id).cloned();
        found.ok_or_else(|| Error::internal("a job without its configuration"))
    }

    async fn configurations_of(
        &self,
        connection: &mut impl Identified,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, Arc<Configuration>>> {
        let remembered = self.of(Some(connection.identity()));
        let (mut found, missing) = cached(&remembered.configurations, ids);
        if !missing.is_empty() {
            for tree in JobConfiguration::load(connection, &missing).await? {
                let configuration = Arc::new(Configuration::from(tree));
                remembered.configurations.insert(configuration.tree.id, Arc::clone(&configuration));
                found.insert(configuration.tree.id, configuration);
            }
        }
        Ok(found)
    }

    async fn remember(
        &self,
        connection: &mut impl Identified,
        heads: Vec<JobHead>,
    ) -> Result<Vec<Arc<JobIdentity>>> {
        let ids: Vec<Uuid> = heads.iter().map(|head| head.job_configuration_id).collect();
        let configurations = self.configurations_of(connection, &ids).await?;
        let remembered = self.of(Some(connection.identity()));
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
            remembered.jobs.insert(job.id, Arc::clone(&job));
            jobs.push(job);
        }
        Ok(jobs)
    }

    /// Rows of the log, each with its job.
    pub(crate) async fn with_jobs(
        &self,
        connection: &mut impl Identified,
        rows: Vec<Event>,
    ) -> Result<Vec<(Event, Arc<JobIdentity>)>> {
        let mut ids: Vec<Uuid> = rows.iter().map(|row| row.job_id).collect();
        ids.sort_unstable();
        ids.dedup();
        let jobs = self.list(connection, &ids).await?;
        rows.into_iter()
            .map(|row| {
                let job = jobs.get(&row.job_id).ok_or_else(|| Error::internal("an event without its job"))?;
                Ok((row, Arc::clone(job)))
            })
            .collect()
    }
}
