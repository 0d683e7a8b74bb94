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

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use diesel_async::{AsyncPgConnection, pooled_connection::PoolableConnection as _};
use futures_util::future::try_join_all;
use moka::sync::Cache;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use uuid::Uuid;

use super::{
    plan::{Appended, Batch, Plan},
    tail::Tail,
};
use crate::{
    db::{
        Database,
        doorbell::{Bell, Doorbell},
    },
    error::{Error, Resource, Result},
    models::event::{Append, AppendOutcome, Event, JobHead},
    progress::JobState,
};

/// Most callers that wait; more wait for a place.
const INBOX: usize = 4_096;
/// Most bytes of events that wait or are on their way, in KiB.
const INBOX_KIB: u32 = 64 * 1024;
/// Most events of one transaction, but for a last batch that passes it.
const ROUND_EVENTS: usize = 2_000;
/// Most jobs whose state is remembered; some 100 bytes each.
const STATES: u64 = 100_000;

/// Where batches are handed in.
#[derive(Clone, Debug)]
pub(crate) struct Appender {
    inbox: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
}

/// Batches of one stream, of which none may be appended after one failed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lane(Arc<AtomicBool>);

#[derive(Debug)]
struct Request {
    batch: Batch,
    lane: Lane,
    /// Events of the batch that were found stored.
    stored: HashMap<Uuid, Event>,
    in_doubt: bool,
    /// Gone once answered.
    reply: Option<oneshot::Sender<Result<Vec<Appended>>>>,
    _room: OwnedSemaphorePermit,
}

impl Appender {
    /// Starts the task; it ends when the last handle is dropped.
    pub(crate) fn start(database: Database, tail: Arc<Tail>, doorbell: Doorbell) -> Self {
        let (inbox, requests) = mpsc::channel(INBOX);
        let limit = database.settings().statement_timeout + Duration::from_secs(1);
        let states = Cache::new(STATES);
        let task = Task { database, tail, doorbell, states, connection: None, limit };
        tokio::spawn(task.run(requests));
        Self { inbox, room: Arc::new(Semaphore::new(INBOX_KIB as usize)) }
    }

    /// Hands a batch in. Batches that are handed in one after the other for one
    /// job are appended in that order. The answer comes once it is durable.
    pub(crate) async fn submit(
        &self,
        batch: Batch,
        lane: Lane,
    ) -> Result<oneshot::Receiver<Result<Vec<Appended>>>> {
        let bytes: usize =
            batch.events.iter().map(|event| 256 + event.name.len() + event.metadata.len()).sum();
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(INBOX_KIB).min(INBOX_KIB);
        let room = Arc::clone(&self.room).acquire_many_owned(kib).await.map_err(Error::internal)?;
        let (reply, answer) = oneshot::channel();
        let request =
            Request { batch, lane, stored: HashMap::new(), in_doubt: false, reply: Some(reply), _room: room };
        self.inbox.send(request).await.map_err(|_| Error::Draining)?;
        Ok(answer)
    }
}

impl Request {
    fn answer(&mut self, answer: Result<Vec<Appended>>) {
        if let Some(reply) = self.reply.take() {
            // Whoever left does not want to know.
            let _ = reply.send(answer);
        }
    }

    /// Whoever lines up behind it in its lane fails as well.
    fn fail(&mut self, source: &Arc<Error>) {
        self.lane.0.store(true, Ordering::Relaxed);
        let source = Arc::clone(source);
        let ours = matches!(*source, Error::Internal(_));
        self.answer(Err(if ours { Error::internal(source) } else { Error::unavailable(source) }));
    }

    /// Answers and drops out if nobody waits for it any more or a batch before
    /// it in its lane failed or dropped out.
    fn still_wanted(&mut self) -> bool {
        if self.lane.0.load(Ordering::Relaxed) {
            self.answer(Err(Error::unavailable("a batch before this one failed")));
        }
        let wanted = self.reply.as_ref().is_some_and(|reply| !reply.is_closed());
        if !wanted {
            // Nor may what was sent after it be appended without it.
            self.lane.0.store(true, Ordering::Relaxed);
        }
        wanted
    }
}

struct Task {
    database: Database,
    tail: Arc<Tail>,
    doorbell: Doorbell,
    states: Cache<Uuid, JobState>,
    /// Its own, so that no reader can keep appends waiting.
    connection: Option<AsyncPgConnection>,
    /// Longest that a round may take.
    limit: Duration,
}

