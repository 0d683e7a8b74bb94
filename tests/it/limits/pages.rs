//! The size of pages, and page tokens that are refused.

use milepost::limits::{CONFIGURATION_STEPS, MESSAGE_BYTES, METADATA_BYTES, TEXT_CHARS, TOKEN_BYTES};
use milepost_client::pb;
use prost::Message;

use super::scene::{Scene, large};
use crate::support::{assert_violations, raw, registration, within_timeout};

/// A text of the maximal length that begins with `beginning` and continues with
/// characters of four bytes each.
fn longest(beginning: &str) -> String {
    let rest = TEXT_CHARS - beginning.chars().count();
    beginning.to_owned() + &"🜁".repeat(rest)
}

/// Reads a list to its end in pages of the maximal size. `read` takes the items
/// and the token of the next page from a page.
async fn list<R: Message, P: Message + Default, T>(
    scene: &Scene,
    method: &str,
    request: impl Fn(String) -> R,
    read: impl Fn(P) -> (Vec<T>, String),
) -> Vec<T> {
    let (mut items, mut token, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = scene.call(method, request(token).encode_to_vec()).await.unwrap();
        assert!(page.len() <= MESSAGE_BYTES, "{}", page.len());
        let (found, next) = read(P::decode(page).unwrap());
        items.extend(found);
        pages += 1;
        if next.is_empty() {
            assert!(pages > 1, "one page has all items");
            return items;
        }
        token = next;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_page_of_events_is_larger_than_one_mebibyte() {
    let mut scene = Scene::new().await;
    let (count, batch) = (120, 40);
    for _ in 0..count / batch {
        scene.provider.append(&scene.job, (0..batch).map(|_| large(METADATA_BYTES))).await;
    }
    let of_job = |page_token| pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(scene.job.id.clone())),
        page_size: 500,
        page_token,
        ..Default::default()
    };
    let read = |page: pb::ListEventsResponse| {
        let sequences: Vec<i64> = page.events.iter().map(|event| event.sequence).collect();
        (sequences, page.next_page_token)
    };
    let sequences = list(&scene, "EventService/ListEvents", of_job, read).await;
    assert_eq!(sequences, (1..=i64::try_from(count).unwrap()).collect::<Vec<_>>());

    let watch = pb::WatchEventsRequest {
        scope: Some(pb::watch_events_request::Scope::JobId(scene.job.id.clone())),
        ..Default::default()
    };
    let channel = scene.server.channel.clone();
    let opened = raw::open(channel, Some(&scene.secret), "EventService/WatchEvents", [watch.encode_to_vec()]);
    let mut messages = opened.await.unwrap();
    let mut seen = 0;
    while seen < count {
        let message = within_timeout("events", messages.message()).await.unwrap().unwrap();
        assert!(message.len() <= MESSAGE_BYTES, "{}", message.len());
        match pb::WatchEventsResponse::decode(message).unwrap().message.unwrap() {
            pb::watch_events_response::Message::Events(watched) => seen += watched.events.len(),
            other => panic!("{other:?} after {seen} events"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_page_of_jobs_is_larger_than_one_mebibyte() {
    let mut scene = Scene::new().await;
    let user = pb::User { first_name: longest(""), last_name: longest(""), ..Default::default() };
    let names = pb::UpdateCurrentUserRequest { user: Some(user), update_mask: None };
    scene.provider.session.auth.update_current_user(names).await.unwrap();
    let mut ids = vec![scene.job.id.clone()];
    for n in 0..300 {
        let request = pb::CreateJobRequest {
            provider_job_id: longest(&n.to_string()),
            customer: Some(pb::create_job_request::Customer::CustomerId(scene.customer_id.clone())),
            configuration_tag: scene.job.configuration_tag.clone(),
            provider_job_name: longest(""),
            ..Default::default()
        };
        let created = scene.provider.jobs.create_job(request).await.unwrap().into_inner();
        ids.push(created.job.unwrap().id);
    }
    let all = |page_token| pb::ListJobsRequest { page_size: 500, page_token, ..Default::default() };
    let read = |page: pb::ListJobsResponse| {
        let ids: Vec<String> = page.jobs.into_iter().map(|job| job.id).collect();
        (ids, page.next_page_token)
    };
    let listed = list(&scene, "JobService/ListJobs", all, read).await;
    ids.reverse();
    assert_eq!(listed, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_page_of_configurations_is_larger_than_one_mebibyte() {
    let mut scene = Scene::new().await;
    let analysis = scene.job.configuration_tag.clone();
    // 400 KB for each configuration.
    let steps = (0..CONFIGURATION_STEPS).map(|n| pb::StepConfiguration {
        tag: longest(&n.to_string()),
        name: longest(""),
        ..Default::default()
    });
    let steps: Vec<_> = steps.collect();
    for (tag, version) in
        [(&analysis[..], "1.0.1"), (&analysis, "1.0.2"), (&analysis, "1.0.3"), ("b", "1.0.0"), ("c", "1.0.0")]
    {
        let request = pb::RegisterJobConfigurationRequest {
            tag: tag.to_owned(),
            steps: steps.clone(),
            ..registration(version, &[])
        };
        scene.provider.register(request).await;
    }
    for (tag, expected) in [
        (
            &analysis[..],
            ["1.0.3", "1.0.2", "1.0.1", "1.0.0"].map(|version| format!("{analysis} {version}")).to_vec(),
        ),
        ("", vec![format!("{analysis} 1.0.3"), "b 1.0.0".to_owned(), "c 1.0.0".to_owned()]),
    ] {
        let of_tag =
            |page_token| pb::ListJobConfigurationsRequest { tag: tag.to_owned(), page_size: 500, page_token };
        let read = |page: pb::ListJobConfigurationsResponse| {
            let found = page.job_configurations.iter();
            let found: Vec<String> = found.map(|found| format!("{} {}", found.tag, found.version)).collect();
            (found, page.next_page_token)
        };
        let method = "ConfigurationService/ListJobConfigurations";
        assert_eq!(list(&scene, method, of_tag, read).await, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_that_is_too_long_is_not_decoded() {
    let mut scene = Scene::new().await;
    // A decoded token turns out to belong to another query.
    for (chars, expected) in [(TOKEN_BYTES, "of the same query"), (TOKEN_BYTES + 2, "of this method")] {
        let page_token = format!("AQ{}", "A".repeat(chars - 2));
        let request = pb::ListJobsRequest { page_token, ..Default::default() };
        let refusal = assert_violations(scene.provider.jobs.list_jobs(request).await, &["page_token"]);
        let description = &refusal.details.bad_request().unwrap().field_violations[0].description;
        assert!(description.contains(expected), "{chars}: {description}");
    }
}
