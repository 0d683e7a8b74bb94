//! A provider and a customer, signed up through the API, and their jobs.

use std::net::SocketAddr;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost_client::{Client, pb::CreateJobRequest};
use milepost_testing::{Clients, User, registration};

use crate::Result;

/// Steps of the configuration.
pub(crate) const STEPS: usize = 20;

/// The provider and the customer of a row.
#[derive(Clone)]
pub(crate) struct Accounts {
    pub(crate) provider: User,
    pub(crate) customer: User,
}

/// The tag of a step; any number is reduced to one of the steps.
pub(crate) fn step_tag(number: usize) -> String {
    format!("step-{:02}", number % STEPS)
}

/// Opens `count` connections to a server with the API key of a user.
pub(crate) async fn connect(server: SocketAddr, user: &User, count: usize) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(Client::connect(&server.to_string()).await?.with_credential(&user.key_secret)?);
    }
    Ok(clients)
}

impl Accounts {
    /// Signs up the provider and the customer and registers the configuration.
    pub(crate) async fn create(server: SocketAddr) -> Self {
        let clients = Clients::of(server);
        let (mut provider, customer) = (clients.provider().await, clients.customer().await);
        let tags: Vec<String> = (0..STEPS).map(step_tag).collect();
        let steps: Vec<(&str, i64)> = tags.iter().map(|tag| (tag.as_str(), 5)).collect();
        provider.register(registration("1.0.0", &steps)).await;
        Self { provider, customer }
    }

    /// Creates jobs and returns their ids.
    pub(crate) async fn create_jobs(&self, server: SocketAddr, count: usize) -> Result<Vec<String>> {
        self.create_more_jobs(server, 0, count).await
    }

    /// Creates jobs whose provider ids follow those of `existing` jobs.
    pub(crate) async fn create_more_jobs(
        &self,
        server: SocketAddr,
        existing: usize,
        count: usize,
    ) -> Result<Vec<String>> {
        let provider = &connect(server, &self.provider, 1).await?[0];
        let create = |number| async move {
            let request = CreateJobRequest {
                provider_job_id: format!("job-{number:07}"),
                provider_job_name: format!("Patient {number}"),
                ..self.provider.new_job(&self.customer)
            };
            let job = provider.jobs().create_job(request).await?.into_inner().job;
            Ok(job.ok_or("an answer without a job")?.id)
        };
        stream::iter(existing..existing + count).map(create).buffered(32).try_collect().await
    }
}
