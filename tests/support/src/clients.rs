//! Users who call a server through the generated clients.

use std::{
    net::{IpAddr, SocketAddr},
    ops::{Deref, DerefMut},
};

use milepost_client::pb::{
    self, auth_service_client::AuthServiceClient, configuration_service_client::ConfigurationServiceClient,
    event_service_client::EventServiceClient, job_service_client::JobServiceClient, watch_events_request,
};
use tonic::{
    Request, Status,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, ClientTlsConfig, Endpoint},
};
use uuid::Uuid;

use super::Watch;

/// The password of every user that [`Clients`] signs up.
pub const PASSWORD: &str = "correct horse battery";

/// The tag of every configuration that [`registration`] makes.
const TAG: &str = "analysis";

/// Adds the secret, if any, to each call as `authorization: Bearer SECRET`.
#[derive(Clone, Debug)]
pub struct Bearer(Option<String>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(secret) = &self.0 {
            request.metadata_mut().insert("authorization", format!("Bearer {secret}").parse().unwrap());
        }
        Ok(request)
    }
}

type Authorized = InterceptedService<Channel, Bearer>;

/// Clients of the four services that share one credential.
#[derive(Clone, Debug)]
pub struct Caller {
    pub auth: AuthServiceClient<Authorized>,
    pub configurations: ConfigurationServiceClient<Authorized>,
    pub jobs: JobServiceClient<Authorized>,
    pub events: EventServiceClient<Authorized>,
}

/// Makes [`Caller`]s of one server. The channel connects on first use, and
/// again after a restart of the server.
#[derive(Clone, Debug)]
pub struct Clients {
    pub channel: Channel,
    pub endpoint: Endpoint,
}

impl Clients {
    pub fn of(address: SocketAddr) -> Self {
        Self::at(Endpoint::from_shared(format!("http://{address}")).unwrap())
    }

    pub fn over_tls(address: SocketAddr, tls: ClientTlsConfig) -> Self {
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
        Self::at(endpoint.tls_config(tls).unwrap())
    }

    fn at(endpoint: Endpoint) -> Self {
        Self { channel: endpoint.connect_lazy(), endpoint }
    }

    /// Clients of the same server that connect from this local address.
    pub fn from(&self, address: impl Into<IpAddr>) -> Self {
        Self::at(self.endpoint.clone().local_address(Some(address.into())))
    }

    /// Clients of the same server over another connection.
    pub fn other_clients(&self) -> Self {
        Self::at(self.endpoint.clone())
    }

    pub fn anonymous(&self) -> Caller {
        self.bearing(None)
    }

    pub fn with_secret(&self, secret: impl Into<String>) -> Caller {
        self.bearing(Some(secret.into()))
    }

    fn bearing(&self, secret: Option<String>) -> Caller {
        let (channel, bearer) = (self.channel.clone(), Bearer(secret));
        Caller {
            auth: AuthServiceClient::with_interceptor(channel.clone(), bearer.clone()),
            configurations: ConfigurationServiceClient::with_interceptor(channel.clone(), bearer.clone()),
            jobs: JobServiceClient::with_interceptor(channel.clone(), bearer.clone()),
            events: EventServiceClient::with_interceptor(channel, bearer),
        }
    }

    /// Signs up a new provider.
    pub async fn provider(&self) -> User {
        self.user(pb::UserRole::Provider).await
    }

    /// Signs up a new customer.
    pub async fn customer(&self) -> User {
        self.user(pb::UserRole::Customer).await
    }

    async fn user(&self, role: pb::UserRole) -> User {
        let email = format!("{}@example.com", Uuid::now_v7());
        let request = pb::SignUpRequest {
            role: role.into(),
            email: email.clone(),
            password: PASSWORD.to_owned(),
            first_name: "Ada".to_owned(),
            last_name: "Lovelace".to_owned(),
        };
        let signed_up = self.anonymous().auth.sign_up(request).await.unwrap().into_inner();
        let mut session = self.with_secret(signed_up.session.unwrap().secret);
        let created =
            session.auth.create_api_key(pb::CreateApiKeyRequest::default()).await.unwrap().into_inner();
        User {
            id: signed_up.user.unwrap().id,
            email,
            session,
            key: self.with_secret(&created.secret),
            key_secret: created.secret,
        }
    }

    /// The same user with the same API key, calling this server instead: for
    /// tests with replicas. The session still calls the first server.
    pub fn same(&self, user: &User) -> User {
        User { key: self.with_secret(&user.key_secret), ..user.clone() }
    }
}

/// A provider or a customer. It dereferences to the caller with the API key.
#[derive(Clone, Debug)]
pub struct User {
    pub id: String,
    pub email: String,
    /// Calls with the session of the sign-up.
    pub session: Caller,
    /// Calls with an API key of default scopes.
    pub key: Caller,
    pub key_secret: String,
}

impl Deref for User {
    type Target = Caller;

    fn deref(&self) -> &Caller {
        &self.key
    }
}

