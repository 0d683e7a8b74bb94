//! Jobs in the order of their creation, for exports.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use super::{Job, JobFilters, list::Condition};
use crate::{
    error::Result,
    models::{CreationCursor, caller::Viewer, visible_jobs},
    schema::jobs,
};

/// Most jobs that one query looks at.
const JOBS: i64 = 100;

/// Some of the jobs that match, and how far they were looked for.
#[derive(Clone, Debug)]
pub struct ExportPage {
    /// In the order of their creation.
    pub jobs: Vec<Job>,
    /// The last job that was looked at; none without one.
    pub last: Option<CreationCursor>,
    /// Whether there is no later one.
    pub ends: bool,
}

impl Job {
    /// The jobs that match the filters among the next ones from this one on, in the order of their
    /// creation, without those created later than `until`. A page may be short, or empty, before
    /// the end.
    pub async fn list_for_export(
        conn: &mut AsyncPgConnection,
        viewer: Viewer,
        filters: &JobFilters,
        until: DateTime<Utc>,
        from: CreationCursor,
    ) -> Result<ExportPage> {
        let visibility = viewer.visibility();
        let mut range =
            visible_jobs!(jobs::table.select((jobs::created_at, jobs::id)).into_boxed(), visibility);
        range = filters.created(range).filter(jobs::created_at.le(until));
        // An index has the jobs of a counterpart, and those of a tag, in the order of creation.
        let conditions = filters.conditions();
        let indexed = conditions.iter().find(|condition| {
            matches!(condition, Condition::Counterpart(_) | Condition::ConfigurationTag(_))
        });
        if let Some(condition) = indexed {
            range = condition.narrow(visibility, range);
        }
        let not_older = jobs::created_at.gt(from.created_at).or(jobs::id.ge(from.id));
        range = range.filter(jobs::created_at.ge(from.created_at).and(not_older));
        let range = range.order((jobs::created_at, jobs::id)).limit(JOBS);
        let looked_at: Vec<CreationCursor> = range.load(conn).await?;
        let ids = looked_at.iter().map(|job| job.id);
        let matching = filters.narrow(visibility, jobs::table.select(jobs::id).into_boxed());
        let ids: Vec<Uuid> = matching.filter(jobs::id.eq_any(ids)).load(conn).await?;
        let mut jobs = if ids.is_empty() { Vec::new() } else { Self::load(conn, visibility, &ids).await? };
        jobs.sort_unstable_by_key(Self::cursor);
        let ends = i64::try_from(looked_at.len()).is_ok_and(|count| count < JOBS);
        Ok(ExportPage { jobs, last: looked_at.last().copied(), ends })
    }
}
