//! Writes the `silent` events. Every server looks each second, which also says that it is
//! there; each job is found by one of them. Which jobs are silent for too long is decided by
//! the SQL function `find_silent_jobs`, in migrations/2026-11-26-000012_silence/up.sql.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;

use super::{
    append::{Appender, Batch, PendingAnswer, WeakAppender},
    background::take_steps,
    job_cache::JobCache,
};
use crate::{
    db::{Database, OwnConnection},
    error::{Error, Result},
    models::{
        caller::Tenant,
        silence::{self, SilentJob},
    },
    progress::EventKind,
    telemetry::metrics::Metrics,
};

/// Pause between two looks. More than five seconds without one count as a gap.
const PAUSE: Duration = Duration::from_secs(1);
/// Most jobs of one look.
const JOBS: i32 = 500;
/// How often the stalled jobs are counted.
const COUNT: Duration = Duration::from_secs(10);

/// Looks for silent jobs for as long as somebody appends.
pub(super) fn start(database: &Database, jobs: JobCache, appender: &Appender, metrics: Arc<Metrics>) {
    let appender = appender.downgrade();
    let of_task = database.clone();
    let mut silences = Silences { database: of_task, jobs, appender, metrics, kept: None, counted_at: None };
    database.spawn(take_steps("cannot look for silent jobs", PAUSE, async move || silences.look().await));
}

struct Silences {
    database: Database,
    jobs: JobCache,
    appender: WeakAppender,
    metrics: Arc<Metrics>,
    /// A connection of its own: callers who use up the pool must not make a gap.
    kept: Option<OwnConnection>,
    counted_at: Option<Instant>,
}

impl Silences {
    /// Looks at some jobs; returns the pause before the next look.
    async fn look(&mut self) -> Result<Option<Duration>> {
        let database = self.database.clone();
        let Some(appender) = self.appender.upgrade() else { return Ok(None) };
        let found = database.in_time(self.find(&appender), "looking for silent jobs took too long").await;
        let (answers, more) = found?;
        for answer in join_all(answers.into_iter().map(PendingAnswer::wait)).await {
            match answer {
                // A job that has gone on or was removed meanwhile is looked at anew.
                Ok(_)
                | Err(Error::SequenceMismatch { .. } | Error::JobClosed { .. } | Error::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Some(if more { Duration::ZERO } else { PAUSE }))
    }

    /// Submits the events of the jobs that are found silent.
    async fn find(&mut self, appender: &Appender) -> Result<(Vec<PendingAnswer>, bool)> {
        let mut connection = self.database.kept_or_new(&mut self.kept).await?;
        let (silent, more) = silence::find(&mut connection, JOBS).await?;
        let ids: Vec<_> = silent.iter().map(|job| job.id).collect();
        let identities = self.jobs.list(&mut connection, &ids).await?;
        if self.counted_at.is_none_or(|at| at.elapsed() >= COUNT) {
            self.metrics.state.jobs_stalled.set(silence::count_stalled(&mut connection).await?);
            self.counted_at = Some(Instant::now());
        }
        self.kept = Some(connection);
        let mut answers = Vec::with_capacity(silent.len());
        for SilentJob { id, last_sequence } in silent {
            let Some(job) = identities.get(&id) else { continue };
            let tenant = Tenant::of_user(job.provider_id);
            let configuration = self.jobs.configuration(tenant, job.configuration_id).await?;
            let weights = Arc::clone(&configuration.weights);
            let batch = Batch::by_server(Arc::clone(job), weights, EventKind::Silent, String::new(), None);
            let batch = Batch { expected_sequence: Some(last_sequence), ..batch };
            answers.push(appender.submit_own(batch).await?);
        }
        Ok((answers, more))
    }
}
