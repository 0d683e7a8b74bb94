//! Jobs, which a provider runs for a customer.

mod export;
mod hold;
mod list;
mod summary;
mod text;
mod walk;

use std::fmt;

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

pub use self::{
    export::ExportPage,
    list::{JobFilters, JobPage},
    summary::{Figures, Grouping, Period, Summary},
    text::SearchText,
    walk::{JobScope, JobWalk, WalkPoint, WalkedJob},
};
use super::{
    caller::{Provider, Viewer, Visibility},
    customer_code::CustomerKey,
    job_configuration::{ConfigurationKey, JobConfiguration},
    labels::Labels,
    max_silence::{self, MaxSilence},
    usage,
    user::User,
    visible_jobs,
};
use crate::{
    config::QuotaSettings,
    db::Transaction,
    error::{Error, Resource, Result, Violations},
    progress::{JobStatus, Progress, Steps, Weights},
    quota::Quota,
    schema::{job_configurations, job_states, job_texts, jobs, step_configurations, users},
};

/// The key by which a request names a job.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum JobKey {
    Id(Uuid),
    /// The provider's own id of the job; only the job's provider may use it.
    ProviderJobId(String),
}

/// The form in which error texts name the job.
impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::ProviderJobId(id) => f.write_str(id),
        }
    }
}

/// A job, with the state that its log derives.
#[derive(Clone, Debug, PartialEq, Eq, Queryable)]
pub struct Job {
    pub id: Uuid,
    /// The user who runs the job.
    pub provider: Party,
    /// The user for whom the job runs.
    pub customer: Party,
    /// The provider's own id of the job; unique within the provider.
    pub provider_job_id: String,
    /// A name for people; may be empty.
    pub provider_job_name: String,
    /// The exact version of the configuration that the job was created with.
    pub job_configuration_id: Uuid,
    /// The tag of that configuration.
    pub configuration_tag: String,
    /// The version of that configuration.
    pub configuration_version: String,
    /// The name of that configuration.
    pub configuration_name: String,
    /// Status after the last event.
    pub status: JobStatus,
    /// Progress after the last event.
    #[diesel(deserialize_as = ProgressColumns)]
    pub progress: Progress,
    /// How far each step is.
    #[diesel(deserialize_as = Vec<u8>)]
    pub steps: Steps,
    /// Sequence of the last event; 0 if there is none.
    pub last_sequence: i64,
    /// How long the provider may be silent; none for ever.
    pub max_silence: Option<MaxSilence>,
    pub labels: Labels,
    /// Whether the provider and the customer hold the job, so that retention removes nothing of it.
    pub held_by_provider: bool,
    pub held_by_customer: bool,
    /// When the customer asked to stop; none if never.
    pub cancellation_requested_at: Option<DateTime<Utc>>,
    /// When the job was closed; none for an open job.
    pub closed_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

/// The provider or the customer of a job, as the other one of them sees it. The names may be
/// empty.
#[derive(Clone, Debug, PartialEq, Eq, Queryable)]
pub struct Party {
    pub id: Uuid,
    pub first_name: String,
    pub last_name: String,
}

impl Party {
    /// The users of these ids.
    pub async fn load(conn: &mut AsyncPgConnection, ids: &[Uuid]) -> Result<Vec<Self>> {
        let query = users::table.filter(users::id.eq_any(ids));
        Ok(query.select((users::id, users::first_name, users::last_name)).load(conn).await?)
    }
}

/// Points done, points in total, percent.
type ProgressColumns = (i64, i64, i16);

impl From<ProgressColumns> for Progress {
    fn from((points_done, points_total, percent): ProgressColumns) -> Self {
        Self { points_done, points_total, percent }
    }
}

#[derive(Clone, Debug)]
pub struct NewJob {
    pub provider_job_id: String,
    pub provider_job_name: String,
    pub customer: CustomerKey,
    pub configuration_tag: String,
    /// None: the latest version of the tag.
    pub configuration_version: Option<String>,
    /// None: that of the configuration.
    pub max_silence: Option<MaxSilence>,
    pub labels: Labels,
}

impl Job {
    /// Loads those of these jobs that are visible, in any order.
    async fn load(conn: &mut AsyncPgConnection, visibility: Visibility, ids: &[Uuid]) -> Result<Vec<Self>> {
        diesel::alias!(users as providers: Providers, users as customers: Customers);
        let (provider_id, customer_id) = (providers.field(users::id), customers.field(users::id));
        let query = jobs::table
            .inner_join(job_states::table)
            .inner_join(providers.on(provider_id.eq(jobs::provider_id)))
            .inner_join(customers.on(customer_id.eq(jobs::customer_id)))
            .inner_join(job_configurations::table.on(job_configurations::id.eq(jobs::job_configuration_id)))
            .select((
                jobs::id,
                providers.fields((users::id, users::first_name, users::last_name)),
                customers.fields((users::id, users::first_name, users::last_name)),
                jobs::provider_job_id,
                jobs::provider_job_name,
                jobs::job_configuration_id,
                job_configurations::tag,
                job_configurations::version,
                job_configurations::name,
                jobs::status,
                (job_states::points_done, job_states::points_total, job_states::percent),
                job_states::steps,
                job_states::last_sequence,
                jobs::max_silence,
                jobs::labels,
                jobs::held_by_provider,
                jobs::held_by_customer,
                job_states::cancellation_requested_at,
                jobs::closed_at,
                jobs::created_at,
                job_states::updated_at,
            ))
            .into_boxed();
        let query = visible_jobs!(query, visibility);
        let query = match ids {
            // Postgres plans a query with an array anew at each call, which costs
            // more than the look-up of one id.
            [id] => query.filter(jobs::id.eq(*id)),
            ids => query.filter(jobs::id.eq_any(ids)),
        };
        Ok(query.load(conn).await?)
    }

