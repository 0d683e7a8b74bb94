//! `ConfigurationService`: registered versions of job configurations.

use std::collections::HashMap;

use diesel_async::AsyncPgConnection;
use futures_util::FutureExt as _;
use semver::Version;
use tonic::{Request, Response};
use uuid::Uuid;

use super::{
    Answer, App, credential_of,
    page::{Page, PageRequest},
    parse,
};
use crate::{
    db::read,
    error::{Error, Resource, Result, Violations, quoted},
    limits::{CONFIGURATION_STEPS, STEP_METADATA, STEP_POINTS},
    models::{
        caller::{KeyScope, Provider},
        job_configuration::{
            ConfigurationKey, JobConfiguration, MetadataConfiguration, MetadataKind, NewJobConfiguration,
            NewMetadataConfiguration, NewStepConfiguration, StepConfiguration,
        },
        version_order,
    },
    pb::{self, configuration_service_server::ConfigurationService, get_job_configuration_request::Key},
    proto_enums::{ProtoEnum as _, duration, timestamp},
};

/// Most configurations that one query reads for a page. Each may be as large as a whole
/// page, so reading all of them at once could take much memory for nothing.
const READ_AT_ONCE: usize = 8;

#[derive(Clone, Debug)]
pub struct ConfigurationApi(pub App);

#[tonic::async_trait]
impl ConfigurationService for ConfigurationApi {
    async fn register_job_configuration(
        &self,
        request: Request<pb::RegisterJobConfigurationRequest>,
    ) -> Answer<pb::RegisterJobConfigurationResponse> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let new = NewJobConfiguration::try_from(request.into_inner())?;
        let quotas = self.0.quotas;
        let registered = self.0.database.write(credential, move |tx| {
            async move { JobConfiguration::register(tx, provider, new, &quotas).await }.boxed()
        });
        let (configuration, existed) = registered.await?;
        let job_configuration = Some(configuration.into());
        Ok(Response::new(pb::RegisterJobConfigurationResponse { job_configuration, existed }))
    }

    async fn get_job_configuration(
        &self,
        request: Request<pb::GetJobConfigurationRequest>,
    ) -> Answer<pb::GetJobConfigurationResponse> {
        let credential = credential_of(&request)?;
        let viewer = credential.caller().user_viewer()?;
        let key = ConfigurationKey::try_from(request.into_inner())?;
        let id =
            read!(self.0.database, viewer.tenant(), |conn| JobConfiguration::find_id(conn, viewer, &key))?
                .ok_or_else(|| Error::not_found(Resource::JobConfiguration, &key))?;
        let job_configuration =
            Some(self.0.log.jobs.configuration(viewer.tenant(), id).await?.tree.clone().into());
        Ok(Response::new(pb::GetJobConfigurationResponse { job_configuration }))
    }

    async fn list_job_configurations(
        &self,
        request: Request<pb::ListJobConfigurationsRequest>,
    ) -> Answer<pb::ListJobConfigurationsResponse> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Read)?;
        let mut request = request.into_inner();
        let (asked, tag) = Violations::check(|violations| {
            let page = PageRequest::<Uuid>::take(violations, provider.id(), &mut request);
            (page, parse::optional_key_text(violations, "tag", request.tag))
        })?;
        let (page, last) =
            read!(self.0.database, provider.tenant(), |conn| list(conn, provider, tag.as_deref(), &asked))?;
        Ok(Response::new(pb::ListJobConfigurationsResponse {
            job_configurations: page.items,
            next_page_token: asked.next_token(last.as_ref()),
        }))
    }
}

/// Reads a page, and returns it with the id of its last item if there is a next page. All of
/// it over one connection: while a user's calls queue for the pool, a call that queued twice
/// might read for nothing.
async fn list(
    conn: &mut AsyncPgConnection,
    provider: Provider,
    tag: Option<&str>,
    asked: &PageRequest<Uuid>,
) -> Result<(Page<pb::JobConfiguration>, Option<Uuid>)> {
    let ids = match tag {
        Some(tag) => JobConfiguration::list_versions(conn, provider, tag, asked.after, asked.limit()).await?,
        None => JobConfiguration::list_latest(conn, provider, asked.after, asked.limit()).await?,
    };
    let on_page = ids.len().min(usize::try_from(asked.size).unwrap_or(usize::MAX));
    let mut page = Page::default();
    'page: for ids in ids[..on_page].chunks(READ_AT_ONCE) {
        for configuration in JobConfiguration::load(conn, ids).await? {
            if !page.push(configuration.into()) {
                break 'page;
            }
        }
    }
    let last = page.items.len().checked_sub(1).filter(|last| last + 1 < ids.len());
    Ok((page, last.map(|last| ids[last])))
}

