//! A watch of a long job from its beginning, compared with COPY of the same rows out of
//! Postgres.

use std::time::Instant;

use futures_util::StreamExt as _;
use milepost_client::{
    Client,
    pb::{
        ExportEventsRequest, WatchEventsRequest,
        export_events_response::Message as Exported,
        watch_events_request::{Scope, Start},
        watch_events_response::Message,
    },
};
use milepost_testing::connect;

use crate::{
    Result,
    accounts::{self, Accounts},
    harness::{Harness, serve, stop},
    report::{Goal, Measure, Outcome},
};

const EVENTS: u32 = 500_000;
/// Goal for the growth of the server's memory during a replay, in kB.
const GOAL_KB: f64 = 16_000.0;

pub(super) async fn measure(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let database = harness.database().await?;
    let mut server = serve(&database).await;
    let accounts = Accounts::create(server.address).await;
    let job = accounts.create_jobs(server.address, 1).await?.remove(0);
    let postgres = connect(&database).await?;
    postgres.batch_execute(&insert_events_sql()).await?;
    postgres.batch_execute("VACUUM ANALYZE").await?;
    // A restarted server has cached nothing from before the INSERT.
    stop(&mut server).await;
    server.restart().await;
    let customer = accounts::connect(server.address, &accounts.customer, 1).await?.remove(0);

    let mut rate = Outcome::new(name, "events/s").compared_with("COPY out", None);
    let mut export = Outcome::new("export", "events/s").compared_with("replay", Some(Goal::AtLeast(0.5)));
    let mut memory =
        Outcome::new(format!("{name}-memory"), "kB").compared_with("none", Some(Goal::Within(GOAL_KB)));
    for _ in 0..harness.options.rounds {
        let before = server.resident_bytes();
        let started = Instant::now();
        let request = WatchEventsRequest {
            scope: Some(Scope::JobId(job.clone())),
            start: Some(Start::AfterSequence(0)),
            ..Default::default()
        };
        let mut stream = customer.events().watch_events(request).await?.into_inner();
        let mut last = 0;
        while let Some(Message::Events(watched)) =
            stream.message().await?.and_then(|response| response.message)
        {
            for event in watched.events {
                if event.sequence != last + 1 {
                    return Err(format!("event {} came after event {last}", event.sequence).into());
                }
                last = event.sequence;
            }
        }
        if last != i64::from(EVENTS) {
            return Err(format!("the watch ended after {last} events of {EVENTS}").into());
        }
        let replayed = Measure::of(f64::from(EVENTS) / started.elapsed().as_secs_f64());
        rate.add_milepost(replayed);
        let started = Instant::now();
        export_all(&customer).await?;
        export.add_milepost(Measure::of(f64::from(EVENTS) / started.elapsed().as_secs_f64()));
        export.add_peer(replayed);
        let grown = server.resident_bytes().saturating_sub(before) / 1_000;
        memory.add_milepost(Measure::of(f64::from(u32::try_from(grown)?)));

        let started = Instant::now();
        let rows = postgres.copy_out("COPY (SELECT * FROM events ORDER BY sequence) TO STDOUT").await?;
        let mut rows = std::pin::pin!(rows);
        let mut copied = 0;
        while let Some(row) = rows.next().await {
            row?;
            copied += 1;
        }
        if copied != EVENTS {
            return Err(format!("COPY returned {copied} rows of {EVENTS}").into());
        }
        rate.add_peer(Measure::of(f64::from(EVENTS) / started.elapsed().as_secs_f64()));
    }
    Ok(vec![rate, export, memory])
}

/// Exports all events of the customer's jobs.
async fn export_all(customer: &Client) -> Result<()> {
    let mut stream = customer.events().export_events(ExportEventsRequest::default()).await?.into_inner();
    let mut last = 0;
    while let Some(Exported::Events(exported)) = stream.message().await?.and_then(|answer| answer.message) {
        for event in exported.jobs.into_iter().flat_map(|job| job.events) {
            if event.sequence != last + 1 {
                return Err(format!("event {} was exported after event {last}", event.sequence).into());
            }
            last = event.sequence;
        }
    }
    if last == i64::from(EVENTS) {
        Ok(())
    } else {
        Err(format!("{last} of {EVENTS} events were exported").into())
    }
}

/// SQL that inserts the events of the job as appends would have stored them.
fn insert_events_sql() -> String {
    format!(
        "INSERT INTO events (job_id, sequence, position, id, kind, name, step_configuration_id, event_metadata,
                             status, points_done, percent, created_at)
         SELECT jobs.id, n, n, gen_random_uuid(), 'step', repeat('.', 64), step.id, '', 'running', 5, 5, now()
         FROM jobs, step_configurations AS step, generate_series(1, {EVENTS}) AS n WHERE step.position = 0;
         UPDATE job_states SET status = 'running', points_done = 5, percent = 5, steps = '\\x65',
                               last_sequence = {EVENTS}, last_event_id = gen_random_uuid();
         UPDATE jobs SET status = 'running';
         UPDATE event_log SET position = {EVENTS}"
    )
}
