//! Pages of one job's events.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    event::LogEvent,
    reader::{Reader, state},
};
use crate::{
    db::read,
    error::{Error, Result},
    models::{
        caller::Tenant,
        event::{Event, JobHead},
        job_identity::JobIdentity,
    },
    progress::EventKind,
};

/// Sequences that one page of a filtered list looks through.
const WINDOW: i64 = 5_000;
/// Retention keeps all events of a job for at least this long after the job has
/// closed: the shortest setting is one second.
const SHORTEST_RETENTION: Duration = Duration::from_secs(1);

/// See [`EventLog::list`](super::EventLog::list).
pub(super) async fn list(
    reader: &Reader,
    tenant: Tenant,
    job: &JobIdentity,
    after: i64,
    kinds: &[EventKind],
    limit: i64,
) -> Result<(Vec<Arc<LogEvent>>, Option<i64>)> {
    read!(reader.database, tenant, |connection| async {
        let since = Instant::now();
        let state = state(connection, job.id).await?;
        let end = state.last_sequence;
        if after > end {
            return Err(Error::PositionBeyondLog);
        }
        let through = end.min(after + WINDOW);
        let rows = Event::list_of_job(connection, job.id, after, through, kinds, limit).await?;
        // Retention marks a log as removed before it deletes the first event, so this
        // check comes after the page.
        if (state.closed || since.elapsed() >= SHORTEST_RETENTION)
            && after < end
            && JobHead::has_removed_events(connection, job.id).await?
        {
            return Err(Error::EventsExpired { first_sequence: Some(end + 1) });
        }
        let full = i64::try_from(rows.len()).is_ok_and(|read| read >= limit);
        let read_to = if full { rows.last().map_or(through, |row| row.sequence) } else { through };
        let events = reader.encode(connection, rows).await?;
        Ok((events, (read_to < end).then_some(read_to)))
    })
}