impl TryFrom<pb::GetJobConfigurationRequest> for ConfigurationKey {
    type Error = Error;

    fn try_from(request: pb::GetJobConfigurationRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let version_given = !request.version.is_empty();
        let key = match request.key {
            Some(Key::Tag(tag)) => {
                let tag = parse::key_text(&mut violations, "tag", tag);
                match optional_version(&mut violations, "version", request.version) {
                    Some(version) => Self::Version { tag, version: version.to_string() },
                    None => Self::Latest { tag },
                }
            }
            Some(Key::Id(id)) => {
                let key = Self::Id(parse::uuid(&mut violations, "id", &id));
                if version_given {
                    violations.add("version", "must be empty when id is given");
                }
                key
            }
            None => {
                violations.add("key", "must be given: id or tag");
                Self::Id(Uuid::nil())
            }
        };
        violations.or(key)
    }
}

impl TryFrom<pb::RegisterJobConfigurationRequest> for NewJobConfiguration {
    type Error = Error;

    fn try_from(request: pb::RegisterJobConfigurationRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let tag = parse::key_text(&mut violations, "tag", request.tag);
        let name = parse::key_text(&mut violations, "name", request.name);
        let version = version(&mut violations, "version", request.version, "");
        let max_silence = parse::max_silence(&mut violations, request.max_silence);
        let steps = new_steps(&mut violations, request.steps);
        violations.or(Self { tag, name, version, max_silence, steps })
    }
}

fn new_steps(violations: &mut Violations, steps: Vec<pb::StepConfiguration>) -> Vec<NewStepConfiguration> {
    if steps.len() > CONFIGURATION_STEPS {
        violations.add("steps", format!("must be at most {CONFIGURATION_STEPS}"));
        return Vec::new();
    }
    let mut tags = UniqueTexts::default();
    let mut parsed = Vec::with_capacity(steps.len());
    for (i, step) in steps.into_iter().enumerate() {
        let field = format!("steps[{i}]");
        let tag = parse::key_text(violations, format!("{field}.tag"), step.tag);
        tags.add(violations, &field, "tag", &tag);
        let name = parse::key_text(violations, format!("{field}.name"), step.name);
        if !(0..=STEP_POINTS).contains(&step.points) {
            let description = format!("{} must be 0 to {STEP_POINTS}", step.points);
            violations.add(format!("{field}.points"), description);
        }
        let points = i32::try_from(step.points).unwrap_or_default();
        let metadata = new_metadata(violations, &field, step.metadata);
        parsed.push(NewStepConfiguration { tag, name, points, metadata });
    }
    parsed
}

fn new_metadata(
    violations: &mut Violations,
    step: &str,
    metadata: Vec<pb::MetadataConfiguration>,
) -> Vec<NewMetadataConfiguration> {
    if metadata.len() > STEP_METADATA {
        let description = format!("must be at most {STEP_METADATA}");
        violations.add(format!("{step}.metadata"), description);
        return Vec::new();
    }
    let mut names = UniqueTexts::default();
    let mut parsed = Vec::with_capacity(metadata.len());
    for (i, metadata) in metadata.into_iter().enumerate() {
        let field = format!("{step}.metadata[{i}]");
        let name = parse::key_text(violations, format!("{field}.name"), metadata.name);
        names.add(violations, &field, "name", &name);
        let kind = MetadataKind::from_proto(metadata.kind);
        if kind.is_none() && metadata.kind != 0 {
            violations.add(format!("{field}.kind"), format!("{} is not a kind of metadata", metadata.kind));
        }
        let units = parse::text(violations, format!("{field}.units"), metadata.units);
        parsed.push(NewMetadataConfiguration { name, kind: kind.unwrap_or(MetadataKind::Text), units });
    }
    parsed
}

