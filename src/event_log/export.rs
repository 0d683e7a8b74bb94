//! Reads the events of all jobs that match, job by job in the order of their creation, up to the
//! position that the log had when the export began.

use std::{collections::HashMap, sync::Arc};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{event::LogEvent, page_size::PageSize, reader::Reader, walk::Piece};
use crate::{
    db::{Connection, Identified as _, Identity},
    error::{Error, Result},
    models::{
        caller::Viewer,
        event::Event,
        history::LogEnd,
        job::{ExportPage, Job, JobFilters, WalkPoint, WalkedJob},
        retention,
    },
    progress::EventKind,
};

/// Which events an export has.
#[derive(Debug)]
pub(crate) struct ExportQuery {
    pub(crate) viewer: Viewer,
    pub(crate) filters: JobFilters,
    /// Only events that were committed at this time or later.
    pub(crate) created_from: Option<DateTime<Utc>>,
    /// Only events that were committed before this time.
    pub(crate) created_before: Option<DateTime<Utc>>,
    /// Empty: events of all kinds.
    pub(crate) kinds: Vec<EventKind>,
}

impl ExportQuery {
    fn contains(&self, event: &Event) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&event.kind))
            && self.created_from.is_none_or(|from| event.created_at >= from)
            && self.created_before.is_none_or(|before| event.created_at < before)
    }
}

/// How far an export has come, and what it was begun with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExportPoint {
    /// The history of the log that has the events up to `end`.
    pub(crate) history: Uuid,
    /// The last position of the log that is exported.
    pub(crate) end: i64,
    /// The number of logs that retention had removed when the export began.
    pub(crate) removals: i64,
    /// Jobs that were created later are left out.
    pub(crate) until: DateTime<Utc>,
    /// Everything up to here was exported.
    pub(crate) walk: WalkPoint,
    /// How many items were exported.
    pub(crate) count: i64,
}

impl ExportPoint {
    /// Where an export begins now.
    pub(crate) async fn begin(connection: &mut Connection) -> Result<Self> {
        let until = crate::models::now(connection).await?;
        let LogEnd { position: end, removals, history } = LogEnd::read(connection).await?;
        Ok(Self { history, end, removals, until, walk: WalkPoint::START, count: 0 })
    }
}

/// An export that is under way.
#[derive(Debug)]
pub(crate) struct EventExport {
    reader: Arc<Reader>,
    query: ExportQuery,
    /// None: the export begins.
    point: Option<ExportPoint>,
    /// The database in which the log was found to have what the export needs.
    identity: Option<Identity>,
    page: PageSize,
    /// The jobs that come next, and those of them that have events.
    jobs: HashMap<Uuid, Job>,
    piece: Option<Piece>,
    ended: bool,
}

/// Events of some jobs.
#[derive(Debug)]
pub(crate) struct Exported {
    /// Each job with its events, ascending; empty only at the end.
    pub(crate) jobs: Vec<(Job, Vec<Arc<LogEvent>>)>,
    /// Where the export is with these.
    pub(crate) point: ExportPoint,
    /// There are no more.
    pub(crate) ends: bool,
}

impl EventExport {
    pub(super) fn new(reader: Arc<Reader>, query: ExportQuery, point: Option<ExportPoint>) -> Self {
        let (page, jobs) = (PageSize::default(), HashMap::new());
        Self { reader, query, point, identity: None, page, jobs, piece: None, ended: false }
    }

    /// The next events; none after those that end it. [`Error::EventsExpired`] if
    /// retention has removed what comes next, [`Error::LogSetBack`] if events are lost.
    pub(crate) async fn next(&mut self) -> Result<Option<Exported>> {
        while !self.ended {
            let exported = self.read().await?;
            if self.ended || !exported.jobs.is_empty() {
                return Ok(Some(exported));
            }
        }
        Ok(None)
    }

