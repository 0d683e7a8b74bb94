//! The requests that cannot be planned from memory: their jobs are read first.

use std::collections::{HashMap, HashSet, VecDeque};

use uuid::Uuid;

use super::{
    ROUND,
    request::{Cost, Costs, Knowledge, Request},
};

/// Most requests of one read, and most events whose ids it looks up: many ids of one
/// provider must not keep the first append of another one waiting.
const READ_REQUESTS: usize = 100;
const READ_IDS: usize = 500;

/// Requests by job, those of each job in their order.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    by_job: HashMap<Uuid, VecDeque<Request>>,
    costs: Costs,
}

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.by_job.is_empty()
    }

    pub(super) fn contains(&self, job: Uuid) -> bool {
        self.by_job.contains_key(&job)
    }

    /// How much of one provider waits.
    pub(super) fn cost_of(&self, provider_id: Uuid) -> Cost {
        self.costs.of(provider_id)
    }

    /// Adds a request behind those of its job.
    pub(super) fn push(&mut self, request: Request) {
        self.costs.add(&request);
        self.by_job.entry(request.job_id()).or_default().push_back(request);
    }

    /// Takes the requests of a job.
    pub(super) fn take(&mut self, job: Uuid) -> VecDeque<Request> {
        let requests = self.by_job.remove(&job).unwrap_or_default();
        requests.iter().for_each(|request| self.costs.remove(request));
        requests
    }

    /// Takes all requests.
    pub(super) fn take_all(&mut self) -> Vec<Request> {
        self.costs = Costs::default();
        std::mem::take(&mut self.by_job).into_values().flatten().collect()
    }

    /// Takes the first requests of free jobs for a read, in turns of the providers, those that
    /// have waited longest first.
    pub(super) fn take_to_read(&mut self, is_free: &dyn Fn(Uuid) -> bool) -> Vec<Request> {
        let mut heads: Vec<_> = self.by_job.values().filter_map(|requests| requests.front()).collect();
        heads.retain(|request| request.needs < Knowledge::Locked && is_free(request.job_id()));
        heads.sort_by_key(|request| request.reply.since);
        let mut jobs: HashMap<Uuid, VecDeque<Uuid>> = HashMap::new();
        let mut turns = VecDeque::new();
        for head in heads {
            let of_provider = jobs.entry(head.provider_id()).or_default();
            if of_provider.is_empty() {
                turns.push_back(head.provider_id());
            }
            of_provider.push_back(head.job_id());
        }
        let (mut taken, mut costs, mut ids) = (Vec::new(), Costs::default(), 0);
        while let Some(provider_id) = turns.pop_front() {
            let Some(of_provider) = jobs.get_mut(&provider_id) else { continue };
            let Some(job) = of_provider.front().copied() else { continue };
            let Some(next) = self.by_job.get(&job).and_then(VecDeque::front) else {
                of_provider.pop_front();
                turns.push_front(provider_id);
                continue;
            };
            if next.needs >= Knowledge::Locked {
                of_provider.pop_front();
                turns.push_front(provider_id);
                continue;
            }
            let of_next = ids_to_read(next);
            let first = costs.of(provider_id) == Cost::default();
            let most_ids = if first { 3 * READ_IDS } else { READ_IDS };
            let room = taken.len() < READ_REQUESTS
                && (ids == 0 || ids + of_next <= most_ids)
                && costs.has_room(provider_id, next.cost, ROUND);
            // A provider without room leaves its turns to the others.
            if room && let Some(request) = self.pop(job) {
                ids += of_next;
                costs.add(&request);
                taken.push(request);
                turns.push_back(provider_id);
            }
        }
        taken
    }

    /// Takes the first requests of a free job whose row has to be locked.
    pub(super) fn take_to_lock(&mut self, is_free: &dyn Fn(Uuid) -> bool) -> Vec<Request> {
        let heads = self.by_job.values().filter_map(|requests| requests.front());
        let locked = heads.filter(|head| head.needs == Knowledge::Locked && is_free(head.job_id()));
        let Some(job) = locked.min_by_key(|head| head.reply.since).map(Request::job_id) else {
            return Vec::new();
        };
        let (mut taken, mut costs, mut ids) = (Vec::new(), Costs::default(), 0);
        while let Some(next) = self.by_job.get(&job).and_then(VecDeque::front) {
            let of_next = next.batch.client_ids().count();
            let room = costs.has_room(next.provider_id(), next.cost, ROUND);
            if !taken.is_empty() && (!room || ids + of_next > READ_IDS) {
                break;
            }
            let Some(request) = self.pop(job) else { break };
            ids += of_next;
            costs.add(&request);
            taken.push(request);
        }
        taken
    }

    fn pop(&mut self, job: Uuid) -> Option<Request> {
        let requests = self.by_job.get_mut(&job)?;
        let request = requests.pop_front()?;
        if requests.is_empty() {
            self.by_job.remove(&job);
        }
        self.costs.remove(&request);
        Some(request)
    }
}

/// The jobs of these requests.
pub(super) fn jobs_of(requests: &[Request]) -> HashSet<Uuid> {
    requests.iter().map(Request::job_id).collect()
}

fn ids_to_read(request: &Request) -> usize {
    if request.needs >= Knowledge::Read { request.batch.client_ids().count() } else { 0 }
}
