//! `SummarizeJobs`: figures of the caller's jobs.

use std::collections::{HashMap, HashSet};

use chrono::DateTime;
use parking_lot::Mutex;

use super::{
    App,
    filter::job_filters,
    page::{Page, PageRequest},
    parse,
};
use crate::{
    db::read,
    error::{Error, Result, Violations, quoted},
    models::{
        caller::Viewer,
        job::{Figures, Grouping, Job, JobFilters, Party, Period, Summary},
        job_configuration::JobConfiguration,
    },
    pb::{self, job_group::Key, summarize_jobs_request::GroupBy},
    progress::JobStatus,
    proto_enums::{ProtoEnum as _, duration, timestamp},
};

pub(super) async fn summarize(
    app: &App,
    viewer: Viewer,
    request: pb::SummarizeJobsRequest,
) -> Result<pb::SummarizeJobsResponse> {
    let (filters, grouping, asked) = parse_request(viewer, request)?;
    let _one = app.auth.tenants().open_summary(viewer.tenant())?;
    if let Some(Grouping::Created { time_zone, .. }) = &grouping {
        check_time_zone(app, viewer, time_zone).await?;
    }
    let (after, limit) = (asked.after.as_deref(), asked.limit());
    let Summary { total, mut groups } = read!(app.database, viewer.tenant(), |conn| {
        Job::summarize(conn, viewer, &filters, grouping.as_ref(), after, limit)
    })?;
    if let (0, Some(tag)) = (total.jobs, &filters.configuration_tag) {
        read!(app.database, viewer.tenant(), |conn| JobConfiguration::demand_tag(conn, viewer, tag))?;
    }
    let mut next_page_token = asked.cut(&mut groups, |(key, _)| key.clone());
    let counterparts = match &grouping {
        Some(Grouping::Counterpart) => {
            let ids: Vec<_> = groups.iter().filter_map(|(id, _)| id.parse().ok()).collect();
            read!(app.database, viewer.tenant(), |conn| Party::load(conn, &ids))?
        }
        _ => Vec::new(),
    };
    let counterparts: HashMap<String, Party> =
        counterparts.into_iter().map(|party| (party.id.to_string(), party)).collect();
    let mut page = Page::default();
    let mut last = None;
    for (key, figures) in groups {
        let group = pb::JobGroup {
            key: grouping.as_ref().and_then(|grouping| key_message(grouping, &key, &counterparts)),
            figures: Some(figures.into()),
        };
        if !page.push(group) {
            next_page_token = asked.next_token(last.as_ref());
            break;
        }
        last = Some(key);
    }
    Ok(pb::SummarizeJobsResponse { groups: page.items, next_page_token, total: Some(total.into()) })
}

/// Time zones that Postgres knows, as far as it was asked. Postgres reads all files of its time zones for each
/// answer, which takes some 50 milliseconds.
#[derive(Debug, Default)]
pub(super) struct TimeZones(Mutex<HashSet<String>>);

async fn check_time_zone(app: &App, viewer: Viewer, name: &str) -> Result<()> {
    if name == UTC || app.time_zones.0.lock().contains(name) {
        return Ok(());
    }
    if !read!(app.database, viewer.tenant(), |conn| Grouping::is_time_zone(conn, name))? {
        let description = format!("{} is not an IANA time zone", quoted(name));
        return Err(Error::invalid("time_zone", description));
    }
    app.time_zones.0.lock().insert(name.to_owned());
    Ok(())
}

const UTC: &str = "UTC";

fn parse_request(
    viewer: Viewer,
    mut request: pb::SummarizeJobsRequest,
) -> Result<(JobFilters, Option<Grouping>, PageRequest<String>)> {
    let mut violations = Violations::default();
    let v = &mut violations;
    let page = PageRequest::take(v, viewer.id(), &mut request);
    let filters = job_filters(v, request.filter);
    let time_zone = parse::optional_key_text(v, "time_zone", request.time_zone);
    if time_zone.is_some() && !matches!(request.group_by, Some(GroupBy::Period(_))) {
        v.add("time_zone", "is valid only with period");
    }
    let time_zone = time_zone.unwrap_or_else(|| UTC.to_owned());
    let grouping = match request.group_by {
        None => None,
        Some(GroupBy::Period(number)) => match period(number) {
            Some(period) => Some(Grouping::Created { period, time_zone }),
            None => {
                v.add("period", format!("{number} is not one of DAY, WEEK, MONTH and YEAR"));
                None
            }
        },
        Some(GroupBy::Attribute(number)) => match attribute(number) {
            Some(grouping) => Some(grouping),
            None => {
                v.add("attribute", format!("{number} is not one of CONFIGURATION, STATUS and COUNTERPART"));
                None
            }
        },
        Some(GroupBy::LabelKey(key)) => parse::label_key(v, "label_key", key).map(Grouping::Label),
    };
    violations.or((filters, grouping, page))
}

fn period(number: i32) -> Option<Period> {
    match pb::SummaryPeriod::try_from(number).ok()? {
        pb::SummaryPeriod::Unspecified => None,
        pb::SummaryPeriod::Day => Some(Period::Day),
        pb::SummaryPeriod::Week => Some(Period::Week),
        pb::SummaryPeriod::Month => Some(Period::Month),
        pb::SummaryPeriod::Year => Some(Period::Year),
    }
}

fn attribute(number: i32) -> Option<Grouping> {
    match pb::SummaryAttribute::try_from(number).ok()? {
        pb::SummaryAttribute::Unspecified => None,
        pb::SummaryAttribute::Configuration => Some(Grouping::Configuration),
        pb::SummaryAttribute::Status => Some(Grouping::Status),
        pb::SummaryAttribute::Counterpart => Some(Grouping::Counterpart),
    }
}

/// The key of a group as a message; none for the jobs without the label.
fn key_message(grouping: &Grouping, key: &str, counterparts: &HashMap<String, Party>) -> Option<Key> {
    match grouping {
        Grouping::Created { .. } => {
            let start = DateTime::parse_from_rfc3339(key).ok()?;
            Some(Key::PeriodStart(timestamp(start.to_utc())))
        }
        Grouping::Configuration => Some(Key::ConfigurationTag(key.to_owned())),
        Grouping::Status => JobStatus::of_label(key).map(|status| Key::Status(status.to_proto())),
        Grouping::Counterpart => counterparts.get(key).cloned().map(|party| Key::Counterpart(party.into())),
        Grouping::Label(_) => key.strip_prefix('=').map(|value| Key::LabelValue(value.to_owned())),
    }
}

impl From<Figures> for pb::JobFigures {
    fn from(figures: Figures) -> Self {
        let statuses = figures.statuses.into_iter();
        let (median, p90) = figures.durations.unzip();
        Self {
            jobs: figures.jobs,
            statuses: statuses
                .map(|(status, jobs)| pb::StatusCount { status: status.to_proto(), jobs })
                .collect(),
            median_duration: median.map(duration),
            p90_duration: p90.map(duration),
        }
    }
}
