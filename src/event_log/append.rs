//! Many callers, few transactions.
//!
//! One task appends for the whole process. While a transaction is on its way
//! to disk, callers line up; the next round takes all of them, so that batches
//! form by back-pressure alone and an idle server adds no delay.
//!
//! A round computes what each batch does from the job's state as it is
//! remembered, and one SQL function appends it for those jobs that still are
//! in that state. Nothing is refused from memory: what memory would refuse, and
//! what the function did not append, is **in doubt**: the job's state and then
//! the batch's ids are read anew, in this order, so that a batch that is stored
//! is never refused for what came after it.
//!
//! The next round is planned while the one before it is under way, on the
//! states that the latter is expected to lead to, so that the database never
//! waits for a plan. What turns out otherwise is planned anew before it is
//! sent.
//!
//! Where another replica appends to the same job all the time, what is read of
//! it is stale by the time a plan is sent. Such a job is locked while one round
//! of it alone is planned.

use std::{
    collections::HashMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};
use futures_util::future::try_join_all;
use moka::sync::Cache;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
};
use uuid::Uuid;

use super::{
    plan::{Appended, Batch},
    round::{Group, Reply, Request, Round, Settled, StreamOrder},
    tail::Tail,
    vital,
};
use crate::{
    db::{
        Database,
        notifier::{Notification, Notifier},
    },
    error::{Error, Resource, Result},
    models::event::{AppendOutcome, Event, JobHead},
    progress::JobState,
    telemetry::{
        Telemetry,
        metrics::Metrics,
        traces::{Traces, TransactionSpan},
    },
};

/// Most callers that wait; more wait for a place.
const INBOX: usize = 4_096;
/// Most bytes of events that wait or are on their way, in KiB.
const INBOX_KIB: u32 = 64 * 1024;
/// Most events of one transaction, but for a last batch that passes it.
const ROUND_EVENTS: usize = 2_000;
/// How often callers are looked after while a round is under way.
const TICK: Duration = Duration::from_millis(1);
/// Most jobs whose state is remembered; some 100 bytes each.
const STATES: u64 = 100_000;

/// Where batches are handed in.
#[derive(Clone, Debug)]
pub(crate) struct Appender {
    inbox: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
    traces: Traces,
}

