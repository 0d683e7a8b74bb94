//! Reads what was committed before, page by page.

use std::sync::Arc;

use diesel_async::AsyncPgConnection;
use uuid::Uuid;

use crate::{
    db::{Identified as _, Identity},
    error::{Error, Result},
    event_log::{event::LogEvent, position::Position, reader::Reader, scope::Scope},
    models::{caller::Tenant, event::Event, retention::Removed},
};

/// Most events that one page reads.
const PAGE: i64 = 200;
/// Most bytes of events that wait to be sent: a page of larger events is cut, and
/// the next one is read shorter.
const PAGE_BYTES: usize = 256 * 1024;
/// Positions of the log that one query looks through for visible events.
const WINDOW: i64 = 10_000;

/// The past of a watch.
#[derive(Debug)]
pub(super) struct Past {
    /// The past ends here: the subscription delivers every event beyond it.
    pub(super) end: i64,
    /// The database in which this end was read. A page of another one might have other
    /// events at the same positions.
    pub(super) identity: Identity,
    /// Most events of the next page.
    page: i64,
    /// The client asked for everything that is kept, not for a certain position.
    from_beginning: bool,
}

/// What one read brings.
pub(super) struct Page {
    /// The events of the scope, ascending.
    pub(super) events: Vec<Arc<LogEvent>>,
    /// The log was read up to here.
    pub(super) read_to: i64,
    /// See [`Position::removals`].
    pub(super) removals: i64,
}

impl Past {
    pub(super) fn new(end: i64, identity: Identity, from_beginning: bool) -> Self {
        Self { end, identity, page: PAGE, from_beginning }
    }

    /// Has the next page be shorter, after one that could not be read; false if that page had
    /// a single event.
    pub(super) fn shorten(&mut self) -> bool {
        let longer = self.page > 1;
        self.page = (self.page / 2).max(1);
        longer
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
        let (rows, read_to, removals) = match scope {
            Scope::Job(job) => {
                let (rows, read_to) = self.read_job(&mut connection, job.id, position.cursor).await?;
                (rows, read_to, position.removals)
            }
            Scope::All { .. } => self.read_visible(&mut connection, scope, position, caught_up).await?,
        };
        let mut events = reader.encode(&mut connection, rows).await?;
        drop(connection);
        let read_to = self.cut(&mut events, scope).unwrap_or(read_to);
        events.retain(|event| scope.contains(&event.job));
        Ok(Some(Page { events, read_to, removals }))
    }

    async fn read_job(
        &self,
        connection: &mut AsyncPgConnection,
        job_id: Uuid,
        cursor: i64,
    ) -> Result<(Vec<Event>, i64)> {
        let rows = Event::list_of_job(connection, job_id, cursor, self.end, &[], self.page).await?;
        let whole = self.page.min(self.end - cursor);
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
        scope: &Scope,
        Position { cursor, removals, .. }: Position,
        caught_up: bool,
    ) -> Result<(Vec<Event>, i64, i64)> {
        let Scope::All { viewer, configuration_tag, counterpart_id } = scope else {
            return Err(Error::internal("a scope of one job has no position in the log"));
        };
        let (visibility, page) = (viewer.visibility(), self.page);
        let through = self.end.min(cursor + WINDOW);
        let rows = if through - cursor <= page && removals == 0 && page == PAGE {
            // For so few events, leaving out the invisible ones afterwards costs less
            // than a query for the visible ones. A shorter page follows one that failed,
            // perhaps because of an invisible event.
            Event::list_of_log(connection, cursor, through, page).await?
        } else {
            Event::list_visible(connection, visibility, cursor, through, page).await?
        };
        let full = count(&rows) >= page;
        let read_to = if full { rows.last().map(|row| row.position) } else { None }.unwrap_or(through);
        let removed = Removed {
            visibility,
            configuration_tag,
            counterpart_id: *counterpart_id,
            after_position: cursor,
            since: removals,
            // A watch from the beginning asks for what is kept: it loses nothing of a
            // log that was removed before the watch came to it, unless the tail
            // delivers the rest of that log.
            except_between: (self.from_beginning && !caught_up).then_some((read_to, self.end)),
        };
        // Retention marks a log as removed before it deletes the first event, so this
        // check comes after the page.
        let (removals, lost) = removed.check(connection).await?;
        if lost {
            return Err(Error::EventsExpired { first_sequence: None });
        }
        Ok((rows, read_to, removals))
    }

    /// Cuts a page of large events, sets the size of the next page, and returns the
    /// cursor of the last event that is left, if the page was cut.
    fn cut(&mut self, events: &mut Vec<Arc<LogEvent>>, scope: &Scope) -> Option<i64> {
        let mut bytes = 0;
        let fit = events.iter().take_while(|event| {
            let fits = bytes < PAGE_BYTES;
            bytes += event.encoded.len();
            fits
        });
        let fit = fit.count();
        if fit == events.len() {
            self.page = (self.page * 2).min(PAGE);
            return None;
        }
        events.truncate(fit);
        self.page = i64::try_from(fit).unwrap_or(PAGE).min(PAGE);
        events.last().map(|event| event.cursor_in(scope))
    }
}

fn count(rows: &[Event]) -> i64 {
    i64::try_from(rows.len()).unwrap_or(i64::MAX)
}
