//! What all who take part share: where the servers are, who calls them, what
//! was recorded, and when it is over.

use std::{
    fmt::Display,
    fs,
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use milepost::pb::{
    self, auth_service_client::AuthServiceClient, configuration_service_client::ConfigurationServiceClient,
    event_service_client::EventServiceClient, job_service_client::JobServiceClient,
};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Response, Status,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::history::{
    Close, Closed, Configuration, Events, History, Job, Lost, Moment, Outcome, Refusal, Unexcused,
};

/// Longest that a client waits for an answer before it asks again.
const TIMEOUT: Duration = Duration::from_secs(3);
const TAG: &str = "faults";
const PASSWORD: &str = "correct horse battery";
/// How many run jobs, and for how many.
pub const PROVIDERS: usize = 2;
pub const CUSTOMERS: usize = 2;

#[derive(Clone)]
pub struct Bearer(String);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.0).parse().unwrap());
        Ok(request)
    }
}

type Service = InterceptedService<Channel, Bearer>;

/// One user's calls to one replica over a connection of their own.
#[derive(Clone)]
pub struct Caller {
    pub events: EventServiceClient<Service>,
    pub jobs: JobServiceClient<Service>,
}

/// Why a call has no answer.
pub enum Failure {
    /// For what it said.
    Refused(Refusal),
    /// Perhaps it was done, perhaps not.
    Unknown(Lost),
}

/// What became of a request to append.
pub fn outcome(answer: Result<pb::AppendEventsResponse, Failure>) -> Outcome {
    match answer {
        Ok(answer) => Outcome::Appended(answer.events),
        Err(Failure::Refused(refusal)) => Outcome::Refused(refusal),
        Err(Failure::Unknown(lost)) => Outcome::Unknown(lost),
    }
}

#[derive(Clone)]
pub struct User {
    pub id: String,
    secret: String,
}

/// How hard everybody goes at it.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How many times slower than is sensible in a short run.
    pub slower: u32,
    /// Longest that a publisher rests between two streams. While it does not, it
    /// sends as fast as it is answered.
    pub rest_ms: u64,
    /// Longest that a fault lasts.
    pub fault_ms: u64,
}

pub struct World {
    begun: Instant,
    pub pace: Pace,
    replicas: [SocketAddr; 2],
    pub providers: Vec<User>,
    pub customers: Vec<User>,
    pub history: Mutex<History>,
    pub events: Events,
    /// No new job, batch or stream from now on.
    pub finishing: CancellationToken,
    pub messages: AtomicU64,
    pub seen: AtomicU64,
    next_seed: Mutex<fastrand::Rng>,
}

impl World {
    /// Signs everybody up and registers configurations.
    pub async fn new(replicas: [SocketAddr; 2], seed: u64, pace: Pace) -> Self {
        let (mut providers, mut customers) = (Vec::new(), Vec::new());
        for _ in 0..PROVIDERS {
            providers.push(sign_up(replicas[0], pb::UserRole::Provider).await);
        }
        for _ in 0..CUSTOMERS {
            customers.push(sign_up(replicas[0], pb::UserRole::Customer).await);
        }
        let world = Self {
            begun: Instant::now(),
            pace,
            replicas,
            providers,
            customers,
            history: Mutex::default(),
            events: Events::default(),
            finishing: CancellationToken::new(),
            messages: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            next_seed: Mutex::new(fastrand::Rng::with_seed(seed)),
        };
        let points: [&[i64]; 4] = [&[20, 60, 20], &[0, 0, 0, 0, 0, 0, 0], &[1, 1_000_000, 333_333, 0], &[]];
        for (number, points) in points.into_iter().enumerate() {
            world.configure(number, points).await;
        }
        world
    }