/// Texts that must not occur twice, with the path of the item in which each occurs.
#[derive(Default)]
struct UniqueTexts(HashMap<String, String>);

impl UniqueTexts {
    fn add(&mut self, violations: &mut Violations, item: &str, field: &str, text: &str) {
        if let Some(first) = self.0.get(text) {
            violations.add(format!("{item}.{field}"), format!("{} is already used by {first}", quoted(text)));
        } else if !text.is_empty() {
            // An empty text is a violation already.
            self.0.insert(text.to_owned(), item.to_owned());
        }
    }
}

/// The rule for a version, in an error text.
const VERSION: &str = "must be a SemVer 2.0 version such as 1.10.0 or 2.0.0-rc.1, with numbers of at most 64 \
                       bits and without leading zeros";

/// Parses a version; 0.0.0 after a violation, which ends with `hint`.
fn version(violations: &mut Violations, field: &str, text: String, hint: &str) -> Version {
    let before = violations.iter().len();
    let text = parse::key_text(violations, field, text);
    let version = version_order::parse(&text);
    if version.is_none() && violations.iter().len() == before {
        violations.add(field, format!("{} {VERSION}{hint}", quoted(&text)));
    }
    version.unwrap_or(Version::new(0, 0, 0))
}

/// As [`version`]; none for an empty text, which stands for the latest version.
pub(super) fn optional_version(violations: &mut Violations, field: &str, text: String) -> Option<Version> {
    (!text.is_empty()).then(|| version(violations, field, text, "; leave it empty for the latest version"))
}

impl From<JobConfiguration> for pb::JobConfiguration {
    fn from(configuration: JobConfiguration) -> Self {
        let JobConfiguration { id, provider_id, tag, name, version, created_at, max_silence, steps } =
            configuration;
        Self {
            id: id.to_string(),
            tag,
            name,
            version,
            steps: steps.into_iter().map(Into::into).collect(),
            created_at: Some(timestamp(created_at)),
            provider_id: provider_id.to_string(),
            updated_at: Some(timestamp(created_at)),
            max_silence: max_silence.map(|silence| duration(silence.length())),
        }
    }
}

impl From<StepConfiguration> for pb::StepConfiguration {
    fn from(step: StepConfiguration) -> Self {
        let StepConfiguration { id, tag, name, points, created_at, metadata } = step;
        Self {
            tag,
            name,
            points,
            metadata: metadata.into_iter().map(Into::into).collect(),
            id: id.to_string(),
            created_at: Some(timestamp(created_at)),
            updated_at: Some(timestamp(created_at)),
        }
    }
}

