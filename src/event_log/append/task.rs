//! The task that plans rounds and sends them, one after the other.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use moka::sync::Cache;
use tokio::{task::JoinHandle, time::sleep};
use uuid::Uuid;

use super::{
    ROUND,
    look::{Locked, Look, ReadJobs, append_locked, read_jobs},
    queue::{Filled, Queue},
    request::{Knowledge, Request},
    round::{Completed, Round},
    waiting::{Waiting, jobs_of},
};
use crate::{
    db::{
        Database, Identified as _, OwnConnection,
        notifier::{Notification, Notifier},
    },
    error::{Error, Result},
    event_log::{position::Run, tail::Tail},
    limits::CONFIGURATION_STEPS,
    models::{
        event::{AppendConnection, AppendOutcome},
        history,
    },
    progress::{Cancellation, JobState},
    telemetry::{
        Telemetry,
        metrics::Metrics,
        traces::{Traces, TransactionSpan},
    },
    usage::EventUsage,
};

/// How often the queue is emptied while a round is under way.
const TICK: Duration = Duration::from_millis(1);
/// About how many bytes a remembered state takes.
const STATE_BYTES: u64 = 200 + CONFIGURATION_STEPS as u64;

/// A round that was sent, and what became of it.
pub(super) type Sent = (Round, Result<(AppendConnection, Vec<Result<AppendOutcome>>)>);

pub(super) struct Task {
    database: Database,
    queue: Arc<Queue>,
    tail: Arc<Tail>,
    notifier: Notifier,
    usage: EventUsage,
    metrics: Arc<Metrics>,
    traces: Traces,
    /// The rounds' own connection, so that no reader keeps appends waiting; none while a
    /// round is under way.
    connection: Option<AppendConnection>,
    /// The run of the primary that the last connection reached. All that is remembered
    /// or planned is of this run.
    run: Option<Run>,
    /// The states of jobs once the round under way is committed.
    states: Cache<Uuid, JobState>,
    most_states: u64,
    under_way: Option<JoinHandle<Sent>>,
    /// The jobs of the round under way.
    sent_jobs: HashSet<Uuid>,
    /// The round after the one under way.
    next: Round,
    /// Requests that cannot be planned from memory.
    waiting: Waiting,
    reading: Look<ReadJobs, OwnConnection>,
    locking: Look<Locked, AppendConnection>,
    /// No request comes any more.
    closed: bool,
}

/// What the task waits for.
enum Event {
    Sent(Sent),
    Read(ReadJobs),
    Locked(Locked),
    Filled(Filled),
    Tick,
}

impl Task {
    pub(super) fn new(
        database: Database,
        queue: Arc<Queue>,
        tail: Arc<Tail>,
        notifier: Notifier,
        cache_bytes: u64,
        usage: EventUsage,
        Telemetry { metrics, traces }: Telemetry,
    ) -> Self {
        Self {
            database,
            queue,
            tail,
            notifier,
            usage,
            metrics,
            traces,
            connection: None,
            run: None,
            states: Cache::new(cache_bytes / STATE_BYTES),
            most_states: cache_bytes / STATE_BYTES,
            under_way: None,
            sent_jobs: HashSet::new(),
            next: Round::default(),
            waiting: Waiting::default(),
            reading: Look::default(),
            locking: Look::default(),
            closed: false,
        }
    }

    pub(super) async fn run(mut self) {
        while !(self.closed && self.is_idle()) {
            self.plan_queued();
            if self.under_way.is_none() {
                self.send_next().await;
            } else {
                self.look();
            }
            match self.wait().await {
                Event::Sent(sent) => self.complete(sent).await,
                Event::Read(read) => self.plan_read(read),
                Event::Locked(locked) => self.complete_locked(locked),
                Event::Filled(Filled::Closed) => self.closed = true,
                Event::Filled(Filled::Requests) | Event::Tick => {}
            }
        }
    }

