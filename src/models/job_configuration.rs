//! Job configurations: the steps and the metadata of a kind of job. A registered
//! version never changes.

mod register;

use std::{collections::HashMap, fmt};

use chrono::{DateTime, Utc};
use diesel::{dsl::exists, pg::Pg, prelude::*};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

pub use self::register::{NewJobConfiguration, NewMetadataConfiguration, NewStepConfiguration};
use super::{
    caller::{Provider, Viewer, Visibility},
    max_silence::MaxSilence,
    pg_enum::pg_enum,
    version_order::latest_first,
};
use crate::{
    error::{Error, Resource, Result},
    progress::Weights,
    schema::{job_configurations, jobs, metadata_configurations, step_configurations},
};

pg_enum! {
    /// The kind of value that a metadata name has.
    pub enum MetadataKind = MetadataKind {
        Text = "text",
        /// A finite number.
        Number = "number",
        /// A string that is an absolute http or https URL.
        Link = "link",
    }
}

/// A version of a configuration, with its steps and their metadata. None of them ever
/// changes, so that `updated_at` of their rows is `created_at`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobConfiguration {
    pub id: Uuid,
    pub provider_id: Uuid,
    /// The provider's key for this kind of job; all versions share it.
    pub tag: String,
    pub name: String,
    /// Strict SemVer 2.0; unique within provider and tag.
    pub version: String,
    pub created_at: DateTime<Utc>,
    /// That of its jobs, unless they have another one; none for ever.
    pub max_silence: Option<MaxSilence>,
    /// In order; at most [`crate::limits::CONFIGURATION_STEPS`].
    pub steps: Vec<StepConfiguration>,
}

/// A step of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepConfiguration {
    pub id: Uuid,
    /// The key by which events name the step; unique within its configuration.
    pub tag: String,
    pub name: String,
    /// Weight of the step in the job's progress: 0 to [`crate::limits::STEP_POINTS`].
    pub points: i64,
    pub created_at: DateTime<Utc>,
    /// In order; at most [`crate::limits::STEP_METADATA`].
    pub metadata: Vec<MetadataConfiguration>,
}

/// A metadata name that a step's events are expected to carry.
#[derive(Clone, Debug, PartialEq, Eq, Queryable, Selectable)]
#[diesel(table_name = metadata_configurations, check_for_backend(Pg))]
pub struct MetadataConfiguration {
    pub id: Uuid,
    /// Unique within its step.
    pub name: String,
    /// The kind that the value must have.
    pub kind: MetadataKind,
    /// The unit of a number, for people; may be empty.
    pub units: String,
    pub created_at: DateTime<Utc>,
}

/// The key by which a request names a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigurationKey {
    Id(Uuid),
    /// Tag and version; only the configuration's provider may use them.
    Version {
        tag: String,
        /// The configuration's version, compared as text.
        version: String,
    },
    /// The latest version of a tag, as `version_order` defines it. Only the configuration's
    /// provider may use it.
    Latest {
        tag: String,
    },
}

/// The form in which error texts name the configuration.
impl fmt::Display for ConfigurationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Version { tag, version } => write!(f, "{tag} {version}"),
            Self::Latest { tag } => f.write_str(tag),
        }
    }
}

impl JobConfiguration {
    pub fn weights(&self) -> Weights {
        Weights::new(self.steps.iter().map(|step| step.points))
    }

    /// Finds a configuration that the viewer may see: a provider's own one, or that of a
    /// customer's job, or that of a watch token's job.
    pub async fn find(
        conn: &mut AsyncPgConnection,
        viewer: Viewer,
        key: &ConfigurationKey,
    ) -> Result<Option<Self>> {
        let Some(id) = Self::find_id(conn, viewer, key).await? else { return Ok(None) };
        Ok(Self::load(conn, &[id]).await?.pop())
    }

