//! Reads what was committed before, page by page.

use std::sync::Arc;

use diesel_async::AsyncPgConnection;
use uuid::Uuid;

use crate::{
    db::{Connection, Identified as _, Identity},
    error::{Error, Result},
    event_log::{
        event::LogEvent,
        page_size::PageSize,
        position::{Position, Walk},
        reader::Reader,
        scope::Scope,
        walk::{self, Piece},
    },
    models::{
        caller::Tenant,
        event::Event,
        job::JobScope,
        retention::{Removed, Unread},
    },
};

/// Positions of the log that one query looks through for visible events.
const WINDOW: i64 = 10_000;

/// The past of a watch.
#[derive(Debug)]
pub(super) struct Past {
    /// The past ends here: the subscription delivers every event beyond it.
    end: i64,
    /// The database in which this end was read. A page of another one might have other
    /// events at the same positions.
    identity: Identity,
    page: PageSize,
    /// The client asked for everything that is kept, not for a certain position.
    from_beginning: bool,
    /// Up to here the log is scanned, since a walk of the scope's jobs would cost more.
    scan_to: i64,
    /// What was read of the jobs that a walk comes to next.
    piece: Option<Box<Piece>>,
}

/// What one read brings.
pub(super) struct Page {
    /// The events of the scope: in a walk job by job, otherwise ascending.
    pub(super) events: Vec<Arc<LogEvent>>,
    /// See [`Position::cursor`], when these events are sent.
    pub(super) read_to: i64,
    /// See [`Position::walk`], when these events are sent.
    pub(super) walk: Option<Walk>,
    /// See [`Position::removals`].
    pub(super) removals: i64,
}

impl Past {
    pub(super) fn new(end: i64, identity: Identity, from_beginning: bool) -> Self {
        Self { end, identity, page: PageSize::default(), from_beginning, scan_to: 0, piece: None }
    }

    /// Takes this past for a task that reads a page and gives the past back. If the read is
    /// given up, the past that stays behind goes on, and reads the piece of a walk again.
    pub(super) fn take(&mut self) -> Self {
        Self { piece: self.piece.take(), ..*self }
    }

