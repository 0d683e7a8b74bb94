//! Reads events job by job: the past of a watch of all jobs, or an export.
//!
//! A scan of the log costs what everybody has appended, a walk of the scope's jobs what the
//! scope has. Where the scope has so many jobs that most of the log is probably theirs, the
//! scan costs less.

use std::collections::VecDeque;

use diesel_async::AsyncPgConnection;
use uuid::Uuid;

use crate::{
    error::Result,
    event_log::position::{Position, Walk},
    models::{
        CreationCursor,
        job::{JobScope, JobWalk, WalkPoint, WalkedJob},
    },
};

/// Most jobs that one query looks at.
const JOBS: i64 = 100;
/// A walk has at most one job for so many positions of the log.
const POSITIONS_A_JOB: i64 = 10;
/// Most jobs that are counted for the choice between a walk and a scan. A scope of more jobs is
/// walked if the log is so long: that costs what the scope has, too.
const COUNTED: i64 = 100_000;

/// Whether the jobs of a scope are walked for so many positions of the log.
pub(super) async fn is_shorter(
    connection: &mut AsyncPgConnection,
    scope: JobScope<'_>,
    positions: i64,
) -> Result<bool> {
    let most = positions / POSITIONS_A_JOB;
    Ok(most > COUNTED || !scope.has_more_than(connection, most).await?)
}

/// The next jobs of a walk that have events in it.
#[derive(Debug)]
pub(super) struct Piece {
    jobs: VecDeque<WalkedJob>,
    /// The last job that was looked at; none without one.
    last: Option<CreationCursor>,
    /// Whether the walk ends with it.
    ends: bool,
}

/// Events of a walk that one page reads.
pub(super) struct Part {
    /// The jobs with their events in this page.
    pub(super) jobs: Vec<WalkedJob>,
    /// Where the walk stands with this page; none if it is done.
    pub(super) point: Option<WalkPoint>,
}

impl Piece {
    /// The jobs from the one that the walk has come to.
    pub(super) async fn read(
        connection: &mut AsyncPgConnection,
        scope: JobScope<'_>,
        position: Position,
        walk: Walk,
    ) -> Result<Self> {
        let query = JobWalk { scope, after: position.cursor, through: walk.end };
        let jobs = query.list(connection, walk.point.job, JOBS).await?;
        let last = jobs.last().map(|last| last.job);
        let ends = i64::try_from(jobs.len()).is_ok_and(|jobs| jobs < JOBS);
        Ok(Self::new(jobs, last, ends))
    }

    /// These jobs, in the order of their creation, of those up to `last`.
    pub(super) fn new(
        jobs: impl IntoIterator<Item = WalkedJob>,
        last: Option<CreationCursor>,
        ends: bool,
    ) -> Self {
        Self { jobs: jobs.into_iter().filter(|job| job.after < job.through).collect(), last, ends }
    }

    /// Leaves out what lies before this point; whether there is more.
    pub(super) fn go_to(&mut self, point: WalkPoint) -> bool {
        while let Some(first) = self.jobs.front_mut() {
            if first.job == point.job {
                first.after = first.after.max(point.sequence);
            }
            if first.job >= point.job && first.after < first.through {
                return true;
            }
            self.jobs.pop_front();
        }
        false
    }

    /// The first events, at most so many.
    pub(super) fn part(&self, most: i64) -> Part {
        let mut jobs = Vec::new();
        let mut room = most;
        for whole in &self.jobs {
            let through = whole.through.min(whole.after + room);
            room -= through - whole.after;
            jobs.push(WalkedJob { through, ..*whole });
            if room == 0 {
                break;
            }
        }
        let reached = jobs.last().map(|last| WalkPoint { job: last.job, sequence: last.through });
        let rest = jobs.len() < self.jobs.len()
            || jobs.last().map(|job| job.through) < self.jobs.back().map(|job| job.through);
        let point = match self.last {
            _ if rest => reached,
            Some(last) if !self.ends => Some(
                reached.filter(|reached| reached.job == last).unwrap_or(WalkPoint { job: last, sequence: 0 }),
            ),
            _ => None,
        };
        Part { jobs, point }
    }
}

