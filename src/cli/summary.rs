//! `milepost summary`: counts jobs, and says how long they took.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use milepost_client::pb::{
    JobFigures, JobGroup, JobStatus, SummarizeJobsRequest, SummarizeJobsResponse, SummaryAttribute,
    SummaryPeriod, job_group::Key, summarize_jobs_request::GroupBy,
};

use super::{
    connection::Api,
    jobs::Filter,
    output::{Row, Table, json, short, time},
    print_line,
};
use crate::error::BoxError;

/// Which jobs to count, and by what.
#[derive(Args, Clone, Debug)]
pub(super) struct Summary {
    /// What makes a group [default: only the total is counted]
    #[arg(long, value_enum, value_name = "WHAT")]
    by: Option<By>,

    /// Count by the value of the label with this key
    #[arg(long, value_name = "KEY", conflicts_with = "by")]
    by_label: Option<String>,

    /// IANA time zone in which days, weeks, months and years begin [default: UTC]
    #[arg(long, value_name = "ZONE", default_value = "", hide_default_value = true, requires = "by")]
    time_zone: String,

    #[command(flatten)]
    filter: Filter,

    #[command(flatten)]
    api: Api,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum By {
    Day,
    Week,
    Month,
    Year,
    Configuration,
    Status,
    Counterpart,
}

impl From<By> for GroupBy {
    fn from(by: By) -> Self {
        match by {
            By::Day => Self::Period(SummaryPeriod::Day.into()),
            By::Week => Self::Period(SummaryPeriod::Week.into()),
            By::Month => Self::Period(SummaryPeriod::Month.into()),
            By::Year => Self::Period(SummaryPeriod::Year.into()),
            By::Configuration => Self::Attribute(SummaryAttribute::Configuration.into()),
            By::Status => Self::Attribute(SummaryAttribute::Status.into()),
            By::Counterpart => Self::Attribute(SummaryAttribute::Counterpart.into()),
        }
    }
}

/// The columns of the statuses.
const STATUSES: [JobStatus; 6] = [
    JobStatus::Pending,
    JobStatus::Running,
    JobStatus::Stalled,
    JobStatus::Failed,
    JobStatus::Complete,
    JobStatus::Cancelled,
];

impl Summary {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        let mut jobs = self.api.connect().await?.jobs();
        let mut request = SummarizeJobsRequest {
            filter: Some(self.filter.into()),
            group_by: self.by.map(GroupBy::from).or(self.by_label.map(GroupBy::LabelKey)),
            time_zone: self.time_zone,
            page_size: 500,
            page_token: String::new(),
        };
        let columns = [
            "GROUP",
            "JOBS",
            "PENDING",
            "RUNNING",
            "STALLED",
            "FAILED",
            "COMPLETE",
            "CANCELLED",
            "MEDIAN",
            "P90",
        ];
        let mut table = Table::with(&columns);
        loop {
            let answer = jobs.summarize_jobs(request.clone()).await?.into_inner();
            if self.api.output.is_json() {
                print_line(&json(&answer, &[])?)?;
            }
            let SummarizeJobsResponse { groups, next_page_token, total } = answer;
            let is_last = next_page_token.is_empty();
            if !self.api.output.is_json() {
                let mut rows: Vec<Row> =
                    groups.iter().map(|group| row(key(group), group.figures.as_ref())).collect();
                if is_last {
                    rows.push(row("all".to_owned(), total.as_ref()));
                }
                table.print(rows)?;
            }
            if is_last {
                return Ok(ExitCode::SUCCESS);
            }
            request.page_token = next_page_token;
        }
    }
}

fn key(group: &JobGroup) -> String {
    match &group.key {
        Some(Key::PeriodStart(start)) => time(Some(*start)),
        Some(Key::ConfigurationTag(text) | Key::LabelValue(text)) => text.clone(),
        Some(Key::Status(_)) => short(group_status(group).as_str_name(), "JOB_STATUS_"),
        Some(Key::Counterpart(party)) => {
            format!("{} {} {}", party.id, party.first_name, party.last_name).trim_end().to_owned()
        }
        None => "without".to_owned(),
    }
}

fn group_status(group: &JobGroup) -> JobStatus {
    match group.key {
        Some(Key::Status(status)) => JobStatus::try_from(status).unwrap_or_default(),
        _ => JobStatus::Unspecified,
    }
}

fn row(key: String, figures: Option<&JobFigures>) -> Row {
    let figures = figures.cloned().unwrap_or_default();
    let of = |status: JobStatus| {
        let count = figures.statuses.iter().find(|count| count.status() == status);
        count.map_or(0, |count| count.jobs).to_string()
    };
    let length = |length: Option<prost_types::Duration>| {
        length
            .map_or_else(String::new, |length| format!("{}.{} s", length.seconds, length.nanos / 100_000_000))
    };
    let mut row = vec![key, figures.jobs.to_string()];
    row.extend(STATUSES.map(of));
    row.extend([length(figures.median_duration), length(figures.p90_duration)]);
    row
}
