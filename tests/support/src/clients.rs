//! Users who call a server through the generated clients.

use std::{
    net::{IpAddr, SocketAddr},
    ops::{Deref, DerefMut},
};

use milepost_client::{
    Client, Service,
    pb::{
        self, auth_service_client::AuthServiceClient,
        configuration_service_client::ConfigurationServiceClient, event_service_client::EventServiceClient,
        job_service_client::JobServiceClient, watch_events_request,
    },
};
use tonic::{
    Status,
    transport::{Channel, ClientTlsConfig, Endpoint},
};
use uuid::Uuid;

use crate::Watch;

/// The password of every user that [`Clients`] signs up.
pub const PASSWORD: &str = "correct horse battery";

/// The tag of every configuration that [`registration`] makes.
const TAG: &str = "analysis";

/// Clients of the four services that share one credential.
#[derive(Clone, Debug)]
pub struct Caller {
    pub auth: AuthServiceClient<Service>,
    pub configurations: ConfigurationServiceClient<Service>,
    pub jobs: JobServiceClient<Service>,
    pub events: EventServiceClient<Service>,
}

impl Caller {
    fn of(client: &Client) -> Self {
        Self {
            auth: client.auth(),
            configurations: client.configurations(),
            jobs: client.jobs(),
            events: client.events(),
        }
    }

    /// The user and the credential of this caller, which the server may refuse.
    pub async fn current_user(&self) -> Result<pb::GetCurrentUserResponse, Status> {
        Ok(self.auth.clone().get_current_user(pb::GetCurrentUserRequest {}).await?.into_inner())
    }
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

    pub fn at(endpoint: Endpoint) -> Self {
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
        Caller::of(&self.client())
    }

    pub fn with_secret(&self, secret: impl AsRef<str>) -> Caller {
        Caller::of(&self.client().with_credential(secret.as_ref()).unwrap())
    }

    /// The client that users have, without a credential.
    pub fn client(&self) -> Client {
        Client::new(self.channel.clone())
    }

    /// Signs up a new provider.
    pub async fn provider(&self) -> User {
        self.sign_up(pb::UserRole::Provider, &[]).await
    }

    /// Signs up a new customer.
    pub async fn customer(&self) -> User {
        self.sign_up(pb::UserRole::Customer, &[]).await
    }

    /// Signs up a new user, whose API key has these scopes; without any, the default ones.
    pub async fn sign_up(&self, role: pb::UserRole, scopes: &[pb::ApiKeyScope]) -> User {
        let email = format!("{}@example.com", Uuid::now_v7());
        let request = pb::SignUpRequest { role: role.into(), ..sign_up_request(&email) };
        let signed_up = self.anonymous().auth.sign_up(request).await.unwrap().into_inner();
        let mut session = self.with_secret(signed_up.session.unwrap().secret);
        let (_, key_secret) = create_key(&mut session, scopes).await;
        let key = self.with_secret(&key_secret);
        User { id: signed_up.user.unwrap().id, email, session, key, key_secret }
    }

    /// Signs up a provider and a customer, and creates a job of the one for the other, of a
    /// configuration of these steps and points.
    pub async fn job(&self, steps: &[(&str, i64)]) -> (User, User, pb::Job) {
        let (mut provider, customer) = (self.provider().await, self.customer().await);
        provider.configuration(steps).await;
        let job = provider.job(&customer).await;
        (provider, customer, job)
    }

    /// The secret of a new session.
    pub async fn log_in(&self, user: &User) -> String {
        self.try_log_in(&user.email, PASSWORD).await.unwrap()
    }

    /// The secret of a new session, which the server may refuse.
    pub async fn try_log_in(&self, email: &str, password: &str) -> Result<String, Status> {
        let request = pb::LogInRequest { email: email.to_owned(), password: password.to_owned() };
        Ok(self.anonymous().auth.log_in(request).await?.into_inner().session.unwrap().secret)
    }

    /// The same user with the same API key, calling this server instead: for
    /// tests with replicas. The session still calls the first server.
    pub fn same(&self, user: &User) -> User {
        User { key: self.with_secret(&user.key_secret), ..user.clone() }
    }
}