    /// As [`Self::find`], but reads only the id.
    pub async fn find_id(
        conn: &mut AsyncPgConnection,
        viewer: Viewer,
        key: &ConfigurationKey,
    ) -> Result<Option<Uuid>> {
        use job_configurations::{id, provider_id, table, tag as tag_, version as version_};
        let jobs_of = |wanted| jobs::table.filter(jobs::job_configuration_id.eq(wanted));
        let query = table.select(id).into_boxed();
        let query = match (viewer.visibility(), key) {
            (Visibility::Provider(provider), ConfigurationKey::Id(wanted)) => {
                query.filter(provider_id.eq(provider).and(id.eq(wanted)))
            }
            (Visibility::Provider(provider), ConfigurationKey::Version { tag, version }) => {
                query.filter(provider_id.eq(provider).and(tag_.eq(tag)).and(version_.eq(version)))
            }
            (Visibility::Provider(provider), ConfigurationKey::Latest { tag }) => {
                query.filter(provider_id.eq(provider).and(tag_.eq(tag))).order(latest_first()).limit(1)
            }
            (Visibility::Customer(customer), ConfigurationKey::Id(wanted)) => {
                let visible = jobs_of(wanted).filter(jobs::customer_id.eq(customer));
                query.filter(id.eq(wanted).and(exists(visible)))
            }
            (Visibility::Job(job), ConfigurationKey::Id(wanted)) => {
                query.filter(id.eq(wanted).and(exists(jobs_of(wanted).filter(jobs::id.eq(job)))))
            }
            (
                Visibility::Customer(_) | Visibility::Job(_),
                ConfigurationKey::Version { .. } | ConfigurationKey::Latest { .. },
            ) => return Ok(None),
        };
        Ok(query.first(conn).await.optional()?)
    }

    /// Fails with [`Error::NotFound`] if a provider filters by a tag of which they have no
    /// configuration. A customer may filter by any tag: there may be providers who have it.
    pub async fn demand_tag(conn: &mut AsyncPgConnection, viewer: Viewer, tag: &str) -> Result<()> {
        let Visibility::Provider(_) = viewer.visibility() else { return Ok(()) };
        let key = ConfigurationKey::Latest { tag: tag.to_owned() };
        let found = Self::find_id(conn, viewer, &key).await?;
        found.map(drop).ok_or_else(|| Error::not_found(Resource::JobConfiguration, tag))
    }

