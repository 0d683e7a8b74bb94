//! Completeness of watches of all jobs that filter by configuration tag, counterpart or labels.

use std::collections::BTreeMap;

use milepost_client::pb::{self, Event, watch_events_request::Scope};

use super::{by_job, collect};
use crate::support::{TestServer, User, info, registration};

/// Jobs of two providers, two configurations of each and two customers. The name
/// of a job and of its events has all three: `first scan ada`.
struct Mixture {
    providers: [User; 2],
    customers: [User; 2],
    /// Name, index of the provider, job.
    jobs: Vec<(String, usize, pb::Job)>,
}

impl Mixture {
    async fn new(server: &TestServer) -> Self {
        let mut providers = [server.provider().await, server.provider().await];
        for provider in &mut providers {
            for tag in ["scan", "study"] {
                let tag = tag.to_owned();
                let request = pb::RegisterJobConfigurationRequest { tag, ..registration("1.0.0", &[]) };
                provider.register(request).await;
            }
        }
        let customers = [server.customer().await, server.customer().await];
        Self { providers, customers, jobs: Vec::new() }
    }

    /// Creates one more job of each combination.
    async fn create_jobs(&mut self) {
        for (index, provider_name) in ["first", "second"].into_iter().enumerate() {
            let provider = &mut self.providers[index];
            for tag in ["scan", "study"] {
                for (customer, customer_name) in self.customers.iter().zip(["ada", "grace"]) {
                    let configuration_tag = tag.to_owned();
                    let labels = labels(&[("customer", customer_name), ("tag", tag)]);
                    let new = provider.new_job(customer);
                    let request = pb::CreateJobRequest { configuration_tag, labels, ..new };
                    let job = provider.jobs.create_job(request).await.unwrap().into_inner().job.unwrap();
                    self.jobs.push((format!("{provider_name} {tag} {customer_name}"), index, job));
                }
            }
        }
    }

    /// Appends one event to each job.
    async fn append(&mut self) {
        for (name, provider, job) in &self.jobs {
            self.providers[*provider].append(job, [info(name)]).await;
        }
    }

    /// The names of `each` events of every job whose name has all these words.
    fn names(&self, words: &[&str], each: usize) -> Vec<String> {
        let names = self.jobs.iter().map(|(name, ..)| name);
        let names = names.filter(|name| words.iter().all(|word| name.split(' ').any(|part| part == *word)));
        sorted(names.flat_map(|name| std::iter::repeat_n(name.clone(), each)))
    }
}

fn labels(given: &[(&str, &str)]) -> BTreeMap<String, String> {
    given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn sorted(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut names: Vec<String> = names.into_iter().collect();
    names.sort();
    names
}

fn names(events: &[Event]) -> Vec<String> {
    sorted(events.iter().map(|event| event.name.clone()))
}

#[tokio::test(flavor = "multi_thread")]
async fn filtered_watches_of_all_jobs_receive_events_of_jobs_created_later() {
    let server = TestServer::start().await;
    let mut mixture = Mixture::new(&server).await;
    mixture.create_jobs().await;
    mixture.append().await;
    let [first, second] = mixture.providers.each_ref().map(|user| user.id.clone());
    let [ada, grace] = mixture.customers.each_ref().map(|user| user.id.clone());
    let (of_first, of_ada) = (mixture.providers[0].clone(), mixture.customers[0].clone());
    let mut watches = Vec::new();
    for (user, tag, counterpart, labelled, expected) in [
        (&of_first, "", "", &[][..], vec!["first"]),
        (&of_first, "scan", "", &[][..], vec!["first", "scan"]),
        (&of_first, "study", "", &[][..], vec!["first", "study"]),
        (&of_first, "", ada.as_str(), &[][..], vec!["first", "ada"]),
        (&of_first, "study", grace.as_str(), &[][..], vec!["first", "study", "grace"]),
        (&of_ada, "", "", &[][..], vec!["ada"]),
        (&of_ada, "scan", "", &[][..], vec!["scan", "ada"]),
        (&of_ada, "another", "", &[][..], vec!["none"]),
        (&of_ada, "", second.as_str(), &[][..], vec!["second", "ada"]),
        (&of_ada, "study", first.as_str(), &[][..], vec!["first", "study", "ada"]),
        (&of_ada, "", grace.as_str(), &[][..], vec!["none"]),
        (&of_first, "", "", &[("customer", "ada")][..], vec!["first", "ada"]),
        (&of_first, "", "", &[("customer", "ada"), ("tag", "scan")], vec!["first", "scan", "ada"]),
        (&of_first, "scan", ada.as_str(), &[("customer", "ada")], vec!["first", "scan", "ada"]),
        (&of_first, "scan", "", &[("tag", "study")], vec!["none"]),
        (&of_first, "", "", &[("customer", "ad")], vec!["none"]),
        (&of_first, "", "", &[("ada", "customer")], vec!["none"]),
        (&of_ada, "", "", &[("tag", "scan")], vec!["scan", "ada"]),
        (&of_ada, "", second.as_str(), &[("tag", "scan")], vec!["second", "scan", "ada"]),
    ] {
        let (configuration_tag, counterpart_id) = (tag.to_owned(), counterpart.to_owned());
        let scope =
            Some(Scope::AllJobs(pb::AllJobs { configuration_tag, counterpart_id, labels: labels(labelled) }));
        let request = pb::WatchEventsRequest { scope, ..Default::default() };
        let mut watch = user.clone().watch_by(request).await.unwrap();
        let (past, _) = watch.caught_up().await;
        assert_eq!(names(&past), mixture.names(&expected, 1));
        watches.push((watch, expected));
    }
    mixture.create_jobs().await;
    // Twice, so that events which pass the filter follow events which do not.
    mixture.append().await;
    mixture.append().await;
    for (watch, expected) in watches {
        let expected = mixture.names(&expected, 2);
        if !expected.is_empty() {
            let live = collect(watch, expected.len()).await;
            by_job(&live);
            assert_eq!(names(&live), expected);
        }
    }
}
