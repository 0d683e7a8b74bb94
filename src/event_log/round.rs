//! What is appended in one transaction: who asked for it, what it comes to for
//! each job, and what is told afterwards.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use diesel_async::{AsyncPgConnection, pooled_connection::PoolableConnection as _};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use uuid::Uuid;

use super::{
    job_cache::JobIdentity,
    plan::{Appended, Batch},
};
use crate::{
    error::{Error, Result},
    models::{
        audit_entry::AuditEntry,
        event::{Append, AppendOutcome, Event, NewRow},
    },
    progress::JobState,
    telemetry::traces::{AppendSpan, TransactionSpan},
};

/// A database that does not answer within this is slow for all, whatever it was
/// asked.
const REFUSED_WITHIN: Duration = Duration::from_secs(1);

/// Whom to answer, and since when they wait.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) to: oneshot::Sender<Result<Vec<Appended>>>,
    pub(super) since: Instant,
}

/// Batches of one stream, of which none may be appended after one failed.
#[derive(Clone, Debug, Default)]
pub(crate) struct StreamOrder(Arc<AtomicBool>);

#[derive(Debug)]
pub(super) struct Request {
    pub(super) batch: Batch,
    pub(super) stream_order: StreamOrder,
    /// Events of the batch that were found stored.
    pub(super) stored: HashMap<Uuid, Event>,
    pub(super) in_doubt: bool,
    /// Its job had moved although its state had just been read.
    pub(super) outrun: bool,
    pub(super) reply: Reply,
    pub(super) span: Option<Box<AppendSpan>>,
    pub(super) _room: OwnedSemaphorePermit,
}

impl Request {
    pub(super) fn answer(self, answer: Result<Vec<Appended>>) {
        // Whoever left does not want to know.
        let _ = self.reply.to.send(answer);
    }

    /// Whoever lines up behind it in its lane fails as well.
    pub(super) fn fail(self, source: &Arc<Error>) {
        self.stream_order.0.store(true, Ordering::Relaxed);
        let source = Arc::clone(source);
        let ours = matches!(*source, Error::Internal(_));
        self.answer(Err(if ours { Error::internal(source) } else { Error::unavailable(source) }));
    }

    /// Nothing if nobody waits for it any more, or if a batch before it in its
    /// lane failed or dropped out.
    pub(super) fn still_wanted(self) -> Option<Self> {
        if self.stream_order.0.load(Ordering::Relaxed) {
            self.answer(Err(Error::unavailable("a batch before this one failed")));
            return None;
        }
        if self.reply.to.is_closed() {
            // Nor may what was sent after it be appended without it.
            self.stream_order.0.store(true, Ordering::Relaxed);
            return None;
        }
        Some(self)
    }
}

/// What is appended in one transaction.
#[derive(Default)]
pub(super) struct Round {
    pub(super) groups: HashMap<Uuid, Group>,
    /// The jobs that have something to append.
    pub(super) order: Vec<Uuid>,
    /// What clients made the ids of, among what it appends.
    pub(super) ids: HashSet<(Uuid, Uuid)>,
    pub(super) events: usize,
    /// It appends to one job at most, locked by the transaction that is open on
    /// the connection.
    pub(super) locked: bool,
    pub(super) span: Option<TransactionSpan>,
}

/// One job's part of a round.
pub(super) struct Group {
    /// What each request comes to; a refusal holds once what is planned before
    /// it is committed.
    pub(super) plans: Vec<(Request, Result<Vec<Appended>>)>,
    pub(super) before: JobState,
    pub(super) after: JobState,
    /// The state is not remembered but was read for this round.
    pub(super) fresh: bool,
}

impl Round {
    /// Plans a request, for a job that is in this state before the round; gives
    /// back what is in doubt. `fresh` says that the state was just read.
    pub(super) fn fold(&mut self, mut request: Request, state: JobState, fresh: bool) -> Option<Request> {
        let id = request.batch.job.id;
        let looked_up = std::mem::replace(&mut request.in_doubt, true);
        let new_ids = || {
            let ids = request.batch.client_ids().filter(|id| !request.stored.contains_key(id));
            ids.map(|event| (id, event))
        };
        if new_ids().any(|id| self.ids.contains(&id)) {
            // The same event twice in one round: the second waits for what
            // becomes of the first.
            return Some(request);
        }
        let new_group = || Group { plans: Vec::new(), before: state, after: state, fresh };
        let (mut after, fresh) =
            self.groups.get(&id).map_or((state, fresh), |group| (group.after, group.fresh));
        let plan = request.batch.plan(&request.stored, &mut after);
        if plan.is_err() && !(looked_up && fresh) {
            return Some(request);
        }
        let appended = plan.as_ref().map_or(0, |events| events.iter().filter(|event| !event.existed).count());
        if appended > 0 {
            self.ids.extend(new_ids());
            self.events += appended;
        }
        let group = self.groups.entry(id).or_insert_with(new_group);
        if appended > 0 && group.is_empty() {
            self.order.push(id);
        }
        group.after = after;
        request.in_doubt = false;
        group.plans.push((request, plan));
        None
    }

