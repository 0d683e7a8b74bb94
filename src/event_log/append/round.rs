//! A round: the requests that one transaction serves, what they come to for each job,
//! and what is answered and delivered afterwards.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use diesel_async::pooled_connection::PoolableConnection as _;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use uuid::Uuid;

use super::{
    StreamOrder,
    batch::{AppendedEvent, Batch},
};
use crate::{
    auth::Credential,
    db::OwnConnection,
    error::{Error, Result},
    event_log::event::CommittedEvent,
    models::{
        audit_entry::AuditEntry,
        event::{AppendOutcome, AppendStatement, Event, LockedJob, NewRow},
    },
    progress::JobState,
    telemetry::traces::{AppendSpan, TransactionSpan},
};

/// A database that takes longer than this to refuse a round is slow, whatever the
/// round contains: its jobs are not tried one by one.
const REFUSED_WITHIN: Duration = Duration::from_secs(1);

/// Where the answer to a request goes, and since when its caller waits.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) to: oneshot::Sender<Result<Vec<AppendedEvent>>>,
    pub(super) since: Instant,
}

/// What is known of a job's state when a request is planned, and what a request needs
/// to be known. See the diagram in the parent module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Knowledge {
    /// The state that the last round of this process led to.
    Remembered,
    /// The state was read from the database for this round, and after it the stored
    /// ids of the requests that need this.
    Read,
    /// The same, and the job's row is locked until the round is committed.
    Locked,
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) credential: Arc<Credential>,
    pub(super) batch: Batch,
    pub(super) stream_order: StreamOrder,
    /// Events of the batch that were found stored.
    pub(super) stored: HashMap<Uuid, Event>,
    pub(super) needs: Knowledge,
    pub(super) reply: Reply,
    pub(super) span: Option<Box<AppendSpan>>,
    pub(super) _room: OwnedSemaphorePermit,
}

impl Request {
    pub(super) fn answer(self, answer: Result<Vec<AppendedEvent>>) {
        // A caller that left needs no answer.
        let _ = self.reply.to.send(answer);
    }

    /// Fails the request and all later ones of its publish stream.
    pub(super) fn fail(self, source: &Arc<Error>) {
        self.stream_order.fail();
        let source = Arc::clone(source);
        let internal = matches!(*source, Error::Internal(_));
        self.answer(Err(if internal { Error::internal(source) } else { Error::unavailable(source) }));
    }

    /// Why the batch must not be appended: its credential has ended, an earlier batch of the
    /// publish stream failed, or the caller has left.
    fn refusal(&self) -> Option<Error> {
        if let Err(error) = self.credential.check_valid() {
            return Some(error);
        }
        if self.stream_order.has_failed() {
            return Some(Error::unavailable("a batch before this one failed"));
        }
        self.reply.to.is_closed().then(|| Error::unavailable("the caller has left"))
    }

    /// `None` if the batch must not be appended any more. Then no later batch of the publish
    /// stream is appended either.
    pub(super) fn still_wanted(self) -> Option<Self> {
        let Some(error) = self.refusal() else { return Some(self) };
        self.stream_order.fail();
        self.answer(Err(error));
        None
    }
}

/// The requests of one transaction.
#[derive(Default)]
pub(super) struct Round {
    pub(super) groups: HashMap<Uuid, Group>,
    /// The jobs that are appended to.
    pub(super) order: Vec<Uuid>,
    /// The ids of jobs and events, of those events whose ids clients made.
    ids: HashSet<(Uuid, Uuid)>,
    /// How many events are appended.
    pub(super) events: usize,
    /// The transaction that is open already, of a round of one locked job.
    pub(super) locked: Option<LockedJob>,
    pub(super) span: Option<TransactionSpan>,
}

/// The part of a round that concerns one job.
pub(super) struct Group {
    /// What each request comes to. A refusal holds once the plans before it are
    /// committed.
    pub(super) plans: Vec<(Request, Result<Vec<AppendedEvent>>)>,
    before: JobState,
    pub(super) after: JobState,
    known: Knowledge,
}

impl Round {
    /// Plans a request for a job of which `state` is known before the round. Gives a
    /// request back that needs a read of its job first.
    pub(super) fn plan(
        &mut self,
        mut request: Request,
        state: JobState,
        known: Knowledge,
    ) -> Option<Request> {
        let id = request.batch.job.id;
        let new_ids = || {
            let ids = request.batch.client_ids().filter(|id| !request.stored.contains_key(id));
            ids.map(|event| (id, event))
        };
        // The same event twice in one round: the second request waits for what becomes
        // of the first.
        let repeats = new_ids().any(|id| self.ids.contains(&id));
        let new_group = Group { plans: Vec::new(), before: state, after: state, known };
        let (mut after, known) =
            self.groups.get(&id).map_or((state, known), |group| (group.after, group.known));
        let plan = request.batch.plan(&request.stored, &mut after);
        if repeats || plan.is_err() && known.min(request.needs) < Knowledge::Read {
            request.needs = request.needs.max(Knowledge::Read);
            return Some(request);
        }
        let appended = plan.as_ref().map_or(0, |events| events.iter().filter(|event| !event.existed).count());
        if appended > 0 {
            self.ids.extend(new_ids());
            self.events += appended;
        }
        let group = self.groups.entry(id).or_insert(new_group);
        if appended > 0 && group.is_empty() {
            self.order.push(id);
        }
        group.after = after;
        group.plans.push((request, plan));
        None
    }

