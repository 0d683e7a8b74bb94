//! Those who ask how jobs are while everything goes on: by GetJob, ListJobs and
//! ListEvents.

use std::sync::Arc;

use milepost::pb;

use crate::{
    history::{Body, Chain, End, Glance, Message, Only, Scope, Start, Stream},
    world::{Caller, World},
};

/// Between one look and the next.
const PAUSE_MS: u64 = 100;

pub async fn look_around(world: Arc<World>) {
    let mut random = world.random();
    let mut callers: Vec<_> = world.providers.iter().map(|provider| world.callers(provider)).collect();
    while !world.is_finishing() {
        world.pause(&mut random, PAUSE_MS).await;
        let Some((job, sequence)) = world.recently_acknowledged(&mut random) else { continue };
        let (provider, replica) = (world.history.lock().unwrap().jobs[job].provider, random.usize(..2));
        let caller = &mut callers[provider][replica];
        match random.u32(..10) {
            0 => glance_at_all(&world, caller, replica).await,
            1..4 => list(&world, caller, replica, job, sequence).await,
            _ => glance(&world, caller, replica, job).await,
        }
    }
}

async fn glance(world: &World, caller: &mut Caller, replica: usize, job: usize) {
    let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(world.job_id(job))) };
    let sent = world.now();
    // Who is not answered has learned nothing.
    if let Ok(answer) = world.answer("GetJob", caller.jobs.get_job(request)).await {
        let found = answer.job.expect("a job");
        let glance = Glance { replica, sent, over: world.now(), found };
        world.history.lock().unwrap().glances.push(glance);
    }
}

async fn glance_at_all(world: &World, caller: &mut Caller, replica: usize) {
    let sent = world.now();
    let request = pb::ListJobsRequest::default();
    if let Ok(page) = world.answer("ListJobs", caller.jobs.list_jobs(request)).await {
        let over = world.now();
        let glances = page.jobs.into_iter().map(|found| Glance { replica, sent, over, found });
        world.history.lock().unwrap().glances.extend(glances);
    }
}

/// Page by page to where there is no more, as a watch would tell it.
async fn list(world: &World, caller: &mut Caller, replica: usize, job: usize, after: i64) {
    let opened = world.now();
    let mut request = pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(world.job_id(job))),
        after_sequence: after,
        page_size: 20,
        ..Default::default()
    };
    let mut messages = Vec::new();
    loop {
        let call = caller.events.list_events(request.clone());
        let Ok(page) = world.answer("ListEvents", call).await else { return };
        let events = page.events.into_iter().map(|event| world.events.one_of(event)).collect();
        messages.push(Message { at: world.now(), body: Body::Events(events) });
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    messages.push(Message { at: world.now(), body: Body::Listed });
    let (start, over) = (Start::AfterSequence(after), world.now());
    let stream = Stream { replica, start, opened, messages, end: End::Left, over };
    let chain = Chain {
        name: "a reader".to_owned(),
        scope: Scope::Job(job),
        only: Only::default(),
        prompt: false,
        kinds: Vec::new(),
        streams: vec![stream],
        whole: false,
    };
    world.history.lock().unwrap().chains.push(chain);
}