    /// How many requests it serves.
    pub(super) fn batches(&self) -> usize {
        self.groups.values().map(|group| group.plans.len()).sum()
    }

    /// Takes a job out; its requests, in their order.
    pub(super) fn withdraw(&mut self, job: &Uuid) -> Vec<Request> {
        let Some(group) = self.groups.remove(job) else { return Vec::new() };
        self.order.retain(|id| id != job);
        self.ids.retain(|(id, _)| id != job);
        self.events -= group.events().count();
        group.plans.into_iter().map(|(request, _)| request).collect()
    }

    /// Appends its events in one transaction; if the database refuses it as
    /// a whole, each job's in one of its own, so that nobody fails for another's
    /// sake.
    pub(super) async fn append(
        &self,
        connection: &mut AsyncPgConnection,
    ) -> Result<Vec<Result<AppendOutcome>>> {
        let of = |jobs: &[Uuid]| {
            let mut append = Append::default();
            for id in jobs {
                let group = &self.groups[id];
                append.add(*id, &group.before, &group.after, group.events());
                group.audit().for_each(|entry| append.audit(entry));
            }
            append
        };
        let (all, since) = (of(&self.order), Instant::now());
        let appended =
            if self.locked { all.execute_locked(connection).await } else { all.execute(connection).await };
        match appended {
            Ok(outcomes) => return Ok(outcomes.into_iter().map(Ok).collect()),
            Err(error) => {
                let slow = !matches!(error, Error::Internal(_)) && since.elapsed() > REFUSED_WITHIN;
                if slow || self.order.len() == 1 || connection.is_broken() {
                    return Err(error);
                }
            }
        }
        let mut outcomes = Vec::with_capacity(self.order.len());
        for job in self.order.chunks(1) {
            match of(job).execute(connection).await {
                Ok(outcome) => outcomes.extend(outcome.into_iter().map(Ok)),
                Err(error) if connection.is_broken() => return Err(error),
                Err(error) => outcomes.push(Err(error)),
            }
        }
        Ok(outcomes)
    }
}

impl Group {
    /// What it appends.
    pub(super) fn events(&self) -> impl Iterator<Item = NewRow<'_>> {
        self.accepted().flat_map(|(request, answer)| request.batch.rows(answer))
    }

    /// What is written down of it.
    fn audit(&self) -> impl Iterator<Item = &AuditEntry> {
        self.accepted().filter_map(|(request, _)| request.batch.audit.as_deref())
    }

    fn accepted(&self) -> impl Iterator<Item = (&Request, &[Appended])> {
        self.plans.iter().filter_map(|(request, plan)| Some((request, plan.as_deref().ok()?)))
    }

    /// Of those that are traced.
    pub(super) fn spans(&mut self) -> impl Iterator<Item = &mut AppendSpan> {
        self.plans.iter_mut().filter_map(|(request, _)| request.span.as_deref_mut())
    }

    /// Whether it appends nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.before.last_sequence == self.after.last_sequence
    }
}

/// What is to be told after a round.
#[derive(Default)]
pub(super) struct Settled {
    pub(super) answers: Vec<(Reply, Result<Vec<Appended>>)>,
    /// In the order of the log.
    pub(super) committed: Vec<(Event, Arc<JobIdentity>)>,
}

impl Settled {
    pub(super) fn append(&mut self, group: Group, mut position: i64, at: DateTime<Utc>) {
        for (request, plan) in group.plans {
            if let Ok(answer) = &plan {
                let job = Arc::clone(&request.batch.job);
                if let Some(entry) = &request.batch.audit {
                    entry.log();
                }
                for event in request.batch.into_events(answer, at) {
                    position += 1;
                    self.committed.push((Event { position, ..event }, Arc::clone(&job)));
                }
            }
            self.answers.push((request.reply, plan));
        }
    }

    pub(super) fn nothing_to_append(&mut self, groups: HashMap<Uuid, Group>) {
        let plans = groups.into_values().flat_map(|group| group.plans);
        self.answers.extend(plans.map(|(request, plan)| (request.reply, plan)));
    }
}
