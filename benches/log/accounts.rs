//! A provider and a customer, signed up through the API, and their jobs.

use std::net::SocketAddr;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use milepost_client::{
    Client,
    pb::{self, RegisterJobConfigurationRequest, SignUpRequest, StepConfiguration, UserRole},
};

use crate::Result;

/// Steps of the configuration.
pub(crate) const STEPS: usize = 20;
/// The tag of the configuration.
const TAG: &str = "analysis";

/// The provider and the customer of a row, with their API keys.
#[derive(Clone)]
pub(crate) struct Accounts {
    pub(crate) provider_key: String,
    pub(crate) customer_key: String,
    customer_id: String,
}

/// The tag of a step; any number is reduced to one of the steps.
pub(crate) fn step_tag(number: usize) -> String {
    format!("step-{:02}", number % STEPS)
}

/// Opens `count` connections to a server with one API key.
pub(crate) async fn connect(server: SocketAddr, key: &str, count: usize) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(Client::connect(&server.to_string()).await?.with_credential(key)?);
    }
    Ok(clients)
}

impl Accounts {
    /// Signs up the provider and the customer and registers the configuration.
    pub(crate) async fn create(server: SocketAddr) -> Result<Self> {
        let unauthenticated = Client::connect(&server.to_string()).await?;
        let (_, provider_key) = sign_up(&unauthenticated, UserRole::Provider).await?;
        let (customer_id, customer_key) = sign_up(&unauthenticated, UserRole::Customer).await?;
        let step = |number| StepConfiguration {
            tag: step_tag(number),
            name: format!("Step {number}"),
            points: 5,
            metadata: Vec::new(),
        };
        let request = RegisterJobConfigurationRequest {
            tag: TAG.to_owned(),
            name: "Analysis".to_owned(),
            version: "1.0.0".to_owned(),
            steps: (0..STEPS).map(step).collect(),
        };
        let provider = unauthenticated.with_credential(&provider_key)?;
        provider.configurations().register_job_configuration(request).await?;
        Ok(Self { provider_key, customer_key, customer_id })
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
        let provider = &connect(server, &self.provider_key, 1).await?[0];
        let create = |number| async move {
            let request = pb::CreateJobRequest {
                provider_job_id: format!("job-{number:07}"),
                customer_id: self.customer_id.clone(),
                configuration_tag: TAG.to_owned(),
                configuration_version: String::new(),
                provider_job_name: format!("Patient {number}"),
            };
            let job = provider.jobs().create_job(request).await?.into_inner().job;
            Ok(job.ok_or("an answer without a job")?.id)
        };
        stream::iter(existing..existing + count).map(create).buffered(32).try_collect().await
    }
}

/// Signs a user up; returns the user's id and an API key.
async fn sign_up(unauthenticated: &Client, role: UserRole) -> Result<(String, String)> {
    let request = SignUpRequest {
        role: role.into(),
        email: format!("{}@example.com", uuid::Uuid::now_v7()),
        password: "correct horse battery".to_owned(),
        first_name: "Ada".to_owned(),
        last_name: "Lovelace".to_owned(),
    };
    let answer = unauthenticated.auth().sign_up(request).await?.into_inner();
    let session = answer.session.ok_or("an answer without a session")?.secret;
    let session = unauthenticated.with_credential(&session)?;
    let key = session.auth().create_api_key(pb::CreateApiKeyRequest::default()).await?.into_inner();
    Ok((answer.user.ok_or("an answer without a user")?.id, key.secret))
}
