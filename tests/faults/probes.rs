//! A probe for each replica: it appends one event after the other, to measure from
//! when to when the replica can append.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use milepost_client::pb;

use crate::{
    context::{Context, append_outcome},
    history::{Attempt, Moment, Outcome},
    writers::{Writer, event},
};

/// Pause after each append.
const INTERVAL: Duration = Duration::from_millis(25);
/// After so many events a probe creates another job.
const EVENTS_PER_JOB: usize = 1_000;

/// For each successful append the moments when it was sent and when it was answered.
pub type Successes = Arc<Mutex<Vec<(Moment, Moment)>>>;

pub async fn probe(context: Arc<Context>, replica: usize, successes: Successes) {
    let mut writer = Writer::new(&context, format!("probe {replica}"), 0);
    // Until the event is sent again: shorter than a server may take to recover, and on a busy
    // machine longer than an append may take.
    let timeout = Duration::from_secs(if context.strict { 1 } else { 10 });
    let mut job = writer.create_job().await;
    let mut appended = 0;
    while !context.is_finishing() {
        if appended == EVENTS_PER_JOB {
            job = writer.create_job().await;
            appended = 0;
        }
        let event = event(&context, &mut writer.random, job);
        let mut batch = writer.batch(job, vec![event]);
        let request = pb::AppendEventsRequest {
            job: Some(pb::append_events_request::Job::JobId(context.job_id(job))),
            expected_sequence: None,
            events: batch.events.clone(),
        };
        while batch.answer().is_none() {
            let sent_at = context.now();
            let call = writer.clients[replica].events.append_events(request.clone());
            let outcome = append_outcome(context.call_within(timeout, "AppendEvents", call).await);
            let ended_at = context.now();
            if let Outcome::Appended(_) = outcome {
                successes.lock().unwrap().push((sent_at, ended_at));
            }
            let refused = matches!(outcome, Outcome::Refused(_));
            batch.attempts.push(Attempt { replica, sent_at, ended_at, outcome });
            tokio::time::sleep(INTERVAL).await;
            if refused {
                break;
            }
        }
        // The job itself may be lost.
        let refused = batch.answer().is_none();
        appended = if refused { EVENTS_PER_JOB } else { appended + 1 };
        context.history.lock().unwrap().batches.push(batch);
    }
}
