//! Writers that append with `AppendEvents`. Several writers share some jobs. After a
//! lost answer a writer sends the same request again.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use milepost_client::pb::{self, EventKind};
use milepost_testing::Clients;
use prost_types::{Struct, Timestamp, Value, value::Kind};
use uuid::Uuid;

use crate::{
    clients::UserClient,
    context::{Context, append_outcome},
    history::{Attempt, Batch, Outcome},
};

/// How many acknowledged batches of a job a writer keeps, to repeat their events.
const REMEMBERED: usize = 20;

/// A random event of a kind that does not close its job.
pub fn event(context: &Context, random: &mut fastrand::Rng, job: usize) -> pb::NewEvent {
    let steps = {
        let history = context.history.lock().unwrap();
        history.configurations[history.jobs[job].configuration].len()
    };
    let tag = if steps > 0 { format!("step-{}", random.usize(..steps)) } else { String::new() };
    let kind = match random.u32(..10) {
        0..3 => EventKind::Step,
        3..6 if steps > 0 => EventKind::Progress,
        9 => EventKind::Error,
        _ => EventKind::Info,
    };
    let metadata = (random.u32(..3) == 0).then(|| {
        let value = |kind| Value { kind: Some(kind) };
        let fields = [
            ("bone".to_owned(), value(Kind::NumberValue(f64::from(random.u32(..)) / 7.0))),
            ("done".to_owned(), value(Kind::BoolValue(random.bool()))),
            ("by".to_owned(), value(Kind::StringValue("räntgen".repeat(random.usize(..30))))),
        ];
        Struct { fields: fields.into_iter().take(random.usize(1..=3)).collect() }
    });
    let occurred_at = random
        .bool()
        .then(|| Timestamp { seconds: random.i64(0..2_000_000_000), nanos: random.i32(0..1_000_000_000) });
    let names_step = matches!(kind, EventKind::Step | EventKind::Progress);
    let step_percent = (kind == EventKind::Progress && random.bool()).then(|| random.i32(0..=99));
    pb::NewEvent {
        id: Uuid::now_v7().to_string(),
        kind: kind.into(),
        name: format!("{:x}", random.u64(..)),
        step_tag: if names_step || random.bool() { tag } else { String::new() },
        metadata,
        occurred_at,
        step_percent,
    }
}

pub fn complete() -> pb::NewEvent {
    pb::NewEvent {
        id: Uuid::now_v7().to_string(),
        kind: EventKind::Complete.into(),
        name: "done".to_owned(),
        ..Default::default()
    }
}

/// 1 to 150 random events, mostly few.
pub fn events(context: &Context, random: &mut fastrand::Rng, job: usize) -> Vec<pb::NewEvent> {
    let count = match random.u32(..100) {
        0..60 => 1,
        60..92 => random.usize(2..=5),
        92..99 => random.usize(6..=40),
        _ => random.usize(41..=150),
    };
    (0..count).map(|_| event(context, random, job)).collect()
}

/// A job that several writers append to.
pub struct SharedJob {
    job: usize,
    /// The highest sequence in any answer so far.
    last_sequence: AtomicI64,
}

/// The open shared jobs of a provider. A writer that finds an empty slot creates a
/// job for it.
pub type SharedJobs = Mutex<Vec<Option<Arc<SharedJob>>>>;

pub struct Writer {
    pub context: Arc<Context>,
    pub name: String,
    pub random: fastrand::Rng,
    provider: usize,
    pub clients: [UserClient; 2],
}

impl Writer {
    pub fn new(context: &Arc<Context>, name: String, provider: usize) -> Self {
        let clients = context.clients(&context.providers[provider]);
        Self { context: Arc::clone(context), name, random: context.random(), provider, clients }
    }

    /// Has the calls go over these connections.
    pub fn over(mut self, shared: &[Clients; 2]) -> Self {
        self.clients = UserClient::over(shared, &self.context.providers[self.provider]);
        self
    }

    pub async fn create_job(&mut self) -> usize {
        self.context.create_job(self.provider, &mut self.clients, &mut self.random).await
    }

    /// Appends to jobs of its own and to shared ones until the load finishes.
    pub async fn write(mut self, shared_jobs: Arc<SharedJobs>) {
        while !self.context.is_finishing() {
            if self.random.bool() {
                self.write_to_shared_job(&shared_jobs).await;
            } else {
                self.write_to_own_job().await;
            }
        }
    }

