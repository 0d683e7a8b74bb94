//! State that all tasks of the load share: the replicas' addresses, the users,
//! the recorded history, and the signal to finish.

use std::{
    collections::BTreeMap,
    fmt::Display,
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use milepost_client::{Service, pb};
use milepost_testing::{Caller, Clients, User};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::{
    clients::{UserClient, connection, shared_connection, sign_up, slow_connection},
    event_interner::EventInterner,
    history::{
        Cancellation, Close, Closed, Configuration, FailedCall, History, Job, Moment, Outcome, Refusal,
        UnexpectedAnswer, UnknownReason,
    },
};

/// How long a client waits for an answer before it sends the request again. While no fault
/// affects the server, no call may take so long; a debug build beside the hostile tenant is
/// slow.
pub const TIMEOUT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 3 });
const TAG_PREFIX: &str = "faults";
pub const PROVIDERS: usize = 2;
pub const CUSTOMERS: usize = 2;

/// Why a call returned no response.
pub enum CallError {
    /// The server refused the request, which it did not execute.
    Refused(Refusal),
    /// The request was executed, or it was not.
    Unknown(UnknownReason),
}

pub fn append_outcome(answer: Result<pb::AppendEventsResponse, CallError>) -> Outcome {
    match answer {
        Ok(answer) => Outcome::Appended(answer.events),
        Err(CallError::Refused(refusal)) => Outcome::Refused(refusal),
        Err(CallError::Unknown(reason)) => Outcome::Unknown(reason),
    }
}

/// The load and the faults of a run, depending on its length.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Multiplies the pauses between calls.
    pub pause_factor: u32,
    /// Maximal pause of a publisher between two streams. During a stream it sends
    /// as fast as it is answered.
    pub max_rest_ms: u64,
    pub max_fault_ms: u64,
}

pub struct Context {
    began: Instant,
    pub pace: Pace,
    /// See [`crate::campaign::run`].
    pub strict: bool,
    replicas: [SocketAddr; 2],
    pub providers: Vec<User>,
    pub customers: Vec<User>,
    /// The provider whose credentials are made and ended, and the customer of its jobs.
    pub revoker: User,
    pub revoked_from: User,
    /// The provider and the customer that ask for as much as the API allows. The customer has
    /// no job.
    pub hostile: User,
    pub hostile_customer: User,
    pub history: Mutex<History>,
    pub interner: EventInterner,
    /// Once cancelled, the load starts no new job, batch or stream.
    pub finishing: CancellationToken,
    /// By all watchers.
    pub messages_received: AtomicU64,
    /// By all watchers.
    pub events_received: AtomicU64,
    next_seed: Mutex<fastrand::Rng>,
}

impl Context {
    /// Signs the users up and registers the configurations.
    pub async fn new(replicas: [SocketAddr; 2], seed: u64, pace: Pace, strict: bool) -> Self {
        let (mut providers, mut customers) = (Vec::new(), Vec::new());
        for _ in 0..PROVIDERS {
            providers.push(sign_up(replicas[0], pb::UserRole::Provider).await);
        }
        for _ in 0..CUSTOMERS {
            customers.push(sign_up(replicas[0], pb::UserRole::Customer).await);
        }
        let revoker = sign_up(replicas[0], pb::UserRole::Provider).await;
        let revoked_from = sign_up(replicas[0], pb::UserRole::Customer).await;
        let hostile = sign_up(replicas[0], pb::UserRole::Provider).await;
        let hostile_customer = sign_up(replicas[0], pb::UserRole::Customer).await;
        let context = Self {
            began: Instant::now(),
            pace,
            strict,
            replicas,
            providers,
            customers,
            revoker,
            revoked_from,
            hostile,
            hostile_customer,
            history: Mutex::default(),
            interner: EventInterner::default(),
            finishing: CancellationToken::new(),
            messages_received: AtomicU64::new(0),
            events_received: AtomicU64::new(0),
            next_seed: Mutex::new(fastrand::Rng::with_seed(seed)),
        };
        let points: [&[i64]; 4] = [&[20, 60, 20], &[0, 0, 0, 0, 0, 0, 0], &[1, 1_000_000, 333_333, 0], &[]];
        for (number, points) in points.into_iter().enumerate() {
            context.register_configuration(number, points).await;
        }
        context
    }

    async fn register_configuration(&self, number: usize, points: &[i64]) {
        let steps: Configuration =
            points.iter().enumerate().map(|(step, &points)| (format!("step-{step}"), points)).collect();
        let step = |(tag, points): &(String, i64)| pb::StepConfiguration {
            tag: tag.clone(),
            name: format!("The {tag}"),
            points: *points,
            ..Default::default()
        };
        let request = pb::RegisterJobConfigurationRequest {
            tag: configuration_tag(number),
            name: "Faults".to_owned(),
            version: "1.0.0".to_owned(),
            steps: steps.iter().map(step).collect(),
            ..Default::default()
        };
        for provider in self.providers.iter().chain([&self.revoker, &self.hostile]) {
            let mut client = self.client(0, provider).configurations.clone();
            client.register_job_configuration(request.clone()).await.unwrap();
        }
        self.history.lock().unwrap().configurations.push(steps);
    }

