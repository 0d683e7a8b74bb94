//! Nothing is written under a credential that ended while its call waited. Each method
//! that writes is called with a session, which ends while the call waits.

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};
use futures_util::future::join_all;
use milepost::{
    auth::Revocation,
    db::{Connection, Payer},
    models::caller::CredentialId,
    tenant::Tenant,
};
use milepost_client::pb;
use prost::Message;
use tokio::task::JoinHandle;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::support::{CONNECTIONS, PASSWORD, TestServer, User, info, raw, registration, within_timeout};

/// What a call waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// A connection of the pool, all of which are in use.
    Connection,
    /// The state of its job, which the task that appends reads.
    JobState,
    /// The round under way, after which its batch is appended.
    Round,
}

/// A method that writes under a credential.
struct Write {
    /// `SERVICE/METHOD`.
    method: &'static str,
    request: fn(&Scene) -> Vec<u8>,
    /// Queries what the method writes, as rows with a column `text`.
    written: &'static str,
}

impl Write {
    fn is_of_customer(&self) -> bool {
        ["AuthService/RenewCustomerCode", "JobService/RequestCancellation"].contains(&self.method)
    }

    fn waits_for(&self, wait: Wait) -> bool {
        let appends = [
            "EventService/AppendEvents",
            "EventService/PublishEvents",
            "JobService/CloseJob",
            "JobService/RequestCancellation",
        ];
        wait == Wait::Connection || appends.contains(&self.method)
    }
}

const SESSIONS: &str = "SELECT (revoked_at IS NULL)::text AS text FROM sessions";
const NAMES: &str = "SELECT first_name || ' ' || last_name AS text FROM users";
const CUSTOMER_CODES: &str = "SELECT customer_code AS text FROM users WHERE role = 'customer'";
const PASSWORDS: &str = "SELECT password_hash AS text FROM users
    UNION ALL SELECT failures::text FROM log_in_attempts";
const API_KEYS: &str = "SELECT concat_ws(' ', id, expires_at, revoked_at) AS text FROM api_keys";
const WATCH_TOKENS: &str = "SELECT concat_ws(' ', id, revoked_at) AS text FROM watch_tokens";
const CONFIGURATIONS: &str = "SELECT tag || ' ' || version AS text FROM job_configurations";
const JOBS: &str = "SELECT provider_job_id AS text FROM jobs";
const HOLDS: &str = "SELECT held_by_provider::text AS text FROM jobs";
/// Without the events that the test appends under a valid credential.
const EVENTS: &str = "SELECT kind || ' ' || name AS text FROM events WHERE name <> 'other'";

