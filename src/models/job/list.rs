//! Pages of jobs, newest first, by filters that combine.
//!
//! Each filter alone selects a range of an index, and each label. The index has the jobs in the
//! order of their creation or, for a prefix, in the order of the text. A text that jobs contain is
//! looked for among the newest jobs first, and then by the index of trigrams. A combination of
//! filters reads one such range and leaves out the jobs that do not match the other
//! filters. One page reads at most [`CANDIDATES`] jobs of the range, so it may be
//! short.

use std::cmp::Reverse;

use chrono::{DateTime, Utc};
use diesel::{dsl::exists, pg::Pg, prelude::*, sql_types};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use super::{Job, text::SearchText};
use crate::{
    error::Result,
    models::{
        CreationCursor,
        caller::{Viewer, Visibility},
        job_configuration::JobConfiguration,
        labels::{Labels, has_labels},
        visible_jobs,
    },
    progress::JobStatus,
    schema::{job_labels, job_texts, jobs},
};

/// Most jobs of one range of an index that are read for a page.
const CANDIDATES: i64 = 10_000;

/// Filters that a job must match all. A filter that is none or empty matches every job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobFilters {
    /// The job has one of these statuses; each occurs once.
    pub statuses: Vec<JobStatus>,
    /// True: the job is open. False: the job is closed.
    pub open: Option<bool>,
    pub configuration_tag: Option<String>,
    /// The job's other party is this user.
    pub counterpart_id: Option<Uuid>,
    /// The job was created at this time or later.
    pub created_from: Option<DateTime<Utc>>,
    /// The job was created before this time.
    pub created_before: Option<DateTime<Utc>>,
    /// The job's `provider_job_id` starts with this text.
    pub provider_job_id_prefix: String,
    /// The job's `provider_job_name` starts with this text.
    pub provider_job_name_prefix: String,
    /// The job has all of these labels.
    pub labels: Labels,
    /// The job's `provider_job_id` or `provider_job_name` contains this text.
    pub text: Option<SearchText>,
    /// The job was closed before this time.
    pub closed_before: Option<DateTime<Utc>>,
}

#[derive(Clone, Debug)]
pub struct JobPage {
    /// Newest first.
    pub jobs: Vec<Job>,
    /// The next page has the jobs older than this one. None: there is no next page.
    pub next: Option<CreationCursor>,
}

impl Job {
    pub fn cursor(&self) -> CreationCursor {
        CreationCursor { created_at: self.created_at, id: self.id }
    }

    /// Lists at most `limit` jobs that the viewer may see, newest first, beginning with
    /// those older than `after`. A page may have fewer jobs, or none, before the end of
    /// the list. Fails with [`Error::NotFound`](crate::error::Error::NotFound) if no job
    /// matches and the viewer may not filter by the configuration tag.
    pub async fn list(
        conn: &mut AsyncPgConnection,
        viewer: Viewer,
        filters: &JobFilters,
        after: Option<CreationCursor>,
        limit: i64,
    ) -> Result<JobPage> {
        let conditions = filters.conditions();
        let query = ListQuery { visibility: viewer.visibility(), filters, after, limit };
        let found = match query.by_prefix(conn, &conditions).await? {
            Some(found) => Some(found),
            None => query.by_label(conn, &conditions).await?,
        };
        let Found { mut keys, rest } = match found {
            Some(found) => found,
            None => {
                let newest = query.by_creation(conn, &conditions).await?;
                // A page of a common text is full without the index, which would find too much.
                let is_full = i64::try_from(newest.keys.len()).is_ok_and(|count| count > limit);
                match newest.rest.filter(|_| !is_full) {
                    Some(_) => query.by_text(conn, &conditions).await?.unwrap_or(newest),
                    None => newest,
                }
            }
        };
        if let (true, Some(tag)) = (keys.is_empty(), &filters.configuration_tag) {
            JobConfiguration::demand_tag(conn, viewer, tag).await?;
        }
        let mut next = rest;
        if let Ok(limit) = usize::try_from(limit)
            && keys.len() > limit
        {
            keys.truncate(limit);
            next = keys.last().copied();
        }
        let ids: Vec<Uuid> = keys.iter().map(|key| key.id).collect();
        let mut jobs = Self::load(conn, viewer.visibility(), &ids).await?;
        // An event may have changed a job since its key was found.
        jobs.retain(|job| filters.still_hold(job));
        jobs.sort_unstable_by_key(|job| Reverse(job.cursor()));
        Ok(JobPage { jobs, next })
    }
}

