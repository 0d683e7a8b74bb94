//! Registration of a version of a configuration.

use diesel::{ExpressionMethods as _, Insertable};
use diesel_async::RunQueryDsl as _;
use semver::Version;
use uuid::Uuid;

use super::{ConfigurationKey, JobConfiguration, MetadataKind, StepConfiguration};
use crate::{
    config::QuotaSettings,
    db::Transaction,
    error::{Error, Resource, Result, Violations, quoted, quoted_list},
    models::{
        caller::Provider,
        max_silence::{self, MaxSilence},
        usage, version_order,
    },
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
    pub max_silence: Option<MaxSilence>,
    pub steps: Vec<NewStepConfiguration>,
}

/// A step of a version to register.
#[derive(Clone, Debug)]
pub struct NewStepConfiguration {
    pub tag: String,
    pub name: String,
    pub points: i32,
    pub metadata: Vec<NewMetadataConfiguration>,
}

/// A metadata name of a step to register.
#[derive(Clone, Debug)]
pub struct NewMetadataConfiguration {
    pub name: String,
    pub kind: MetadataKind,
    pub units: String,
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
                job_configurations::max_silence.eq(self.max_silence),
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
        if self.max_silence != stored.max_silence {
            differences.add("max_silence", max_silence::is_stored_as(stored.max_silence));
        }
        let tags = (keys(&self.steps, |step| &step.tag), keys(&stored.steps, |step| &step.tag));
        for (i, place) in places(&mut differences, "steps", &tags).into_iter().enumerate() {
            let (path, step) = (format!("steps[{i}]"), &self.steps[i]);
            match place {
                Some(place) => step.add_differences(&mut differences, &path, &stored.steps[place]),
                None => differences.add(path, format!("{} is not stored", quoted(&step.tag))),
            }
        }
        differences
    }
}

impl NewStepConfiguration {
    fn add_differences(&self, differences: &mut Violations, path: &str, stored: &StepConfiguration) {
        differences.add_if_different(format!("{path}.name"), &self.name, &stored.name);
        if i64::from(self.points) != stored.points {
            differences.add(format!("{path}.points"), format!("is stored as {}", stored.points));
        }
        let path = format!("{path}.metadata");
        let names = (keys(&self.metadata, |item| &item.name), keys(&stored.metadata, |item| &item.name));
        for (i, place) in places(differences, &path, &names).into_iter().enumerate() {
            let (path, metadata) = (format!("{path}[{i}]"), &self.metadata[i]);
            let Some(stored) = place.map(|place| &stored.metadata[place]) else {
                differences.add(path, format!("{} is not stored", quoted(&metadata.name)));
                continue;
            };
            if metadata.kind != stored.kind {
                let kind = stored.kind.label().to_uppercase();
                differences.add(format!("{path}.kind"), format!("is stored as {kind}"));
            }
            differences.add_if_different(format!("{path}.units"), &metadata.units, &stored.units);
        }
    }
}

fn keys<T>(items: &[T], key: impl Fn(&T) -> &String) -> Vec<&str> {
    items.iter().map(|item| key(item).as_str()).collect()
}

/// Compares a given and a stored list by the keys of their items, which are unique in each.
/// Adds which items the given list lacks, and whether the others have another order. Returns
/// the place of each given item in the stored list; none if it is not stored.
fn places(
    differences: &mut Violations,
    field: &str,
    (given, stored): &(Vec<&str>, Vec<&str>),
) -> Vec<Option<usize>> {
    for key in stored.iter().filter(|key| !given.contains(key)) {
        differences.add(field, format!("{} is stored and missing here", quoted(key)));
    }
    let places: Vec<_> = given.iter().map(|key| stored.iter().position(|stored| stored == key)).collect();
    if !places.iter().flatten().is_sorted() {
        let stored = quoted_list(stored.iter().copied());
        differences.add(field, format!("the order differs; stored are {stored}"));
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::job_configuration::MetadataConfiguration;

    fn metadata(name: &str, kind: MetadataKind) -> NewMetadataConfiguration {
        NewMetadataConfiguration { name: name.to_owned(), kind, units: "HU".to_owned() }
    }

    /// A version with these steps, of which each has 10 points and two names of metadata.
    fn new(tags: &[&str]) -> NewJobConfiguration {
        let step = |tag: &&str| NewStepConfiguration {
            tag: (*tag).to_owned(),
            name: "A step".to_owned(),
            points: 10,
            metadata: vec![metadata("mean", MetadataKind::Number), metadata("source", MetadataKind::Link)],
        };
        NewJobConfiguration {
            tag: "ct".to_owned(),
            name: "CT".to_owned(),
            version: Version::new(1, 0, 0),
            max_silence: None,
            steps: tags.iter().map(step).collect(),
        }
    }

    fn stored(new: NewJobConfiguration) -> JobConfiguration {
        let created_at = chrono::Utc::now();
        let metadata = |NewMetadataConfiguration { name, kind, units }| MetadataConfiguration {
            id: Uuid::now_v7(),
            name,
            kind,
            units,
            created_at,
        };
        let steps = new.steps.into_iter().map(|step| StepConfiguration {
            id: Uuid::now_v7(),
            tag: step.tag,
            name: step.name,
            points: step.points.into(),
            created_at,
            metadata: step.metadata.into_iter().map(metadata).collect(),
        });
        JobConfiguration {
            id: Uuid::now_v7(),
            provider_id: Uuid::now_v7(),
            tag: new.tag,
            name: new.name,
            version: new.version.to_string(),
            created_at,
            max_silence: new.max_silence,
            steps: steps.collect(),
        }
    }

    fn listed(new: &NewJobConfiguration, stored: &JobConfiguration) -> Vec<String> {
        let differences = new.differences(stored);
        differences.iter().map(|v| format!("{}: {}", v.field, v.description)).collect()
    }

    #[test]
    fn every_difference_is_listed_by_its_field_path() {
        let before = stored(new(&["load", "report"]));
        assert_eq!(listed(&new(&["load", "report"]), &before), [""; 0]);

        let mut other = new(&["load", "archive"]);
        other.name = "CT scan".to_owned();
        other.steps[0].points = 11;
        other.steps[0].metadata =
            vec![metadata("mean", MetadataKind::Text), metadata("median", MetadataKind::Text)];
        other.steps[0].metadata[0].units = String::new();
        assert_eq!(
            listed(&other, &before),
            [
                r#"name: is stored as "CT""#,
                r#"steps: "report" is stored and missing here"#,
                "steps[0].points: is stored as 10",
                r#"steps[0].metadata: "source" is stored and missing here"#,
                "steps[0].metadata[0].kind: is stored as NUMBER",
                r#"steps[0].metadata[0].units: is stored as "HU""#,
                r#"steps[0].metadata[1]: "median" is not stored"#,
                r#"steps[1]: "archive" is not stored"#,
            ]
        );
    }

    #[test]
    fn another_order_is_one_difference_and_an_added_item_moves_none_of_the_others() {
        let before = stored(new(&["load", "segment", "report"]));
        assert_eq!(
            listed(&new(&["load", "report", "segment"]), &before),
            [r#"steps: the order differs; stored are "load", "segment", "report""#]
        );
        let mut of_metadata = new(&["load", "segment", "report"]);
        of_metadata.steps[1].metadata.swap(0, 1);
        assert_eq!(
            listed(&of_metadata, &before),
            [r#"steps[1].metadata: the order differs; stored are "mean", "source""#]
        );
        let added = new(&["load", "archive", "segment", "report"]);
        assert_eq!(listed(&added, &before), [r#"steps[1]: "archive" is not stored"#]);
    }
}
