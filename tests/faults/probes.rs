//! One client per server that appends one event after the other, to see
//! whether the service is there.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use milepost::pb;

use crate::{
    history::{Attempt, Moment, Outcome},
    world::{World, outcome},
    writers::{Writer, event},
};

/// Between one append and the next.
const INTERVAL: Duration = Duration::from_millis(25);
/// How long an answer may take before the event is sent again.
const TIMEOUT: Duration = Duration::from_millis(400);
/// Events in one job, then comes another one.
const EVENTS: usize = 1_000;

/// When a server was asked, and when it answered that it had appended.
pub type Successes = Arc<Mutex<Vec<(Moment, Moment)>>>;

pub async fn probe(world: Arc<World>, replica: usize, successes: Successes) {
    let mut writer = Writer::new(&world, format!("probe {replica}"), 0);
    let mut job = writer.new_job().await;
    let mut appended = 0;
    while !world.is_finishing() {
        if appended == EVENTS {
            job = writer.new_job().await;
            appended = 0;
        }
        let event = event(&world, &mut writer.random, job);
        let mut batch = writer.batch(job, vec![event]);
        let request = pb::AppendEventsRequest {
            job: Some(pb::append_events_request::Job::JobId(world.job_id(job))),
            expected_sequence: None,
            events: batch.events.clone(),
        };
        while batch.answer().is_none() {
            let sent = world.now();
            let call = writer.callers[replica].events.append_events(request.clone());
            let outcome = outcome(world.answer_within(TIMEOUT, "AppendEvents", call).await);
            let over = world.now();
            if let Outcome::Appended(_) = outcome {
                successes.lock().unwrap().push((sent, over));
            }
            let refused = matches!(outcome, Outcome::Refused(_));
            batch.attempts.push(Attempt { replica, sent, over, outcome });
            tokio::time::sleep(INTERVAL).await;
            if refused {
                break;
            }
        }
        appended += 1;
        world.history.lock().unwrap().batches.push(batch);
    }
}