    /// Finds a job that the viewer may see. Fails with [`Error::NotFound`] for any
    /// other job, and for a provider's key if the viewer is not a provider.
    pub async fn find(conn: &mut AsyncPgConnection, viewer: Viewer, key: &JobKey) -> Result<Self> {
        let job = match (key, viewer.visibility()) {
            (JobKey::Id(id), visibility) => Self::load(conn, visibility, &[*id]).await?.pop(),
            (JobKey::ProviderJobId(name), Visibility::Provider(provider_id)) => {
                Self::find_by_provider_job_id(conn, provider_id, name).await?
            }
            (JobKey::ProviderJobId(_), Visibility::Customer(_) | Visibility::Job(_)) => None,
        };
        job.ok_or_else(|| Error::not_found(Resource::Job, key))
    }

    async fn find_by_provider_job_id(
        conn: &mut AsyncPgConnection,
        provider_id: Uuid,
        provider_job_id: &str,
    ) -> Result<Option<Self>> {
        let id = jobs::table
            .filter(jobs::provider_id.eq(provider_id).and(jobs::provider_job_id.eq(provider_job_id)))
            .select(jobs::id)
            .first(conn)
            .await
            .optional()?;
        let Some(id) = id else { return Ok(None) };
        Ok(Self::load(conn, Visibility::Provider(provider_id), &[id]).await?.pop())
    }

    /// Creates a job. Returns it and whether it existed before. Fails with
    /// [`Error::RateExceeded`] after too many unknown customer codes, with
    /// [`Error::Differs`] if the job exists with other content, otherwise with
    /// [`Error::NotFound`] if the customer or the configuration does not exist, otherwise with
    /// [`Error::QuotaExceeded`].
    ///
    /// None if no customer has the code: the transaction must be committed all the same,
    /// because the code is counted.
    pub async fn create(
        tx: &mut Transaction<'_>,
        provider: Provider,
        new: NewJob,
        quotas: &QuotaSettings,
    ) -> Result<Option<(Self, bool)>> {
        let customer_id = new.customer.resolve(tx, provider).await?;
        // A repeated request has the same answer, even if the customer has been
        // disabled since.
        if let Some(stored) = Self::find_by_provider_job_id(tx, provider.id(), &new.provider_job_id).await? {
            return new.repeats(stored, customer_id).map(Some);
        }
        if !User::is_customer(tx, customer_id).await? {
            return new.customer.refuse(tx, provider).await.map(|()| None);
        }
        let configuration = new.resolve(tx, provider).await?;
        let quotas = [quotas.of(Quota::OpenJobs), quotas.of(Quota::StoredBytes)];
        if let Some(used) = usage::find_used_up(tx, provider.id(), &quotas).await? {
            // The last place may have been taken by the same request.
            let stored = Self::find_by_provider_job_id(tx, provider.id(), &new.provider_job_id).await?;
            let repeats = stored.map(|stored| new.repeats(stored, customer_id));
            return repeats.unwrap_or(Err(Error::QuotaExceeded(used))).map(Some);
        }
        let inserted = new.insert(tx, provider, customer_id, configuration).await?;
        let job = Self::find_by_provider_job_id(tx, provider.id(), &new.provider_job_id)
            .await?
            .ok_or_else(|| Error::internal("a job is missing directly after its creation"))?;
        let created = if inserted { Ok((job, false)) } else { new.repeats(job, customer_id) };
        created.map(Some)
    }
}

impl NewJob {
    /// The id of the job's configuration, the job's points and how long its provider may be
    /// silent. Fails with [`Error::NotFound`] if the configuration does not exist.
    async fn resolve(
        &self,
        tx: &mut Transaction<'_>,
        provider: Provider,
    ) -> Result<(Uuid, i64, Option<MaxSilence>)> {
        let tag = self.configuration_tag.clone();
        let key = match self.configuration_version.clone() {
            Some(version) => ConfigurationKey::Version { tag, version },
            None => ConfigurationKey::Latest { tag },
        };
        let job_configuration_id = JobConfiguration::find_id(tx, provider.into(), &key)
            .await?
            .ok_or_else(|| Error::not_found(Resource::JobConfiguration, &key))?;
        let points = step_configurations::table
            .filter(step_configurations::job_configuration_id.eq(job_configuration_id))
            .select(step_configurations::points)
            .load::<i32>(tx)
            .await?;
        let max_silence = match self.max_silence {
            Some(given) => Some(given),
            None => {
                let configuration = job_configurations::table.find(job_configuration_id);
                configuration.select(job_configurations::max_silence).first(tx).await?
            }
        };
        Ok((job_configuration_id, Weights::new(points.into_iter().map(i64::from)).total(), max_silence))
    }