    async fn configure(&self, number: usize, points: &[i64]) {
        let steps: Configuration =
            points.iter().enumerate().map(|(step, &points)| (format!("step-{step}"), points)).collect();
        let step = |(tag, points): &(String, i64)| pb::StepConfiguration {
            tag: tag.clone(),
            name: format!("The {tag}"),
            points: *points,
            metadata: Vec::new(),
        };
        let request = pb::RegisterJobConfigurationRequest {
            tag: tag(number),
            name: "Faults".to_owned(),
            version: "1.0.0".to_owned(),
            steps: steps.iter().map(step).collect(),
        };
        for provider in &self.providers {
            let service = service(self.replicas[0], &provider.secret);
            let mut client = ConfigurationServiceClient::new(service);
            client.register_job_configuration(request.clone()).await.unwrap();
        }
        self.history.lock().unwrap().configurations.push(steps);
    }

    pub fn now(&self) -> Moment {
        self.begun.elapsed()
    }

    /// For one task, so that its choices do not depend on others'.
    pub fn random(&self) -> fastrand::Rng {
        self.next_seed.lock().unwrap().fork()
    }

    pub fn is_finishing(&self) -> bool {
        self.finishing.is_cancelled()
    }

    /// Waits somewhere between none of it and all of it, or until the end.
    pub async fn pause(&self, random: &mut fastrand::Rng, longest_ms: u64) {
        let pause = Duration::from_millis(random.u64(0..=longest_ms)) * self.pace.slower;
        let _ = tokio::time::timeout(pause, self.finishing.cancelled()).await;
    }

    pub fn caller(&self, replica: usize, user: &User) -> Caller {
        let service = service(self.replicas[replica], &user.secret);
        Caller { events: EventServiceClient::new(service.clone()), jobs: JobServiceClient::new(service) }
    }

    pub fn callers(&self, user: &User) -> [Caller; 2] {
        [self.caller(0, user), self.caller(1, user)]
    }

    /// One that takes no more than it reads, and so is slow if it reads slowly.
    pub fn slow_caller(&self, replica: usize, user: &User) -> EventServiceClient<Service> {
        let window = 64 * 1024;
        let endpoint = endpoint(self.replicas[replica]);
        let endpoint = endpoint.initial_stream_window_size(window).initial_connection_window_size(window);
        EventServiceClient::with_interceptor(endpoint.connect_lazy(), Bearer(user.secret.clone()))
    }

    /// A call's answer, or what became of it.
    pub async fn answer<T>(
        &self,
        what: impl Display,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        self.answer_within(TIMEOUT, what, call).await
    }