    async fn read(&mut self) -> Result<Exported> {
        let tenant = self.query.viewer.tenant();
        let _permit = self.reader.permit(tenant, None).await;
        let mut connection = self.reader.database.get(tenant).await?;
        let mut point = self.point_in(&mut connection).await?;
        if !self.piece.as_mut().is_some_and(|piece| piece.go_to(point.walk)) {
            let mut piece = self.read_jobs(&mut connection, point).await?;
            piece.go_to(point.walk);
            self.piece = Some(piece);
        }
        let piece = self.piece.as_ref().ok_or_else(|| Error::internal("an export without jobs"))?;
        let part = piece.part(self.page.events());
        let mut rows = match &part.jobs[..] {
            [] => Vec::new(),
            jobs => Event::list_of_walk(&mut connection, jobs).await?,
        };
        // Retention deletes events once it has marked their job.
        if i64::try_from(rows.len()) != Ok(part.count()) {
            return Err(Error::EventsExpired { first_sequence: None });
        }
        rows.retain(|row| self.query.contains(row));
        let mut events = self.reader.encode(&mut connection, rows).await?;
        drop(connection);
        let mut reached = part.point;
        if self.page.cut(&mut events) {
            let last = events.last().and_then(|last| part.point_after(last.job.id, last.sequence));
            reached = Some(last.ok_or_else(|| Error::internal("an event of a job that was not asked for"))?);
        }
        self.ended = reached.is_none();
        let end = || part.jobs.last().map(|last| WalkPoint { job: last.job, sequence: last.through });
        point.walk = reached.or_else(end).unwrap_or(point.walk);
        point.count += i64::try_from(events.len()).unwrap_or(i64::MAX);
        self.point = Some(point);
        Ok(Exported { jobs: self.by_job(events)?, point, ends: self.ended })
    }

    /// Where the export stands, in the database that this connection has reached.
    async fn point_in(&mut self, connection: &mut Connection) -> Result<ExportPoint> {
        let identity = connection.identity();
        let point = match self.point {
            None => ExportPoint::begin(connection).await?,
            Some(point) if self.identity == Some(identity) => return Ok(point),
            Some(point) => {
                self.piece = None;
                let log = LogEnd::read(connection).await?;
                let kept = log.kept(connection, point.history, point.end).await?.ok_or(Error::LogSetBack)?;
                ExportPoint { history: log.history, removals: point.removals.min(kept), ..point }
            }
        };
        self.identity = Some(identity);
        self.point = Some(point);
        Ok(point)
    }

    /// The jobs from the one that the export has come to.
    async fn read_jobs(&mut self, connection: &mut Connection, point: ExportPoint) -> Result<Piece> {
        let ExportQuery { viewer, filters, .. } = &self.query;
        let page = Job::list_for_export(connection, *viewer, filters, point.until, point.walk.job).await?;
        let ExportPage { jobs, last, ends } = page;
        let ids: Vec<Uuid> = jobs.iter().map(|job| job.id).collect();
        let through = Event::sequences_at(connection, &ids, point.end).await?;
        // This check comes after the count, which leaves out the jobs whose events were removed.
        if retention::removed_since(connection, &ids, point.removals, point.end).await? {
            return Err(Error::EventsExpired { first_sequence: None });
        }
        let walked = jobs.iter().map(|job| {
            let through = through.get(&job.id).copied().unwrap_or_default();
            WalkedJob { job: job.cursor(), after: 0, through }
        });
        let piece = Piece::new(walked, last, ends);
        self.jobs = jobs.into_iter().map(|job| (job.id, job)).collect();
        Ok(piece)
    }

    fn by_job(&self, events: Vec<Arc<LogEvent>>) -> Result<Vec<(Job, Vec<Arc<LogEvent>>)>> {
        let mut jobs: Vec<(Job, Vec<Arc<LogEvent>>)> = Vec::new();
        for event in events {
            match jobs.last_mut() {
                Some((job, of_job)) if job.id == event.job.id => of_job.push(event),
                _ => {
                    let job = self.jobs.get(&event.job.id);
                    let job = job.ok_or_else(|| Error::internal("an event without its job"))?;
                    jobs.push((job.clone(), vec![event]));
                }
            }
        }
        Ok(jobs)
    }
}
