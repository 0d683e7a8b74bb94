//! How long completed jobs took from the end of each of their steps.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::now,
    prelude::*,
    sql_types::{BigInt, Timestamptz},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use super::job::Job;
use crate::{
    db::Transaction,
    error::Result,
    estimate::PAST_JOBS,
    schema::{events, job_states, jobs, step_configurations, step_times},
};

/// Most events that one step of the pass reads.
const STEP_EVENTS: i64 = 10_000;

diesel::define_sql_function! {
    /// See migrations/2026-11-26-000013_step_times/up.sql.
    fn keep_step_times(most_events: BigInt) -> BigInt;
}

/// Keeps the step times of some completed jobs. Returns whether there may be more.
pub async fn keep(tx: &mut Transaction<'_>) -> Result<bool> {
    let read: i64 = diesel::select(keep_step_times(STEP_EVENTS)).get_result(tx).await?;
    Ok(read >= STEP_EVENTS)
}

/// The step that a job finished last, or its creation, and what jobs before it took from there
/// to their completion.
#[derive(Clone, Debug)]
pub struct SinceStep {
    /// The database's time of this answer.
    pub now: DateTime<Utc>,
    /// How long ago the step was finished.
    pub passed: Duration,
    /// Of the jobs of the same configuration tag that completed last, at most [`PAST_JOBS`]:
    /// first those of the same version. A job that did not finish the step has none.
    pub times: Vec<Duration>,
}

impl SinceStep {
    /// Reads what is known of an open job.
    pub async fn read(conn: &mut AsyncPgConnection, job: &Job) -> Result<Self> {
        let state = job_states::table.find(job.id).inner_join(jobs::table);
        let (present, created_at, last_step_sequence, provider_id): (DateTime<Utc>, _, i64, Uuid) = state
            .select((
                now.into_sql::<Timestamptz>(),
                jobs::created_at,
                job_states::last_step_sequence,
                jobs::provider_id,
            ))
            .first(conn)
            .await?;
        let last_step: Option<(DateTime<Utc>, String)> = events::table
            .inner_join(
                step_configurations::table
                    .on(events::step_configuration_id.eq(step_configurations::id.nullable())),
            )
            .filter(events::job_id.eq(job.id).and(events::sequence.eq(last_step_sequence)))
            .select((events::created_at, step_configurations::tag))
            .first(conn)
            .await
            .optional()?;
        let (since, step_tag) = last_step.map_or((created_at, None), |(at, tag)| (at, Some(tag)));
        let past = past(conn, provider_id, job).await?;
        let positions = match &step_tag {
            Some(tag) => positions(conn, tag, &past).await?,
            None => Vec::new(),
        };
        let times = past.iter().filter_map(|past| {
            let micros = match step_tag {
                None => Some(past.total),
                Some(_) => {
                    let (_, position) = positions.iter().find(|(id, _)| *id == past.job_configuration_id)?;
                    past.remaining.get(usize::try_from(*position).ok()?).copied().flatten()
                }
            };
            Some(Duration::from_micros(u64::try_from(micros?).unwrap_or_default()))
        });
        let passed = (present - since).to_std().unwrap_or_default();
        Ok(Self { now: present, passed, times: times.collect() })
    }
}

#[derive(Debug, Queryable, Selectable)]
#[diesel(table_name = step_times, check_for_backend(diesel::pg::Pg))]
struct Past {
    job_configuration_id: Uuid,
    total: i64,
    remaining: Vec<Option<i64>>,
}

/// The jobs that completed last: of the same version, and if these are too few, of the same tag.
async fn past(conn: &mut AsyncPgConnection, provider_id: Uuid, job: &Job) -> Result<Vec<Past>> {
    let most = i64::try_from(PAST_JOBS).unwrap_or(i64::MAX);
    let mut past: Vec<Past> = step_times::table
        .filter(step_times::job_configuration_id.eq(job.job_configuration_id))
        .order(step_times::completed_at.desc())
        .limit(most)
        .select(Past::as_select())
        .load(conn)
        .await?;
    // Of the version there are fewer than these to pass over.
    let left = most - i64::try_from(past.len()).unwrap_or(most);
    if left > 0 {
        let others: Vec<Past> = step_times::table
            .filter(step_times::provider_id.eq(provider_id))
            .filter(step_times::configuration_tag.eq(&job.configuration_tag))
            .filter(step_times::job_configuration_id.ne(job.job_configuration_id))
            .order(step_times::completed_at.desc())
            .limit(left)
            .select(Past::as_select())
            .load(conn)
            .await?;
        past.extend(others);
    }
    Ok(past)
}

/// The position of the step with this tag in each configuration that has it.
async fn positions(conn: &mut AsyncPgConnection, tag: &str, past: &[Past]) -> Result<Vec<(Uuid, i16)>> {
    let mut ids: Vec<Uuid> = past.iter().map(|past| past.job_configuration_id).collect();
    ids.sort_unstable();
    ids.dedup();
    Ok(step_configurations::table
        .filter(step_configurations::job_configuration_id.eq_any(ids))
        .filter(step_configurations::tag.eq(tag))
        .select((step_configurations::job_configuration_id, step_configurations::position))
        .load(conn)
        .await?)
}