impl Appender {
    /// Starts the task; it ends when the last handle is dropped.
    ///
    /// On a thread of its own: every step of it keeps all callers waiting, and
    /// must not queue behind the work of some of them.
    pub(crate) fn start(
        database: Database,
        tail: Arc<Tail>,
        notifier: Notifier,
        Telemetry { metrics, traces }: Telemetry,
    ) -> io::Result<Self> {
        let (inbox, requests) = mpsc::channel(INBOX);
        let limit = database.settings().longest_use();
        let task = Task {
            database,
            tail,
            notifier,
            metrics,
            traces: traces.clone(),
            limit,
            states: Cache::new(STATES),
            connection: None,
            next: Round::default(),
            waiting: HashMap::new(),
            locks: false,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("append".to_owned()).spawn(move || {
            runtime.block_on(vital(task.run(requests)));
        })?;
        Ok(Self { inbox, room: Arc::new(Semaphore::new(INBOX_KIB as usize)), traces })
    }

    /// Hands a batch in. Batches that are handed in one after the other for one
    /// job are appended in that order. The answer comes once it is durable.
    pub(crate) async fn submit(
        &self,
        batch: Batch,
        stream_order: StreamOrder,
    ) -> Result<oneshot::Receiver<Result<Vec<Appended>>>> {
        let (since, span) = (Instant::now(), self.traces.append());
        let bytes: usize =
            batch.events.iter().map(|event| 256 + event.name.len() + event.metadata.len()).sum();
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(INBOX_KIB).min(INBOX_KIB);
        let room = Arc::clone(&self.room).acquire_many_owned(kib).await.map_err(Error::internal)?;
        let (to, answer) = oneshot::channel();
        let reply = Reply { to, since };
        let request = Request {
            batch,
            stream_order,
            stored: HashMap::new(),
            in_doubt: false,
            outrun: false,
            reply,
            span,
            _room: room,
        };
        self.inbox.send(request).await.map_err(|_| Error::Draining)?;
        Ok(answer)
    }
}

/// A round that was sent, and what became of it.
type Sent = (Round, Result<(AsyncPgConnection, Vec<Result<AppendOutcome>>)>);

struct Task {
    database: Database,
    tail: Arc<Tail>,
    notifier: Notifier,
    metrics: Arc<Metrics>,
    traces: Traces,
    /// Longest that a round may take.
    limit: Duration,
    /// Its own, so that no reader can keep appends waiting; gone while a round
    /// is under way.
    connection: Option<AsyncPgConnection>,
    /// Where jobs are once the round under way is committed.
    states: Cache<Uuid, JobState>,
    /// What is sent after the round under way.
    next: Round,
    /// What cannot be planned from memory, by job.
    waiting: HashMap<Uuid, Vec<Request>>,
    /// Whether it is the turn of a job that is outrun.
    locks: bool,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<Request>) {
        let mut under_way: Option<JoinHandle<Sent>> = None;
        loop {
            self.admit_all(&mut inbox);
            let Some(round) = &mut under_way else {
                if self.is_idle() {
                    let Some(request) = inbox.recv().await else { return };
                    self.admit(request);
                } else {
                    under_way = self.start().await;
                }
                continue;
            };
            // Each request would otherwise wake this thread by itself.
            let Ok(sent) = tokio::time::timeout(TICK, round).await else { continue };
            let sent = sent.unwrap_or_else(|gone| std::panic::resume_unwind(gone.into_panic()));
            self.admit_all(&mut inbox);
            under_way = self.turn(sent).await;
        }
    }

    fn is_idle(&self) -> bool {
        self.next.groups.is_empty() && self.waiting.is_empty()
    }

    /// Takes in what has come, as far as the next round has room.
    fn admit_all(&mut self, inbox: &mut mpsc::Receiver<Request>) {
        let waiting = self.waiting.values().flatten().map(|request| request.batch.events.len());
        let mut room = ROUND_EVENTS.saturating_sub(self.next.events + waiting.sum::<usize>());
        while room > 0
            && let Ok(request) = inbox.try_recv()
        {
            room = room.saturating_sub(request.batch.events.len());
            self.admit(request);
        }
    }

    /// Plans a request for the next round, or has it wait to be looked up.
    fn admit(&mut self, request: Request) {
        let Some(request) = request.still_wanted() else { return };
        let id = request.batch.job.id;
        // Nothing overtakes what waits for the same job.
        let known = !request.in_doubt && !self.waiting.contains_key(&id);
        let waits = match self.states.get(&id) {
            Some(state) if known => self.next.fold(request, state, false),
            _ => Some(request),
        };
        if let Some(request) = waits {
            self.waiting.entry(id).or_default().push(request);
        }
    }

    /// Sends a round. Nothing is under way.
    async fn start(&mut self) -> Option<JoinHandle<Sent>> {
        // In turns, or others would wait for as long as some are outrun.
        self.locks = !self.locks;
        let is_outrun = |requests: &Vec<Request>| requests.iter().any(|request| request.outrun);
        let outrun = self.waiting.iter().find_map(|(id, requests)| is_outrun(requests).then_some(*id));
        if let Some(id) = outrun.filter(|_| self.locks) {
            return self.start_locked(id).await;
        }
        if !self.waiting.is_empty() {
            self.look_up(false).await;
        }
        self.send_next()
    }

