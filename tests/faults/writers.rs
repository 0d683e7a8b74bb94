//! Those who append by single calls, some of them to the same jobs, and send
//! the very same again after a lost answer.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use milepost::pb::{self, EventKind};
use prost_types::{Struct, Timestamp, Value, value::Kind};
use uuid::Uuid;

use crate::{
    history::{Attempt, Batch, Outcome},
    world::{Caller, World, outcome},
};

/// How many batches of a job its writer remembers, to send them once more.
const REMEMBERED: usize = 20;

/// An event of any kind that does not close its job.
pub fn event(world: &World, random: &mut fastrand::Rng, job: usize) -> pb::NewEvent {
    let steps = {
        let history = world.history.lock().unwrap();
        history.configurations[history.jobs[job].configuration].len()
    };
    let tag = if steps > 0 { format!("step-{}", random.usize(..steps)) } else { String::new() };
    let kind = match random.u32(..10) {
        0..5 if steps > 0 => EventKind::Step,
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
    pb::NewEvent {
        id: Uuid::now_v7().to_string(),
        kind: kind.into(),
        name: format!("{:x}", random.u64(..)),
        step_tag: if kind == EventKind::Step || random.bool() { tag } else { String::new() },
        metadata,
        occurred_at,
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

/// Mostly one or a few, now and then many.
pub fn events(world: &World, random: &mut fastrand::Rng, job: usize) -> Vec<pb::NewEvent> {
    let count = match random.u32(..100) {
        0..60 => 1,
        60..92 => random.usize(2..=5),
        92..99 => random.usize(6..=40),
        _ => random.usize(41..=150),
    };
    (0..count).map(|_| event(world, random, job)).collect()
}

/// A job that several write to.
pub struct Shared {
    job: usize,
    /// The last sequence that any of them was told.
    last: AtomicI64,
}

/// What is written to now, by whoever comes along.
pub type Slots = Mutex<Vec<Option<Arc<Shared>>>>;

pub struct Writer {
    pub world: Arc<World>,
    pub name: String,
    pub random: fastrand::Rng,
    provider: usize,
    pub callers: [Caller; 2],
}

impl Writer {
    pub fn new(world: &Arc<World>, name: String, provider: usize) -> Self {
        let callers = world.callers(&world.providers[provider]);
        Self { world: Arc::clone(world), name, random: world.random(), provider, callers }
    }

    pub async fn new_job(&mut self) -> usize {
        self.world.new_job(self.provider, &mut self.callers, &mut self.random).await
    }

    /// Writes to jobs of its own and to shared ones until the end.
    pub async fn write(mut self, slots: Arc<Slots>) {
        while !self.world.is_finishing() {
            if self.random.bool() {
                self.write_shared(&slots).await;
            } else {
                self.write_own().await;
            }
        }
    }

    async fn write_shared(&mut self, slots: &Slots) {
        let slot = self.random.usize(..slots.lock().unwrap().len());
        let known = slots.lock().unwrap()[slot].clone();
        let shared = match known {
            Some(shared) => shared,
            None => {
                let job = self.new_job().await;
                let shared = Arc::new(Shared { job, last: AtomicI64::new(0) });
                slots.lock().unwrap()[slot] = Some(Arc::clone(&shared));
                shared
            }
        };
        let mut acknowledged = VecDeque::new();
        for _ in 0..self.random.usize(3..15) {
            let last = shared.last.load(Ordering::Relaxed);
            let expected = (self.random.u32(..3) == 0).then_some(last);
            let closes = self.random.u32(..40) == 0;
            let batch = self.append(shared.job, expected, closes, &mut acknowledged).await;
            let closed = match batch.attempts.last().map(|attempt| &attempt.outcome) {
                Some(Outcome::Appended(events)) => {
                    let told = events.iter().map(|event| event.sequence).max().unwrap_or_default();
                    shared.last.fetch_max(told, Ordering::Relaxed);
                    closes
                }
                Some(Outcome::Refused(refusal)) => {
                    shared.last.fetch_max(refusal.last_sequence.unwrap_or(0), Ordering::Relaxed);
                    refusal.code == tonic::Code::FailedPrecondition
                }
                Some(Outcome::Unknown(_)) | None => false,
            };
            self.record(batch, &mut acknowledged).await;
            if closed || self.world.is_finishing() {
                break;
            }
            if self.random.u32(..60) == 0 {
                self.world.close_job(&mut self.callers, &mut self.random, shared.job).await;
            }
        }
        let mut slots = slots.lock().unwrap();
        // Whoever comes next starts another one.
        if slots[slot].as_ref().is_some_and(|known| Arc::ptr_eq(known, &shared)) && self.random.u32(..4) == 0
        {
            slots[slot] = None;
        }
    }

    async fn write_own(&mut self) {
        let job = self.new_job().await;
        let mut acknowledged = VecDeque::new();
        let (batches, completes) = (self.random.usize(2..25), self.random.u32(..10));
        for n in 0..batches {
            let closes = n + 1 == batches && completes < 6;
            let batch = self.append(job, None, closes, &mut acknowledged).await;
            self.record(batch, &mut acknowledged).await;
            if self.world.is_finishing() {
                return;
            }
        }
        if (4..9).contains(&completes) {
            self.world.close_job(&mut self.callers, &mut self.random, job).await;
        }
        // Whatever became of the job, what is stored is answered as it is.
        for _ in 0..self.random.usize(..3) {
            let Some(mut batch) = acknowledged.pop_front() else { return };
            batch.attempts = Vec::new();
            batch.repeats = batch.events.len();
            self.send(&mut batch, false).await;
            self.world.history.lock().unwrap().batches.push(batch);
        }
    }

    /// Gives its events no ids, and so sends none of them a second time.
    pub async fn write_carelessly(mut self) {
        while !self.world.is_finishing() {
            let job = self.new_job().await;
            for _ in 0..self.random.usize(3..15) {
                let id = String::new();
                let event = pb::NewEvent { id, ..event(&self.world, &mut self.random, job) };
                let mut batch = self.batch(job, vec![event]);
                self.send(&mut batch, true).await;
                let told = batch.answer().map(|(_, told)| told[0].id.clone());
                batch.events[0].id = told.unwrap_or_default();
                self.record(batch, &mut VecDeque::new()).await;
            }
        }
    }

    /// A new batch, sent until it is answered; or, now and then, not.
    async fn append(
        &mut self,
        job: usize,
        expected: Option<i64>,
        closes: bool,
        acknowledged: &mut VecDeque<Batch>,
    ) -> Batch {
        let mut fresh = events(&self.world, &mut self.random, job);
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
        let leaves = self.random.u32(..40) == 0;
        self.send(&mut batch, leaves).await;
        batch
    }

    /// One to be sent for the first time.
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

    /// Sends it until it is answered, or if it `leaves` until an answer is lost.
    async fn send(&mut self, batch: &mut Batch, leaves: bool) {
        let mut replica = self.random.usize(..2);
        let request = pb::AppendEventsRequest {
            job: Some(pb::append_events_request::Job::JobId(self.world.job_id(batch.job))),
            expected_sequence: batch.expected,
            events: batch.events.clone(),
        };
        loop {
            let sent = self.world.now();
            let call = self.callers[replica].events.append_events(request.clone());
            let outcome = outcome(self.world.answer("AppendEvents", call).await);
            let lost = matches!(outcome, Outcome::Unknown(_));
            batch.attempts.push(Attempt { replica, sent, over: self.world.now(), outcome });
            // As one that crashes.
            if !lost || leaves {
                return;
            }
            tokio::time::sleep(Duration::from_millis(self.random.u64(5..100))).await;
            if self.random.bool() {
                replica = 1 - replica;
            }
        }
    }

    async fn record(&mut self, batch: Batch, acknowledged: &mut VecDeque<Batch>) {
        if batch.answer().is_some() {
            acknowledged.push_back(batch.clone());
            acknowledged.truncate(REMEMBERED);
        }
        self.world.history.lock().unwrap().batches.push(batch);
        self.world.pause(&mut self.random, 100).await;
    }
}
