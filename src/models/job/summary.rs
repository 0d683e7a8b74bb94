//! Figures of a user's jobs: how many there are, and how long those took that are complete.

use std::time::Duration;

use diesel::{
    dsl::sql,
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{BigInt, Bool, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};

use super::{Job, JobFilters};
use crate::{
    error::Result,
    models::caller::{Viewer, Visibility},
    progress::JobStatus,
    schema::{jobs, sql_types::JobStatus as JobStatusType},
};

/// A period by which jobs are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    Day,
    /// From Monday on.
    Week,
    Month,
    Year,
}

/// What the jobs of a group have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grouping {
    /// The period in which they were created, in a time zone that [`Grouping::is_time_zone`].
    Created {
        period: Period,
        time_zone: String,
    },
    Configuration,
    Status,
    Counterpart,
    /// The value of this label.
    Label(String),
}

/// The figures of some jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    pub jobs: i64,
    /// How many of them have each status, without those that none has.
    pub statuses: Vec<(JobStatus, i64)>,
    /// Median and 90th percentile of the time from creation to completion; none if none is
    /// complete.
    pub durations: Option<(Duration, Duration)>,
}

/// The figures of a page of groups, and of all jobs.
#[derive(Clone, Debug)]
pub struct Summary {
    pub total: Figures,
    /// Each with its key as a text: the start of the period in UTC; the tag; the status; the id of the
    /// counterpart; `=` and the value of the label, or nothing for the jobs without it.
    pub groups: Vec<(String, Figures)>,
}

impl Grouping {
    /// Whether Postgres knows this time zone by its name.
    pub async fn is_time_zone(conn: &mut AsyncPgConnection, name: &str) -> Result<bool> {
        let known = sql::<Bool>("EXISTS (SELECT FROM pg_timezone_names WHERE name = ").bind::<Text, _>(name);
        Ok(diesel::select(known.sql(")")).get_result(conn).await?)
    }

    /// Writes what groups a job of `matching`.
    fn walk_raw_key<'b>(&'b self, visibility: Visibility, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        match self {
            Self::Created { period, time_zone } => {
                out.push_sql(match period {
                    Period::Day => "date_trunc('day', created_at, ",
                    Period::Week => "date_trunc('week', created_at, ",
                    Period::Month => "date_trunc('month', created_at, ",
                    Period::Year => "date_trunc('year', created_at, ",
                });
                out.push_bind_param::<Text, _>(time_zone)?;
                out.push_sql(")");
            }
            Self::Configuration => out.push_sql("configuration_tag"),
            Self::Status => out.push_sql("status"),
            Self::Counterpart => out.push_sql(match visibility {
                Visibility::Provider(_) => "customer_id",
                Visibility::Customer(_) | Visibility::Job(_) => "provider_id",
            }),
            Self::Label(key) => {
                out.push_sql(
                    "(SELECT value FROM job_labels WHERE job_labels.job_id = matching.id AND job_labels.key = ",
                );
                out.push_bind_param::<Text, _>(key)?;
                out.push_sql(")");
            }
        }
        Ok(())
    }

    /// Writes the key of a group as a text, in whose order the groups come: see [`Summary::groups`].
    fn key(&self) -> &'static str {
        match self {
            Self::Created { .. } => "to_char(key AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')",
            Self::Configuration | Self::Status | Self::Counterpart => "key::text",
            Self::Label(_) => "coalesce('=' || key, '')",
        }
    }
}

impl Job {
    /// Counts the viewer's jobs that match the filters: all of them, and by group at most `limit`
    /// groups after the one with the key `after`.
    pub async fn summarize(
        conn: &mut AsyncPgConnection,
        viewer: Viewer,
        filters: &JobFilters,
        grouping: Option<&Grouping>,
        after: Option<&str>,
        limit: i64,
    ) -> Result<Summary> {
        let visibility = viewer.visibility();
        let columns = (
            jobs::id,
            jobs::status,
            jobs::created_at,
            jobs::closed_at,
            jobs::configuration_tag,
            jobs::provider_id,
            jobs::customer_id,
        );
        let matching = filters.narrow_many(visibility, jobs::table.select(columns).into_boxed());
        let query = SummaryQuery { matching, visibility, grouping, after, limit };
        let mut rows: Vec<Row> = query.load(conn).await?;
        let total = Figures::from(&rows.remove(0));
        let groups = rows.iter().map(|row| (row.1.clone().unwrap_or_default(), Figures::from(row)));
        Ok(Summary { total, groups: groups.collect() })
    }
}