    pub(super) fn batches(&self) -> usize {
        self.groups.values().map(|group| group.plans.len()).sum()
    }

    /// The jobs with a request that is not wanted any more.
    pub(super) fn unwanted(&self) -> Vec<Uuid> {
        let refused = |group: &Group| group.plans.iter().any(|(request, _)| request.refusal().is_some());
        self.groups.iter().filter(|(_, group)| refused(group)).map(|(id, _)| *id).collect()
    }

    /// Takes a job out of the round; returns its requests in their order.
    pub(super) fn withdraw(&mut self, job: &Uuid) -> Vec<Request> {
        let Some(group) = self.groups.remove(job) else { return Vec::new() };
        self.order.retain(|id| id != job);
        self.ids.retain(|(id, _)| id != job);
        self.events -= group.events().count();
        group.plans.into_iter().map(|(request, _)| request).collect()
    }

    /// Appends in one transaction. If the database refuses the round as a whole, each
    /// job is tried in a transaction of its own, so that no job fails because of another.
    pub(super) async fn append(
        &self,
        mut connection: OwnConnection,
    ) -> Result<(OwnConnection, Vec<Result<AppendOutcome>>)> {
        let since = Instant::now();
        match self.statement(&self.order).execute(&connection).await {
            Ok(outcomes) => return Ok((connection, outcomes.into_iter().map(Ok).collect())),
            Err(error) => {
                let slow = !matches!(error, Error::Internal(_)) && since.elapsed() > REFUSED_WITHIN;
                if slow || self.order.len() == 1 || connection.is_broken() {
                    return Err(error);
                }
            }
        }
        let mut outcomes = Vec::with_capacity(self.order.len());
        for job in self.order.chunks(1) {
            match self.statement(job).execute(&connection).await {
                Ok(outcome) => outcomes.extend(outcome.into_iter().map(Ok)),
                Err(error) if connection.is_broken() => return Err(error),
                Err(error) => outcomes.push(Err(error)),
            }
        }
        Ok((connection, outcomes))
    }

    /// Appends to the locked job, and ends its transaction.
    pub(super) async fn append_locked(
        &self,
        locked: LockedJob,
    ) -> Result<(OwnConnection, Vec<Result<AppendOutcome>>)> {
        let (connection, outcomes) = locked.append(&self.statement(&self.order)).await?;
        Ok((connection, outcomes.into_iter().map(Ok).collect()))
    }

    fn statement(&self, jobs: &[Uuid]) -> AppendStatement<'_> {
        let mut statement = AppendStatement::default();
        for id in jobs {
            let group = &self.groups[id];
            statement.add(*id, &group.before, &group.after, group.events());
            group.audit().for_each(|entry| statement.audit(entry));
        }
        statement
    }
}

impl Group {
    fn events(&self) -> impl Iterator<Item = NewRow<'_>> {
        self.accepted().flat_map(|(request, answer)| request.batch.rows(answer))
    }

    fn audit(&self) -> impl Iterator<Item = &AuditEntry> {
        self.accepted().filter_map(|(request, _)| request.batch.audit.as_deref())
    }

    fn accepted(&self) -> impl Iterator<Item = (&Request, &[AppendedEvent])> {
        self.plans.iter().filter_map(|(request, plan)| Some((request, plan.as_deref().ok()?)))
    }

    pub(super) fn spans(&mut self) -> impl Iterator<Item = &mut AppendSpan> {
        self.plans.iter_mut().filter_map(|(request, _)| request.span.as_deref_mut())
    }

    /// Whether nothing is appended.
    fn is_empty(&self) -> bool {
        self.before.last_sequence == self.after.last_sequence
    }

    /// The requests of a job that was not appended to, with what they need to be planned
    /// again.
    pub(super) fn into_requests(self, outcome: AppendOutcome) -> impl Iterator<Item = Request> {
        self.plans.into_iter().map(move |(mut request, plan)| {
            let moved = outcome == AppendOutcome::Moved;
            let may_be_stored = !moved && request.batch.client_ids().next().is_some();
            request.needs = if moved && self.known >= Knowledge::Read {
                Knowledge::Locked
            } else if plan.is_err() || may_be_stored {
                Knowledge::Read
            } else {
                Knowledge::Remembered
            };
            request
        })
    }
}

/// What is to be answered and delivered after a round.
#[derive(Default)]
pub(super) struct Completed {
    pub(super) answers: Vec<(Reply, Result<Vec<AppendedEvent>>)>,
    /// The committed events, in the order of the log.
    pub(super) events: Vec<CommittedEvent>,
}

impl Completed {
    /// Adds a job whose events were committed after this position, at this time.
    pub(super) fn commit(&mut self, group: Group, mut position: i64, at: DateTime<Utc>) {
        for (request, plan) in group.plans {
            if let Ok(answer) = &plan {
                if let Some(entry) = &request.batch.audit {
                    entry.log();
                }
                for mut event in request.batch.into_events(answer, at) {
                    position += 1;
                    event.row.position = position;
                    self.events.push(event);
                }
            }
            self.answers.push((request.reply, plan));
        }
    }

    /// Adds jobs that nothing was to be appended to.
    pub(super) fn answer(&mut self, groups: HashMap<Uuid, Group>) {
        let plans = groups.into_values().flat_map(|group| group.plans);
        self.answers.extend(plans.map(|(request, plan)| (request.reply, plan)));
    }
}