    pub fn now(&self) -> Moment {
        self.began.elapsed()
    }

    /// A generator for one task, so that its choices do not depend on the other
    /// tasks.
    pub fn random(&self) -> fastrand::Rng {
        self.next_seed.lock().unwrap().fork()
    }

    pub fn is_finishing(&self) -> bool {
        self.finishing.is_cancelled()
    }

    /// Sleeps for a random time up to `max_ms` (times the pace's `pause_factor`), or
    /// until the load finishes.
    pub async fn pause(&self, random: &mut fastrand::Rng, max_ms: u64) {
        let pause = Duration::from_millis(random.u64(0..=max_ms)) * self.pace.pause_factor;
        let _ = tokio::time::timeout(pause, self.finishing.cancelled()).await;
    }

    pub fn client(&self, replica: usize, user: &User) -> UserClient {
        UserClient::new(replica, &connection(self.replicas[replica]), user)
    }

    /// Of a server that is none of the replicas; the checker knows its calls as replica 0's.
    pub fn client_at(&self, address: SocketAddr, user: &User) -> UserClient {
        UserClient::new(0, &connection(address), user)
    }

    pub fn clients(&self, user: &User) -> [UserClient; 2] {
        [self.client(0, user), self.client(1, user)]
    }

    /// A client with small HTTP/2 windows: while it does not read, the server can
    /// send it only 64 KiB.
    pub fn slow_client(&self, replica: usize, user: &User) -> UserClient {
        UserClient::new(replica, &slow_connection(self.replicas[replica]), user)
    }

    /// A connection to each replica for the calls of several users.
    pub fn shared_connections(&self) -> [Clients; 2] {
        self.replicas.map(shared_connection)
    }

    /// A connection with the key of a user, for calls with another codec.
    pub fn service(&self, replica: usize, user: &User) -> Service {
        let client = connection(self.replicas[replica]).client();
        client.with_credential(&user.key_secret).unwrap().service()
    }

    /// The clients with any secret, over a connection of their own.
    pub fn caller(&self, replica: usize, secret: &str) -> Caller {
        connection(self.replicas[replica]).with_secret(secret)
    }

    /// Awaits a call for at most [`TIMEOUT`].
    pub async fn call<T>(
        &self,
        method: impl Display,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CallError> {
        self.call_within(TIMEOUT, method, call).await
    }

    /// As [`Self::call`]; the checker judges whether the call may have failed.
    pub async fn checked_call<T>(
        &self,
        replica: usize,
        method: &'static str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CallError> {
        let sent_at = self.now();
        let answer = self.call(method, call).await;
        if let Err(CallError::Unknown(reason)) = &answer {
            let failed =
                FailedCall { replica, method, sent_at, ended_at: self.now(), reason: reason.clone() };
            self.history.lock().unwrap().failed_calls.push(failed);
        }
        answer
    }

    pub async fn call_within<T>(
        &self,
        timeout: Duration,
        method: impl Display,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(timeout, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.classify(method, &status)),
            Err(_) => Err(CallError::Unknown(UnknownReason::Abandoned)),
        }
    }

    /// Tells by a status whether the request was refused, and records the status if
    /// no fault excuses it.
    pub fn classify(&self, method: impl Display, status: &Status) -> CallError {
        // A status made by the client for a broken connection has a source.
        let connection_broke = std::error::Error::source(status).is_some();
        let unknown = UnknownReason::Broken(format!("{:?}: {}", status.code(), status.message()));
        match status.code() {
            code if is_refusal(code) => CallError::Refused(refusal(status)),
            Code::Unavailable | Code::DeadlineExceeded => CallError::Unknown(unknown),
            code if connection_broke || code == Code::Cancelled => CallError::Unknown(unknown),
            code => {
                self.record_unexpected(format!("{method}: {code:?}: {}", status.message()));
                CallError::Unknown(unknown)
            }
        }
    }

    /// Records an answer that no fault excuses.
    pub fn record_unexpected(&self, what: String) {
        let unexpected = UnexpectedAnswer { at: self.now(), what };
        self.history.lock().unwrap().unexpected_answers.push(unexpected);
    }