const WRITES: [Write; 16] = [
    Write {
        method: "AuthService/LogOut",
        request: |_| pb::LogOutRequest {}.encode_to_vec(),
        written: SESSIONS,
    },
    Write {
        method: "AuthService/UpdateCurrentUser",
        request: |_| {
            let user = Some(pb::User { first_name: "Grace".to_owned(), ..Default::default() });
            pb::UpdateCurrentUserRequest { user, update_mask: None }.encode_to_vec()
        },
        written: NAMES,
    },
    Write {
        method: "AuthService/ChangePassword",
        request: |_| new_password().encode_to_vec(),
        written: PASSWORDS,
    },
    Write {
        method: "AuthService/RenewCustomerCode",
        request: |_| pb::RenewCustomerCodeRequest {}.encode_to_vec(),
        written: CUSTOMER_CODES,
    },
    Write {
        method: "AuthService/CreateApiKey",
        request: |_| pb::CreateApiKeyRequest::default().encode_to_vec(),
        written: API_KEYS,
    },
    Write {
        method: "AuthService/ExpireApiKey",
        request: |scene| pb::ExpireApiKeyRequest { api_key_id: scene.api_key_id.clone() }.encode_to_vec(),
        written: API_KEYS,
    },
    Write {
        method: "AuthService/RotateApiKey",
        request: |scene| {
            pb::RotateApiKeyRequest { api_key_id: scene.api_key_id.clone(), overlap: None }.encode_to_vec()
        },
        written: API_KEYS,
    },
    Write {
        method: "AuthService/CreateWatchToken",
        request: |scene| watch_token_of(&scene.other_job).encode_to_vec(),
        written: WATCH_TOKENS,
    },
    Write {
        method: "AuthService/ExpireWatchToken",
        request: |scene| {
            pb::ExpireWatchTokenRequest { watch_token_id: scene.watch_token_id.clone() }.encode_to_vec()
        },
        written: WATCH_TOKENS,
    },
    Write {
        method: "ConfigurationService/RegisterJobConfiguration",
        request: |_| registration("2.0.0", &[("load", 1)]).encode_to_vec(),
        written: CONFIGURATIONS,
    },
    Write {
        method: "JobService/CreateJob",
        request: |scene| scene.provider.new_job(&scene.customer).encode_to_vec(),
        written: JOBS,
    },
    Write {
        method: "JobService/CloseJob",
        request: |scene| {
            let job = Some(pb::close_job_request::Job::JobId(scene.job.id.clone()));
            pb::CloseJobRequest { job, ..Default::default() }.encode_to_vec()
        },
        written: EVENTS,
    },
    Write {
        method: "JobService/RequestCancellation",
        request: |scene| {
            let job_id = scene.job.id.clone();
            pb::RequestCancellationRequest { job_id, reason: "late".to_owned() }.encode_to_vec()
        },
        written: EVENTS,
    },
    Write {
        method: "JobService/HoldJob",
        request: |scene| {
            let job = Some(pb::hold_job_request::Job::JobId(scene.job.id.clone()));
            pb::HoldJobRequest { job, held: true }.encode_to_vec()
        },
        written: HOLDS,
    },
    Write {
        method: "EventService/AppendEvents",
        request: |scene| {
            let job = Some(pb::append_events_request::Job::JobId(scene.job.id.clone()));
            pb::AppendEventsRequest { job, events: vec![info("late")], ..Default::default() }.encode_to_vec()
        },
        written: EVENTS,
    },
    Write {
        method: "EventService/PublishEvents",
        request: |scene| {
            let job = Some(pb::publish_events_request::Job::JobId(scene.job.id.clone()));
            pb::PublishEventsRequest { job, events: vec![info("late")], ..Default::default() }.encode_to_vec()
        },
        written: EVENTS,
    },
];

/// The methods that only read, or that need no credential.
const OTHERS: [&str; 16] = [
    "AuthService/SignUp",
    "AuthService/LogIn",
    "AuthService/GetCurrentUser",
    "AuthService/ListApiKeys",
    "AuthService/ListWatchTokens",
    "AuthService/GetUsage",
    "ConfigurationService/GetJobConfiguration",
    "ConfigurationService/ListJobConfigurations",
    "JobService/GetJob",
    "JobService/ListJobs",
    "JobService/EstimateJob",
    "JobService/SummarizeJobs",
    "JobService/ExportJobs",
    "EventService/ExportEvents",
    "EventService/ListEvents",
    "EventService/WatchEvents",
];

fn new_password() -> pb::ChangePasswordRequest {
    pb::ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: "another horse".to_owned(),
    }
}

fn watch_token_of(job: &pb::Job) -> pb::CreateWatchTokenRequest {
    let job = Some(pb::create_watch_token_request::Job::JobId(job.id.clone()));
    pb::CreateWatchTokenRequest { job, ..Default::default() }
}

/// Calls a method with one message, until the first message of its answer.
async fn call(channel: Channel, secret: String, method: &str, message: Vec<u8>) -> Result<(), Status> {
    let answer = raw::open(channel, Some(&secret), method, [message]).await?.message().await?;
    answer.map(drop).ok_or_else(|| Status::unknown("no message"))
}

/// A provider or a customer with two sessions, of which one ends while a call waits.
struct Scene {
    server: TestServer,
    provider: User,
    customer: User,
    /// The server has not looked up this job yet.
    job: pb::Job,
    other_job: pb::Job,
    api_key_id: String,
    watch_token_id: String,
    ending: pb::Session,
    staying: pb::Session,
}