impl DerefMut for User {
    fn deref_mut(&mut self) -> &mut Caller {
        &mut self.key
    }
}

/// A request that registers a configuration of these steps and points. Tests
/// may change it before they send it.
pub fn registration(version: &str, steps: &[(&str, i64)]) -> pb::RegisterJobConfigurationRequest {
    let step = |&(tag, points): &(&str, i64)| pb::StepConfiguration {
        tag: tag.to_owned(),
        name: format!("The step {tag}"),
        points,
        metadata: Vec::new(),
    };
    pb::RegisterJobConfigurationRequest {
        tag: TAG.to_owned(),
        name: "Analysis".to_owned(),
        version: version.to_owned(),
        steps: steps.iter().map(step).collect(),
    }
}

impl User {
    /// Registers version 1.0.0 of a configuration of these steps and points.
    pub async fn configuration(&mut self, steps: &[(&str, i64)]) -> pb::JobConfiguration {
        self.register(registration("1.0.0", steps)).await
    }

    pub async fn register(&mut self, request: pb::RegisterJobConfigurationRequest) -> pb::JobConfiguration {
        let response = self.configurations.register_job_configuration(request).await.unwrap();
        response.into_inner().job_configuration.unwrap()
    }

    /// A request for a job of the latest configuration.
    pub fn new_job(&self, customer: &User) -> pb::CreateJobRequest {
        pb::CreateJobRequest {
            provider_job_id: Uuid::now_v7().to_string(),
            customer_id: customer.id.clone(),
            configuration_tag: TAG.to_owned(),
            configuration_version: String::new(),
            provider_job_name: "A job".to_owned(),
        }
    }

    /// Creates a job of the latest configuration.
    pub async fn job(&mut self, customer: &User) -> pb::Job {
        let request = self.new_job(customer);
        self.jobs.create_job(request).await.unwrap().into_inner().job.unwrap()
    }

    /// The job as it is now.
    pub async fn get(&mut self, job: &pb::Job) -> pb::Job {
        let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(job.id.clone())) };
        self.jobs.get_job(request).await.unwrap().into_inner().job.unwrap()
    }

    /// Appends a batch, which the server may refuse.
    pub async fn try_append(
        &mut self,
        job: &pb::Job,
        events: impl IntoIterator<Item = pb::NewEvent>,
    ) -> Result<Vec<pb::AppendedEvent>, Status> {
        let request = pb::AppendEventsRequest {
            job: Some(pb::append_events_request::Job::JobId(job.id.clone())),
            expected_sequence: None,
            events: events.into_iter().collect(),
        };
        Ok(self.events.append_events(request).await?.into_inner().events)
    }

    /// Appends a batch and panics if the server refuses it.
    pub async fn append(
        &mut self,
        job: &pb::Job,
        events: impl IntoIterator<Item = pb::NewEvent>,
    ) -> Vec<pb::AppendedEvent> {
        self.try_append(job, events).await.unwrap()
    }

    /// Closes the job, which the server may refuse.
    pub async fn close(&mut self, job: &pb::Job) -> Result<pb::CloseJobResponse, Status> {
        let request = pb::CloseJobRequest {
            job: Some(pb::close_job_request::Job::JobId(job.id.clone())),
            reason: "no longer needed".to_owned(),
        };
        Ok(self.jobs.close_job(request).await?.into_inner())
    }

    /// All events of the job, from all pages of ListEvents.
    pub async fn list(&mut self, job: &pb::Job) -> Vec<pb::Event> {
        let mut events = Vec::new();
        let mut request = pb::ListEventsRequest {
            job: Some(pb::list_events_request::Job::JobId(job.id.clone())),
            page_size: 500,
            ..Default::default()
        };
        loop {
            let page = self.events.list_events(request.clone()).await.unwrap().into_inner();
            events.extend(page.events);
            if page.next_page_token.is_empty() {
                return events;
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Watches one job from its beginning.
    pub async fn watch(&mut self, job: &pb::Job) -> Watch {
        self.watch_from(job, None).await
    }

    /// Watches one job from `start`; `None` is the beginning.
    pub async fn watch_from(&mut self, job: &pb::Job, start: Option<watch_events_request::Start>) -> Watch {
        let scope = Some(watch_events_request::Scope::JobId(job.id.clone()));
        self.watch_by(pb::WatchEventsRequest { scope, start, ..Default::default() }).await.unwrap()
    }

    /// Watches all jobs that this user may see, from the beginning.
    pub async fn watch_all(&mut self) -> Watch {
        let scope = Some(watch_events_request::Scope::AllJobs(pb::AllJobs::default()));
        self.watch_by(pb::WatchEventsRequest { scope, ..Default::default() }).await.unwrap()
    }

    /// Opens a watch, which the server may refuse.
    pub async fn watch_by(&mut self, request: pb::WatchEventsRequest) -> Result<Watch, Status> {
        Ok(Watch::new(self.events.watch_events(request).await?.into_inner()))
    }
}