impl From<MetadataConfiguration> for pb::MetadataConfiguration {
    fn from(metadata: MetadataConfiguration) -> Self {
        let MetadataConfiguration { id, name, kind, units, created_at } = metadata;
        Self {
            name,
            kind: kind.to_proto(),
            units,
            id: id.to_string(),
            created_at: Some(timestamp(created_at)),
            updated_at: Some(timestamp(created_at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations<T>(result: Result<T>) -> Vec<String> {
        match result {
            Err(Error::Invalid(violations)) => {
                violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect()
            }
            _ => Vec::new(),
        }
    }

    fn step(tag: &str, points: i64, metadata: &[&str]) -> pb::StepConfiguration {
        let metadata = metadata
            .iter()
            .map(|name| pb::MetadataConfiguration { name: (*name).to_owned(), ..Default::default() });
        pb::StepConfiguration {
            tag: tag.to_owned(),
            name: "A step".to_owned(),
            points,
            metadata: metadata.collect(),
            ..Default::default()
        }
    }

    fn request(version: &str, steps: Vec<pb::StepConfiguration>) -> pb::RegisterJobConfigurationRequest {
        pb::RegisterJobConfigurationRequest {
            tag: "ct".to_owned(),
            name: "CT".to_owned(),
            version: version.to_owned(),
            steps,
            max_silence: None,
        }
    }

    #[test]
    fn a_configuration_within_the_limits_is_parsed_unchanged() {
        let names: Vec<String> = (0..STEP_METADATA).map(|i| i.to_string()).collect();
        let names: Vec<&str> = names.iter().map(|name| &name[..]).collect();
        let steps = (0..CONFIGURATION_STEPS).map(|i| step(&i.to_string(), STEP_POINTS, &names)).collect();
        let new = NewJobConfiguration::try_from(request("1.0.0-rc.1+b", steps)).expect("valid");
        assert_eq!(new.version.to_string(), "1.0.0-rc.1+b");
        assert_eq!((new.steps.len(), new.steps[199].metadata.len()), (200, 64));
        assert_eq!(new.steps[0].metadata[0].kind, MetadataKind::Text);
        assert!(NewJobConfiguration::try_from(request("0.0.0", vec![])).is_ok());
    }

    #[test]
    fn all_violations_are_listed_in_field_order() {
        let mut steps = vec![step("a", -1, &["m", "n", "m"]), step("b", 1_000_001, &[]), step("a", 0, &[""])];
        steps[2].name = "x\0".to_owned();
        steps[2].metadata[0].kind = 99;
        steps[2].metadata[0].units = "u".repeat(257);
        let mut request = request("1.0", steps);
        request.tag = " ct".to_owned();
        request.name = String::new();
        let listed = violations(NewJobConfiguration::try_from(request));
        let fields: Vec<&str> =
            listed.iter().map(|violation| violation.split(": ").next().unwrap_or_default()).collect();
        assert_eq!(
            fields,
            [
                "tag",
                "name",
                "version",
                "steps[0].points",
                "steps[0].metadata[2].name",
                "steps[1].points",
                "steps[2].tag",
                "steps[2].name",
                "steps[2].metadata[0].name",
                "steps[2].metadata[0].kind",
                "steps[2].metadata[0].units",
            ]
        );
        assert_eq!(listed[3], "steps[0].points: -1 must be 0 to 1000000");
        assert_eq!(listed[4], r#"steps[0].metadata[2].name: "m" is already used by steps[0].metadata[0]"#);
        assert_eq!(listed[6], r#"steps[2].tag: "a" is already used by steps[0]"#);
    }

    #[test]
    fn too_many_items_are_one_violation() {
        let listed = violations(NewJobConfiguration::try_from(request("1.0.0", vec![step("", 0, &[]); 201])));
        assert_eq!(listed, ["steps: must be at most 200"]);
        let listed =
            violations(NewJobConfiguration::try_from(request("1.0.0", vec![step("a", 0, &[""; 65])])));
        assert_eq!(listed, ["steps[0].metadata: must be at most 64"]);
    }

    #[test]
    fn a_key_is_an_id_or_a_tag_with_an_optional_version() {
        let key = |key, version: &str| {
            ConfigurationKey::try_from(pb::GetJobConfigurationRequest { key, version: version.to_owned() })
        };
        let (tag, id) = (|| Some(Key::Tag("ct".to_owned())), Uuid::now_v7());
        assert_eq!(key(tag(), "").expect("valid"), ConfigurationKey::Latest { tag: "ct".to_owned() });
        let version = "1.0.0+b".to_owned();
        assert_eq!(
            key(tag(), "1.0.0+b").expect("valid"),
            ConfigurationKey::Version { tag: "ct".to_owned(), version }
        );
        assert_eq!(key(Some(Key::Id(id.to_string())), "").expect("valid"), ConfigurationKey::Id(id));
        assert_eq!(violations(key(None, "")), ["key: must be given: id or tag"]);
        assert_eq!(
            violations(key(Some(Key::Id(id.to_string())), "1.0.0")),
            ["version: must be empty when id is given"]
        );
        assert_eq!(violations(key(Some(Key::Tag(String::new())), "x")).len(), 2);
        let latest = violations(key(tag(), "latest"));
        assert_eq!(latest, [format!("version: \"latest\" {VERSION}; leave it empty for the latest version")]);
        let latest = violations(NewJobConfiguration::try_from(request("latest", vec![])));
        assert_eq!(latest, [format!("version: \"latest\" {VERSION}")]);
    }
}