impl Scene {
    async fn new(of_customer: bool) -> Self {
        let server = TestServer::start().await;
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        provider.configuration(&[("load", 1)]).await;
        let (job, other_job) = (provider.job(&customer).await, provider.job(&customer).await);
        let keys = provider.session.auth.list_api_keys(pb::ListApiKeysRequest::default()).await.unwrap();
        let token = provider.auth.create_watch_token(watch_token_of(&other_job)).await.unwrap();
        let email = if of_customer { &customer.email } else { &provider.email };
        let log_in = async || {
            let request = pb::LogInRequest { email: email.clone(), password: PASSWORD.to_owned() };
            let session =
                server.anonymous().auth.log_in(request).await.unwrap().into_inner().session.unwrap();
            // The server then needs no connection to authenticate a call.
            let caller = server.with_secret(&session.secret);
            caller.current_user().await.unwrap();
            session
        };
        let (ending, staying) = (log_in().await, log_in().await);
        Self {
            api_key_id: keys.into_inner().api_keys[0].id.clone(),
            watch_token_id: token.into_inner().watch_token.unwrap().id,
            server,
            provider,
            customer,
            job,
            other_job,
            ending,
            staying,
        }
    }

    /// Calls under a session.
    fn call(
        &self,
        session: &pb::Session,
        method: &'static str,
        message: Vec<u8>,
    ) -> JoinHandle<Result<(), Status>> {
        let (channel, secret) = (self.server.channel.clone(), session.secret.clone());
        tokio::spawn(async move { call(channel, secret, method, message).await })
    }

    /// Logs the session out.
    async fn log_out(&self) {
        let mut caller = self.server.with_secret(&self.ending.secret);
        caller.auth.log_out(pb::LogOutRequest {}).await.unwrap();
    }

    /// Ends the session as LogOut does after its commit, but without a connection.
    fn revoke(&self) {
        let id = CredentialId::Session(self.ending.id.parse().unwrap());
        self.server.app.auth.revoke(Revocation::Credential(id));
    }

    /// What the method has written, with the audit.
    async fn written(&self, write: &Write) -> Vec<String> {
        let sql = format!("{} UNION ALL SELECT act::text FROM audit_entries", write.written);
        let mut rows = self.server.database.texts(&sql).await;
        rows.sort_unstable();
        rows
    }

    /// Makes calls wait.
    async fn hold(&mut self, wait: Wait) -> Held {
        let Self { server, provider, job, other_job, .. } = self;
        let mut held = Held { connections: Vec::new(), locker: server.database.connect().await, round: None };
        match wait {
            Wait::Connection => held.connections = take_connections(server, CONNECTIONS).await,
            Wait::JobState => {
                // Looks the job up, but not its state.
                provider.list(job).await;
                held.locker
                    .batch_execute("BEGIN; LOCK TABLE job_states IN ACCESS EXCLUSIVE MODE")
                    .await
                    .unwrap();
            }
            Wait::Round => {
                // The state of the job is known, so that a batch for it is planned at once.
                provider.append(job, [info("other")]).await;
                held.locker.batch_execute("BEGIN; SELECT FROM event_log FOR UPDATE").await.unwrap();
                let (mut provider, other_job) = (provider.clone(), other_job.clone());
                held.round = Some(tokio::spawn(async move {
                    provider.append(&other_job, [info("other")]).await;
                }));
                server.database.wait_for_locks(1).await;
            }
        }
        held
    }

    /// Returns once the call waits.
    async fn wait_for_call(&mut self, wait: Wait) {
        match wait {
            Wait::Connection => wait_for_connection(&self.server).await,
            Wait::JobState => {
                self.server.database.wait_for_locks(1).await;
            }
            // No signal tells that the batch is queued. These calls, which are sent after it,
            // take longer.
            Wait::Round => {
                for _ in 0..20 {
                    self.provider.get(&self.job).await;
                }
            }
        }
    }
}

/// What calls wait for.
struct Held {
    connections: Vec<Connection>,
    locker: AsyncPgConnection,
    /// An append that is under way.
    round: Option<JoinHandle<()>>,
}

impl Held {
    async fn let_go(mut self) {
        drop(self.connections);
        self.locker.batch_execute("ROLLBACK").await.unwrap();
        if let Some(round) = self.round {
            within_timeout("the append under way", round).await.unwrap();
        }
    }
}

/// Of the pool one user may take half, so each is taken by a user of its own.
async fn take_connections(server: &TestServer, count: usize) -> Vec<Connection> {
    let taken = join_all((0..count).map(|_| server.app.database.get(Tenant::of_user(Uuid::now_v7())))).await;
    taken.into_iter().map(Result::unwrap).collect()
}

async fn wait_for_connection(server: &TestServer) {
    let waits = async {
        while server.app.database.status().waiting == 0 {
            tokio::task::yield_now().await;
        }
    };
    within_timeout("a caller that waits for a connection", waits).await;
}