    async fn write_to_shared_job(&mut self, shared_jobs: &SharedJobs) {
        let slot = self.random.usize(..shared_jobs.lock().unwrap().len());
        let known = shared_jobs.lock().unwrap()[slot].clone();
        let shared = match known {
            Some(shared) => shared,
            None => {
                let job = self.create_job().await;
                let shared = Arc::new(SharedJob { job, last_sequence: AtomicI64::new(0) });
                shared_jobs.lock().unwrap()[slot] = Some(Arc::clone(&shared));
                shared
            }
        };
        let mut acknowledged = VecDeque::new();
        for _ in 0..self.random.usize(3..15) {
            let last = shared.last_sequence.load(Ordering::Relaxed);
            let expected = (self.random.u32(..3) == 0).then_some(last);
            let closes = self.random.u32(..40) == 0;
            let batch = self.append(shared.job, expected, closes, &mut acknowledged).await;
            let closed = match batch.attempts.last().map(|attempt| &attempt.outcome) {
                Some(Outcome::Appended(events)) => {
                    let last = events.iter().map(|event| event.sequence).max().unwrap_or_default();
                    shared.last_sequence.fetch_max(last, Ordering::Relaxed);
                    closes
                }
                Some(Outcome::Refused(refusal)) => {
                    shared.last_sequence.fetch_max(refusal.last_sequence.unwrap_or(0), Ordering::Relaxed);
                    // Closed, or lost.
                    matches!(refusal.code, tonic::Code::FailedPrecondition | tonic::Code::NotFound)
                }
                Some(Outcome::Unknown(_)) | None => false,
            };
            self.record(batch, &mut acknowledged).await;
            if closed || self.context.is_finishing() {
                break;
            }
            if self.random.u32(..60) == 0 {
                self.context.close_job(&mut self.clients, &mut self.random, shared.job).await;
            }
        }
        let mut shared_jobs = shared_jobs.lock().unwrap();
        // The next writer that takes this slot creates another job.
        if shared_jobs[slot].as_ref().is_some_and(|known| Arc::ptr_eq(known, &shared))
            && self.random.u32(..4) == 0
        {
            shared_jobs[slot] = None;
        }
    }

    async fn write_to_own_job(&mut self) {
        let job = self.create_job().await;
        let mut acknowledged = VecDeque::new();
        let (batches, ending) = (self.random.usize(2..25), self.random.u32(..10));
        for n in 0..batches {
            let closes = n + 1 == batches && ending < 6;
            let batch = self.append(job, None, closes, &mut acknowledged).await;
            self.record(batch, &mut acknowledged).await;
            if self.context.is_finishing() {
                return;
            }
        }
        if (4..9).contains(&ending) {
            self.context.close_job(&mut self.clients, &mut self.random, job).await;
        }
        // Also on a closed job, events that are stored are answered as stored.
        for _ in 0..self.random.usize(..3) {
            let Some(mut batch) = acknowledged.pop_front() else { return };
            batch.attempts = Vec::new();
            batch.repeats = batch.events.len();
            self.send(&mut batch, false).await;
            self.context.history.lock().unwrap().batches.push(batch);
        }
    }

    /// Appends events without ids, and sends none of them a second time.
    pub async fn write_without_ids(mut self) {
        while !self.context.is_finishing() {
            let job = self.create_job().await;
            for _ in 0..self.random.usize(3..15) {
                let id = String::new();
                let event = pb::NewEvent { id, ..event(&self.context, &mut self.random, job) };
                let mut batch = self.batch(job, vec![event]);
                self.send(&mut batch, true).await;
                let id = batch.answer().map(|(_, appended)| appended[0].id.clone());
                batch.events[0].id = id.unwrap_or_default();
                self.record(batch, &mut VecDeque::new()).await;
            }
        }
    }

    /// Sends a new batch until it is answered. Now and then it repeats an
    /// acknowledged event first, or gives up after a lost answer.
    async fn append(
        &mut self,
        job: usize,
        expected: Option<i64>,
        closes: bool,
        acknowledged: &mut VecDeque<Batch>,
    ) -> Batch {
        let mut fresh = events(&self.context, &mut self.random, job);
        if closes {
            fresh.push(complete());
        }
        let mut batch = Batch { expected, ..self.batch(job, Vec::new()) };
        if let Some(old) = acknowledged.back()
            && self.random.u32(..12) == 0
        {
            batch.events.push(old.events[0].clone());
            batch.repeats = 1;
        }
        batch.events.append(&mut fresh);
        let gives_up = self.random.u32(..40) == 0;
        self.send(&mut batch, gives_up).await;
        batch
    }

    /// A batch of new events that has not been sent.
    pub fn batch(&self, job: usize, events: Vec<pb::NewEvent>) -> Batch {
        Batch {
            writer: self.name.clone(),
            job,
            expected: None,
            repeats: 0,
            events,
            attempts: Vec::new(),
            order: None,
        }
    }

    /// Sends a batch until it is answered. With `gives_up` it sends it only once, as a
    /// client that crashes.
    async fn send(&mut self, batch: &mut Batch, gives_up: bool) {
        let mut replica = self.random.usize(..2);
        loop {
            let is_unknown = matches!(self.send_to(replica, batch).await, Outcome::Unknown(_));
            if !is_unknown || gives_up {
                return;
            }
            tokio::time::sleep(Duration::from_millis(self.random.u64(5..100))).await;
            if self.random.bool() {
                replica = 1 - replica;
            }
        }
    }

    /// Sends a batch once and records the attempt.
    pub async fn send_to(&mut self, replica: usize, batch: &mut Batch) -> Outcome {
        let request = pb::AppendEventsRequest {
            job: Some(pb::append_events_request::Job::JobId(self.context.job_id(batch.job))),
            expected_sequence: batch.expected,
            events: batch.events.clone(),
        };
        let sent_at = self.context.now();
        let call = self.clients[replica].events.append_events(request);
        let outcome = append_outcome(self.context.call("AppendEvents", call).await);
        let attempt = Attempt { replica, sent_at, ended_at: self.context.now(), outcome: outcome.clone() };
        batch.attempts.push(attempt);
        outcome
    }

    async fn record(&mut self, batch: Batch, acknowledged: &mut VecDeque<Batch>) {
        if batch.answer().is_some() {
            acknowledged.push_back(batch.clone());
            acknowledged.truncate(REMEMBERED);
        }
        self.context.history.lock().unwrap().batches.push(batch);
        self.context.pause(&mut self.random, 100).await;
    }
}
