//! The task that plans rounds and sends them, one after the other.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use diesel_async::AsyncPgConnection;
use futures_util::future::try_join_all;
use moka::sync::Cache;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_util::either::Either;
use uuid::Uuid;

use super::round::{Completed, Group, Knowledge, Request, Round};
use crate::{
    db::{
        Database, Identified as _, OwnConnection,
        notifier::{Notification, Notifier},
    },
    error::{Error, Resource, Result},
    event_log::{position::Run, tail::Tail},
    models::{
        event::{AppendOutcome, Event, JobHead, LockedJob},
        history,
    },
    progress::JobState,
    telemetry::{
        Telemetry,
        metrics::Metrics,
        traces::{Traces, TransactionSpan},
    },
};

/// Most events of one round, except for a last batch that passes this.
const ROUND_EVENTS: usize = 2_000;
/// How often the queue is emptied while a round is under way.
const TICK: Duration = Duration::from_millis(1);
/// About how many bytes a remembered state takes.
const STATE_BYTES: u64 = 200;

/// A round that was sent, and what became of it.
type Sent = (Round, Result<(OwnConnection, Vec<Result<AppendOutcome>>)>);

pub(super) struct Task {
    database: Database,
    tail: Arc<Tail>,
    notifier: Notifier,
    metrics: Arc<Metrics>,
    traces: Traces,
    /// Longest time that a round may take.
    limit: Duration,
    /// The task's own connection, so that no reader keeps appends waiting; none while a
    /// round is under way.
    connection: Option<OwnConnection>,
    /// The run of the primary that the last connection reached. All that is remembered
    /// or planned is of this run.
    run: Option<Run>,
    /// The states of jobs once the round under way is committed.
    states: Cache<Uuid, JobState>,
    most_states: u64,
    /// The round after the one under way.
    next: Round,
    /// Requests that cannot be planned from memory, by job.
    waiting: HashMap<Uuid, Vec<Request>>,
    /// Whether the last round was one of a locked job.
    locked_last: bool,
}

