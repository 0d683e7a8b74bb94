//! A round: the requests that one transaction serves, what they come to for each job,
//! and what is answered and delivered afterwards.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use diesel_async::pooled_connection::PoolableConnection as _;
use uuid::Uuid;

use super::{
    ROUND,
    batch::{Appended, AppendedEvent},
    request::{Cost, Costs, Knowledge, Reply, Request},
};
use crate::{
    error::{Error, Resource, Result},
    event_log::event::CommittedEvent,
    models::{
        audit_entry::AuditEntry,
        event::{AppendConnection, AppendOutcome, AppendStatement, LockedJob, NewRow},
    },
    progress::{Cancellation, JobState},
    telemetry::{
        metrics::Metrics,
        traces::{AppendSpan, Traces, TransactionSpan},
    },
};

/// A database that takes longer than this to refuse a round is slow, whatever the
/// round contains: its jobs are not tried one by one.
const REFUSED_WITHIN: Duration = Duration::from_secs(1);

/// The requests of one transaction.
#[derive(Default)]
pub(super) struct Round {
    pub(super) groups: HashMap<Uuid, Group>,
    /// The jobs that are appended to.
    pub(super) order: Vec<Uuid>,
    /// The ids of jobs and events, of those events whose ids clients made.
    ids: HashSet<(Uuid, Uuid)>,
    /// The publish streams that end with a refusal in this round.
    ended: HashSet<usize>,
    /// How many events are appended.
    pub(super) events: usize,
    /// What the requests take of the round.
    costs: Costs,
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
    /// Whether the round has room for a request of this provider.
    pub(super) fn has_room(&self, provider_id: Uuid, cost: Cost) -> bool {
        self.costs.has_room(provider_id, cost, ROUND)
    }

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
        let (mut after, known) =
            self.groups.get(&id).map_or((state.clone(), known), |group| (group.after.clone(), group.known));
        let plan = if self.ended.contains(&request.stream_order.number()) {
            Err(Error::unavailable("a batch before this one failed"))
        } else {
            request.batch.plan(&request.stored, &mut after)
        };
        // What appends nothing rests on a state that may be older than the job's.
        let appends = plan.as_ref().is_ok_and(|events| events.iter().any(|event| !event.existed));
        if repeats || !appends && known.min(request.needs) < Knowledge::Read {
            request.needs = request.needs.max(Knowledge::Read);
            return Some(request);
        }
        let appended = plan.as_ref().map_or(0, |events| events.iter().filter(|event| !event.existed).count());
        if appended > 0 {
            self.ids.extend(new_ids());
            self.events += appended;
        }
        if ends_stream(&plan) {
            self.ended.insert(request.stream_order.number());
        }
        let new_group = || Group { plans: Vec::new(), before: state.clone(), after: state, known };
        let group = self.groups.entry(id).or_insert_with(new_group);
        if appended > 0 && group.is_empty() {
            self.order.push(id);
        }
        group.after = after;
        self.costs.add(&request);
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
    pub(super) fn withdraw(&mut self, job: Uuid) -> Vec<Request> {
        let Some(group) = self.groups.remove(&job) else { return Vec::new() };
        self.order.retain(|id| *id != job);
        self.ids.retain(|(id, _)| *id != job);
        self.events -= group.events().count();
        group.plans.iter().for_each(|(request, _)| self.costs.remove(request));
        group.plans.into_iter().map(|(request, _)| request).collect()
    }

    /// Takes a job out of the round if nothing is appended to it: its answers depend on no
    /// transaction.
    pub(super) fn take_answered(&mut self, job: Uuid) -> Option<Group> {
        if !self.groups.get(&job).is_some_and(Group::is_empty) {
            return None;
        }
        let group = self.groups.remove(&job)?;
        group.plans.iter().for_each(|(request, _)| self.costs.remove(request));
        Some(group)
    }