    async fn wait(&mut self) -> Event {
        // While there is work, the queue is emptied with a tick, since each request would
        // otherwise wake this thread by itself.
        let working = self.under_way.is_some() || !self.waiting.is_empty();
        tokio::select! {
            biased;
            sent = finished(&mut self.under_way) => Event::Sent(sent),
            read = finished(&mut self.reading.under_way) => Event::Read(read),
            locked = finished(&mut self.locking.under_way) => Event::Locked(locked),
            filled = self.queue.filled(), if !working && !self.closed => Event::Filled(filled),
            () = sleep(TICK), if working => Event::Tick,
        }
    }

    fn is_idle(&self) -> bool {
        self.next.groups.is_empty()
            && self.waiting.is_empty()
            && self.under_way.is_none()
            && self.reading.is_free()
            && self.locking.is_free()
    }

    /// Whether nothing of a job is planned or under way, so that what is read of it stays true.
    fn is_free(&self, job: Uuid) -> bool {
        !self.next.groups.contains_key(&job) && !self.sent_jobs.contains(&job) && !self.is_looked_at(job)
    }

    fn is_looked_at(&self, job: Uuid) -> bool {
        self.reading.jobs.contains(&job) || self.locking.jobs.contains(&job)
    }

    /// Takes requests out of the queue, as far as the next round has room.
    fn plan_queued(&mut self) {
        let queue = Arc::clone(&self.queue);
        while let Some(request) = queue.take(|request| {
            let (provider_id, cost) = (request.provider_id(), request.cost);
            self.next.has_room(provider_id, cost) && self.waiting.cost_of(provider_id).is_within(ROUND)
        }) {
            self.plan(request);
        }
    }

    /// Plans a request for the next round, or has it wait for a read of its job.
    fn plan(&mut self, request: Request) {
        let Some(request) = request.still_wanted() else { return };
        let id = request.job_id();
        // No request overtakes another one of the same job.
        let first = !self.waiting.contains(id) && !self.is_looked_at(id);
        let from_memory = first && request.needs <= Knowledge::Remembered;
        let unplanned = match self.states.get(&id) {
            Some(state) if from_memory => self.next.plan(request, state, Knowledge::Remembered),
            _ => Some(request),
        };
        if let Some(request) = unplanned {
            self.waiting.push(request);
        }
    }

    /// Sends what is planned. No round is under way.
    async fn send_next(&mut self) {
        if self.next.groups.is_empty() && self.waiting.is_empty() {
            return;
        }
        let database = self.database.clone();
        if let Err(error) = database.in_time(self.connect(), "connecting took too long").await {
            let error = Arc::new(error);
            return self.take_all().into_iter().for_each(|request| request.fail(&error));
        }
        self.look();
        self.drop_unwanted();
        let round = std::mem::take(&mut self.next);
        self.send(round);
    }

    /// Connects if need be. In another database than before, all is forgotten that was
    /// remembered, and all is planned again that was planned: the states of jobs may be lost.
    async fn connect(&mut self) -> Result<()> {
        let mut connection = AppendConnection::kept_or_new(&self.database, &mut self.connection).await?;
        let identity = connection.identity();
        if self.run.is_none_or(|run| run.identity != identity) {
            self.run = Some(Run { identity, history: history::enter(&mut *connection).await? });
            self.states = Cache::new(self.most_states);
            let mut requests = self.take_all();
            requests.iter_mut().for_each(|request| request.needs = request.needs.max(Knowledge::Read));
            self.plan_again(requests);
        }
        self.connection = Some(connection);
        Ok(())
    }

    /// The requests that are planned or wait, those of each job in their order.
    fn take_all(&mut self) -> Vec<Request> {
        let planned: Vec<Uuid> = self.next.groups.keys().copied().collect();
        let mut requests: Vec<Request> = planned.into_iter().flat_map(|id| self.next.withdraw(id)).collect();
        requests.extend(self.waiting.take_all());
        requests
    }

    /// Plans the next round again without the requests that are not wanted any more: a
    /// credential may have ended, or a caller left, while the round before it was under way.
    fn drop_unwanted(&mut self) {
        loop {
            let jobs = self.next.unwanted();
            if jobs.is_empty() {
                return;
            }
            let again = jobs.into_iter().flat_map(|id| self.next.withdraw(id)).collect();
            self.plan_again(again);
        }
    }

