//! Job configurations: registered once per version, visible to their provider and
//! to the customers of their jobs.

use milepost_client::pb::{self, ErrorReason, MetadataKind, get_job_configuration_request::Key};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::support::{TestServer, User, assert_refused, assert_violations, registration};

async fn get(user: &mut User, key: Key, version: &str) -> Result<pb::JobConfiguration, Status> {
    let request = pb::GetJobConfigurationRequest { key: Some(key), version: version.to_owned() };
    let response = user.configurations.get_job_configuration(request).await?.into_inner();
    Ok(response.job_configuration.unwrap())
}

async fn latest(user: &mut User) -> String {
    get(user, Key::Tag("analysis".to_owned()), "").await.unwrap().version
}

/// All configurations that ListJobConfigurations returns, from all pages.
async fn list(user: &mut User, tag: &str, page_size: i32) -> Vec<pb::JobConfiguration> {
    let mut listed = Vec::new();
    let mut request =
        pb::ListJobConfigurationsRequest { tag: tag.to_owned(), page_size, page_token: String::new() };
    loop {
        let page = user.configurations.list_job_configurations(request.clone()).await.unwrap().into_inner();
        listed.extend(page.job_configurations);
        if page.next_page_token.is_empty() {
            return listed;
        }
        request.page_token = page.next_page_token;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_is_found_by_id_by_version_and_by_tag() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let mut request = registration("1.0.0", &[("load", 10), ("measure", 0), ("report", 1_000_000)]);
    request.steps[1].metadata = vec![
        pb::MetadataConfiguration {
            name: "mean".to_owned(),
            kind: MetadataKind::Number.into(),
            units: "HU".to_owned(),
            ..Default::default()
        },
        pb::MetadataConfiguration { name: "comment".to_owned(), ..Default::default() },
    ];
    let stored = provider.register(request.clone()).await;
    assert_eq!(stored.provider_id, provider.id);
    assert_eq!((&stored.tag, &stored.name, &stored.version), (&request.tag, &request.name, &request.version));
    request.steps[1].metadata[1].kind = MetadataKind::Text.into();
    let sent = as_sent(stored.steps.clone());
    assert_eq!(sent, request.steps, "steps keep their order, and a missing kind becomes TEXT");

    let tag = Key::Tag(stored.tag.clone());
    for (key, version) in [(Key::Id(stored.id.clone()), ""), (tag.clone(), "1.0.0"), (tag, "")] {
        assert_eq!(get(&mut provider, key, version).await.unwrap(), stored);
    }
}

/// The steps without what the server sets.
fn as_sent(mut steps: Vec<pb::StepConfiguration>) -> Vec<pb::StepConfiguration> {
    for step in &mut steps {
        for metadata in &mut step.metadata {
            (metadata.id, metadata.created_at, metadata.updated_at) = (String::new(), None, None);
        }
        (step.id, step.created_at, step.updated_at) = (String::new(), None, None);
    }
    steps
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_and_metadata_have_ids_and_times_which_a_registration_ignores() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let mut request = registration("1.0.0", &[("load", 1), ("report", 1)]);
    request.steps[0].metadata = ["mean", "median"]
        .map(|name| pb::MetadataConfiguration { name: name.to_owned(), ..Default::default() })
        .to_vec();
    let stored = provider.register(request.clone()).await;
    let at = stored.created_at;
    assert!(at.is_some() && stored.updated_at == at);
    let mut ids = std::collections::BTreeSet::from([stored.id.clone()]);
    for step in &stored.steps {
        assert_eq!((step.created_at, step.updated_at), (at, at));
        ids.insert(step.id.clone());
        for metadata in &step.metadata {
            assert_eq!((metadata.created_at, metadata.updated_at), (at, at));
            ids.insert(metadata.id.clone());
        }
    }
    assert!(ids.len() == 5 && ids.iter().all(|id| Uuid::parse_str(id).is_ok()), "{ids:?}");

    // What was read may be registered again, and as another version.
    request.steps.clone_from(&stored.steps);
    let again =
        provider.configurations.register_job_configuration(request.clone()).await.unwrap().into_inner();
    assert!(again.existed && again.job_configuration.as_ref() == Some(&stored));
    request.version = "1.1.0".to_owned();
    let later = provider.register(request).await;
    assert_eq!(as_sent(later.steps.clone()), as_sent(stored.steps.clone()));
    assert!(
        later.steps[0].id != stored.steps[0].id
            && later.steps[0].metadata[0].id != stored.steps[0].metadata[0].id
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latest_version_is_the_highest_release_whatever_the_order_of_registration() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    for version in ["1.0.0", "1.10.0", "1.9.0"] {
        provider.register(registration(version, &[("load", 1)])).await;
    }
    assert_eq!(latest(&mut provider).await, "1.10.0");
    provider.register(registration("2.0.0-rc.1", &[("load", 1)])).await;
    assert_eq!(latest(&mut provider).await, "1.10.0");
    let job = provider.job(&server.customer().await).await;
    assert_eq!(job.configuration_version, "1.10.0");
    provider.register(registration("2.0.0", &[("load", 1)])).await;
    assert_eq!(latest(&mut provider).await, "2.0.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_release_the_latest_is_the_highest_pre_release() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    for version in ["1.0.0-alpha", "1.0.0-alpha.10", "1.0.0-alpha.9", "1.0.0-1"] {
        provider.register(registration(version, &[])).await;
    }
    assert_eq!(latest(&mut provider).await, "1.0.0-alpha.10");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latest_of_versions_that_differ_in_build_metadata_is_the_newest() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    for version in ["1.0.0+b", "1.0.0+c", "1.0.0+a"] {
        provider.register(registration(version, &[])).await;
        assert_eq!(latest(&mut provider).await, version);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_of_a_tag_are_listed_by_precedence_highest_first() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    for version in ["1.9.0", "2.0.0-rc.1", "1.10.0", "2.0.0-rc.1.1", "1.10.0-beta"] {
        provider.register(registration(version, &[])).await;
    }
    for page_size in [0, 1, 2, 500] {
        let versions: Vec<_> =
            list(&mut provider, "analysis", page_size).await.into_iter().map(|found| found.version).collect();
        assert_eq!(versions, ["2.0.0-rc.1.1", "2.0.0-rc.1", "1.10.0", "1.10.0-beta", "1.9.0"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latest_of_every_tag_is_listed_by_tag() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    for (tag, version) in [("b", "1.0.0"), ("a", "1.0.0"), ("b", "1.1.0"), ("c", "0.1.0-x"), ("b", "0.9.0")] {
        let request = pb::RegisterJobConfigurationRequest {
            tag: tag.to_owned(),
            ..registration(version, &[("load", 1)])
        };
        provider.register(request).await;
    }
    for page_size in [0, 1, 2] {
        let found = list(&mut provider, "", page_size).await;
        let found: Vec<_> = found.iter().map(|found| (found.tag.as_str(), found.version.as_str())).collect();
        assert_eq!(found, [("a", "1.0.0"), ("b", "1.1.0"), ("c", "0.1.0-x")]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_versions_of_an_unknown_tag_are_not_found() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    provider.configuration(&[]).await;
    let request = pb::ListJobConfigurationsRequest { tag: "analysys".to_owned(), ..Default::default() };
    let answer = provider.configurations.list_job_configurations(request).await;
    let refusal = assert_refused(answer, Code::NotFound, ErrorReason::ResourceNotFound);
    assert_eq!(refusal.details.resource_info().unwrap().resource_name, "analysys");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_is_valid_for_its_own_query_only() {
    let server = TestServer::start().await;
    let (mut provider, mut other_provider) = (server.provider().await, server.provider().await);
    for version in ["1.0.0", "2.0.0"] {
        provider.register(registration(version, &[])).await;
    }
    let request = pb::ListJobConfigurationsRequest {
        tag: "analysis".to_owned(),
        page_size: 1,
        page_token: String::new(),
    };
    let page = provider.configurations.list_job_configurations(request.clone()).await.unwrap().into_inner();
    let next = pb::ListJobConfigurationsRequest { page_token: page.next_page_token, ..request };

    let of_another_tag = pb::ListJobConfigurationsRequest { tag: String::new(), ..next.clone() };
    assert_violations(provider.configurations.list_job_configurations(of_another_tag).await, &["page_token"]);
    assert_violations(
        other_provider.configurations.list_job_configurations(next.clone()).await,
        &["page_token"],
    );
    provider.configurations.list_job_configurations(next).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_customer_finds_the_configuration_of_their_job_by_id() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let (mut customer, mut other_customer) = (server.customer().await, server.customer().await);
    let stored = provider.configuration(&[("load", 1)]).await;
    let by_id = Key::Id(stored.id.clone());
    let before = get(&mut customer, by_id.clone(), "").await;
    assert_refused(before, Code::NotFound, ErrorReason::ResourceNotFound);

    provider.job(&customer).await;
    assert_eq!(get(&mut customer, by_id.clone(), "").await.unwrap(), stored);
    let refusal = assert_refused(
        get(&mut other_customer, by_id, "").await,
        Code::NotFound,
        ErrorReason::ResourceNotFound,
    );
    let resource = refusal.details.resource_info().unwrap().clone();
    assert_eq!(
        (resource.resource_type.as_str(), resource.resource_name),
        ("milepost.v1.JobConfiguration", stored.id)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_of_another_provider_is_not_found() {
    let server = TestServer::start().await;
    let (mut provider, mut other_provider) = (server.provider().await, server.provider().await);
    let stored = provider.configuration(&[("load", 1)]).await;
    for (key, version) in [(Key::Id(stored.id), ""), (Key::Tag(stored.tag), "1.0.0")] {
        let answer = get(&mut other_provider, key, version).await;
        assert_refused(answer, Code::NotFound, ErrorReason::ResourceNotFound);
    }
    assert_eq!(list(&mut other_provider, "", 0).await, []);
    // Another provider may register the same tag and version.
    other_provider.configuration(&[("unload", 2)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_is_strict_semver() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    for version in ["", "1", "1.0", "v1.0.0", "1.0.0.0", "01.0.0", "1.0.0-01", "1.0.0-", "1.0.0 ", "١.0.0"] {
        let answer = provider.configurations.register_job_configuration(registration(version, &[])).await;
        assert_violations(answer, &["version"]);
    }
    assert_eq!(server.count("job_configurations").await, 0);
    let huge = format!("{}.0.0", u64::MAX);
    for version in ["0.0.0", "1.0.0-alpha.1+build.01", huge.as_str()] {
        let answer = provider.configurations.register_job_configuration(registration(version, &[])).await;
        assert!(answer.is_ok(), "{version}: {answer:?}");
    }
    assert_eq!(latest(&mut provider).await, huge);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_refusal_of_the_version_latest_says_to_leave_it_empty() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let stored = provider.configuration(&[]).await;
    let got = get(&mut provider, Key::Tag(stored.tag), "latest").await.map(drop);
    let job = provider.new_job(&server.customer().await);
    let job = pb::CreateJobRequest { configuration_version: "latest".to_owned(), ..job };
    let created = provider.jobs.create_job(job).await.map(drop);
    for (answer, field) in [(got, "version"), (created, "configuration_version")] {
        let refusal = assert_violations(answer, &[field]);
        let description = &refusal.details.bad_request().unwrap().field_violations[0].description;
        assert!(description.ends_with("; leave it empty for the latest version"), "{description}");
    }
}
