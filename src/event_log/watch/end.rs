//! Where the log that a watch sees begins and ends now.

use super::query::Scope;
use crate::{
    error::{Error, Resource, Result},
    event_log::{EventLog, position::Position},
    models::{
        event::{Event, JobHead},
        retention,
    },
    progress::JobState,
};

/// Where the scope's log ends now.
pub(super) struct LogEnd {
    pub(super) place: Position,
    /// The state of the one job there.
    pub(super) job: Option<JobState>,
}

impl LogEnd {
    pub(super) async fn look(log: &EventLog, scope: &Scope) -> Result<Self> {
        let mut connection = log.0.database.get().await?;
        match scope {
            Scope::Job(job) => {
                let head = JobHead::load(&mut connection, &[job.id]).await?.pop();
                let state = head.ok_or_else(|| Error::not_found(Resource::Job, &job.id))?.state();
                Ok(Self { place: Position { cursor: state.last_sequence, removals: 0 }, job: Some(state) })
            }
            Scope::All { .. } => {
                let (cursor, removals) = retention::log_end(&mut connection).await?;
                Ok(Self { place: Position { cursor, removals }, job: None })
            }
        }
    }
}

/// Where a watch from the beginning starts: for all jobs, before the oldest
/// event that is kept.
pub(super) async fn before_oldest(log: &EventLog, scope: &Scope, end: &LogEnd) -> Result<i64> {
    match scope {
        Scope::Job(_) => Ok(0),
        Scope::All { .. } => {
            let oldest = Event::oldest_kept(&mut *log.0.database.get().await?).await?;
            Ok(oldest.map_or(end.place.cursor, |position| position - 1).min(end.place.cursor))
        }
    }
}