    pub async fn answer_within<T>(
        &self,
        timeout: Duration,
        what: impl Display,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(timeout, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failure(what, &status)),
            Err(_) => Err(Failure::Unknown(Lost::GaveUp)),
        }
    }

    /// What a status says, noted where no fault excuses it.
    pub fn failure(&self, what: impl Display, status: &Status) -> Failure {
        let broken = std::error::Error::source(status).is_some();
        let lost = Lost::Broken(format!("{:?}: {}", status.code(), status.message()));
        match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange => Failure::Refused(refusal(status)),
            Code::Unavailable | Code::DeadlineExceeded => Failure::Unknown(lost),
            code if broken || code == Code::Cancelled => Failure::Unknown(lost),
            code => {
                let what = format!("{what}: {code:?}: {}", status.message());
                self.history.lock().unwrap().unexcused.push(Unexcused { at: self.now(), what });
                Failure::Unknown(lost)
            }
        }
    }

    /// Creates a job of the provider who calls, however long that takes.
    pub async fn new_job(
        &self,
        provider: usize,
        callers: &mut [Caller; 2],
        random: &mut fastrand::Rng,
    ) -> usize {
        let configuration = random.usize(..self.history.lock().unwrap().configurations.len());
        let customer = random.usize(..CUSTOMERS);
        let request = pb::CreateJobRequest {
            provider_job_id: Uuid::now_v7().to_string(),
            customer_id: self.customers[customer].id.clone(),
            configuration_tag: tag(configuration),
            configuration_version: String::new(),
            provider_job_name: "A job".to_owned(),
        };
        loop {
            let caller = &mut callers[random.usize(..2)];
            match self.answer("CreateJob", caller.jobs.create_job(request.clone())).await {
                Ok(created) => {
                    let id = created.job.expect("a job").id;
                    let mut history = self.history.lock().unwrap();
                    history.jobs.push(Job { id, configuration, provider, customer });
                    return history.jobs.len() - 1;
                }
                Err(Failure::Refused(refusal)) => panic!("a job was refused: {refusal:?}"),
                Err(Failure::Unknown(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    pub fn job_id(&self, job: usize) -> String {
        self.history.lock().unwrap().jobs[job].id.clone()
    }

    /// Closes a job, however long that takes.
    pub async fn close_job(&self, callers: &mut [Caller; 2], random: &mut fastrand::Rng, job: usize) {
        let reason = format!("closed {}", random.u32(..));
        let request = pb::CloseJobRequest {
            job: Some(pb::close_job_request::Job::JobId(self.job_id(job))),
            reason: reason.clone(),
        };
        let sent = self.now();
        let outcome = loop {
            let caller = &mut callers[random.usize(..2)];
            match self.answer("CloseJob", caller.jobs.close_job(request.clone())).await {
                Ok(closed) => {
                    let last_sequence = closed.job.expect("a job").last_sequence;
                    break Ok(Closed { last_sequence, existed: closed.existed });
                }
                Err(Failure::Refused(refusal)) => break Err(refusal),
                Err(Failure::Unknown(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        let close = Close { job, reason, sent, over: self.now(), outcome };
        self.history.lock().unwrap().closes.push(close);
    }

    /// A batch that was acknowledged not long ago: its job, and one of its
    /// sequences.
    pub fn recently_acknowledged(&self, random: &mut fastrand::Rng) -> Option<(usize, i64)> {
        let history = self.history.lock().unwrap();
        let recent = history.batches.iter().rev().take(200);
        let answered: Vec<_> = recent.filter_map(|batch| Some((batch.job, batch.answer()?.1))).collect();
        let (job, events) = random.choice(answered)?;
        Some((job, random.choice(events)?.sequence))
    }

    /// Counts what a watcher received.
    pub fn received(&self, message: &pb::WatchEventsResponse) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        if let Some(pb::watch_events_response::Message::Events(watched)) = &message.message {
            self.seen.fetch_add(watched.events.len() as u64, Ordering::Relaxed);
        }
    }
}

/// Of a configuration, by its number.
pub fn tag(configuration: usize) -> String {
    format!("{TAG}-{configuration}")
}

/// What a status refuses, and where it says that the log ends.
pub fn refusal(status: &Status) -> Refusal {
    let info = status.get_details_error_info();
    let last_sequence = info.and_then(|info| info.metadata.get("last_sequence")?.parse().ok());
    Refusal { code: status.code(), message: status.message().to_owned(), last_sequence }
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect_timeout(Duration::from_secs(1))
}

fn service(address: SocketAddr, secret: &str) -> Service {
    InterceptedService::new(endpoint(address).connect_lazy(), Bearer(secret.to_owned()))
}

async fn sign_up(address: SocketAddr, role: pb::UserRole) -> User {
    let request = pb::SignUpRequest {
        role: role.into(),
        email: format!("{}@example.com", Uuid::now_v7()),
        password: PASSWORD.to_owned(),
        first_name: "Ada".to_owned(),
        last_name: "Lovelace".to_owned(),
    };
    let mut anonymous = AuthServiceClient::new(endpoint(address).connect_lazy());
    let signed_up = anonymous.sign_up(request).await.unwrap().into_inner();
    let session = service(address, &signed_up.session.unwrap().secret);
    let key = AuthServiceClient::new(session).create_api_key(pb::CreateApiKeyRequest::default()).await;
    User { id: signed_up.user.unwrap().id, secret: key.unwrap().into_inner().secret }
}

/// `work`'s result, or a panic that names what was waited for in vain.
pub async fn within<T>(timeout: Duration, what: impl Display, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        Err(_) => panic!("waited {timeout:?} in vain for {what}"),
    }
}

pub async fn signal(name: &str, pid: &str) {
    let status = Command::new("kill").args(["-s", name, pid]).status().await.unwrap();
    assert!(status.success(), "kill -s {name} {pid}");
}

/// Whether a process is there and is no mere zombie.
pub fn runs(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}