    /// Inserts the job. Returns false if its key exists. If another transaction is
    /// inserting the key, this waits until that transaction ends.
    async fn insert(
        &self,
        tx: &mut Transaction<'_>,
        provider: Provider,
        customer_id: Uuid,
        (job_configuration_id, points_total, max_silence): (Uuid, i64, Option<MaxSilence>),
    ) -> Result<bool> {
        let id = Uuid::now_v7();
        let inserted = diesel::insert_into(jobs::table)
            .values((
                jobs::id.eq(id),
                jobs::provider_id.eq(provider.id()),
                jobs::customer_id.eq(customer_id),
                jobs::job_configuration_id.eq(job_configuration_id),
                jobs::configuration_tag.eq(&self.configuration_tag),
                jobs::provider_job_id.eq(&self.provider_job_id),
                jobs::provider_job_name.eq(&self.provider_job_name),
                jobs::points_total.eq(points_total),
                jobs::max_silence.eq(max_silence),
                jobs::labels.eq(&self.labels),
            ))
            .on_conflict((jobs::provider_id, jobs::provider_job_id))
            .do_nothing()
            .execute(tx)
            .await?;
        if inserted == 0 {
            return Ok(false);
        }
        diesel::insert_into(job_texts::table)
            .values((
                job_texts::job_id.eq(id),
                job_texts::provider_id.eq(provider.id()),
                job_texts::customer_id.eq(customer_id),
                job_texts::provider_job_id.eq(text::folded(&self.provider_job_id)),
                job_texts::provider_job_name.eq(text::folded(&self.provider_job_name)),
            ))
            .execute(tx)
            .await?;
        Ok(true)
    }

    /// Returns the stored job of the same key, if its content is the same.
    fn repeats(&self, stored: Job, customer_id: Uuid) -> Result<(Job, bool)> {
        let differences = self.differences(&stored, customer_id);
        if differences.is_empty() {
            return Ok((stored, true));
        }
        Err(Error::Differs { resource: Resource::Job, name: self.provider_job_id.clone(), differences })
    }

    /// Lists the fields whose stored values differ from those of this job.
    fn differences(&self, stored: &Job, customer_id: Uuid) -> Violations {
        let version = self.configuration_version.as_ref().unwrap_or(&stored.configuration_version);
        let mut differences = Violations::default();
        if customer_id != stored.customer.id {
            let stored = format!("is stored with the customer \"{}\"", stored.customer.id);
            differences.add(self.customer.field(), stored);
        }
        for (field, given, stored) in [
            ("configuration_tag", &self.configuration_tag, &stored.configuration_tag),
            ("configuration_version", version, &stored.configuration_version),
            ("provider_job_name", &self.provider_job_name, &stored.provider_job_name),
        ] {
            differences.add_if_different(field, given, stored);
        }
        if self.labels != stored.labels {
            differences.add("labels", "are stored with other keys or values");
        }
        if self.max_silence.is_some() && self.max_silence != stored.max_silence {
            differences.add("max_silence", max_silence::is_stored_as(stored.max_silence));
        }
        differences
    }
}