/// One of [`JobFilters`] that is given.
#[derive(Clone, Copy)]
pub(super) enum Condition<'a> {
    Counterpart(Uuid),
    Open(bool),
    Statuses(&'a [JobStatus]),
    ConfigurationTag(&'a str),
    ProviderJobIdPrefix(&'a str),
    ProviderJobNamePrefix(&'a str),
    Labels(&'a Labels),
    Text(&'a SearchText),
    ClosedBefore(DateTime<Utc>),
}

impl<'a> Condition<'a> {
    /// Cuts a query to the jobs that match.
    pub(super) fn narrow<C>(self, visibility: Visibility, query: Jobs<'a, C>) -> Jobs<'a, C> {
        match (self, visibility) {
            (Self::Counterpart(id), Visibility::Provider(_)) => query.filter(jobs::customer_id.eq(id)),
            (Self::Counterpart(id), Visibility::Customer(_)) => query.filter(jobs::provider_id.eq(id)),
            (Self::Counterpart(id), Visibility::Job(_)) => {
                query.filter(jobs::provider_id.eq(id).or(jobs::customer_id.eq(id)))
            }
            (Self::Open(true), _) => query.filter(jobs::closed_at.is_null()),
            (Self::Open(false), _) => query.filter(jobs::closed_at.is_not_null()),
            (Self::Statuses(&[status]), _) => query.filter(jobs::status.eq(status)),
            (Self::Statuses(statuses), _) => query.filter(jobs::status.eq_any(statuses)),
            (Self::ConfigurationTag(tag), _) => query.filter(jobs::configuration_tag.eq(tag)),
            (Self::ProviderJobIdPrefix(prefix), _) => {
                let query = query.filter(jobs::provider_job_id.ge(prefix));
                match after_prefix(prefix) {
                    Some(end) => query.filter(jobs::provider_job_id.lt(end)),
                    None => query,
                }
            }
            (Self::ProviderJobNamePrefix(prefix), _) => {
                let query = query.filter(jobs::provider_job_name.ge(prefix));
                match after_prefix(prefix) {
                    Some(end) => query.filter(jobs::provider_job_name.lt(end)),
                    None => query,
                }
            }
            (Self::Labels(labels), _) => query.filter(has_labels(jobs::labels, labels)),
            (Self::ClosedBefore(before), _) => query.filter(jobs::closed_at.lt(before)),
            (Self::Text(text), _) => {
                let of_job = job_texts::table.filter(job_texts::job_id.eq(jobs::id));
                let by_id = job_texts::provider_job_id.like(text.pattern());
                let by_name = job_texts::provider_job_name.like(text.pattern());
                query.filter(exists(of_job.filter(by_id.or(by_name))))
            }
        }
    }

    /// As [`Self::narrow`], for a query of many jobs. The side's id stands beside labels and the
    /// text, so that they are ranges of indexes of their own.
    fn narrow_many<C>(self, visibility: Visibility, query: Jobs<'a, C>) -> Jobs<'a, C> {
        match self {
            Self::Labels(labels) => labels.0.iter().fold(query, |query, (key, value)| {
                let of_job = job_labels::table.filter(job_labels::job_id.eq(jobs::id));
                let of_job = of_job.filter(job_labels::key.eq(key)).filter(job_labels::value.eq(value));
                match visibility {
                    Visibility::Provider(id) => {
                        query.filter(exists(of_job.filter(job_labels::provider_id.eq(id))))
                    }
                    Visibility::Customer(id) => {
                        query.filter(exists(of_job.filter(job_labels::customer_id.eq(id))))
                    }
                    Visibility::Job(_) => query.filter(exists(of_job)),
                }
            }),
            Self::Text(text) => {
                let by_id = job_texts::provider_job_id.like(text.pattern());
                let by_name = job_texts::provider_job_name.like(text.pattern());
                let of_job = job_texts::table.filter(job_texts::job_id.eq(jobs::id));
                let of_job = of_job.filter(by_id.or(by_name));
                match visibility {
                    Visibility::Provider(id) => {
                        query.filter(exists(of_job.filter(job_texts::provider_id.eq(id))))
                    }
                    Visibility::Customer(id) => {
                        query.filter(exists(of_job.filter(job_texts::customer_id.eq(id))))
                    }
                    Visibility::Job(_) => query.filter(exists(of_job)),
                }
            }
            Self::Counterpart(_)
            | Self::Open(_)
            | Self::Statuses(_)
            | Self::ConfigurationTag(_)
            | Self::ProviderJobIdPrefix(_)
            | Self::ProviderJobNamePrefix(_)
            | Self::ClosedBefore(_) => self.narrow(visibility, query),
        }
    }
}

impl JobFilters {
    /// Cuts a query of many jobs to those that are visible and match all filters.
    pub(super) fn narrow_many<'a, C>(&'a self, visibility: Visibility, query: Jobs<'a, C>) -> Jobs<'a, C> {
        let query = self.created(visible_jobs!(query, visibility));
        self.conditions().into_iter().fold(query, |query, condition| condition.narrow_many(visibility, query))
    }

    /// Cuts a query of a few jobs to those that are visible and match all filters.
    pub(super) fn narrow<'a, C>(&'a self, visibility: Visibility, query: Jobs<'a, C>) -> Jobs<'a, C> {
        let query = self.created(visible_jobs!(query, visibility));
        self.conditions().into_iter().fold(query, |query, condition| condition.narrow(visibility, query))
    }

    /// Cuts a query to the jobs that match the filters by time of creation.
    pub(super) fn created<'a, C>(&self, mut query: Jobs<'a, C>) -> Jobs<'a, C> {
        if let Some(from) = self.created_from {
            query = query.filter(jobs::created_at.ge(from));
        }
        if let Some(before) = self.created_before {
            query = query.filter(jobs::created_at.lt(before));
        }
        query
    }

    /// Lists the filters that are given, without those by time of creation. The filter
    /// that probably matches the fewest jobs comes first, except that those without a range
    /// in the order of creation come last.
    pub(super) fn conditions(&self) -> Vec<Condition<'_>> {
        let statuses = Some(&self.statuses[..]).filter(|statuses| !statuses.is_empty());
        let id_prefix = Some(&self.provider_job_id_prefix[..]).filter(|prefix| !prefix.is_empty());
        let name_prefix = Some(&self.provider_job_name_prefix[..]).filter(|prefix| !prefix.is_empty());
        [
            self.counterpart_id.map(Condition::Counterpart),
            self.open.filter(|open| *open).map(Condition::Open),
            statuses.map(Condition::Statuses),
            self.configuration_tag.as_deref().map(Condition::ConfigurationTag),
            self.open.filter(|open| !open).map(Condition::Open),
            id_prefix.map(Condition::ProviderJobIdPrefix),
            name_prefix.map(Condition::ProviderJobNamePrefix),
            Some(&self.labels).filter(|labels| !labels.is_empty()).map(Condition::Labels),
            self.text.as_ref().map(Condition::Text),
            self.closed_before.map(Condition::ClosedBefore),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Whether the job matches the filters whose columns an event may change.
    fn still_hold(&self, job: &Job) -> bool {
        (self.statuses.is_empty() || self.statuses.contains(&job.status))
            && self.open.is_none_or(|open| open == job.closed_at.is_none())
    }
}

/// A query that selects these columns of jobs.
pub(super) type Jobs<'a, C> = jobs::BoxedQuery<'a, Pg, C>;

/// A query that selects the cursors of jobs.
type Keys<'a> = Jobs<'a, (sql_types::Timestamptz, sql_types::Uuid)>;

/// A query that selects the cursors of jobs by a label.
type Labelled<'a> = job_labels::BoxedQuery<'a, Pg, (sql_types::Timestamptz, sql_types::Uuid)>;

/// Cursors of matching jobs, newest first. There is one more than the limit if so many
/// jobs match.
struct Found {
    keys: Vec<CreationCursor>,
    /// Jobs older than this were not read.
    rest: Option<CreationCursor>,
}

#[derive(Clone, Copy)]
struct ListQuery<'a> {
    visibility: Visibility,
    filters: &'a JobFilters,
    after: Option<CreationCursor>,
    limit: i64,
}

impl<'a> ListQuery<'a> {
    fn visible(self) -> Keys<'a> {
        let query = jobs::table.select((jobs::created_at, jobs::id)).into_boxed();
        visible_jobs!(query, self.visibility)
    }

    /// The visible jobs that match the filters by time of creation, after those of the
    /// previous pages.
    fn remaining(self) -> Keys<'a> {
        let mut query = self.filters.created(self.visible());
        if let Some(CreationCursor { created_at, id }) = self.after {
            let older = jobs::created_at.lt(created_at).or(jobs::id.lt(id));
            query = query.filter(jobs::created_at.le(created_at).and(older));
        }
        query
    }

    /// Reads all jobs that match one of the prefixes. Returns none if each prefix
    /// matches more than [`CANDIDATES`] jobs.
    async fn by_prefix(
        self,
        conn: &mut AsyncPgConnection,
        conditions: &[Condition<'a>],
    ) -> Result<Option<Found>> {
        for &condition in conditions {
            let query = condition.narrow(self.visibility, self.visible()).limit(CANDIDATES + 1);
            let query = match condition {
                Condition::ProviderJobIdPrefix(_) => query.order(jobs::provider_job_id),
                Condition::ProviderJobNamePrefix(_) => query.order(jobs::provider_job_name),
                Condition::Counterpart(_)
                | Condition::Open(_)
                | Condition::Statuses(_)
                | Condition::ConfigurationTag(_)
                | Condition::Labels(_)
                | Condition::Text(_)
                | Condition::ClosedBefore(_) => continue,
            };
            let candidates: Vec<CreationCursor> = query.load(conn).await?;
            if i64::try_from(candidates.len()).is_ok_and(|count| count <= CANDIDATES) {
                let keys =
                    self.among(conn, conditions, candidates.iter().map(|candidate| candidate.id)).await?;
                return Ok(Some(self.newest(keys, None)));
            }
        }
        Ok(None)
    }

    /// Reads all jobs that match the text. Returns none without a text, if more than
    /// [`CANDIDATES`] jobs match, or if the index does not have the text.
    async fn by_text(
        self,
        conn: &mut AsyncPgConnection,
        conditions: &[Condition<'a>],
    ) -> Result<Option<Found>> {
        let Some(text) = &self.filters.text else { return Ok(None) };
        let found = text.find(conn, self.visibility, CANDIDATES + 1).await?;
        let is_all = |found: &Vec<Uuid>| i64::try_from(found.len()).is_ok_and(|count| count <= CANDIDATES);
        let Some(ids) = found.filter(is_all) else { return Ok(None) };
        let keys = self.among(conn, conditions, ids).await?;
        Ok(Some(self.newest(keys, None)))
    }

    /// The jobs among these candidates that match all conditions.
    async fn among(
        self,
        conn: &mut AsyncPgConnection,
        conditions: &[Condition<'a>],
        candidates: impl IntoIterator<Item = Uuid>,
    ) -> Result<Vec<CreationCursor>> {
        let query = conditions
            .iter()
            .fold(self.remaining(), |query, condition| condition.narrow(self.visibility, query));
        Ok(query.filter(jobs::id.eq_any(candidates)).load(conn).await?)
    }

    /// Reads the jobs of one label, newest first: of the first one that not more than
    /// [`CANDIDATES`] jobs have, or of the first one. Returns none without labels.
    async fn by_label(
        self,
        conn: &mut AsyncPgConnection,
        conditions: &[Condition<'a>],
    ) -> Result<Option<Found>> {
        let alone = conditions.len() == 1 && self.filters.labels.0.len() == 1;
        let most = if alone { self.limit + 1 } else { CANDIDATES };
        let mut first = None;
        for (key, value) in &self.filters.labels.0 {
            let candidates = self.labelled(key, value).limit(most).load::<CreationCursor>(conn).await?;
            if alone {
                return Ok(Some(Found { keys: candidates, rest: None }));
            }
            let is_all = i64::try_from(candidates.len()).is_ok_and(|count| count < most);
            if is_all {
                let keys =
                    self.among(conn, conditions, candidates.iter().map(|candidate| candidate.id)).await?;
                return Ok(Some(self.newest(keys, None)));
            }
            first.get_or_insert(candidates);
        }
        let Some(candidates) = first else { return Ok(None) };
        let keys = self.among(conn, conditions, candidates.iter().map(|candidate| candidate.id)).await?;
        Ok(Some(self.newest(keys, candidates.last().copied())))
    }

    /// The visible jobs with this label, newest first, after those of the previous pages.
    fn labelled(self, key: &'a str, value: &'a str) -> Labelled<'a> {
        use job_labels::{customer_id, job_created_at, job_id, provider_id};
        let query = job_labels::table.select((job_created_at, job_id)).into_boxed();
        let mut query = match self.visibility {
            Visibility::Provider(id) => query.filter(provider_id.eq(id)),
            Visibility::Customer(id) => query.filter(customer_id.eq(id)),
            Visibility::Job(id) => query.filter(job_id.eq(id)),
        };
        query = query.filter(job_labels::key.eq(key)).filter(job_labels::value.eq(value));
        if let Some(from) = self.filters.created_from {
            query = query.filter(job_created_at.ge(from));
        }
        if let Some(before) = self.filters.created_before {
            query = query.filter(job_created_at.lt(before));
        }
        if let Some(CreationCursor { created_at: at, id }) = self.after {
            query = query.filter(job_created_at.le(at).and(job_created_at.lt(at).or(job_id.lt(id))));
        }
        query.order((job_created_at.desc(), job_id.desc()))
    }

    /// Reads jobs in the order of their creation: those that match the first condition,
    /// or all visible ones if that condition is a prefix or there is none.
    async fn by_creation(self, conn: &mut AsyncPgConnection, conditions: &[Condition<'a>]) -> Result<Found> {
        let (ranges, others): (Vec<Option<Condition<'a>>>, _) = match conditions.split_first() {
            Some((Condition::Statuses(statuses), others)) => {
                (statuses.chunks(1).map(|status| Some(Condition::Statuses(status))).collect(), others)
            }
            Some((
                first @ (Condition::Counterpart(_) | Condition::Open(_) | Condition::ConfigurationTag(_)),
                others,
            )) => (vec![Some(*first)], others),
            Some((
                Condition::ProviderJobIdPrefix(_)
                | Condition::ProviderJobNamePrefix(_)
                | Condition::Labels(_)
                | Condition::Text(_)
                | Condition::ClosedBefore(_),
                _,
            ))
            | None => (vec![None], conditions),
        };
        let newest_first = (jobs::created_at.desc(), jobs::id.desc());
        let mut keys = Vec::new();
        let mut rest = None;
        for range in ranges {
            let range = || {
                range.into_iter().fold(self.remaining(), |query, only| only.narrow(self.visibility, query))
            };
            let last_read: Option<CreationCursor> = if others.is_empty() {
                None
            } else {
                range().order(newest_first).offset(CANDIDATES - 1).first(conn).await.optional()?
            };
            let mut query = others.iter().fold(range(), |query, other| other.narrow(self.visibility, query));
            if let Some(CreationCursor { created_at, id }) = last_read {
                let not_older = jobs::created_at.gt(created_at).or(jobs::id.ge(id));
                query = query.filter(jobs::created_at.ge(created_at).and(not_older));
            }
            keys.extend(query.order(newest_first).limit(self.limit + 1).load::<CreationCursor>(conn).await?);
            rest = rest.max(last_read);
        }
        Ok(self.newest(keys, rest))
    }

    /// Takes the newest of these keys, without those older than `rest`.
    fn newest(self, mut keys: Vec<CreationCursor>, rest: Option<CreationCursor>) -> Found {
        keys.retain(|key| rest.is_none_or(|rest| *key >= rest));
        keys.sort_unstable_by_key(|key| Reverse(*key));
        keys.truncate(usize::try_from(self.limit + 1).unwrap_or(usize::MAX));
        Found { keys, rest }
    }
}

/// Returns the first text, in the order of bytes, after all texts that start with the
/// prefix; none if there is no such text.
fn after_prefix(prefix: &str) -> Option<String> {
    let mut chars: Vec<char> = prefix.chars().collect();
    while let Some(last) = chars.pop() {
        // The range begins with `last` and leaves out surrogates.
        if let Some(next) = (last..=char::MAX).nth(1) {
            chars.push(next);
            return Some(chars.into_iter().collect());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_the_first_text_after_all_that_start_with_it() {
        for (prefix, end) in [
            ("a", Some("b")),
            ("scan-9", Some("scan-:")),
            ("100%", Some("100&")),
            ("\u{7f}", Some("\u{80}")),
            ("\u{d7ff}", Some("\u{e000}")),
            ("a\u{10ffff}", Some("b")),
            ("a\u{10ffff}\u{10ffff}", Some("b")),
            ("\u{10ffff}", None),
            ("", None),
        ] {
            let found = after_prefix(prefix);
            assert_eq!(found.as_deref(), end, "{prefix:?}");
            assert!(found.is_none_or(|end| *end > *format!("{prefix}\u{10ffff}")), "{prefix:?}");
        }
    }

    #[test]
    fn a_later_job_has_a_greater_cursor() {
        let at = |micros, id| CreationCursor {
            created_at: DateTime::from_timestamp_micros(micros).expect("a time"),
            id: Uuid::from_u128(id),
        };
        assert!(at(2, 1) > at(1, 2) && at(1, 2) > at(1, 1));
    }
}
