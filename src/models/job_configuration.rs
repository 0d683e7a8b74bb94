//! What jobs look like: versions of a configuration, registered once and never
//! changed.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use diesel::{ExpressionMethods as _, QueryDsl as _, deserialize::FromSqlRow, expression::AsExpression};
use diesel_async::{AsyncPgConnection, RunQueryDsl as _};
use uuid::Uuid;

use crate::{
    error::Result,
    progress::Weights,
    schema::{job_configurations, metadata_configurations, sql_types, step_configurations},
};

/// What kind of value a metadata name has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, AsExpression, FromSqlRow)]
#[diesel(sql_type = sql_types::MetadataKind)]
pub enum MetadataKind {
    /// A string.
    Text,
    /// A finite number.
    Number,
    /// A string that is an absolute http or https URL.
    Link,
}

/// A version of a configuration, with all that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobConfiguration {
    /// Made here.
    pub id: Uuid,
    /// Whose it is.
    pub provider_id: Uuid,
    /// What kind of job this is, within its provider.
    pub tag: String,
    /// For people.
    pub name: String,
    /// Strict SemVer 2.0; unique within provider and tag.
    pub version: String,
    /// When it was registered.
    pub created_at: DateTime<Utc>,
    /// In order; at most [`crate::limits::CONFIGURATION_STEPS`].
    pub steps: Vec<StepConfiguration>,
}

/// A step of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepConfiguration {
    /// Made here.
    pub id: Uuid,
    /// What events name it by; unique within its configuration.
    pub tag: String,
    /// For people.
    pub name: String,
    /// How much of the whole it is: 0 to [`crate::limits::STEP_POINTS`].
    pub points: i64,
    /// In order; at most [`crate::limits::STEP_METADATA`].
    pub metadata: Vec<MetadataConfiguration>,
}

/// A metadata name that a step's events are expected to carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataConfiguration {
    /// Unique within its step.
    pub name: String,
    /// What its value must be.
    pub kind: MetadataKind,
    /// The unit of a number, for people; may be empty.
    pub units: String,
}

impl JobConfiguration {
    /// How much each step weighs.
    pub fn weights(&self) -> Weights {
        Weights::new(self.steps.iter().map(|step| step.points))
    }

    /// Those with these ids, in their order; unknown ids are left out. Whose
    /// they are is not looked at: for ids out of rows that the caller may see.
    pub async fn load(conn: &mut AsyncPgConnection, ids: &[Uuid]) -> Result<Vec<Self>> {
        let mut metadata: HashMap<Uuid, Vec<MetadataConfiguration>> = HashMap::new();
        let rows = metadata_configurations::table
            .inner_join(step_configurations::table)
            .filter(step_configurations::job_configuration_id.eq_any(ids))
            .order((metadata_configurations::step_configuration_id, metadata_configurations::position))
            .select((
                metadata_configurations::step_configuration_id,
                metadata_configurations::name,
                metadata_configurations::kind,
                metadata_configurations::units,
            ))
            .load::<(Uuid, String, MetadataKind, String)>(conn)
            .await?;
        for (step_id, name, kind, units) in rows {
            metadata.entry(step_id).or_default().push(MetadataConfiguration { name, kind, units });
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
            ))
            .load::<(Uuid, Uuid, String, String, i32)>(conn)
            .await?;
        for (configuration_id, id, tag, name, points) in rows {
            let metadata = metadata.remove(&id).unwrap_or_default();
            let step = StepConfiguration { id, tag, name, points: points.into(), metadata };
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
            ))
            .load::<(Uuid, Uuid, String, String, String, DateTime<Utc>)>(conn)
            .await?
            .into_iter()
            .map(|(id, provider_id, tag, name, version, created_at)| {
                let steps = steps.remove(&id).unwrap_or_default();
                (id, Self { id, provider_id, tag, name, version, created_at, steps })
            })
            .collect();
        Ok(ids.iter().filter_map(|id| found.remove(id)).collect())
    }
}
