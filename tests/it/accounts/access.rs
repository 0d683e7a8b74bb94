//! Authorization: every method of the descriptor set, called by every kind of
//! caller.

use std::{collections::BTreeMap, time::Duration};

use futures_util::future::join;
use milepost::secret::{Secret, SecretKind};
use milepost_client::pb::{self, ApiKeyScope};
use prost::Message;
use tokio::{net::TcpStream, time::timeout};
use tonic::{Code, Status, transport::Channel};
use uuid::Uuid;

use crate::support::{PASSWORD, TestServer, User, raw, registration, within_timeout};

/// All callers. Requests name resources of "the provider" and "the customer";
/// "another provider" and "another customer" are a second tenant.
const CALLERS: [&str; 13] = [
    "no credential",
    "a malformed secret",
    "an expired key",
    "a revoked key",
    "a logged-out session",
    "a disabled user",
    "a key without the scope, or instead of a session",
    "a watch token of the job",
    "a watch token of another job",
    "the customer",
    "another customer",
    "the provider",
    "another provider",
];

/// The code that each method answers to each of [`CALLERS`], in their order: O is
/// OK, U UNAUTHENTICATED, P PERMISSION_DENIED, N NOT_FOUND.
const EXPECTED: [(&str, &str); 31] = [
    ("AuthService/SignUp", "OOOOOO O OO OO OO"),
    ("AuthService/LogIn", "OOOOOO O OO OO OO"),
    // These methods concern the caller alone, so that NOT_FOUND cannot occur.
    ("AuthService/LogOut", "UUUUUU P PP OO OO"),
    ("AuthService/GetCurrentUser", "UUUUUU O OO OO OO"),
    ("AuthService/UpdateCurrentUser", "UUUUUU P PP OO OO"),
    ("AuthService/ChangePassword", "UUUUUU P PP OO OO"),
    ("AuthService/RenewCustomerCode", "UUUUUU P PP OO PP"),
    ("AuthService/CreateApiKey", "UUUUUU P PP OO OO"),
    ("AuthService/ListApiKeys", "UUUUUU P PP OO OO"),
    ("AuthService/ExpireApiKey", "UUUUUU P PP ON ON"),
    ("AuthService/RotateApiKey", "UUUUUU P PP ON ON"),
    ("AuthService/CreateWatchToken", "UUUUUU P PP PP ON"),
    ("AuthService/ListWatchTokens", "UUUUUU P PP PP ON"),
    ("AuthService/ExpireWatchToken", "UUUUUU P PP PP ON"),
    ("AuthService/GetUsage", "UUUUUU P PP OO OO"),
    ("ConfigurationService/RegisterJobConfiguration", "UUUUUU P PP PP OO"),
    ("ConfigurationService/GetJobConfiguration", "UUUUUU P PP ON ON"),
    ("ConfigurationService/ListJobConfigurations", "UUUUUU P PP PP OO"),
    ("JobService/CreateJob", "UUUUUU P PP PP OO"),
    ("JobService/GetJob", "UUUUUU P ON ON ON"),
    ("JobService/ListJobs", "UUUUUU P PP OO OO"),
    ("JobService/CloseJob", "UUUUUU P PP PP ON"),
    ("JobService/RequestCancellation", "UUUUUU P PP ON PP"),
    ("JobService/HoldJob", "UUUUUU P PP ON ON"),
    ("JobService/EstimateJob", "UUUUUU P ON ON ON"),
    ("JobService/SummarizeJobs", "UUUUUU P PP OO OO"),
    ("JobService/ExportJobs", "UUUUUU P PP OO OO"),
    ("EventService/AppendEvents", "UUUUUU P PP PP ON"),
    ("EventService/ListEvents", "UUUUUU P ON ON ON"),
    ("EventService/WatchEvents", "UUUUUU P ON ON ON"),
    ("EventService/ExportEvents", "UUUUUU P PP OO OO"),
];

/// The stream refuses a batch with a message, not with its own status.
const PUBLISH: (&str, &str) = ("EventService/PublishEvents", "UUUUUU P PP PP ON");

/// Two tenants with a job each. Requests name the job of the first.
pub struct World {
    pub server: TestServer,
    provider: User,
    customer: User,
    other_provider: User,
    other_customer: User,
    configuration_id: String,
    job: pb::Job,
    /// Id and secret of a watch token of `job`.
    watch_token: (String, String),
    other_watch_token: String,
}

