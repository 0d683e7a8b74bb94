//! A long job from its beginning, through a watch, beside COPY of the same rows
//! out of Postgres.

use std::time::Instant;

use futures_util::StreamExt as _;
use milepost::pb::{
    WatchEventsRequest,
    watch_events_request::{Scope, Start},
    watch_events_response::Message,
};

use crate::{
    Result,
    bed::{Bed, connect},
    report::{Goal, Measure, Outcome},
    tenant::{self, Tenant},
};

const EVENTS: u32 = 500_000;
/// The most that the server may grow by while it replays, in kB.
const MOST_KB: f64 = 16_000.0;

pub(super) async fn measure(bed: &Bed, name: &str) -> Result<Vec<Outcome>> {
    let database = bed.database().await?;
    let server = bed.server(&database).await?;
    let tenant = Tenant::create(server.address).await?;
    let job = tenant.jobs(server.address, 1).await?.remove(0);
    let postgres = connect(&database).await?;
    postgres.batch_execute(&filling()).await?;
    postgres.batch_execute("VACUUM ANALYZE").await?;
    // The server has not seen how these events came about.
    server.stop().await?;
    let server = bed.server(&database).await?;
    let customer = tenant::connect(server.address, &tenant.customer_key, 1).await?.remove(0);

    let mut rate = Outcome::new(name, "events/s", "COPY out", None);
    let mut memory = Outcome::new(format!("{name}-memory"), "kB", "none", Some(Goal::Within(MOST_KB)));
    for _ in 0..bed.options.rounds {
        let before = server.resident_bytes()?;
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
            return Err(format!("{last} events of {EVENTS}").into());
        }
        rate.milepost(Measure::of(f64::from(EVENTS) / started.elapsed().as_secs_f64()));
        let grown = server.resident_bytes()?.saturating_sub(before) / 1_000;
        memory.milepost(Measure::of(f64::from(u32::try_from(grown)?)));

        let started = Instant::now();
        let rows = postgres.copy_out("COPY (SELECT * FROM events ORDER BY sequence) TO STDOUT").await?;
        let mut rows = std::pin::pin!(rows);
        let mut copied = 0;
        while let Some(row) = rows.next().await {
            row?;
            copied += 1;
        }
        if copied != EVENTS {
            return Err(format!("{copied} rows of {EVENTS}").into());
        }
        rate.peer(Measure::of(f64::from(EVENTS) / started.elapsed().as_secs_f64()));
    }
    Ok(vec![rate, memory])
}

/// SQL that makes the events of the one job, as appends would have left them.
fn filling() -> String {
    format!(
        "INSERT INTO events (job_id, sequence, position, id, kind, name, step_configuration_id, event_metadata,
                             status, points_done, percent, created_at)
         SELECT jobs.id, n, n, gen_random_uuid(), 'step', repeat('.', 64), step.id, '', 'running', 5, 5, now()
         FROM jobs, step_configurations AS step, generate_series(1, {EVENTS}) AS n WHERE step.position = 0;
         UPDATE jobs SET status = 'running', points_done = 5, percent = 5, steps_done = '\\x01',
                         last_sequence = {EVENTS};
         UPDATE event_log SET position = {EVENTS}"
    )
}