    /// Plans requests that came before all those of their jobs that wait.
    fn plan_again(&mut self, requests: Vec<Request>) {
        let jobs = jobs_of(&requests);
        let later: Vec<Request> = jobs.into_iter().flat_map(|id| self.waiting.take(id)).collect();
        requests.into_iter().chain(later).for_each(|request| self.plan(request));
    }

    /// Begins to read the jobs of requests that wait, and to append to a locked one.
    fn look(&mut self) {
        let Some(run) = self.run.filter(|_| !self.waiting.is_empty()) else { return };
        if self.reading.is_free() {
            let requests = self.take_free(Waiting::take_to_read);
            let database = self.database.clone();
            self.reading.begin(requests, |kept, requests| read_jobs(database, run, kept, requests));
        }
        if self.locking.is_free() {
            let requests = self.take_free(Waiting::take_to_lock);
            let database = self.database.clone();
            let telemetry = (self.traces.clone(), Arc::clone(&self.metrics));
            self.locking
                .begin(requests, |kept, requests| append_locked(database, run, kept, requests, telemetry));
        }
    }

    /// Takes requests that wait, of free jobs alone.
    fn take_free(&mut self, take: fn(&mut Waiting, &dyn Fn(Uuid) -> bool) -> Vec<Request>) -> Vec<Request> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let requests = take(&mut waiting, &|job| self.is_free(job));
        self.waiting = waiting;
        requests
    }

    fn send(&mut self, mut round: Round) {
        if round.order.is_empty() {
            let mut completed = Completed::default();
            completed.answer(round.groups.into_values());
            return self.publish(self.run, completed, Instant::now());
        }
        let Some(connection) = self.connection.take() else { return };
        // Every server locks jobs in this order.
        round.order.sort_unstable();
        for (id, group) in &round.groups {
            self.remember(*id, &group.after);
        }
        self.sent_jobs = round.groups.keys().copied().collect();
        round.start_span(&self.traces);
        self.under_way =
            Some(tokio::spawn(append(connection, round, self.database.clone(), Arc::clone(&self.metrics))));
    }

    /// Remembers the state to which a round leads. A state that lacks a time which only the
    /// commit gives is read again.
    fn remember(&self, job: Uuid, state: &JobState) {
        if state.cancellation == Cancellation::Now {
            self.states.invalidate(&job);
        } else {
            self.states.insert(job, state.clone());
        }
    }

    /// Plans the requests whose jobs were read. Those that come to no new event are answered.
    fn plan_read(&mut self, read: ReadJobs) {
        let ReadJobs { requests, states, connection } = read;
        self.reading.connection = connection;
        let jobs = std::mem::take(&mut self.reading.jobs);
        let states = match states {
            Ok(states) => states,
            Err(error) => {
                let error = Arc::new(error);
                requests.into_iter().for_each(|request| request.fail(&error));
                return self.plan_behind(jobs);
            }
        };
        states.iter().for_each(|(id, state)| self.states.insert(*id, state.clone()));
        let unplanned = self.next.plan_all(requests, &states, Knowledge::Read);
        let mut completed = Completed::default();
        completed.answer(jobs.iter().filter_map(|id| self.next.take_answered(*id)));
        self.publish(None, completed, Instant::now());
        self.plan_again(unplanned);
        self.plan_behind(jobs);
    }

    /// Plans what waits behind the requests of these jobs that were looked at.
    fn plan_behind(&mut self, jobs: HashSet<Uuid>) {
        let behind: Vec<Request> = jobs.into_iter().flat_map(|id| self.waiting.take(id)).collect();
        behind.into_iter().for_each(|request| self.plan(request));
    }

    /// Sends the next round before it answers the callers of the round that came back.
    async fn complete(&mut self, sent: Sent) {
        let received_at = Instant::now();
        let run = self.run;
        self.sent_jobs.clear();
        let (connection, completed) = self.settle(sent);
        self.connection = connection;
        self.plan_queued();
        self.send_next().await;
        // The round's task runs before anything else is done.
        tokio::task::yield_now().await;
        self.publish(run, completed, received_at);
    }

    fn complete_locked(&mut self, Locked { run, sent, unplanned }: Locked) {
        let received_at = Instant::now();
        let jobs = std::mem::take(&mut self.locking.jobs);
        let after: Vec<_> = sent.0.groups.iter().map(|(id, group)| (*id, group.after.clone())).collect();
        let (connection, completed) = self.settle(sent);
        self.locking.connection = connection;
        if self.run == Some(run) && !completed.events.is_empty() {
            after.iter().for_each(|(id, state)| self.remember(*id, state));
        }
        self.publish(Some(run), completed, received_at);
        self.plan_again(unplanned);
        self.plan_behind(jobs);
    }

    /// Sorts out what became of a round. Requests for jobs that were not appended to are
    /// planned again, and so are those of the next round that rested on them.
    fn settle(&mut self, (round, result): Sent) -> (Option<AppendConnection>, Completed) {
        let batches = round.batches();
        let Round { mut groups, order, events, span, .. } = round;
        let (connection, outcomes): (_, Vec<Result<AppendOutcome, Arc<Error>>>) = match result {
            Ok((connection, outcomes)) => {
                let outcomes = outcomes.into_iter().map(|outcome| outcome.map_err(Arc::new));
                (Some(connection), outcomes.collect())
            }
            // Whether the transaction was committed is not known.
            Err(error) => {
                span.iter().for_each(TransactionSpan::failed);
                let error = Arc::new(error);
                (None, order.iter().map(|_| Err(Arc::clone(&error))).collect())
            }
        };
        let mut completed = Completed::default();
        let mut again = Vec::new();
        for (id, outcome) in order.into_iter().zip(outcomes) {
            let Some(group) = groups.remove(&id) else { continue };
            match outcome {
                Ok(AppendOutcome::Committed { after_position, at }) => {
                    completed.commit(group, after_position, at);
                    continue;
                }
                Ok(outcome @ (AppendOutcome::Moved | AppendOutcome::Stored)) => {
                    again.extend(group.into_requests(outcome));
                }
                Err(error) => group.plans.into_iter().for_each(|(request, _)| request.fail(&error)),
            }
            self.states.invalidate(&id);
            again.extend(self.next.withdraw(id));
        }
        if let Some(span) = span {
            let position = completed.events.last().map(|event| event.row.position);
            span.took(events, batches, position);
        }
        completed.answer(groups.into_values());
        self.plan_again(again);
        (connection, completed)
    }

    /// Counts what was committed, answers callers, and delivers the events that were
    /// committed in this run to watchers.
    fn publish(&self, run: Option<Run>, completed: Completed, received_at: Instant) {
        self.usage.appended(completed.events.iter().map(|event| (event.job.provider_id, &event.row)));
        let now = Instant::now();
        for (reply, answer) in completed.answers {
            if answer.is_ok() {
                self.metrics.appends.answered(now.saturating_duration_since(reply.since));
            }
            // A caller that left needs no answer.
            let _ = reply.to.send(answer);
        }
        if let Some(run) = run.filter(|_| !completed.events.is_empty()) {
            self.tail.offer(run, &completed.events, received_at);
            self.notifier.notify(Notification::Log);
        }
    }
}

/// Returns once the task has ended, and takes it; never returns without a task.
async fn finished<T>(task: &mut Option<JoinHandle<T>>) -> T {
    let Some(running) = task else { return std::future::pending().await };
    let result = running.await;
    *task = None;
    result.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
}

/// Appends a round.
async fn append(
    connection: AppendConnection,
    round: Round,
    database: Database,
    metrics: Arc<Metrics>,
) -> Sent {
    let appended = round.measured(&metrics, round.append(connection));
    let result = database.in_time(appended, "the append took too long").await;
    (round, result)
}