impl World {
    pub async fn new(server: TestServer) -> Self {
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        let (mut other_provider, other_customer) = (server.provider().await, server.customer().await);
        let configuration_id = provider.configuration(&[("load", 1)]).await.id;
        other_provider.configuration(&[("load", 1)]).await;
        let job = provider.job(&customer).await;
        let other_job = other_provider.job(&other_customer).await;
        let watch_token = provider.create_watch_token(&job).await;
        let (_, other_watch_token) = other_provider.create_watch_token(&other_job).await;
        Self {
            server,
            provider,
            customer,
            other_provider,
            other_customer,
            configuration_id,
            job,
            watch_token,
            other_watch_token,
        }
    }

    /// The secret that this caller sends; `None` for "no credential".
    pub async fn secret(&mut self, caller: &str, method: &str) -> Option<String> {
        let provider = &mut self.provider;
        Some(match caller {
            "no credential" => return None,
            "a malformed secret" => "mpk_garbage".to_owned(),
            "an expired key" => {
                let (id, secret) = provider.create_key(&[ApiKeyScope::Read]).await;
                let past =
                    format!("UPDATE api_keys SET expires_at = now() - interval '1 s' WHERE id = '{id}'");
                self.server.database.execute(&past).await;
                secret
            }
            "a revoked key" => {
                let (api_key_id, secret) = provider.create_key(&[ApiKeyScope::Read]).await;
                provider.session.auth.expire_api_key(pb::ExpireApiKeyRequest { api_key_id }).await.unwrap();
                secret
            }
            "a logged-out session" => {
                let secret = self.server.log_in(provider).await;
                self.server.with_secret(&secret).auth.log_out(pb::LogOutRequest {}).await.unwrap();
                secret
            }
            "a disabled user" => {
                let user = self.server.provider().await;
                let disable = format!("UPDATE users SET disabled_at = now() WHERE id = '{}'", user.id);
                self.server.database.execute(&disable).await;
                user.key_secret
            }
            "a key without the scope, or instead of a session" => {
                let scopes: &[ApiKeyScope] = match method.split('/').nth(1).unwrap() {
                    "GetJobConfiguration"
                    | "ListJobConfigurations"
                    | "GetJob"
                    | "EstimateJob"
                    | "ListJobs"
                    | "SummarizeJobs"
                    | "ExportJobs"
                    | "ExportEvents"
                    | "ListEvents"
                    | "WatchEvents"
                    | "GetUsage" => &[ApiKeyScope::Append, ApiKeyScope::Manage],
                    "CreateApiKey" | "ListApiKeys" | "ExpireApiKey" | "RotateApiKey" => {
                        &[ApiKeyScope::Read, ApiKeyScope::Append]
                    }
                    "LogOut" | "UpdateCurrentUser" | "ChangePassword" | "RenewCustomerCode" => {
                        &[ApiKeyScope::Read, ApiKeyScope::Append, ApiKeyScope::Manage]
                    }
                    _ => &[ApiKeyScope::Read, ApiKeyScope::Manage],
                };
                provider.create_key(scopes).await.1
            }
            "a watch token of the job" => self.watch_token.1.clone(),
            "a watch token of another job" => self.other_watch_token.clone(),
            "the customer" => self.server.log_in(&self.customer).await,
            "another customer" => self.server.log_in(&self.other_customer).await,
            "the provider" => self.server.log_in(&self.provider).await,
            "another provider" => self.server.log_in(&self.other_provider).await,
            other => panic!("{other}"),
        })
    }