impl Task {
    pub(super) fn new(
        database: Database,
        tail: Arc<Tail>,
        notifier: Notifier,
        cache_bytes: u64,
        Telemetry { metrics, traces }: Telemetry,
    ) -> Self {
        Self {
            limit: database.longest_use(),
            database,
            tail,
            notifier,
            metrics,
            traces,
            connection: None,
            run: None,
            states: Cache::new(cache_bytes / STATE_BYTES),
            most_states: cache_bytes / STATE_BYTES,
            next: Round::default(),
            waiting: HashMap::new(),
            locked_last: false,
        }
    }

    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut under_way: Option<JoinHandle<Sent>> = None;
        loop {
            self.plan_queued(&mut queue);
            let Some(round) = &mut under_way else {
                if self.is_idle() {
                    let Some(request) = queue.recv().await else { return };
                    self.plan(request);
                } else {
                    under_way = self.send_next().await;
                }
                continue;
            };
            // With a tick, since each request would otherwise wake this thread by itself.
            let Ok(sent) = timeout(TICK, round).await else { continue };
            let sent = sent.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()));
            self.plan_queued(&mut queue);
            under_way = self.complete(sent).await;
        }
    }

    fn is_idle(&self) -> bool {
        self.next.groups.is_empty() && self.waiting.is_empty()
    }

    /// Takes requests out of the queue, as far as the next round has room.
    fn plan_queued(&mut self, queue: &mut mpsc::Receiver<Request>) {
        let waiting = self.waiting.values().flatten().map(|request| request.batch.events.len());
        let mut room = ROUND_EVENTS.saturating_sub(self.next.events + waiting.sum::<usize>());
        while room > 0
            && let Ok(request) = queue.try_recv()
        {
            room = room.saturating_sub(request.batch.events.len());
            self.plan(request);
        }
    }

    /// Plans a request for the next round, or has it wait for a read of its job.
    fn plan(&mut self, request: Request) {
        let Some(request) = request.still_wanted() else { return };
        let id = request.batch.job.id;
        // No request overtakes another one of the same job.
        let from_memory = request.needs <= Knowledge::Remembered && !self.waiting.contains_key(&id);
        let unplanned = match self.states.get(&id) {
            Some(state) if from_memory => self.next.plan(request, state, Knowledge::Remembered),
            _ => Some(request),
        };
        if let Some(request) = unplanned {
            self.waiting.entry(id).or_default().push(request);
        }
    }

    /// Sends a round. No round is under way.
    async fn send_next(&mut self) -> Option<JoinHandle<Sent>> {
        if let Err(error) = within(self.limit, self.connect(), "connecting took too long").await {
            fail(self.take_all(), error);
            return None;
        }
        // Every other round at most, or other jobs would wait for as long as some need
        // their locks.
        let may_lock = !std::mem::take(&mut self.locked_last);
        let needs_lock =
            |requests: &Vec<Request>| requests.iter().any(|request| request.needs == Knowledge::Locked);
        let locked = self.waiting.iter().find_map(|(id, requests)| needs_lock(requests).then_some(*id));
        if let Some(id) = locked.filter(|_| may_lock) {
            self.locked_last = true;
            return self.send_locked(id).await;
        }
        if !self.waiting.is_empty() {
            self.read_and_plan().await;
        }
        self.drop_unwanted();
        // A read that failed has dropped the connection: the next attempt makes another one.
        self.connection.as_ref()?;
        let round = std::mem::take(&mut self.next);
        self.send(round)
    }

    /// Connects if need be. In another database than before, all is forgotten that was
    /// remembered, and all is planned again that was planned: the states of jobs may be lost.
    async fn connect(&mut self) -> Result<()> {
        let mut connection = self.database.kept_or_new(&mut self.connection).await?;
        let identity = connection.identity();
        if self.run.is_none_or(|run| run.identity != identity) {
            self.run = Some(Run { identity, history: history::enter(&mut connection).await? });
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
        let mut requests: Vec<Request> = planned.iter().flat_map(|id| self.next.withdraw(id)).collect();
        requests.extend(std::mem::take(&mut self.waiting).into_values().flatten());
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
            let again = jobs.iter().flat_map(|id| self.next.withdraw(id)).collect();
            self.plan_again(again);
        }
    }

    /// Plans requests that came before all those that wait.
    fn plan_again(&mut self, requests: Vec<Request>) {
        let later = std::mem::take(&mut self.waiting);
        requests.into_iter().chain(later.into_values().flatten()).for_each(|request| self.plan(request));
    }

    /// Sends a round of one job to which another replica appends so fast that it has
    /// always moved between the read of its state and the round. Only for such a job,
    /// since a server that stops within the transaction keeps others waiting.
    async fn send_locked(&mut self, id: Uuid) -> Option<JoinHandle<Sent>> {
        let mut requests = self.waiting.remove(&id).unwrap_or_default();
        let read = async {
            let connection = self.connection.take().ok_or_else(|| Error::unavailable("not connected"))?;
            let locked = LockedJob::begin(connection, id).await?;
            read_stored(locked.connection(), &mut requests).await?;
            Ok(locked)
        };
        let locked = match within(self.limit, read, "locking the job took too long").await {
            Ok(locked) => locked,
            Err(error) => {
                fail(requests, error);
                return None;
            }
        };
        let mut round = Round::default();
        let states = locked.head().map(|head| (id, head.state())).into_iter().collect();
        for request in plan_all(&mut round, requests, &states, Knowledge::Locked) {
            self.waiting.entry(id).or_default().push(request);
        }
        if round.order.is_empty() {
            // A connection whose transaction does not end is dropped.
            let ended = timeout(self.limit, locked.roll_back()).await;
            self.connection = ended.ok().and_then(Result::ok);
        } else {
            round.locked = Some(locked);
        }
        self.send(round)
    }

    fn send(&mut self, mut round: Round) -> Option<JoinHandle<Sent>> {
        if round.order.is_empty() {
            let mut completed = Completed::default();
            completed.answer(round.groups);
            self.publish(self.run, completed, Instant::now());
            return None;
        }
        // Every server locks jobs in this order.
        round.order.sort_unstable();
        for (id, group) in &round.groups {
            self.states.insert(*id, group.after);
        }
        round.span = self.traces.transaction(round.groups.values_mut().flat_map(Group::spans));
        let transaction = match round.locked.take() {
            Some(locked) => Either::Left(locked),
            None => Either::Right(self.connection.take()?),
        };
        Some(tokio::spawn(append(transaction, round, self.limit, Arc::clone(&self.metrics))))
    }

    /// Reads the jobs of waiting requests and plans these requests, except for jobs that
    /// are in the next round already: these wait for the round after it.
    async fn read_and_plan(&mut self) {
        let (planned, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<HashMap<_, _>, _>(|(id, _)| self.next.groups.contains_key(id));
        self.waiting = planned;
        let mut requests: Vec<Request> = waiting.into_values().flatten().collect();
        if requests.is_empty() {
            return;
        }
        let limit = self.limit;
        let states = match within(limit, self.read(&mut requests), "reading the jobs took too long").await {
            Ok(states) => states,
            Err(error) => return fail(requests, error),
        };
        for request in plan_all(&mut self.next, requests, &states, Knowledge::Read) {
            self.waiting.entry(request.batch.job.id).or_default().push(request);
        }
    }

    /// Reads the states of the requests' jobs, and after them the stored ids.
    async fn read(&mut self, requests: &mut [Request]) -> Result<HashMap<Uuid, JobState>> {
        let mut connection = self.connection.take().ok_or_else(|| Error::unavailable("not connected"))?;
        let mut jobs: Vec<Uuid> = requests.iter().map(|request| request.batch.job.id).collect();
        jobs.sort_unstable();
        jobs.dedup();
        let heads = JobHead::load(&mut connection, &jobs).await?;
        read_stored(&connection, requests).await?;
        self.connection = Some(connection);
        Ok(heads.iter().map(|head| (head.id, head.state())).collect())
    }

    /// Sends the next round before it answers the callers of the round that came back.
    async fn complete(&mut self, sent: Sent) -> Option<JoinHandle<Sent>> {
        let received_at = Instant::now();
        let completed = self.settle(sent);
        let run = self.run;
        if !self.waiting.is_empty() {
            // Callers are answered before jobs are read.
            self.publish(run, completed, received_at);
            return None;
        }
        let next = self.send_next().await;
        // The round's task runs before anything else is done.
        tokio::task::yield_now().await;
        self.publish(run, completed, received_at);
        next
    }

    /// Sorts out what became of a round. Requests for jobs that were not appended to are
    /// planned again, and so are those of the next round that rested on them.
    fn settle(&mut self, (round, result): Sent) -> Completed {
        let batches = round.batches();
        let Round { mut groups, order, events, span, .. } = round;
        let outcomes: Vec<Result<AppendOutcome, Arc<Error>>> = match result {
            Ok((connection, outcomes)) => {
                self.connection = Some(connection);
                outcomes.into_iter().map(|outcome| outcome.map_err(Arc::new)).collect()
            }
            // Whether the transaction was committed is not known.
            Err(error) => {
                span.iter().for_each(TransactionSpan::failed);
                let error = Arc::new(error);
                order.iter().map(|_| Err(Arc::clone(&error))).collect()
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
            again.extend(self.next.withdraw(&id));
        }
        if let Some(span) = span {
            span.took(events, batches, completed.events.last().map(|event| event.row.position));
        }
        completed.answer(groups);
        self.plan_again(again);
        completed
    }

    /// Answers callers, and delivers the events that were committed in this run to watchers.
    fn publish(&self, run: Option<Run>, completed: Completed, received_at: Instant) {
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

/// Plans requests on these states, which took a while to read, if they are still wanted;
/// returns those that have to wait, in their order. Requests for jobs that do not exist
/// are answered so.
fn plan_all(
    round: &mut Round,
    requests: Vec<Request>,
    states: &HashMap<Uuid, JobState>,
    known: Knowledge,
) -> Vec<Request> {
    let mut unplanned: Vec<Request> = Vec::new();
    for request in requests {
        let Some(request) = request.still_wanted() else { continue };
        let id = request.batch.job.id;
        let Some(state) = states.get(&id) else {
            request.answer(Err(Error::not_found(Resource::Job, &id)));
            continue;
        };
        if unplanned.iter().any(|before| before.batch.job.id == id) {
            unplanned.push(request);
        } else {
            unplanned.extend(round.plan(request, *state, known));
        }
    }
    unplanned
}

/// Reads which events of those requests are stored that were refused from memory or
/// not appended.
async fn read_stored(connection: &AsyncPgConnection, requests: &mut [Request]) -> Result<()> {
    let unsure = requests.iter_mut().filter(|request| request.needs >= Knowledge::Read);
    let reads = unsure.map(|request| async move {
        let ids: Vec<Uuid> = request.batch.client_ids().collect();
        let rows = Event::list_by_ids(connection, request.batch.job.id, &ids).await?;
        request.stored = rows.into_iter().map(|row| (row.id, row)).collect();
        Ok::<_, Error>(())
    });
    try_join_all(reads).await.map(drop)
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T>>,
    too_long: &'static str,
) -> Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(Error::unavailable(too_long)))
}

fn fail(requests: Vec<Request>, error: Error) {
    let error = Arc::new(error);
    requests.into_iter().for_each(|request| request.fail(&error));
}

/// Appends a round, over the connection of its locked job or another one.
async fn append(
    transaction: Either<LockedJob, OwnConnection>,
    round: Round,
    limit: Duration,
    metrics: Arc<Metrics>,
) -> Sent {
    let appended = async {
        let sent_at = Instant::now();
        let statement = round.span.as_ref().map(TransactionSpan::statement);
        let appended = match transaction {
            Either::Left(locked) => round.append_locked(locked).await?,
            Either::Right(connection) => round.append(connection).await?,
        };
        drop(statement);
        metrics.appends.committed(sent_at.elapsed(), round.events, round.batches());
        Ok(appended)
    };
    let result = within(limit, appended, "the append took too long").await;
    (round, result)
}