/// A request that signs up a customer. Tests may change it before they send it.
pub fn sign_up_request(email: &str) -> pb::SignUpRequest {
    pb::SignUpRequest {
        role: pb::UserRole::Customer.into(),
        email: email.to_owned(),
        password: PASSWORD.to_owned(),
        first_name: "Ada".to_owned(),
        last_name: "Lovelace".to_owned(),
    }
}

/// Id and secret of a new API key.
async fn create_key(session: &mut Caller, scopes: &[pb::ApiKeyScope]) -> (String, String) {
    let scopes = scopes.iter().map(|scope| i32::from(*scope)).collect();
    let request = pb::CreateApiKeyRequest { scopes, ..Default::default() };
    let created = session.auth.create_api_key(request).await.unwrap().into_inner();
    (created.api_key.unwrap().id, created.secret)
}

/// A provider or a customer. It dereferences to the caller with the API key.
#[derive(Clone, Debug)]
pub struct User {
    pub id: String,
    pub email: String,
    /// Calls with the session of the sign-up.
    pub session: Caller,
    /// Calls with an API key.
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
        ..Default::default()
    };
    pb::RegisterJobConfigurationRequest {
        tag: TAG.to_owned(),
        name: "Analysis".to_owned(),
        version: version.to_owned(),
        steps: steps.iter().map(step).collect(),
        ..Default::default()
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

    /// Id and secret of a new API key with these scopes; without any, with the default ones.
    pub async fn create_key(&mut self, scopes: &[pb::ApiKeyScope]) -> (String, String) {
        create_key(&mut self.session, scopes).await
    }

    /// The API keys of this user on the first page, from the oldest to the newest.
    pub async fn keys(&mut self) -> Vec<pb::ApiKey> {
        let listed = self.session.auth.list_api_keys(pb::ListApiKeysRequest::default()).await;
        listed.unwrap().into_inner().api_keys
    }

    /// Ends the oldest API key, which is the one that this user calls with; the server may
    /// refuse it.
    pub async fn expire_key(&mut self) -> Result<pb::ApiKey, Status> {
        let request = pb::ExpireApiKeyRequest { api_key_id: self.keys().await.remove(0).id };
        Ok(self.session.auth.expire_api_key(request).await?.into_inner().api_key.unwrap())
    }

    /// Id and secret of a new watch token.
    pub async fn create_watch_token(&mut self, job: &pb::Job) -> (String, String) {
        let job = Some(pb::create_watch_token_request::Job::JobId(job.id.clone()));
        let request = pb::CreateWatchTokenRequest { job, ..Default::default() };
        let created = self.auth.create_watch_token(request).await.unwrap().into_inner();
        (created.watch_token.unwrap().id, created.secret)
    }

    /// A request for a job of the latest configuration.
    pub fn new_job(&self, customer: &User) -> pb::CreateJobRequest {
        pb::CreateJobRequest {
            provider_job_id: Uuid::now_v7().to_string(),
            customer: Some(pb::create_job_request::Customer::CustomerId(customer.id.clone())),
            configuration_tag: TAG.to_owned(),
            configuration_version: String::new(),
            provider_job_name: "A job".to_owned(),
            ..Default::default()
        }
    }

    /// The same, for the customer whose code this is.
    pub fn new_job_by_code(&self, customer: &User, code: &str) -> pb::CreateJobRequest {
        let code = pb::create_job_request::Customer::CustomerCode(code.to_owned());
        pb::CreateJobRequest { customer: Some(code), ..self.new_job(customer) }
    }

    /// The code of this customer.
    pub async fn customer_code(&self) -> String {
        self.current_user().await.unwrap().user.unwrap().customer_code
    }

    /// Creates a job of the latest configuration.
    pub async fn job(&mut self, customer: &User) -> pb::Job {
        let request = self.new_job(customer);
        self.jobs.create_job(request).await.unwrap().into_inner().job.unwrap()
    }

    /// The job as it is now.
    pub async fn get(&mut self, job: &pb::Job) -> pb::Job {
        self.find(job).await.job.unwrap()
    }

    /// The job with its configuration and the states of its steps.
    pub async fn find(&mut self, job: &pb::Job) -> pb::GetJobResponse {
        let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(job.id.clone())) };
        self.jobs.get_job(request).await.unwrap().into_inner()
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
