//! Registration of a version of a configuration.

use diesel::{ExpressionMethods as _, Insertable};
use diesel_async::RunQueryDsl as _;
use semver::Version;
use uuid::Uuid;

use super::{ConfigurationKey, JobConfiguration, MetadataConfiguration, MetadataKind};
use crate::{
    config::QuotaSettings,
    db::Transaction,
    error::{Error, Resource, Result, Violations},
    models::{caller::Provider, usage, version_order},
    quota::Quota,
    schema::{job_configurations, metadata_configurations, step_configurations},
};

/// A version to register. Its values are within the limits, and its step tags and
/// metadata names are unique where they have to be.
#[derive(Clone, Debug)]
pub struct NewJobConfiguration {
    pub tag: String,
    pub name: String,
    pub version: Version,
    pub steps: Vec<NewStepConfiguration>,
}

/// A step of a version to register.
#[derive(Clone, Debug)]
pub struct NewStepConfiguration {
    pub tag: String,
    pub name: String,
    pub points: i32,
    pub metadata: Vec<MetadataConfiguration>,
}

impl JobConfiguration {
    /// Registers a version. Returns it and whether it existed before. Fails with
    /// [`Error::Differs`] if it exists with other content, otherwise with
    /// [`Error::QuotaExceeded`] if the provider has too many.
    pub async fn register(
        tx: &mut Transaction<'_>,
        provider: Provider,
        new: NewJobConfiguration,
        quotas: &QuotaSettings,
    ) -> Result<(Self, bool)> {
        let key = ConfigurationKey::Version { tag: new.tag.clone(), version: new.version.to_string() };
        if let Some(stored) = Self::find(tx, provider.into(), &key).await? {
            return new.repeats(stored);
        }
        let quota = quotas.of(Quota::Configurations);
        if let Some(used) = usage::find_used_up(tx, provider.id(), &[quota]).await? {
            // The last place may have been taken by the same request.
            let stored = Self::find(tx, provider.into(), &key).await?;
            return stored.map_or(Err(Error::QuotaExceeded(used)), |stored| new.repeats(stored));
        }
        let inserted = new.insert(tx, provider).await?;
        let stored = Self::find(tx, provider.into(), &key)
            .await?
            .ok_or_else(|| Error::internal("a configuration is missing directly after its registration"))?;
        if inserted { Ok((stored, false)) } else { new.repeats(stored) }
    }
}

/// Most rows of one INSERT: Postgres takes at most 65,535 parameters in a statement.
const INSERT_ROWS: usize = 5_000;

#[derive(Insertable)]
#[diesel(table_name = step_configurations)]
struct StepRow<'a> {
    id: Uuid,
    job_configuration_id: Uuid,
    position: i16,
    tag: &'a str,
    name: &'a str,
    points: i32,
}

#[derive(Insertable)]
#[diesel(table_name = metadata_configurations)]
struct MetadataRow<'a> {
    id: Uuid,
    step_configuration_id: Uuid,
    position: i16,
    name: &'a str,
    kind: MetadataKind,
    units: &'a str,
}

impl NewJobConfiguration {
    /// Inserts the version. Returns false if its tag and version exist. If another
    /// transaction is inserting them, this waits until that transaction ends.
    async fn insert(&self, tx: &mut Transaction<'_>, provider: Provider) -> Result<bool> {
        let job_configuration_id = Uuid::now_v7();
        let inserted = diesel::insert_into(job_configurations::table)
            .values((
                job_configurations::id.eq(job_configuration_id),
                job_configurations::provider_id.eq(provider.id()),
                job_configurations::tag.eq(&self.tag),
                job_configurations::name.eq(&self.name),
                job_configurations::version.eq(self.version.to_string()),
                job_configurations::release.eq(self.version.pre.is_empty()),
                job_configurations::precedence.eq(version_order::precedence(&self.version)),
            ))
            .on_conflict((
                job_configurations::provider_id,
                job_configurations::tag,
                job_configurations::version,
            ))
            .do_nothing()
            .execute(tx)
            .await?;
        if inserted == 0 {
            return Ok(false);
        }
        let mut steps = Vec::with_capacity(self.steps.len());
        let mut metadata = Vec::new();
        for (position, step) in (0..).zip(&self.steps) {
            let id = Uuid::now_v7();
            let NewStepConfiguration { tag, name, points, .. } = step;
            steps.push(StepRow { id, job_configuration_id, position, tag, name, points: *points });
            metadata.extend((0..).zip(&step.metadata).map(|(position, metadata)| MetadataRow {
                id: Uuid::now_v7(),
                step_configuration_id: id,
                position,
                name: &metadata.name,
                kind: metadata.kind,
                units: &metadata.units,
            }));
        }
        for rows in steps.chunks(INSERT_ROWS) {
            diesel::insert_into(step_configurations::table).values(rows).execute(tx).await?;
        }
        for rows in metadata.chunks(INSERT_ROWS) {
            diesel::insert_into(metadata_configurations::table).values(rows).execute(tx).await?;
        }
        Ok(true)
    }