/// One job's part of a round.
struct Group {
    /// Of its requests that take part, and what each comes to; a refusal holds
    /// once what is planned before it is committed.
    plans: Vec<(usize, Result<Plan>)>,
    before: JobState,
    after: JobState,
    /// The state is not remembered but was read in this round.
    fresh: bool,
    /// The rest of its requests wait for the next round.
    blocked: bool,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<Request>) {
        let mut waiting: Vec<Request> = Vec::new();
        loop {
            if waiting.is_empty() {
                let Some(request) = inbox.recv().await else { return };
                waiting.push(request);
            }
            let mut events: usize = waiting.iter().map(|request| request.batch.events.len()).sum();
            while events < ROUND_EVENTS
                && let Ok(request) = inbox.try_recv()
            {
                events += request.batch.events.len();
                waiting.push(request);
            }
            waiting.retain_mut(Request::still_wanted);
            self.round(&mut waiting).await;
            waiting.retain(|request| request.reply.is_some());
        }
    }

    /// Answers requests; those that it does not answer go on in the next round.
    async fn round(&mut self, requests: &mut [Request]) {
        let limit = self.limit;
        let failure = match tokio::time::timeout(limit, self.try_round(requests)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => Arc::new(error),
            Err(_) => Arc::new(Error::unavailable("the append took too long")),
        };
        // Whether it was committed is not known: neither, now, is any state.
        self.connection = None;
        for request in requests.iter_mut().filter(|request| request.reply.is_some()) {
            self.states.invalidate(&request.batch.job.id);
            request.fail(&failure);
        }
    }

    async fn try_round(&mut self, requests: &mut [Request]) -> Result<()> {
        // One that broke while it was idle had nothing to lose.
        let mut connection = match self.connection.take_if(|connection| !connection.is_broken()) {
            Some(connection) => connection,
            None => self.database.connect().await?,
        };
        let mut groups = self.open(&mut connection, requests).await?;
        let order = plan(&mut groups, requests);
        let outcomes = append(&mut connection, &order, &groups).await?;
        self.connection = Some(connection);
        self.settle(requests, order, groups, outcomes);
        Ok(())
    }

    /// A group for each job, with its state; what is in doubt is looked up.
    async fn open(
        &self,
        connection: &mut AsyncPgConnection,
        requests: &mut [Request],
    ) -> Result<HashMap<Uuid, Group>> {
        let mut states: HashMap<Uuid, Option<JobState>> = HashMap::new();
        for request in &*requests {
            let id = request.batch.job.id;
            let state = states.entry(id).or_insert_with(|| self.states.get(&id));
            if request.in_doubt {
                *state = None;
            }
        }
        let unknown: Vec<Uuid> =
            states.iter().filter(|(_, state)| state.is_none()).map(|(id, _)| *id).collect();
        let heads = if unknown.is_empty() { Vec::new() } else { JobHead::load(connection, &unknown).await? };
        let read: HashMap<Uuid, JobState> = heads.iter().map(|head| (head.id, head.state())).collect();
        let doubtful = requests.iter().filter(|request| request.in_doubt);
        let found = try_join_all(doubtful.map(|request| {
            let ids: Vec<Uuid> = request.batch.client_ids().collect();
            let connection = &*connection;
            async move { Event::list_by_ids(connection, request.batch.job.id, &ids).await }
        }))
        .await?;
        for (request, rows) in requests.iter_mut().filter(|request| request.in_doubt).zip(found) {
            request.stored = rows.into_iter().map(|row| (row.id, row)).collect();
        }
        let groups = states.into_iter().filter_map(|(id, remembered)| {
            let state = remembered.or_else(|| read.get(&id).copied())?;
            let fresh = remembered.is_none();
            let group = Group { plans: Vec::new(), before: state, after: state, fresh, blocked: false };
            Some((id, group))
        });
        Ok(groups.collect())
    }

    /// Answers what is decided, remembers where jobs are now, tells watchers.
    fn settle(
        &self,
        requests: &mut [Request],
        order: Vec<Uuid>,
        mut groups: HashMap<Uuid, Group>,
        outcomes: Vec<Result<AppendOutcome>>,
    ) {
        let mut committed = Vec::new();
        for (id, outcome) in order.into_iter().zip(outcomes) {
            let Some(group) = groups.remove(&id) else { continue };
            match outcome {
                Ok(AppendOutcome::Appended { after_position, at }) => {
                    self.states.insert(id, group.after);
                    let mut position = after_position;
                    for (index, plan) in group.plans {
                        let plan = plan.map(|plan| {
                            for (mut row, _) in plan.rows {
                                position += 1;
                                row.position = position;
                                row.created_at = at;
                                committed.push((row, Arc::clone(&requests[index].batch.job)));
                            }
                            plan.answer
                        });
                        requests[index].answer(plan);
                    }
                }
                Ok(outcome @ (AppendOutcome::Moved | AppendOutcome::Stored)) => {
                    self.states.invalidate(&id);
                    for (index, plan) in group.plans {
                        let may_be_stored = outcome == AppendOutcome::Stored
                            && requests[index].batch.client_ids().next().is_some();
                        requests[index].in_doubt = plan.is_err() || may_be_stored;
                    }
                }
                Err(error) => {
                    self.states.invalidate(&id);
                    let error = Arc::new(error);
                    for (index, _) in group.plans {
                        requests[index].fail(&error);
                    }
                }
            }
        }
        // What is left had nothing to append.
        for group in groups.into_values() {
            for (index, plan) in group.plans {
                requests[index].answer(plan.map(|plan| plan.answer));
            }
        }
        if !committed.is_empty() {
            self.tail.offer(&committed);
            self.doorbell.ring(Bell::Log);
        }
    }
}