    /// See [`Self::end`].
    pub(super) fn end(&self) -> i64 {
        self.end
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// Has the past end no earlier than here.
    pub(super) fn extend(&mut self, end: i64) {
        self.end = self.end.max(end);
    }

    /// Goes on to an end that was read in this database.
    pub(super) fn go_on(&mut self, end: i64, identity: Identity) {
        // A piece was read for the end before, perhaps in another database.
        (self.end, self.identity, self.scan_to, self.piece) = (end, identity, 0, None);
    }

    /// See [`PageSize::shorten`].
    pub(super) fn shorten(&mut self) -> bool {
        self.page.shorten()
    }

    /// Reads a page after the position; none if the database is another one than that of
    /// the end. [`Error::EventsExpired`] if retention has removed a part of the page.
    /// `caught_up` says that the watch had caught up before.
    pub(super) async fn read(
        &mut self,
        reader: &Reader,
        tenant: Tenant,
        scope: &Scope,
        position: Position,
        caught_up: bool,
    ) -> Result<Option<Page>> {
        let mut connection = reader.database.get(tenant).await?;
        if connection.identity() != self.identity {
            return Ok(None);
        }
        let (rows, read_to, removals) = match (scope, scope.jobs()) {
            (Scope::Job(job), _) => {
                let (rows, read_to) = self.read_job(&mut connection, job.id, position.cursor).await?;
                (rows, read_to, position.removals)
            }
            (Scope::All { .. }, None) => return Err(Error::internal("a scope of all jobs that has none")),
            (Scope::All { .. }, Some(jobs)) => {
                let skips = self.from_beginning && !caught_up;
                if let Some(walk) = position.walk {
                    return self.walk(reader, &mut connection, jobs, position, walk, skips).await.map(Some);
                }
                if self.is_walked(&mut connection, jobs, position.cursor).await? {
                    let Position { cursor: read_to, removals, .. } = position;
                    let walk = Some(Walk::begin(self.end));
                    return Ok(Some(Page { events: Vec::new(), read_to, walk, removals }));
                }
                self.read_visible(&mut connection, jobs, position, skips).await?
            }
        };
        let mut events = reader.encode(&mut connection, rows).await?;
        drop(connection);
        let cut = self.page.cut(&mut events);
        let last = events.last().filter(|_| cut).map(|last| last.cursor_in(scope));
        let read_to = last.unwrap_or(read_to);
        events.retain(|event| scope.contains(&event.job));
        Ok(Some(Page { events, read_to, walk: None, removals }))
    }

    /// Whether the past is to be read by a walk of the scope's jobs. Decided once for an end.
    async fn is_walked(
        &mut self,
        connection: &mut AsyncPgConnection,
        scope: JobScope<'_>,
        cursor: i64,
    ) -> Result<bool> {
        if cursor < self.scan_to || self.end - cursor <= WINDOW {
            return Ok(false);
        }
        let walked = walk::is_shorter(connection, scope, self.end - cursor).await?;
        if !walked {
            self.scan_to = self.end;
        }
        Ok(walked)
    }

    /// Reads the next page of a walk. `skips` says that jobs may be left out whose logs were
    /// removed before the walk came to them.
    async fn walk(
        &mut self,
        reader: &Reader,
        connection: &mut Connection,
        scope: JobScope<'_>,
        position: Position,
        walk: Walk,
        skips: bool,
    ) -> Result<Page> {
        if !self.piece.as_mut().is_some_and(|piece| piece.go_to(walk.point)) {
            self.piece = None;
        }
        let piece = match &mut self.piece {
            Some(piece) => piece,
            none => {
                let mut piece = Piece::read(connection, scope, position, walk).await?;
                piece.go_to(walk.point);
                none.insert(Box::new(piece))
            }
        };
        let part = piece.part(self.page.events());
        let rows = if part.jobs.is_empty() {
            Vec::new()
        } else {
            Event::list_of_walk(connection, &part.jobs).await?
        };
        let whole = count(&rows) == part.count();
        let mut events = reader.encode(connection, rows).await?;
        let mut point = part.point;
        if self.page.cut(&mut events) {
            let last = events.last().and_then(|last| part.point_after(last.job.id, last.sequence));
            point = Some(last.ok_or_else(|| Error::internal("an event of a job that was not asked for"))?);
        }
        let with =
            point.or_else(|| part.jobs.last().and_then(|job| part.point_after(job.job.id, job.through)));
        let removed = Removed {
            scope,
            after_position: position.cursor,
            since: position.removals,
            unread: Unread::InWalk {
                end: walk.end,
                points: [walk.point, with.unwrap_or(walk.point)],
                except_unbegun: skips,
            },
        };
        // As in `read_visible`, after the page.
        let (removals, lost) = removed.check(connection).await?;
        if lost || !(whole || skips) {
            return Err(Error::EventsExpired { first_sequence: None });
        }
        if point.is_none() {
            self.piece = None;
        }
        let read_to = if point.is_none() { walk.end } else { position.cursor };
        Ok(Page { events, read_to, walk: point.map(|point| Walk { point, ..walk }), removals })
    }

    async fn read_job(
        &self,
        connection: &mut AsyncPgConnection,
        job_id: Uuid,
        cursor: i64,
    ) -> Result<(Vec<Event>, i64)> {
        let rows = Event::list_of_job(connection, job_id, cursor, self.end, &[], self.page.events()).await?;
        let whole = self.page.events().min(self.end - cursor);
        // Retention deletes a log from its beginning: a page may be full and yet not
        // begin after the cursor.
        if count(&rows) < whole || rows.last().is_some_and(|row| row.sequence != cursor + whole) {
            return Err(Error::EventsExpired { first_sequence: None });
        }
        let read_to = rows.last().map_or(self.end, |row| row.sequence);
        Ok((rows, read_to))
    }

    async fn read_visible(
        &self,
        connection: &mut AsyncPgConnection,
        scope: JobScope<'_>,
        Position { cursor, removals, .. }: Position,
        skips: bool,
    ) -> Result<(Vec<Event>, i64, i64)> {
        let page = self.page.events();
        let through = self.end.min(cursor + WINDOW);
        let rows = if through - cursor <= page && removals == 0 && page == PageSize::MOST {
            // For so few events, leaving out the invisible ones afterwards costs less
            // than a query for the visible ones. A shorter page follows one that failed,
            // perhaps because of an invisible event.
            Event::list_of_log(connection, cursor, through, page).await?
        } else {
            Event::list_visible(connection, scope.visibility, cursor, through, page).await?
        };
        let full = count(&rows) >= page;
        let read_to = if full { rows.last().map(|row| row.position) } else { None }.unwrap_or(through);
        let removed = Removed {
            scope,
            after_position: cursor,
            since: removals,
            // A watch from the beginning asks for what is kept: it loses nothing of a
            // log that was removed before the watch came to it, unless the tail
            // delivers the rest of that log.
            unread: Unread::InLog { except_between: skips.then_some((read_to, self.end)) },
        };
        // Retention marks a log as removed before it deletes the first event, so this
        // check comes after the page.
        let (removals, lost) = removed.check(connection).await?;
        if lost {
            return Err(Error::EventsExpired { first_sequence: None });
        }
        Ok((rows, read_to, removals))
    }
}

fn count(rows: &[Event]) -> i64 {
    i64::try_from(rows.len()).unwrap_or(i64::MAX)
}