    /// Returns the stored version of the same key, if its content is the same.
    fn repeats(&self, stored: JobConfiguration) -> Result<(JobConfiguration, bool)> {
        let differences = self.differences(&stored);
        if differences.is_empty() {
            return Ok((stored, true));
        }
        let name = format!("{} {}", stored.tag, stored.version);
        Err(Error::Differs { resource: Resource::JobConfiguration, name, differences })
    }

    /// Lists the fields whose stored values differ from those of this version.
    fn differences(&self, stored: &JobConfiguration) -> Violations {
        let mut differences = Violations::default();
        differences.add_if_different("name", &self.name, &stored.name);
        if self.steps.len() != stored.steps.len() {
            differences.add("steps", format!("{} are stored", stored.steps.len()));
        }
        for (i, (step, stored)) in self.steps.iter().zip(&stored.steps).enumerate() {
            differences.add_if_different(format!("steps[{i}].tag"), &step.tag, &stored.tag);
            differences.add_if_different(format!("steps[{i}].name"), &step.name, &stored.name);
            if i64::from(step.points) != stored.points {
                differences.add(format!("steps[{i}].points"), format!("is stored as {}", stored.points));
            }
            if step.metadata.len() != stored.metadata.len() {
                differences
                    .add(format!("steps[{i}].metadata"), format!("{} are stored", stored.metadata.len()));
            }
            for (j, (metadata, stored)) in step.metadata.iter().zip(&stored.metadata).enumerate() {
                let path = format!("steps[{i}].metadata[{j}]");
                differences.add_if_different(format!("{path}.name"), &metadata.name, &stored.name);
                if metadata.kind != stored.kind {
                    let kind = stored.kind.label().to_uppercase();
                    differences.add(format!("{path}.kind"), format!("is stored as {kind}"));
                }
                differences.add_if_different(format!("{path}.units"), &metadata.units, &stored.units);
            }
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::job_configuration::StepConfiguration;

    fn metadata(kind: MetadataKind) -> MetadataConfiguration {
        MetadataConfiguration { name: "mean".to_owned(), kind, units: "HU".to_owned() }
    }

    fn new(points: i32, metadata: Vec<MetadataConfiguration>) -> NewJobConfiguration {
        let (tag, name) = ("load".to_owned(), "Load".to_owned());
        NewJobConfiguration {
            tag: "ct".to_owned(),
            name: "CT".to_owned(),
            version: Version::new(1, 0, 0),
            steps: vec![NewStepConfiguration { tag, name, points, metadata }],
        }
    }

    fn stored(new: NewJobConfiguration) -> JobConfiguration {
        let steps = new.steps.into_iter().map(|step| StepConfiguration {
            id: Uuid::now_v7(),
            tag: step.tag,
            name: step.name,
            points: step.points.into(),
            metadata: step.metadata,
        });
        JobConfiguration {
            id: Uuid::now_v7(),
            provider_id: Uuid::now_v7(),
            tag: new.tag,
            name: new.name,
            version: new.version.to_string(),
            created_at: chrono::Utc::now(),
            steps: steps.collect(),
        }
    }

    #[test]
    fn every_difference_is_listed_by_its_field_path() {
        let before = stored(new(10, vec![metadata(MetadataKind::Number), metadata(MetadataKind::Link)]));
        let same = new(10, vec![metadata(MetadataKind::Number), metadata(MetadataKind::Link)]);
        assert!(same.differences(&before).is_empty());

        let mut other = new(11, vec![metadata(MetadataKind::Text)]);
        other.name = "CT scan".to_owned();
        other.steps[0].metadata[0].units = String::new();
        other.steps.push(other.steps[0].clone());
        let differences = other.differences(&before);
        let listed: Vec<String> =
            differences.iter().map(|v| format!("{} {}", v.field, v.description)).collect();
        assert_eq!(
            listed,
            [
                "name is stored as \"CT\"",
                "steps 1 are stored",
                "steps[0].points is stored as 10",
                "steps[0].metadata 2 are stored",
                "steps[0].metadata[0].kind is stored as NUMBER",
                "steps[0].metadata[0].units is stored as \"HU\"",
            ]
        );
    }
}
