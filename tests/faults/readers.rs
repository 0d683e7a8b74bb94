//! Readers that call `GetJob`, `ListJobs` and `ListEvents` during the campaign, and customers who
//! ask for cancellations.

use std::sync::Arc;

use milepost_client::pb;

use crate::{
    clients::UserClient,
    context::Context,
    history::{Body, JobFilter, JobRead, Message, Scope, Start, Stream, StreamEnd, WatcherRecord},
};

/// Maximal pause between two calls.
const MAX_PAUSE_MS: u64 = 100;

pub async fn read_jobs(context: Arc<Context>) {
    let mut random = context.random();
    let mut clients: Vec<_> = context.providers.iter().map(|provider| context.clients(provider)).collect();
    while !context.is_finishing() {
        context.pause(&mut random, MAX_PAUSE_MS).await;
        let Some((job, sequence)) = context.recently_acknowledged(&mut random) else { continue };
        let (provider, replica) = (context.history.lock().unwrap().jobs[job].provider, random.usize(..2));
        let client = &mut clients[provider][replica];
        match random.u32(..10) {
            0 => list_jobs(&context, client, replica).await,
            1..4 => list_events(&context, client, replica, job, sequence).await,
            _ => get_job(&context, client, replica, job).await,
        }
    }
}

/// Now and then asks for the cancellation of a job, as its customer.
pub async fn cancel_jobs(context: Arc<Context>) {
    let mut random = context.random();
    let mut clients: Vec<_> = context.customers.iter().map(|customer| context.clients(customer)).collect();
    while !context.is_finishing() {
        context.pause(&mut random, MAX_PAUSE_MS * 20).await;
        let Some((job, _)) = context.recently_acknowledged(&mut random) else { continue };
        let customer = context.history.lock().unwrap().jobs[job].customer;
        context.request_cancellation(&mut clients[customer], &mut random, job).await;
    }
}

async fn get_job(context: &Context, client: &mut UserClient, replica: usize, job: usize) {
    let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(context.job_id(job))) };
    let sent_at = context.now();
    // A call without a response leaves nothing to check.
    if let Ok(answer) = context.checked_call(replica, "GetJob", client.jobs.get_job(request)).await {
        let found = answer.job.expect("the response has a job");
        let read = JobRead { replica, sent_at, ended_at: context.now(), found };
        context.history.lock().unwrap().job_reads.push(read);
    }
}

async fn list_jobs(context: &Context, client: &mut UserClient, replica: usize) {
    let sent_at = context.now();
    let request = pb::ListJobsRequest::default();
    if let Ok(page) = context.checked_call(replica, "ListJobs", client.jobs.list_jobs(request)).await {
        let ended_at = context.now();
        let job_reads = page.jobs.into_iter().map(|found| JobRead { replica, sent_at, ended_at, found });
        context.history.lock().unwrap().job_reads.extend(job_reads);
    }
}

/// Reads all pages after a sequence and records them as the stream of a watcher.
async fn list_events(context: &Context, client: &mut UserClient, replica: usize, job: usize, after: i64) {
    let opened_at = context.now();
    let mut request = pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(context.job_id(job))),
        after_sequence: after,
        page_size: 20,
        ..Default::default()
    };
    let mut messages = Vec::new();
    loop {
        let call = client.events.list_events(request.clone());
        let Ok(page) = context.checked_call(replica, "ListEvents", call).await else { return };
        let events = page.events.into_iter().map(|event| context.interner.intern(event)).collect();
        messages.push(Message { received_at: context.now(), body: Body::Events(events) });
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    messages.push(Message { received_at: context.now(), body: Body::ListEnd });
    let (start, ended_at) = (Start::AfterSequence(after), context.now());
    let stream = Stream { replica, start, opened_at, messages, end: StreamEnd::ClosedByWatcher, ended_at };
    let record = WatcherRecord {
        name: "a reader of ListEvents".to_owned(),
        scope: Scope::Job(job),
        filter: JobFilter::default(),
        reads_promptly: false,
        kinds: Vec::new(),
        streams: vec![stream],
        read_to_end: false,
    };
    context.history.lock().unwrap().watchers.push(record);
}
