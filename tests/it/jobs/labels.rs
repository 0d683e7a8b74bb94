//! Labels of jobs: what a job may have, and what is compared when it is created again. Lists by
//! labels are tested beside the other filters, watches in `guarantees`.

use std::collections::BTreeMap;

use milepost_client::pb::{self, ErrorReason};
use tonic::Code;

use crate::support::{TestServer, assert_refused, assert_violations};

fn labels(given: &[(&str, &str)]) -> BTreeMap<String, String> {
    given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_labels_of_a_job_are_part_of_its_content() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let given = labels(&[("ward", "3b"), ("a=b", ""), ("Ünïcode 🧠", "with \n lines \"and\" quotes, {}")]);
    let new = pb::CreateJobRequest { labels: given.clone(), ..provider.new_job(&customer) };
    let created = provider.jobs.create_job(new.clone()).await.unwrap().into_inner();
    assert_eq!((created.job.as_ref().unwrap().labels.clone(), created.existed), (given.clone(), false));
    let job = created.job.unwrap();
    assert_eq!(customer.get(&job).await.labels, given);
    assert!(provider.jobs.create_job(new.clone()).await.unwrap().into_inner().existed);

    let changed = [
        labels(&[]),
        labels(&[("ward", "3b")]),
        [given.clone(), labels(&[("more", "")])].into_iter().flatten().collect(),
        [given.clone(), labels(&[("ward", "3c")])].into_iter().flatten().collect(),
    ];
    for labels in changed {
        let other = pb::CreateJobRequest { labels, ..new.clone() };
        let answer = provider.jobs.create_job(other).await;
        let refusal = assert_refused(answer, Code::AlreadyExists, ErrorReason::JobDiffers);
        assert_eq!(refusal.fields, ["labels"]);
    }
    let stored =
        server.database.texts("SELECT key || '=' || value AS text FROM job_labels ORDER BY key").await;
    let expected: Vec<String> = given.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(stored, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_and_a_filter_have_at_most_16_labels_of_bounded_texts() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let count =
        |count: usize| (0..count).map(|n| (format!("key {n}"), String::new())).collect::<BTreeMap<_, _>>();
    let longest = |key: usize, value: usize| labels(&[(&"ü".repeat(key), &"🧠".repeat(value))]);
    for labels in [count(16), longest(64, 256)] {
        let new = pb::CreateJobRequest { labels: labels.clone(), ..provider.new_job(&customer) };
        let job = provider.jobs.create_job(new).await.unwrap().into_inner().job.unwrap();
        assert_eq!(job.labels, labels);
        let filter = Some(pb::JobFilter { labels, ..Default::default() });
        let listed = provider.jobs.list_jobs(pb::ListJobsRequest { filter, ..Default::default() }).await;
        assert_eq!(listed.unwrap().into_inner().jobs, [job]);
    }

    let long_value = format!("labels.{}", "ü".repeat(64));
    for (labels, field) in [
        (count(17), "labels"),
        (count(1_000), "labels"),
        (longest(65, 1), "labels"),
        (longest(64, 257), &long_value),
        (labels(&[("", "x")]), "labels"),
        (labels(&[(" x", "x")]), "labels"),
        (labels(&[("a\0b", "x")]), "labels"),
        (labels(&[("x", "a\0b")]), "labels.x"),
    ] {
        let new = pb::CreateJobRequest { labels: labels.clone(), ..provider.new_job(&customer) };
        assert_violations(provider.jobs.create_job(new).await, &[field]);
        let filter = Some(pb::JobFilter { labels: labels.clone(), ..Default::default() });
        let listed = provider.jobs.list_jobs(pb::ListJobsRequest { filter, ..Default::default() }).await;
        assert_violations(listed, &[&format!("filter.{field}")]);
        let all = pb::AllJobs { labels, ..Default::default() };
        let scope = Some(pb::watch_events_request::Scope::AllJobs(all));
        let watch = pb::WatchEventsRequest { scope, ..Default::default() };
        assert_violations(provider.events.watch_events(watch).await, &[&format!("all_jobs.{field}")]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_count_as_stored_bytes_until_the_job_is_deleted() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let id = provider.id.clone();
    let stored = async || {
        server.database.texts(&format!(
        "SELECT (stored_bytes + coalesce((SELECT sum(stored_bytes) FROM usage_changes WHERE user_id = '{0}'), 0))::text
             AS text FROM user_usage WHERE user_id = '{0}'",
        id
    )).await.remove(0).parse::<i64>().unwrap()
    };
    let before = stored().await;
    let plain = provider.new_job(&customer);
    let labelled = pb::CreateJobRequest {
        labels: labels(&[("key", "value"), ("k", "")]),
        provider_job_id: "x".repeat(plain.provider_job_id.len()),
        ..plain.clone()
    };
    provider.jobs.create_job(plain).await.unwrap();
    let without = stored().await - before;
    provider.jobs.create_job(labelled).await.unwrap();
    assert_eq!(stored().await - before - without, without + 2 * 400 + 4 * 9);
    server.database.execute("DELETE FROM jobs").await;
    assert_eq!(stored().await, before);
    assert_eq!(server.count("job_labels").await, 0);
}