    /// A request that is valid for the owner of the resource.
    pub async fn request(&mut self, caller: &str, method: &str) -> Vec<u8> {
        let job_id = self.job.id.clone();
        let fresh = Uuid::now_v7().to_string();
        let event =
            pb::NewEvent { kind: pb::EventKind::Info.into(), name: "x".to_owned(), ..Default::default() };
        // The owner of the API keys, which other callers do not own.
        let owner = if caller.contains("customer") { &mut self.customer } else { &mut self.provider };
        match method.split('/').nth(1).unwrap() {
            "SignUp" => pb::SignUpRequest {
                role: pb::UserRole::Customer.into(),
                email: format!("{fresh}@example.com"),
                password: PASSWORD.to_owned(),
                ..Default::default()
            }
            .encode_to_vec(),
            "LogIn" => pb::LogInRequest { email: self.provider.email.clone(), password: PASSWORD.to_owned() }
                .encode_to_vec(),
            "LogOut" | "GetCurrentUser" | "RenewCustomerCode" | "CreateApiKey" | "ListApiKeys"
            | "GetUsage" | "ListJobs" | "SummarizeJobs" | "ExportJobs" | "ExportEvents" => Vec::new(),
            "UpdateCurrentUser" => {
                pb::UpdateCurrentUserRequest { user: Some(pb::User::default()), update_mask: None }
                    .encode_to_vec()
            }
            "ChangePassword" => pb::ChangePasswordRequest {
                current_password: PASSWORD.to_owned(),
                new_password: PASSWORD.to_owned(),
            }
            .encode_to_vec(),
            "ExpireApiKey" => {
                let (api_key_id, _) = owner.create_key(&[ApiKeyScope::Read]).await;
                pb::ExpireApiKeyRequest { api_key_id }.encode_to_vec()
            }
            "RotateApiKey" => {
                let (api_key_id, _) = owner.create_key(&[ApiKeyScope::Read]).await;
                pb::RotateApiKeyRequest { api_key_id, overlap: None }.encode_to_vec()
            }
            "CreateWatchToken" => {
                let job = Some(pb::create_watch_token_request::Job::JobId(job_id));
                pb::CreateWatchTokenRequest { job, ..Default::default() }.encode_to_vec()
            }
            "ListWatchTokens" => {
                let job = Some(pb::list_watch_tokens_request::Job::JobId(job_id));
                pb::ListWatchTokensRequest { job, ..Default::default() }.encode_to_vec()
            }
            "ExpireWatchToken" => {
                let (watch_token_id, _) = self.provider.create_watch_token(&self.job).await;
                pb::ExpireWatchTokenRequest { watch_token_id }.encode_to_vec()
            }
            "RegisterJobConfiguration" => registration("2.0.0", &[("load", 1)]).encode_to_vec(),
            "GetJobConfiguration" => {
                let key = pb::get_job_configuration_request::Key::Id(self.configuration_id.clone());
                pb::GetJobConfigurationRequest { key: Some(key), ..Default::default() }.encode_to_vec()
            }
            "ListJobConfigurations" => Vec::new(),
            "CreateJob" => {
                let job = self.provider.new_job(&self.customer);
                pb::CreateJobRequest { provider_job_id: fresh, ..job }.encode_to_vec()
            }
            "GetJob" => {
                let job = Some(pb::get_job_request::Job::JobId(job_id));
                pb::GetJobRequest { job }.encode_to_vec()
            }
            "RequestCancellation" => {
                pb::RequestCancellationRequest { job_id, ..Default::default() }.encode_to_vec()
            }
            "HoldJob" => {
                let job = Some(pb::hold_job_request::Job::JobId(job_id));
                pb::HoldJobRequest { job, held: true }.encode_to_vec()
            }
            "EstimateJob" => {
                let job = Some(pb::estimate_job_request::Job::JobId(job_id));
                pb::EstimateJobRequest { job }.encode_to_vec()
            }
            "CloseJob" => {
                let job = Some(pb::close_job_request::Job::JobId(job_id));
                pb::CloseJobRequest { job, ..Default::default() }.encode_to_vec()
            }
            "AppendEvents" => {
                let job = Some(pb::append_events_request::Job::JobId(job_id));
                pb::AppendEventsRequest { job, events: vec![event], ..Default::default() }.encode_to_vec()
            }
            "PublishEvents" => {
                let job = Some(pb::publish_events_request::Job::JobId(job_id));
                pb::PublishEventsRequest { job, events: vec![event], ..Default::default() }.encode_to_vec()
            }
            "ListEvents" => {
                let job = Some(pb::list_events_request::Job::JobId(job_id));
                pb::ListEventsRequest { job, ..Default::default() }.encode_to_vec()
            }
            "WatchEvents" => {
                let scope = Some(pb::watch_events_request::Scope::JobId(job_id));
                pb::WatchEventsRequest { scope, ..Default::default() }.encode_to_vec()
            }
            other => panic!("no request for {other} is defined here"),
        }
    }
}

/// The call's code: OK once a first message arrives.
pub async fn call(channel: Channel, secret: Option<String>, method: &str, message: Vec<u8>) -> Code {
    let first = async { raw::open(channel, secret.as_deref(), method, [message]).await?.message().await };
    match within_timeout("an answer", first).await {
        Err(status) => status.code(),
        Ok(None) => panic!("{method} ended without a message"),
        Ok(Some(answer)) if method == PUBLISH.0 => {
            match pb::PublishEventsResponse::decode(answer).unwrap().outcome.unwrap() {
                pb::publish_events_response::Outcome::Appended(_) => Code::Ok,
                pb::publish_events_response::Outcome::Refused(status) => Code::from(status.code),
            }
        }
        Ok(Some(_)) => Code::Ok,
    }
}