    /// Sends a round of one job to which another replica appends so fast that it
    /// has always moved before a look at it has led to a plan: it is locked from
    /// the look on. Only where that is so, since whoever stops in between keeps
    /// others waiting.
    async fn start_locked(&mut self, id: Uuid) -> Option<JoinHandle<Sent>> {
        let mut others = std::mem::take(&mut self.waiting);
        self.waiting.extend(others.remove_entry(&id));
        let next = std::mem::replace(&mut self.next, Round { locked: true, ..Round::default() });
        self.look_up(true).await;
        let sent = self.send_next();
        if sent.is_none()
            && let Some(mut connection) = self.connection.take()
        {
            // A connection of which the transaction does not end is given up.
            let ended = tokio::time::timeout(self.limit, connection.batch_execute("ROLLBACK")).await;
            self.connection = matches!(ended, Ok(Ok(()))).then_some(connection);
        }
        self.next = next;
        self.waiting.extend(others);
        sent
    }

    fn send_next(&mut self) -> Option<JoinHandle<Sent>> {
        let mut round = std::mem::take(&mut self.next);
        if round.order.is_empty() {
            let mut settled = Settled::default();
            settled.nothing_to_append(round.groups);
            self.tell(settled, Instant::now());
            return None;
        }
        // Everybody locks jobs in this order.
        round.order.sort_unstable();
        for (id, group) in &round.groups {
            self.states.insert(*id, group.after);
        }
        round.span = self.traces.transaction(round.groups.values_mut().flat_map(Group::spans));
        let (connection, metrics) = (self.connection.take(), Arc::clone(&self.metrics));
        Some(tokio::spawn(send(self.database.clone(), connection, round, self.limit, metrics)))
    }