/// Whether the call was refused because its credential has ended.
fn is_refused(answer: &Result<(), Status>) -> bool {
    let reason = |status: &Status| status.get_details_error_info().map(|info| info.reason);
    matches!(answer, Err(status) if status.code() == Code::Unauthenticated
        && reason(status).as_deref() == Some("CREDENTIAL_INVALID"))
}

/// Ends the session of a call while the call waits; returns what was wrong then.
async fn wrong_after(write: &Write, wait: Wait) -> Option<String> {
    let mut scene = Scene::new(write.is_of_customer()).await;
    let message = (write.request)(&scene);
    let held = scene.hold(wait).await;
    let calling = scene.call(&scene.ending, write.method, message.clone());
    scene.wait_for_call(wait).await;
    match wait {
        Wait::Connection => scene.revoke(),
        Wait::JobState | Wait::Round => scene.log_out().await,
    }
    let before = scene.written(write).await;
    held.let_go().await;
    let answer = within_timeout("the answer", calling).await.unwrap();
    // A publish stream may end before its batch is refused. Batches for one job are
    // appended in their order, so that the batch is decided on before this one.
    let job = scene.job.clone();
    let _ = scene.provider.try_append(&job, [info("other")]).await;
    let after = scene.written(write).await;
    if !is_refused(&answer) || after != before {
        return Some(format!("answered {answer:?}; before: {before:?}, after: {after:?}"));
    }
    // The same call under a valid session shows that the query sees what is written.
    within_timeout("the answer", scene.call(&scene.staying, write.method, message)).await.unwrap().unwrap();
    let seen = scene.written(write).await != before;
    (!seen).then(|| "the query does not see what the method writes".to_owned())
}

async fn assert_nothing_is_written(wait: Wait) {
    let mut wrong = Vec::new();
    for write in WRITES.iter().filter(|write| write.waits_for(wait)) {
        wrong.extend(wrong_after(write, wait).await.map(|what| format!("{}: {what}", write.method)));
    }
    assert!(wrong.is_empty(), "after a wait for {wait:?}:\n{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_writes_nothing_if_its_session_ends_while_it_waits_for_a_connection() {
    assert_nothing_is_written(Wait::Connection).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_not_appended_if_its_session_ends_while_the_state_of_its_job_is_read() {
    assert_nothing_is_written(Wait::JobState).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_not_appended_if_its_session_ends_while_another_round_is_under_way() {
    assert_nothing_is_written(Wait::Round).await;
}

/// The session ends after the attempt is counted and before the new hash is stored:
/// meanwhile the test has all connections, while the server verifies and hashes.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_not_changed_if_the_session_ends_while_bcrypt_works() {
    let scene = Scene::new(false).await;
    let Scene { server, ending, .. } = &scene;
    let method = "AuthService/ChangePassword";
    let change = WRITES.iter().find(|write| write.method == method).unwrap();
    let before = scene.written(change).await;
    let mut locker = server.database.lock("log_in_attempts").await;
    let calling = scene.call(ending, method, new_password().encode_to_vec());
    server.database.wait_for_locks(1).await;
    // The call has the last connection; the test is the next to get it.
    let others = take_connections(server, CONNECTIONS - 1).await;
    let database = server.app.database.clone();
    let last = tokio::spawn(async move { database.get(Payer::Server).await });
    wait_for_connection(server).await;
    locker.batch_execute("ROLLBACK").await.unwrap();
    let last = within_timeout("the call's connection", last).await.unwrap().unwrap();
    assert_ne!(scene.written(change).await, before, "the attempt is counted");
    scene.revoke();
    drop((others, last));
    let answer = within_timeout("the answer", calling).await.unwrap();
    assert!(is_refused(&answer), "{answer:?}");
    // The attempt no longer counts as failed, since its password was not decided on.
    within_timeout("the attempt to be withdrawn", async { while scene.written(change).await != before {} })
        .await;
}

#[test]
fn every_method_that_writes_under_a_credential_is_in_the_table() {
    let mut listed: Vec<&str> = WRITES.iter().map(|write| write.method).chain(OTHERS).collect();
    let mut methods: Vec<String> = raw::methods().iter().map(raw::name).collect();
    listed.sort_unstable();
    methods.sort_unstable();
    assert_eq!(listed, methods, "each method is either in the table or in the list of the others");
}