pub fn methods() -> Vec<String> {
    raw::methods().iter().map(raw::name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_answers_each_caller_as_the_table_says() {
    let expected: BTreeMap<&str, &str> = EXPECTED.into_iter().chain([PUBLISH]).collect();
    let mut wrong = Vec::new();
    for method in methods() {
        let Some(row) = expected.get(method.as_str()) else { panic!("{method} has no row in the table") };
        let row: Vec<char> = row.chars().filter(|cell| *cell != ' ').collect();
        assert_eq!(row.len(), CALLERS.len(), "{method}");
        let mut world = World::new(TestServer::start().await).await;
        for (caller, cell) in CALLERS.into_iter().zip(row) {
            let secret = world.secret(caller, &method).await;
            let message = world.request(caller, &method).await;
            let code = call(world.server.channel.clone(), secret, &method, message).await;
            let as_expected = match cell {
                'O' => code == Code::Ok,
                'U' => code == Code::Unauthenticated,
                'P' => code == Code::PermissionDenied,
                'N' => code == Code::NotFound,
                other => panic!("{other}"),
            };
            if !as_expected {
                wrong.push(format!("{method} by {caller}: expected {cell}, got {code:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(methods().len(), expected.len(), "the table has a row for an unknown method");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unauthenticated_call_is_refused_before_its_message_is_read() {
    let server = TestServer::start().await;
    let (client, connection) =
        h2::client::handshake(TcpStream::connect(server.address).await.unwrap()).await.unwrap();
    tokio::spawn(connection);
    let authenticated =
        EXPECTED.into_iter().chain([PUBLISH]).filter(|(_, expected)| expected.starts_with('U'));
    for (method, _) in authenticated {
        for secret in ["", "Bearer garbage"] {
            let request = http::Request::post(format!("http://{}/milepost.v1.{method}", server.address))
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("authorization", secret)
                .body(())
                .unwrap();
            // The message of the request is never sent.
            let mut client = client.clone().ready().await.unwrap();
            let (answer, _message) = client.send_request(request, false).unwrap();
            let answer = within_timeout(format!("{method} to answer"), answer).await.unwrap();
            let status = Status::from_header_map(answer.headers()).expect("a status in the first headers");
            assert_eq!(status.code(), Code::Unauthenticated, "{method}");
        }
    }
}

/// Asserts that authenticated calls get a database connection while many
/// unauthenticated calls wait for a lock on this table.
async fn assert_authenticated_calls_get_a_connection(
    table: &str,
    secret: impl Fn() -> Option<String>,
    method: &'static str,
    message: &impl Message,
) {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let key = provider.session.auth.create_api_key(pb::CreateApiKeyRequest::default()).await.unwrap();
    let locker = server.database.lock(table).await;
    let unauthenticated: Vec<_> = (0..30)
        .map(|_| {
            let (channel, secret, message) = (server.channel.clone(), secret(), message.encode_to_vec());
            tokio::spawn(async move {
                let call = raw::open(channel, secret.as_deref(), method, [message]);
                call.await.map(drop)
            })
        })
        .collect();
    server.database.wait_for_locks(2).await;
    for _ in 0..20 {
        let read = timeout(Duration::from_secs(2), provider.get(&job)).await;
        assert!(read.is_ok(), "unauthenticated calls have all connections checked out");
    }
    // Secret look-ups do not wait for log-ins, nor log-ins for secret look-ups: one
    // of the two calls succeeds while the other waits for the lock.
    let request = pb::LogInRequest { email: provider.email.clone(), password: PASSWORD.to_owned() };
    let (mut anonymous, mut with_key) =
        (server.anonymous().auth, server.with_secret(key.into_inner().secret).auth);
    let (log_in, look_up) = join(
        timeout(Duration::from_secs(2), anonymous.log_in(request)),
        timeout(Duration::from_secs(2), with_key.get_current_user(pb::GetCurrentUserRequest {})),
    )
    .await;
    assert!(log_in.is_ok_and(|done| done.is_ok()) || look_up.is_ok_and(|done| done.is_ok()));
    drop(locker);
    for call in unauthenticated {
        // The throttle refuses some of many simultaneous log-ins for one e-mail.
        let code = call.await.unwrap().unwrap_err().code();
        assert!([Code::Unauthenticated, Code::ResourceExhausted].contains(&code), "{code:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_unknown_secrets_leave_a_connection_to_authenticated_calls() {
    let secret = || Some(Secret::generate(SecretKind::WatchToken).unwrap().reveal());
    assert_authenticated_calls_get_a_connection("watch_tokens", secret, "JobService/GetJob", &()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_failed_log_ins_leave_a_connection_to_authenticated_calls() {
    let request =
        pb::LogInRequest { email: "nobody@example.com".to_owned(), password: "a wrong guess".to_owned() };
    assert_authenticated_calls_get_a_connection("log_in_attempts", || None, "AuthService/LogIn", &request)
        .await;
}
