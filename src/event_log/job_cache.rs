//! Remembers what never changes about jobs and configurations, so that appends
//! and deliveries need no query for it.

use std::{collections::HashMap, hash::Hash, sync::Arc, time::Duration};

use moka::sync::{Cache, CacheBuilder};
use parking_lot::RwLock;
use uuid::Uuid;

use super::event::CommittedEvent;
use crate::{
    db::{Connection, Database, Identified, Identity, read},
    error::{Error, Resource, Result},
    models::{
        caller::{Provider, Tenant, Viewer, Visibility},
        event::{Event, JobHead},
        job::JobKey,
        job_configuration::JobConfiguration,
        job_identity::{Configuration, JobIdentity, StepIdentity},
    },
};

/// Most rows that one query reads, so that no query takes long, whatever the rows hold.
const PIECE: usize = 100;

/// Bytes of an entry of `by_provider_job_id` beside the name.
const NAME_BYTES: usize = 128;
/// How long a provider's own id for a job is remembered: an operator may delete a job's row,
/// and the provider may create another job of that id.
const NAME_LIFETIME: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(crate) struct JobCache {
    database: Database,
    cache_bytes: u64,
    remembered: Arc<RwLock<Arc<Remembered>>>,
}

/// What is remembered of one database.
#[derive(Debug)]
struct Remembered {
    identity: Option<Identity>,
    jobs: Cache<Uuid, Arc<JobIdentity>>,
    by_provider_job_id: Cache<(Uuid, String), Uuid>,
    steps: Cache<Uuid, Arc<StepIdentity>>,
    configurations: Cache<Uuid, Arc<Configuration>>,
}

impl Remembered {
    /// Of `cache_bytes`, configurations get one half, since each may have a megabyte.
    fn nothing(identity: Option<Identity>, cache_bytes: u64) -> Self {
        let eighth = cache_bytes / 8;
        Self {
            identity,
            jobs: weighed(eighth * 2, |_, job: &Arc<JobIdentity>| job.bytes()).build(),
            by_provider_job_id: weighed(eighth, |(_, name): &(Uuid, String), _| NAME_BYTES + name.len())
                .time_to_live(NAME_LIFETIME)
                .build(),
            steps: weighed(eighth, |_, step: &Arc<StepIdentity>| step.bytes()).build(),
            configurations: weighed(eighth * 4, |_, whole: &Arc<Configuration>| whole.bytes()).build(),
        }
    }
}

