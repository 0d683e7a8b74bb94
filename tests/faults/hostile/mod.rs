//! The hostile tenant: a provider and a customer that stay within every limit of the API, and
//! ask for as much as it allows, at both servers, for as long as the load runs.
//!
//! What it is answered does not matter, as long as that is a status that the API documents.
//! What everybody else is promised is unchanged.

mod appends;
mod calls;
mod configurations;
mod encoded;
mod invalid;
mod load;
mod publishers;
mod requests;
mod watches;

use std::{error::Error as _, sync::Arc, time::Duration};

use milepost_client::pb;
use milepost_testing::Clients;
use tokio::{task::JoinSet, time::timeout};
use tonic::{Code, Response, Status};
use uuid::Uuid;

pub use self::load::{Answers, Load};
use crate::{
    clients::UserClient,
    context::{Context, configuration_tag, is_refusal},
    number_from_env,
};

/// How long the tenant waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(3);
/// The loads begin one after the other within this time.
const START_MS: u64 = 1_000;
/// Multiplies the pauses: a debug build of the servers takes many times as long for a request,
/// and two cores must be enough for the campaign.
const PAUSE_FACTOR: u32 = if cfg!(debug_assertions) { 12 } else { 1 };

/// One task of the tenant: a load at one server.
struct Hostile {
    context: Arc<Context>,
    load: Load,
    replica: usize,
    random: fastrand::Rng,
    client: UserClient,
}

/// Starts every load at both servers. The connections of `shared`, one to each server, are
/// also those of other users. A debug build of the servers leaves two cores so little time
/// that the tenant takes part only if `MILEPOST_FAULTS_HOSTILE` is 1.
pub fn start(context: &Arc<Context>, shared: &[Clients; 2], tasks: &mut JoinSet<()>) {
    let takes_part = number_from_env("MILEPOST_FAULTS_HOSTILE").unwrap_or(u8::from(!cfg!(debug_assertions)));
    if takes_part == 0 {
        return;
    }
    context.history.lock().unwrap().hostile = Load::ALL.map(|load| (load, Answers::default())).into();
    for (replica, shared) in shared.iter().enumerate() {
        for load in Load::ALL {
            tasks.spawn(run(Hostile::new(context, load, replica), shared.clone()));
        }
    }
}

async fn run(mut hostile: Hostile, shared: Clients) {
    hostile.pause(START_MS).await;
    match hostile.load {
        Load::LargeBatches => appends::append_large_batches(hostile).await,
        Load::Replays => appends::replay(hostile).await,
        Load::OneJob => appends::append_to_one_job(hostile).await,
        Load::EmptyEvents => publishers::publish_empty_events(hostile).await,
        Load::UnreadAnswers => publishers::leave_answers_unread(hostile).await,
        Load::LargeConfigurations => configurations::register_and_use(hostile).await,
        Load::GetConfiguration => configurations::get_at_once(hostile).await,
        Load::WatchesOfNothing => watches::watch_nothing(hostile).await,
        Load::UnreadWatches => watches::leave_watches_unread(hostile, shared).await,
        Load::AbandonedCalls => calls::abandon_calls(hostile).await,
        Load::Connections => calls::open_connections(hostile).await,
        Load::Credentials => calls::make_credentials(hostile).await,
        Load::InvalidRequests => invalid::send_invalid_requests(hostile).await,
    }
}

impl Hostile {
    fn new(context: &Arc<Context>, load: Load, replica: usize) -> Self {
        let client = context.client(replica, &context.hostile);
        Self { context: Arc::clone(context), load, replica, random: context.random(), client }
    }

    fn is_finishing(&self) -> bool {
        self.context.is_finishing()
    }

    /// Sleeps for a random time up to `max_ms` (times [`PAUSE_FACTOR`]), or until the load
    /// finishes.
    async fn pause(&mut self, max_ms: u64) {
        let pause = Duration::from_millis(self.random.u64(..=max_ms)) * PAUSE_FACTOR;
        let _ = timeout(pause, self.context.finishing.cancelled()).await;
    }

    fn count(&self, count: impl FnOnce(&mut Answers)) {
        count(self.context.history.lock().unwrap().hostile.entry(self.load).or_default());
    }

    /// Awaits a call and counts its answer.
    async fn call<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Code> {
        match timeout(TIMEOUT, call).await {
            Ok(Ok(response)) => {
                self.count(|answers| answers.accepted += 1);
                Ok(response.into_inner())
            }
            Ok(Err(status)) => Err(self.refused(&status)),
            Err(_) => {
                self.count(|answers| answers.unanswered += 1);
                Err(Code::DeadlineExceeded)
            }
        }
    }

    /// Counts a status, and records one that the API does not document.
    fn refused(&self, status: &Status) -> Code {
        // A status made by the client for a broken connection has a source.
        let connection_broke = status.source().is_some();
        match status.code() {
            code if is_refusal(code) => self.count(|answers| answers.refused += 1),
            Code::ResourceExhausted => self.count(|answers| answers.limited += 1),
            // These use credentials that they end, or that a failover may lose.
            Code::Unauthenticated if matches!(self.load, Load::UnreadWatches | Load::Credentials) => {
                self.count(|answers| answers.refused += 1);
            }
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                self.count(|answers| answers.unanswered += 1);
            }
            _ if connection_broke => self.count(|answers| answers.unanswered += 1),
            code => {
                self.count(|answers| answers.unanswered += 1);
                let (load, message) = (self.load.name(), status.message());
                self.context.record_unexpected(format!("the hostile tenant, {load}: {code:?}: {message}"));
            }
        }
        status.code()
    }

    async fn append(&self, request: pb::AppendEventsRequest) -> Result<pb::AppendEventsResponse, Code> {
        self.call(self.client.events.clone().append_events(request)).await
    }

    /// The id of a new job of a small configuration; none once the load finishes.
    async fn create_job(&mut self) -> Option<String> {
        let id = Uuid::now_v7().to_string();
        self.create_job_of(&id).await
    }

    /// The id of the job with this id of the provider, created unless it exists; none once the
    /// load finishes. Not counted.
    async fn create_job_of(&mut self, provider_job_id: &str) -> Option<String> {
        let request = pb::CreateJobRequest {
            provider_job_id: provider_job_id.to_owned(),
            customer: Some(pb::create_job_request::Customer::CustomerId(
                self.context.revoked_from.id.clone(),
            )),
            configuration_tag: configuration_tag(0),
            configuration_version: String::new(),
            provider_job_name: "A hostile job".to_owned(),
            ..Default::default()
        };
        while !self.is_finishing() {
            let mut client = self.client.jobs.clone();
            if let Ok(Ok(created)) = timeout(TIMEOUT, client.create_job(request.clone())).await {
                return Some(created.into_inner().job.expect("the response has a job").id);
            }
            self.pause(200).await;
        }
        None
    }
}