impl Part {
    /// The number of its events.
    pub(super) fn count(&self) -> i64 {
        self.jobs.iter().map(|job| job.through - job.after).sum()
    }

    /// The point after an event of this part.
    pub(super) fn point_after(&self, job_id: Uuid, sequence: i64) -> Option<WalkPoint> {
        let job = self.jobs.iter().find(|part| part.job.id == job_id)?.job;
        Some(WalkPoint { job, sequence })
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn job(number: u32) -> CreationCursor {
        let created_at = DateTime::from_timestamp(number.into(), 0).expect("a time");
        CreationCursor { created_at, id: Uuid::from_u128(number.into()) }
    }

    fn walked(number: u32, after: i64, through: i64) -> WalkedJob {
        WalkedJob { job: job(number), after, through }
    }

    fn piece(ends: bool) -> Piece {
        // The fifth job has no events in the walk.
        let jobs = [walked(1, 0, 3), walked(2, 4, 6), walked(4, 0, 1)];
        Piece { jobs: jobs.into(), last: Some(job(5)), ends }
    }

    /// Takes part after part.
    fn parts(mut piece: Piece, most: i64) -> Vec<(Vec<WalkedJob>, Option<WalkPoint>)> {
        let mut parts = Vec::new();
        loop {
            let part = piece.part(most);
            let point = part.point;
            parts.push((part.jobs, point));
            if !point.is_some_and(|point| piece.go_to(point)) {
                return parts;
            }
        }
    }

    fn at(number: u32, sequence: i64) -> Option<WalkPoint> {
        Some(WalkPoint { job: job(number), sequence })
    }

    #[test]
    fn parts_have_every_event_once_and_no_more_than_asked_for() {
        for (ends, end) in [(true, None), (false, at(5, 0))] {
            assert_eq!(
                parts(piece(ends), 2),
                [
                    (vec![walked(1, 0, 2)], at(1, 2)),
                    (vec![walked(1, 2, 3), walked(2, 4, 5)], at(2, 5)),
                    (vec![walked(2, 5, 6), walked(4, 0, 1)], end),
                ]
            );
            assert_eq!(
                parts(piece(ends), 5),
                [(vec![walked(1, 0, 3), walked(2, 4, 6)], at(2, 6)), (vec![walked(4, 0, 1)], end),]
            );
            assert_eq!(parts(piece(ends), 200), [(piece(ends).jobs.into(), end)]);
        }
        // The next piece begins with the job that this one ended with.
        let last_has_events = Piece { last: Some(job(4)), ..piece(false) };
        assert_eq!(last_has_events.part(200).point, at(4, 1));
        let none = Piece { jobs: VecDeque::new(), last: Some(job(5)), ends: false };
        assert_eq!(parts(none, 200), [(vec![], at(5, 0))]);
        let none = Piece { jobs: VecDeque::new(), last: None, ends: true };
        assert_eq!(parts(none, 200), [(vec![], None)]);
    }

    #[test]
    fn a_piece_goes_on_within_the_job_that_the_walk_has_come_to() {
        let mut whole = piece(true);
        assert!(whole.go_to(WalkPoint { job: job(2), sequence: 5 }));
        assert_eq!(whole.jobs, [walked(2, 5, 6), walked(4, 0, 1)]);
        assert!(whole.go_to(WalkPoint { job: job(2), sequence: 6 }));
        assert_eq!(whole.jobs, [walked(4, 0, 1)]);
        assert!(!whole.go_to(WalkPoint { job: job(5), sequence: 0 }));
        assert!(piece(true).go_to(WalkPoint::START));
    }
}