/// What each request comes to, job by job, in the order of the requests. The
/// jobs that have something to append, in the order of their first requests.
fn plan(groups: &mut HashMap<Uuid, Group>, requests: &mut [Request]) -> Vec<Uuid> {
    let mut order = Vec::new();
    let mut planned_ids = std::collections::HashSet::new();
    for (index, request) in requests.iter_mut().enumerate() {
        let id = request.batch.job.id;
        let Some(group) = groups.get_mut(&id) else {
            request.answer(Err(Error::not_found(Resource::Job, &id)));
            continue;
        };
        if group.blocked {
            continue;
        }
        let looked_up = std::mem::take(&mut request.in_doubt);
        let planned =
            group.plans.iter().any(|(_, plan)| plan.as_ref().is_ok_and(|plan| !plan.rows.is_empty()));
        let unknown_ids = || request.batch.client_ids().filter(|id| !request.stored.contains_key(id));
        if unknown_ids().any(|event| planned_ids.contains(&(id, event))) {
            // The same event twice in one round: the second waits for what
            // becomes of the first.
            request.in_doubt = true;
            group.blocked = true;
            continue;
        }
        let plan = request.batch.plan(&request.stored, &mut group.after);
        match &plan {
            Ok(plan) => {
                planned_ids.extend(unknown_ids().map(|event| (id, event)));
                if !plan.rows.is_empty() && !planned {
                    order.push(id);
                }
            }
            Err(_) if !(looked_up && group.fresh) => {
                request.in_doubt = true;
                group.blocked = true;
                continue;
            }
            Err(_) => {}
        }
        group.plans.push((index, plan));
    }
    order
}

/// Appends the groups' rows in one transaction; if the database refuses it as
/// a whole, each group's in one of its own, so that nobody fails for another's
/// sake.
async fn append(
    connection: &mut AsyncPgConnection,
    order: &[Uuid],
    groups: &HashMap<Uuid, Group>,
) -> Result<Vec<Result<AppendOutcome>>> {
    let add = |append: &mut Append, id: &Uuid| {
        let group = &groups[id];
        let rows = group.plans.iter().filter_map(|(_, plan)| plan.as_ref().ok()).flat_map(|plan| &plan.rows);
        append.add(*id, &group.before, &group.after, rows);
    };
    if order.is_empty() {
        return Ok(Vec::new());
    }
    let mut all = Append::default();
    order.iter().for_each(|id| add(&mut all, id));
    match all.execute(connection).await {
        Ok(outcomes) => return Ok(outcomes.into_iter().map(Ok).collect()),
        Err(Error::Internal(_)) if order.len() > 1 => {}
        Err(error) => return Err(error),
    }
    let mut outcomes = Vec::with_capacity(order.len());
    for id in order {
        let mut one = Append::default();
        add(&mut one, id);
        outcomes.push(match one.execute(connection).await {
            Ok(outcome) => outcome.into_iter().next().ok_or_else(|| Error::internal("no outcome")),
            Err(error @ Error::Internal(_)) => Err(error),
            Err(error) => return Err(error),
        });
    }
    Ok(outcomes)
}