    /// Appends in one transaction. If the database refuses the round as a whole, each
    /// job is tried in a transaction of its own, so that no job fails because of another.
    pub(super) async fn append(
        &self,
        mut connection: AppendConnection,
    ) -> Result<(AppendConnection, Vec<Result<AppendOutcome>>)> {
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

    /// Plans requests on these states, which took a while to read, if they are still wanted;
    /// returns those that have to wait, in their order. Requests for jobs that do not exist
    /// are answered so.
    pub(super) fn plan_all(
        &mut self,
        requests: Vec<Request>,
        states: &HashMap<Uuid, JobState>,
        known: Knowledge,
    ) -> Vec<Request> {
        let mut unplanned: Vec<Request> = Vec::new();
        for request in requests {
            let Some(request) = request.still_wanted() else { continue };
            let id = request.job_id();
            let Some(state) = states.get(&id) else {
                request.answer(Err(Error::not_found(Resource::Job, &id)));
                continue;
            };
            if unplanned.iter().any(|before| before.job_id() == id) {
                unplanned.push(request);
            } else {
                unplanned.extend(self.plan(request, state.clone(), known));
            }
        }
        unplanned
    }

    /// Appends to the locked job, and ends its transaction.
    pub(super) async fn append_locked(
        &self,
        locked: LockedJob,
    ) -> Result<(AppendConnection, Vec<Result<AppendOutcome>>)> {
        let (connection, outcomes) = locked.append(&self.statement(&self.order)).await?;
        Ok((connection, outcomes.into_iter().map(Ok).collect()))
    }

    /// Starts the round's span, if one of its requests is traced.
    pub(super) fn start_span(&mut self, traces: &Traces) {
        self.span = traces.transaction(self.groups.values_mut().flat_map(Group::spans));
    }

    /// Appends by this work, and measures how long that takes if it succeeds.
    pub(super) async fn measured<T>(
        &self,
        metrics: &Metrics,
        append: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let sent_at = Instant::now();
        let statement = self.span.as_ref().map(TransactionSpan::statement);
        let appended = append.await?;
        drop(statement);
        metrics.appends.committed(sent_at.elapsed(), self.events, self.batches());
        Ok(appended)
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

/// Whether a publish stream ends with this answer.
fn ends_stream(answer: &Result<Vec<AppendedEvent>>) -> bool {
    answer.as_ref().is_err_and(|error| !error.is_about_content())
}

/// What is to be answered and delivered after a round.
#[derive(Default)]
pub(super) struct Completed {
    pub(super) answers: Vec<(Reply, Result<Appended>)>,
    /// The committed events, in the order of the log.
    pub(super) events: Vec<CommittedEvent>,
}

impl Completed {
    /// Adds a job whose events were committed after this position, at this time.
    pub(super) fn commit(&mut self, group: Group, mut position: i64, at: DateTime<Utc>) {
        let cancellation = group.after.cancellation.committed(at);
        for (request, plan) in group.plans {
            let Request { batch, reply, stream_order, .. } = request;
            if ends_stream(&plan) {
                stream_order.fail();
            }
            if let Ok(answer) = &plan {
                if let Some(entry) = &batch.audit {
                    entry.log();
                }
                for mut event in batch.into_events(answer, at) {
                    position += 1;
                    event.row.position = position;
                    self.events.push(event);
                }
            }
            self.answer_with(reply, plan, cancellation);
        }
    }

    /// Adds jobs that nothing was to be appended to.
    pub(super) fn answer(&mut self, groups: impl IntoIterator<Item = Group>) {
        for group in groups {
            for (request, plan) in group.plans {
                if ends_stream(&plan) {
                    request.stream_order.fail();
                }
                self.answer_with(request.reply, plan, group.after.cancellation);
            }
        }
    }

    fn answer_with(&mut self, to: Reply, plan: Result<Vec<AppendedEvent>>, cancellation: Cancellation) {
        let cancellation_requested_at = cancellation.requested_at();
        self.answers.push((to, plan.map(|events| Appended { events, cancellation_requested_at })));
    }
}