    /// Lists the ids of at most `limit` versions of a tag, highest precedence first,
    /// beginning after the version with the id `after`. Fails with [`Error::NotFound`] if
    /// there is no version of the tag.
    pub async fn list_versions(
        conn: &mut AsyncPgConnection,
        provider: Provider,
        tag: &str,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<Uuid>> {
        use job_configurations::{created_at, id, precedence, provider_id, table, tag as tag_};
        let mut query = table
            .filter(provider_id.eq(provider.id()).and(tag_.eq(tag)))
            .order((precedence.desc(), created_at.desc(), id.desc()))
            .limit(limit)
            .select(id)
            .into_boxed();
        if let Some(last) = after {
            let Some((last_precedence, last_created_at)) = table
                .filter(provider_id.eq(provider.id()).and(tag_.eq(tag)).and(id.eq(last)))
                .select((precedence, created_at))
                .first::<(Vec<u8>, DateTime<Utc>)>(conn)
                .await
                .optional()?
            else {
                return Ok(Vec::new());
            };
            let later_of_equal = created_at.eq(last_created_at).and(id.lt(last));
            query =
                query.filter(precedence.le(last_precedence.clone()).and(
                    precedence.lt(last_precedence).or(created_at.lt(last_created_at)).or(later_of_equal),
                ));
        }
        let found: Vec<Uuid> = query.load(conn).await?;
        if found.is_empty() {
            Self::demand_tag(conn, provider.into(), tag).await?;
        }
        Ok(found)
    }

    /// Lists the ids of the latest versions of at most `limit` tags, ordered by tag,
    /// beginning after the tag of the version with the id `after`.
    pub async fn list_latest(
        conn: &mut AsyncPgConnection,
        provider: Provider,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<Uuid>> {
        use job_configurations::{id, provider_id, table, tag};
        let mut query = table
            .filter(provider_id.eq(provider.id()))
            .distinct_on(tag)
            .order((tag, latest_first()))
            .limit(limit)
            .select(id)
            .into_boxed();
        if let Some(last) = after {
            let Some(last_tag) = table
                .filter(provider_id.eq(provider.id()).and(id.eq(last)))
                .select(tag)
                .first::<String>(conn)
                .await
                .optional()?
            else {
                return Ok(Vec::new());
            };
            query = query.filter(tag.gt(last_tag));
        }
        Ok(query.load(conn).await?)
    }

    /// The id, tag and name of each of these steps, whosever they are.
    pub async fn load_step_names(
        conn: &mut AsyncPgConnection,
        ids: &[Uuid],
    ) -> Result<Vec<(Uuid, String, String)>> {
        use step_configurations::{id, name, table, tag};
        Ok(table.filter(id.eq_any(ids)).select((id, tag, name)).load(conn).await?)
    }

    /// Loads configurations by their ids, in the order of the ids. Unknown ids are left
    /// out. It does not check whether a viewer may see them: the ids must come from rows
    /// that the viewer may see.
    pub async fn load(conn: &mut AsyncPgConnection, ids: &[Uuid]) -> Result<Vec<Self>> {
        let mut metadata: HashMap<Uuid, Vec<MetadataConfiguration>> = HashMap::new();
        let rows = metadata_configurations::table
            .inner_join(step_configurations::table)
            .filter(step_configurations::job_configuration_id.eq_any(ids))
            .order((metadata_configurations::step_configuration_id, metadata_configurations::position))
            .select((metadata_configurations::step_configuration_id, MetadataConfiguration::as_select()))
            .load::<(Uuid, MetadataConfiguration)>(conn)
            .await?;
        for (step_id, of_step) in rows {
            metadata.entry(step_id).or_default().push(of_step);
        }

        let mut steps: HashMap<Uuid, Vec<StepConfiguration>> = HashMap::new();
        let rows = step_configurations::table
            .filter(step_configurations::job_configuration_id.eq_any(ids))
            .order((step_configurations::job_configuration_id, step_configurations::position))
            .select((
                step_configurations::job_configuration_id,
                step_configurations::id,
                step_configurations::tag,
                step_configurations::name,
                step_configurations::points,
                step_configurations::created_at,
            ))
            .load::<(Uuid, Uuid, String, String, i32, DateTime<Utc>)>(conn)
            .await?;
        for (configuration_id, id, tag, name, points, created_at) in rows {
            let metadata = metadata.remove(&id).unwrap_or_default();
            let step = StepConfiguration { id, tag, name, points: points.into(), created_at, metadata };
            steps.entry(configuration_id).or_default().push(step);
        }

        let mut found: HashMap<Uuid, Self> = job_configurations::table
            .filter(job_configurations::id.eq_any(ids))
            .select((
                job_configurations::id,
                job_configurations::provider_id,
                job_configurations::tag,
                job_configurations::name,
                job_configurations::version,
                job_configurations::created_at,
                job_configurations::max_silence,
            ))
            .load::<(Uuid, Uuid, String, String, String, DateTime<Utc>, Option<MaxSilence>)>(conn)
            .await?
            .into_iter()
            .map(|(id, provider_id, tag, name, version, created_at, max_silence)| {
                let steps = steps.remove(&id).unwrap_or_default();
                (id, Self { id, provider_id, tag, name, version, created_at, max_silence, steps })
            })
            .collect();
        Ok(ids.iter().filter_map(|id| found.remove(id)).collect())
    }
}