    /// Looks up what waits and plans it, but for jobs that are in the next
    /// round already: their turn comes after it.
    async fn look_up(&mut self, locks: bool) {
        let (planned, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<HashMap<_, _>, _>(|(id, _)| self.next.groups.contains_key(id));
        self.waiting = planned;
        let mut requests: Vec<Request> = waiting.into_values().flatten().collect();
        if requests.is_empty() {
            return;
        }
        let states = match tokio::time::timeout(self.limit, self.try_look_up(&mut requests, locks)).await {
            Ok(Ok(states)) => states,
            failed => {
                let error = match failed {
                    Ok(Err(error)) => error,
                    _ => Error::unavailable("the look-up took too long"),
                };
                let error = Arc::new(error);
                return requests.into_iter().for_each(|request| request.fail(&error));
            }
        };
        for request in requests {
            let id = request.batch.job.id;
            let waits = match states.get(&id) {
                None => {
                    request.answer(Err(Error::not_found(Resource::Job, &id)));
                    continue;
                }
                Some(_) if self.waiting.contains_key(&id) => Some(request),
                Some(state) => self.next.fold(request, *state, true),
            };
            if let Some(request) = waits {
                self.waiting.entry(id).or_default().push(request);
            }
        }
    }

    /// The states of the requests' jobs, and then which events of those in
    /// doubt are stored. `locks` the job, which is one.
    async fn try_look_up(
        &mut self,
        requests: &mut [Request],
        locks: bool,
    ) -> Result<HashMap<Uuid, JobState>> {
        let mut connection = self.database.kept_or_new(&mut self.connection).await?;
        let mut jobs: Vec<Uuid> = requests.iter().map(|request| request.batch.job.id).collect();
        jobs.sort_unstable();
        jobs.dedup();
        let heads = match jobs[..] {
            [id] if locks => Vec::from_iter(JobHead::lock(&mut connection, id).await?),
            _ => JobHead::load(&mut connection, &jobs).await?,
        };
        let shared = &connection;
        let in_doubt = requests.iter_mut().filter(|request| request.in_doubt).map(|request| async move {
            let ids: Vec<Uuid> = request.batch.client_ids().collect();
            let rows = Event::list_by_ids(shared, request.batch.job.id, &ids).await?;
            request.stored = rows.into_iter().map(|row| (row.id, row)).collect();
            Ok::<_, Error>(())
        });
        try_join_all(in_doubt).await?;
        self.connection = Some(connection);
        Ok(heads.iter().map(|head| (head.id, head.state())).collect())
    }

    /// A round came back: sends the next one, then tells what became of this.
    async fn turn(&mut self, sent: Sent) -> Option<JoinHandle<Sent>> {
        let received_at = Instant::now();
        let settled = self.settle(sent);
        if !self.waiting.is_empty() {
            // Callers are told before others are looked up.
            self.tell(settled, received_at);
            return None;
        }
        let next = self.start().await;
        // It goes out before anything else is done.
        tokio::task::yield_now().await;
        self.tell(settled, received_at);
        next
    }

    /// What became of a round. What rested on a job of it that was not appended
    /// to is planned anew.
    fn settle(&mut self, (round, result): Sent) -> Settled {
        let batches = round.batches();
        let Round { mut groups, order, events, span, .. } = round;
        let outcomes: Vec<Result<AppendOutcome, Arc<Error>>> = match result {
            Ok((connection, outcomes)) => {
                self.connection = Some(connection);
                outcomes.into_iter().map(|outcome| outcome.map_err(Arc::new)).collect()
            }
            // Whether it was committed is not known.
            Err(error) => {
                span.iter().for_each(TransactionSpan::failed);
                let error = Arc::new(error);
                order.iter().map(|_| Err(Arc::clone(&error))).collect()
            }
        };
        let mut settled = Settled::default();
        let mut again = Vec::new();
        for (id, outcome) in order.into_iter().zip(outcomes) {
            let Some(group) = groups.remove(&id) else { continue };
            match outcome {
                Ok(AppendOutcome::Appended { after_position, at }) => {
                    settled.append(group, after_position, at);
                    continue;
                }
                Ok(outcome @ (AppendOutcome::Moved | AppendOutcome::Stored)) => {
                    again.extend(group.plans.into_iter().map(|(mut request, plan)| {
                        let may_be_stored =
                            outcome == AppendOutcome::Stored && request.batch.client_ids().next().is_some();
                        request.in_doubt = plan.is_err() || may_be_stored;
                        request.outrun |= group.fresh && outcome == AppendOutcome::Moved;
                        request
                    }));
                }
                Err(error) => group.plans.into_iter().for_each(|(request, _)| request.fail(&error)),
            }
            self.states.invalidate(&id);
            again.extend(self.next.withdraw(&id));
        }
        if let Some(span) = span {
            span.took(events, batches, settled.committed.last().map(|(event, _)| event.position));
        }
        settled.nothing_to_append(groups);
        // In the order in which they came: these first.
        let later = std::mem::take(&mut self.waiting);
        again.into_iter().chain(later.into_values().flatten()).for_each(|request| self.admit(request));
        settled
    }

    /// Answers, and tells watchers.
    fn tell(&self, settled: Settled, received_at: Instant) {
        let now = Instant::now();
        for (reply, answer) in settled.answers {
            if answer.is_ok() {
                self.metrics.appends.answered(now.saturating_duration_since(reply.since));
            }
            // Whoever left does not want to know.
            let _ = reply.to.send(answer);
        }
        if !settled.committed.is_empty() {
            self.tail.offer(&settled.committed, received_at);
            self.notifier.ring(Notification::Log);
        }
    }
}

/// Appends a round, on this connection or a new one.
async fn send(
    database: Database,
    mut connection: Option<AsyncPgConnection>,
    round: Round,
    limit: Duration,
    metrics: Arc<Metrics>,
) -> Sent {
    let appended = async {
        let mut connection = database.kept_or_new(&mut connection).await?;
        let sent_at = Instant::now();
        let statement = round.span.as_ref().map(TransactionSpan::statement);
        let outcomes = round.append(&mut connection).await?;
        drop(statement);
        metrics.appends.committed(sent_at.elapsed(), round.events, round.batches());
        Ok((connection, outcomes))
    };
    let result = tokio::time::timeout(limit, appended).await;
    (round, result.unwrap_or_else(|_| Err(Error::unavailable("the append took too long"))))
}