/// A cache of at most so many bytes, by this weight of its values.
fn weighed<K, V>(bytes: u64, weight: fn(&K, &V) -> usize) -> CacheBuilder<K, V, Cache<K, V>>
where
    K: Hash + Eq + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    let weigher = move |key: &K, value: &V| u32::try_from(weight(key, value)).unwrap_or(u32::MAX);
    Cache::builder().max_capacity(bytes).weigher(weigher)
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
    /// Remembers at most so many bytes.
    pub(crate) fn new(database: Database, cache_bytes: u64) -> Self {
        let nothing = Remembered::nothing(None, cache_bytes);
        Self { database, cache_bytes, remembered: Arc::new(RwLock::new(Arc::new(nothing))) }
    }

    /// What is remembered of this database. What was remembered of another one is forgotten:
    /// a job or a configuration of it may be lost.
    fn of(&self, identity: Option<Identity>) -> Arc<Remembered> {
        let remembered = Arc::clone(&self.remembered.read());
        if remembered.identity == identity {
            return remembered;
        }
        let nothing = Arc::new(Remembered::nothing(identity, self.cache_bytes));
        self.remembered.write().clone_from(&nothing);
        nothing
    }

    fn of_present(&self) -> Arc<Remembered> {
        self.of(self.database.identity())
    }

    /// A job that the viewer may see. Only its provider finds it by `provider_job_id`, which
    /// is looked up in the database. So is a job of somebody else, whether it is remembered or
    /// not: it takes as long as one that does not exist.
    pub(crate) async fn find(&self, viewer: Viewer, key: &JobKey) -> Result<Arc<JobIdentity>> {
        let found = match (key, viewer.visibility()) {
            (JobKey::Id(id), _) => self.find_by_id(viewer, *id).await?,
            (JobKey::ProviderJobId(name), Visibility::Provider(provider_id)) => {
                read!(self.database, viewer.tenant(), |conn| self.find_by_name(conn, provider_id, name))?
            }
            (JobKey::ProviderJobId(_), Visibility::Customer(_) | Visibility::Job(_)) => None,
        };
        found.ok_or_else(|| Error::not_found(Resource::Job, key))
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
        for piece in missing.chunks(PIECE) {
            for head in JobHead::load(connection, piece).await? {
                let job = self.remember(connection, head);
                found.insert(job.id, job);
            }
        }
        Ok(found)
    }

    async fn find_by_id(&self, viewer: Viewer, id: Uuid) -> Result<Option<Arc<JobIdentity>>> {
        let remembered = self.of_present().jobs.get(&id);
        match remembered.filter(|job| viewer.sees(job.id, job.provider_id, job.customer_id)) {
            Some(job) => Ok(Some(job)),
            None => read!(self.database, viewer.tenant(), |conn| self.load(conn, viewer, id)),
        }
    }

    async fn load(
        &self,
        connection: &mut Connection,
        viewer: Viewer,
        id: Uuid,
    ) -> Result<Option<Arc<JobIdentity>>> {
        let head = JobHead::find(connection, viewer, id).await?;
        Ok(head.map(|head| self.remember(connection, head)))
    }

    async fn find_by_name(
        &self,
        connection: &mut Connection,
        provider_id: Uuid,
        name: &str,
    ) -> Result<Option<Arc<JobIdentity>>> {
        let head = JobHead::find_by_provider_job_id(connection, provider_id, name).await?;
        let job = head.map(|head| self.remember(connection, head));
        if let Some(job) = &job {
            let key = (provider_id, name.to_owned());
            self.of(Some(connection.identity())).by_provider_job_id.insert(key, job.id);
        }
        Ok(job)
    }

    /// A configuration, which must be one that the tenant may see.
    pub(crate) async fn configuration(&self, tenant: Tenant, id: Uuid) -> Result<Arc<Configuration>> {
        if let Some(configuration) = self.of_present().configurations.get(&id) {
            return Ok(configuration);
        }
        read!(self.database, tenant, |conn| self.read_configuration(conn, id))
    }

    async fn read_configuration(&self, connection: &mut Connection, id: Uuid) -> Result<Arc<Configuration>> {
        let tree = JobConfiguration::load(connection, &[id]).await?.pop();
        let tree = tree.ok_or_else(|| Error::internal("a configuration that is referred to is missing"))?;
        let configuration = Arc::new(Configuration::from(tree));
        self.of(Some(connection.identity())).configurations.insert(id, Arc::clone(&configuration));
        Ok(configuration)
    }

    fn remember(&self, connection: &impl Identified, head: JobHead) -> Arc<JobIdentity> {
        let job = Arc::new(JobIdentity {
            id: head.id,
            provider_id: head.provider_id,
            customer_id: head.customer_id,
            provider_job_id: head.provider_job_id,
            configuration_id: head.job_configuration_id,
            configuration_tag: head.configuration_tag,
            labels: head.labels,
            points_total: head.points_total,
        });
        self.of(Some(connection.identity())).jobs.insert(job.id, Arc::clone(&job));
        job
    }

    /// The steps of these ids. Only their tags and names are read, which are small whatever
    /// their configurations hold.
    async fn steps(
        &self,
        connection: &mut impl Identified,
        ids: &[Uuid],
    ) -> Result<HashMap<Uuid, Arc<StepIdentity>>> {
        let remembered = self.of(Some(connection.identity()));
        let (mut found, missing) = cached(&remembered.steps, ids);
        for piece in missing.chunks(PIECE) {
            for (id, tag, name) in JobConfiguration::load_step_names(connection, piece).await? {
                let step = Arc::new(StepIdentity { id, tag, name });
                remembered.steps.insert(id, Arc::clone(&step));
                found.insert(id, step);
            }
        }
        Ok(found)
    }

    /// Rows of the log with what their encoding needs. It is read in pieces, which are
    /// remembered even if a later piece fails.
    pub(crate) async fn with_jobs(
        &self,
        connection: &mut impl Identified,
        rows: Vec<Event>,
    ) -> Result<Vec<CommittedEvent>> {
        let jobs = self.list(connection, &distinct(rows.iter().map(|row| row.job_id))).await?;
        let named = rows.iter().filter_map(|row| row.step_configuration_id);
        let steps = self.steps(connection, &distinct(named)).await?;
        rows.into_iter()
            .map(|row| {
                let job = jobs.get(&row.job_id).ok_or_else(|| Error::internal("an event without its job"))?;
                let step = row.step_configuration_id.map(|id| {
                    steps.get(&id).cloned().ok_or_else(|| Error::internal("an event without its step"))
                });
                Ok(CommittedEvent { job: Arc::clone(job), step: step.transpose()?, row })
            })
            .collect()
    }
}

fn distinct(ids: impl Iterator<Item = Uuid>) -> Vec<Uuid> {
    let mut ids: Vec<Uuid> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}