    /// Creates a job, with retries until the call is answered.
    pub async fn create_job(
        &self,
        provider: usize,
        clients: &mut [UserClient; 2],
        random: &mut fastrand::Rng,
    ) -> usize {
        let configuration = random.usize(..self.history.lock().unwrap().configurations.len());
        let customer = random.usize(..CUSTOMERS);
        let request = pb::CreateJobRequest {
            provider_job_id: Uuid::now_v7().to_string(),
            customer: Some(pb::create_job_request::Customer::CustomerId(self.customers[customer].id.clone())),
            configuration_tag: configuration_tag(configuration),
            configuration_version: String::new(),
            provider_job_name: "A job".to_owned(),
            // Some jobs are left alone for so long.
            max_silence: random.bool().then_some(prost_types::Duration { seconds: 10, nanos: 0 }),
            labels: BTreeMap::new(),
        };
        loop {
            let client = &mut clients[random.usize(..2)];
            let (replica, call) = (client.replica, client.jobs.create_job(request.clone()));
            match self.checked_call(replica, "CreateJob", call).await {
                Ok(created) => {
                    let id = created.job.expect("the response has a job").id;
                    let mut history = self.history.lock().unwrap();
                    history.jobs.push(Job { id, configuration, provider, customer });
                    return history.jobs.len() - 1;
                }
                Err(CallError::Refused(refusal)) => panic!("CreateJob was refused: {refusal:?}"),
                Err(CallError::Unknown(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    pub fn job_id(&self, job: usize) -> String {
        self.history.lock().unwrap().jobs[job].id.clone()
    }

    /// Closes a job, with retries until the call is answered.
    pub async fn close_job(&self, clients: &mut [UserClient; 2], random: &mut fastrand::Rng, job: usize) {
        let reason = format!("closed {}", random.u32(..));
        let request = pb::CloseJobRequest {
            job: Some(pb::close_job_request::Job::JobId(self.job_id(job))),
            reason: reason.clone(),
        };
        let sent_at = self.now();
        let outcome = loop {
            let client = &mut clients[random.usize(..2)];
            let (replica, call) = (client.replica, client.jobs.close_job(request.clone()));
            match self.checked_call(replica, "CloseJob", call).await {
                Ok(closed) => {
                    let last_sequence = closed.job.expect("the response has a job").last_sequence;
                    break Ok(Closed { last_sequence, existed: closed.existed });
                }
                Err(CallError::Refused(refusal)) => break Err(refusal),
                Err(CallError::Unknown(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        let close = Close { job, reason, sent_at, ended_at: self.now(), outcome };
        self.history.lock().unwrap().closes.push(close);
    }

    /// Asks for the cancellation of a job, with retries until the call is answered.
    pub async fn request_cancellation(
        &self,
        clients: &mut [UserClient; 2],
        random: &mut fastrand::Rng,
        job: usize,
    ) {
        let reason = format!("asked to stop {}", random.u32(..));
        let request = pb::RequestCancellationRequest { job_id: self.job_id(job), reason: reason.clone() };
        let sent_at = self.now();
        let outcome = loop {
            let client = &mut clients[random.usize(..2)];
            let (replica, call) = (client.replica, client.jobs.request_cancellation(request.clone()));
            match self.checked_call(replica, "RequestCancellation", call).await {
                Ok(answer) => break Ok(answer.existed),
                Err(CallError::Refused(refusal)) => break Err(refusal),
                Err(CallError::Unknown(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        let cancellation = Cancellation { job, reason, sent_at, outcome };
        self.history.lock().unwrap().cancellations.push(cancellation);
    }

    /// The job of one of the latest acknowledged batches, and a sequence of that
    /// batch.
    pub fn recently_acknowledged(&self, random: &mut fastrand::Rng) -> Option<(usize, i64)> {
        let history = self.history.lock().unwrap();
        let recent = history.batches.iter().rev().take(200);
        let answered: Vec<_> = recent.filter_map(|batch| Some((batch.job, batch.answer()?.1))).collect();
        let (job, events) = random.choice(answered)?;
        Some((job, random.choice(events)?.sequence))
    }

    /// Counts a message that a watcher received.
    pub fn count_message(&self, message: &pb::WatchEventsResponse) {
        self.messages_received.fetch_add(1, Ordering::Relaxed);
        if let Some(pb::watch_events_response::Message::Events(watched)) = &message.message {
            self.events_received.fetch_add(watched.events.len() as u64, Ordering::Relaxed);
        }
    }
}

/// The tag of a configuration with this number.
pub fn configuration_tag(configuration: usize) -> String {
    format!("{TAG_PREFIX}-{configuration}")
}

/// Whether the code says that the request was not executed, and why.
pub fn is_refusal(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange
    )
}

pub fn refusal(status: &Status) -> Refusal {
    let info = status.get_details_error_info();
    let last_sequence = info.as_ref().and_then(|info| info.metadata.get("last_sequence")?.parse().ok());
    let reason = info.map(|info| info.reason).unwrap_or_default();
    Refusal { code: status.code(), reason, message: status.message().to_owned(), last_sequence }
}