type Matching<'a> = jobs::BoxedQuery<
    'a,
    Pg,
    (SqlUuid, JobStatusType, Timestamptz, Nullable<Timestamptz>, Text, SqlUuid, SqlUuid),
>;

/// The key, the number of jobs, those of each of [`STATUSES`], and the microseconds of median and
/// 90th percentile; first those of all jobs.
type Row = (bool, Option<String>, i64, (i64, i64, i64, i64, i64, i64), Option<i64>, Option<i64>);

/// In the order of their names, as `ORDER BY` has them.
const STATUSES: [JobStatus; 6] = [
    JobStatus::Cancelled,
    JobStatus::Complete,
    JobStatus::Failed,
    JobStatus::Pending,
    JobStatus::Running,
    JobStatus::Stalled,
];

impl From<&Row> for Figures {
    fn from((_, _, jobs, counts, median, p90): &Row) -> Self {
        let counts = [counts.0, counts.1, counts.2, counts.3, counts.4, counts.5];
        let length = |micros: i64| Duration::from_micros(micros.max(0).unsigned_abs());
        Self {
            jobs: *jobs,
            statuses: STATUSES.into_iter().zip(counts).filter(|(_, count)| *count > 0).collect(),
            durations: median.zip(*p90).map(|(median, p90)| (length(median), length(p90))),
        }
    }
}

struct SummaryQuery<'a> {
    matching: Matching<'a>,
    visibility: Visibility,
    grouping: Option<&'a Grouping>,
    after: Option<&'a str>,
    limit: i64,
}

impl QueryFragment<Pg> for SummaryQuery<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let (key, sets, is_total) = match self.grouping {
            Some(grouping) => (grouping.key(), "(), (key)", "grouping(key) = 1"),
            None => ("NULL::text", "()", "true"),
        };
        out.push_sql("SELECT is_total, key, jobs");
        for status in STATUSES {
            out.push_sql(", ");
            out.push_sql(status.label());
        }
        out.push_sql(", in_microseconds(lengths[1]), in_microseconds(lengths[2]) FROM (SELECT ");
        out.push_sql(is_total);
        out.push_sql(" AS is_total, ");
        out.push_sql(key);
        out.push_sql(" COLLATE \"C\" AS key, count(*) AS jobs");
        for status in STATUSES {
            out.push_sql(", count(*) FILTER (WHERE status = '");
            out.push_sql(status.label());
            out.push_sql("') AS ");
            out.push_sql(status.label());
        }
        out.push_sql(
            ", percentile_disc(ARRAY[0.5, 0.9]) WITHIN GROUP (ORDER BY closed_at - created_at) \
             FILTER (WHERE status = 'complete') AS lengths FROM (",
        );
        if let Some(grouping) = self.grouping {
            out.push_sql("SELECT status, created_at, closed_at, ");
            grouping.walk_raw_key(self.visibility, &mut out)?;
            out.push_sql(" AS key FROM (");
        }
        QueryFragment::<Pg>::walk_ast(&self.matching, out.reborrow())?;
        out.push_sql(
            ") AS matching (id, status, created_at, closed_at, configuration_tag, provider_id, customer_id)",
        );
        if self.grouping.is_some() {
            out.push_sql(") AS keyed");
        }
        out.push_sql(" GROUP BY GROUPING SETS (");
        out.push_sql(sets);
        out.push_sql(")) AS figures");
        if let Some(after) = &self.after {
            out.push_sql(" WHERE is_total OR key > ");
            out.push_bind_param::<Text, _>(*after)?;
        }
        out.push_sql(" ORDER BY is_total DESC, key LIMIT 1 + ");
        out.push_bind_param::<BigInt, _>(&self.limit)?;
        Ok(())
    }
}

impl Query for SummaryQuery<'_> {
    type SqlType = (
        Bool,
        Nullable<Text>,
        BigInt,
        (BigInt, BigInt, BigInt, BigInt, BigInt, BigInt),
        Nullable<BigInt>,
        Nullable<BigInt>,
    );
}

// The text depends on filters and groups.
impl QueryId for SummaryQuery<'_> {
    type QueryId = ();

    const HAS_STATIC_QUERY_ID: bool = false;
}
