//! `milepost export`: writes jobs, or their events, as CSV or JSON lines.

use std::{
    io::{self, BufWriter, Stdout, Write as _},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand, ValueEnum};
use csv::{Terminator, Writer, WriterBuilder};
use milepost_client::pb::{
    Event, EventsOfJob, ExportEventsRequest, ExportEventsResponse, ExportJobsRequest, ExportJobsResponse,
    Job, Party, Progress, export_events_response, export_jobs_response,
};
use prost::Message as _;
use prost_types::{Struct, Timestamp};
use tonic::{Response, Status, Streaming};

use super::{
    connection::Connection,
    exit::may_succeed_later,
    jobs::Filter,
    output::{json, short},
    values,
};
use crate::{
    error::BoxError,
    json::{DESCRIPTORS, to_json},
};

/// For how long an export that was interrupted is tried again.
const PATIENCE: Duration = Duration::from_secs(30);
/// The pause before it is.
const PAUSE: Duration = Duration::from_millis(500);

/// Writes your jobs, or their events, to standard output.
#[derive(Args, Clone, Debug)]
pub(super) struct Export {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Write the events of your jobs, each with what it belongs to
    Events(Events),
    /// Write your jobs, each as it is now
    Jobs(Jobs),
}

#[derive(Args, Clone, Debug)]
struct Events {
    /// Only events that were committed at this time or later
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    events_from: Option<Timestamp>,

    /// Only events that were committed before this time
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    events_before: Option<Timestamp>,

    /// Only events of these kinds, separated by commas
    #[arg(long, value_name = "KINDS", value_delimiter = ',', value_parser = values::enum_value("EventKind"))]
    kind: Vec<i32>,

    #[command(flatten)]
    common: Common,
}

#[derive(Args, Clone, Debug)]
struct Jobs {
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Clone, Debug)]
struct Common {
    /// How rows are written
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    format: Format,

    /// Only of jobs that were closed before this time
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    closed_before: Option<Timestamp>,

    /// Go on with an export that ended early: the token that it printed. No header is written
    #[arg(long, value_name = "TOKEN", default_value = "", hide_default_value = true)]
    resume_token: String,

    #[command(flatten)]
    filter: Filter,

    #[command(flatten)]
    connection: Connection,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Format {
    /// Comma-separated values by RFC 4180, with a header
    #[default]
    Csv,
    /// A line of JSON for each row
    Jsonl,
}

impl Export {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        match self.command {
            Command::Events(command) => command.run().await,
            Command::Jobs(command) => command.run().await,
        }
    }
}

impl Events {
    async fn run(self) -> Result<ExitCode, BoxError> {
        use export_events_response::Message::{End, Events};
        let Self { events_from, events_before, kind, common } = self;
        let client = common.connection.connect().await?.events();
        let mut rows = Rows::new(common.format, &[&EVENT_COLUMNS, &JOB_COLUMNS], &common.resume_token)?;
        let request = ExportEventsRequest {
            filter: Some(common.filter.into()),
            closed_before: common.closed_before,
            created_from: events_from,
            created_before: events_before,
            kinds: kind,
            resume_token: String::new(),
        };
        let open = async |resume_token| {
            let request = ExportEventsRequest { resume_token, ..request.clone() };
            client.clone().export_events(request).await
        };
        let take = |answer: ExportEventsResponse| {
            match &answer.message {
                Some(Events(events)) => events.jobs.iter().try_for_each(|job| rows.events(job))?,
                Some(End(_)) | None => {}
            }
            rows.flush()?;
            Ok((answer.resume_token, matches!(answer.message, Some(End(_)))))
        };
        follow(common.resume_token, open, take).await
    }
}

impl Jobs {
    async fn run(self) -> Result<ExitCode, BoxError> {
        use export_jobs_response::Message::{End, Jobs};
        let common = self.common;
        let client = common.connection.connect().await?.jobs();
        let mut rows = Rows::new(common.format, &[&STATE_COLUMNS, &JOB_COLUMNS], &common.resume_token)?;
        let request = ExportJobsRequest {
            filter: Some(common.filter.into()),
            closed_before: common.closed_before,
            resume_token: String::new(),
        };
        let open = async |resume_token| {
            let request = ExportJobsRequest { resume_token, ..request.clone() };
            client.clone().export_jobs(request).await
        };
        let take = |answer: ExportJobsResponse| {
            match &answer.message {
                Some(Jobs(jobs)) => jobs.jobs.iter().try_for_each(|job| rows.job(job))?,
                Some(End(_)) | None => {}
            }
            rows.flush()?;
            Ok((answer.resume_token, matches!(answer.message, Some(End(_)))))
        };
        follow(common.resume_token, open, take).await
    }
}

/// Opens a stream by a token, and takes its messages; opens another one where it breaks. `take`
/// returns the token of the message, and whether it is the last one.
async fn follow<M>(
    mut resume_token: String,
    open: impl AsyncFn(String) -> Result<Response<Streaming<M>>, Status>,
    mut take: impl FnMut(M) -> Result<(String, bool), BoxError>,
) -> Result<ExitCode, BoxError> {
    let mut attempt = Attempt::new();
    loop {
        let broken = match open(resume_token.clone()).await {
            Err(status) => status,
            Ok(answer) => {
                let mut stream = answer.into_inner();
                loop {
                    let message = match stream.message().await {
                        Ok(Some(message)) => message,
                        Ok(None) => break ended_early(),
                        Err(status) => break status,
                    };
                    let (token, is_last) = take(message)?;
                    if is_last {
                        return Ok(ExitCode::SUCCESS);
                    }
                    resume_token = token;
                    attempt = Attempt::new();
                }
            }
        };
        attempt.wait(broken, &resume_token).await?;
    }
}

/// The error of a stream without an end.
fn ended_early() -> Status {
    Status::unavailable("the export ended without its last message")
}

/// Since when an export does not get on.
struct Attempt(Instant);

impl Attempt {
    fn new() -> Self {
        Self(Instant::now())
    }

    /// Waits before the export goes on; an error if it does not, which says how to go on.
    async fn wait(&self, broken: Status, resume_token: &str) -> Result<(), BoxError> {
        if may_succeed_later(&broken) && self.0.elapsed() < PATIENCE {
            tokio::time::sleep(PAUSE).await;
            return Ok(());
        }
        if !resume_token.is_empty() {
            eprintln!("milepost: not complete; go on with --resume-token {resume_token}");
        }
        Err(broken.into())
    }
}

const EVENT_COLUMNS: [&str; 14] = [
    "event_id",
    "sequence",
    "kind",
    "name",
    "step_tag",
    "step_name",
    "step_percent",
    "status",
    "percent",
    "points_done",
    "points_total",
    "metadata",
    "occurred_at",
    "created_at",
];

const STATE_COLUMNS: [&str; 11] = [
    "status",
    "percent",
    "points_done",
    "points_total",
    "last_sequence",
    "created_at",
    "closed_at",
    "updated_at",
    "cancellation_requested_at",
    "held_by_provider",
    "held_by_customer",
];

/// What a row belongs to.
const JOB_COLUMNS: [&str; 15] = [
    "job_id",
    "provider_job_id",
    "provider_job_name",
    "provider_id",
    "provider_first_name",
    "provider_last_name",
    "customer_id",
    "customer_first_name",
    "customer_last_name",
    "job_configuration_id",
    "configuration_tag",
    "configuration_version",
    "configuration_name",
    "max_silence_s",
    "labels",
];

/// Writes rows to standard output.
enum Rows {
    Csv(Box<Writer<Stdout>>),
    Jsonl(BufWriter<Stdout>),
}

impl Rows {
    fn new(format: Format, columns: &[&[&str]], resume_token: &str) -> Result<Self, BoxError> {
        Ok(match format {
            Format::Jsonl => Self::Jsonl(BufWriter::new(io::stdout())),
            Format::Csv => {
                let mut csv = WriterBuilder::new().terminator(Terminator::CRLF).from_writer(io::stdout());
                if resume_token.is_empty() {
                    csv.write_record(columns.concat())?;
                }
                Self::Csv(Box::new(csv))
            }
        })
    }

    fn events(&mut self, EventsOfJob { job, events }: &EventsOfJob) -> Result<(), BoxError> {
        let job = job.as_ref().ok_or("the server sent events without their job")?;
        match self {
            Self::Csv(csv) => {
                let of_job = job_cells(job)?;
                for event in events {
                    csv.write_record(event_cells(event)?.iter().chain(&of_job))?;
                }
            }
            Self::Jsonl(lines) => {
                let job = json(job, &[])?;
                for event in events {
                    writeln!(lines, "{{\"event\":{},\"job\":{job}}}", json(event, &[])?)?;
                }
            }
        }
        Ok(())
    }

    fn job(&mut self, job: &Job) -> Result<(), BoxError> {
        match self {
            Self::Csv(csv) => csv.write_record(state_cells(job).iter().chain(&job_cells(job)?))?,
            Self::Jsonl(lines) => writeln!(lines, "{}", json(job, &[])?)?,
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Csv(csv) => csv.flush(),
            Self::Jsonl(lines) => lines.flush(),
        }
    }
}

fn event_cells(event: &Event) -> Result<Vec<String>, BoxError> {
    let Progress { points_done, points_total, percent } = event.progress.unwrap_or_default();
    Ok(vec![
        event.id.clone(),
        event.sequence.to_string(),
        short(event.kind().as_str_name(), "EVENT_KIND_"),
        harmless(&event.name),
        harmless(&event.step_tag),
        harmless(&event.step_name),
        event.step_percent.map(|percent| percent.to_string()).unwrap_or_default(),
        short(event.status().as_str_name(), "JOB_STATUS_"),
        percent.to_string(),
        points_done.to_string(),
        points_total.to_string(),
        event.metadata.as_ref().map(metadata).transpose()?.unwrap_or_default(),
        time(event.occurred_at),
        time(event.created_at),
    ])
}

fn state_cells(job: &Job) -> Vec<String> {
    let Progress { points_done, points_total, percent } = job.progress.unwrap_or_default();
    vec![
        short(job.status().as_str_name(), "JOB_STATUS_"),
        percent.to_string(),
        points_done.to_string(),
        points_total.to_string(),
        job.last_sequence.to_string(),
        time(job.created_at),
        time(job.closed_at),
        time(job.updated_at),
        time(job.cancellation_requested_at),
        job.held_by_provider.to_string(),
        job.held_by_customer.to_string(),
    ]
}

fn job_cells(job: &Job) -> Result<Vec<String>, BoxError> {
    let mut cells = vec![job.id.clone(), harmless(&job.provider_job_id), harmless(&job.provider_job_name)];
    for party in [&job.provider, &job.customer] {
        let Party { id, first_name, last_name } = party.clone().unwrap_or_default();
        cells.extend([id, harmless(&first_name), harmless(&last_name)]);
    }
    cells.extend([
        job.job_configuration_id.clone(),
        harmless(&job.configuration_tag),
        job.configuration_version.clone(),
        harmless(&job.configuration_name),
        job.max_silence.map(|length| length.seconds.to_string()).unwrap_or_default(),
        if job.labels.is_empty() { String::new() } else { serde_json::to_string(&job.labels)? },
    ]);
    Ok(cells)
}

/// Metadata as JSON.
fn metadata(metadata: &Struct) -> Result<String, BoxError> {
    let descriptor = DESCRIPTORS.get_message_by_name("google.protobuf.Struct");
    let descriptor = descriptor.ok_or("the descriptors lack google.protobuf.Struct")?;
    let mut json = Vec::new();
    to_json(&descriptor, &metadata.encode_to_vec(), &mut json)?;
    Ok(String::from_utf8(json)?)
}

/// A time in UTC, with microseconds.
fn time(at: Option<Timestamp>) -> String {
    let time = at.and_then(|at| chrono::DateTime::from_timestamp(at.seconds, u32::try_from(at.nanos).ok()?));
    time.map_or_else(String::new, |time| time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true))
}

/// A text of a user, with an apostrophe before it if a spreadsheet would run it as a formula
/// (OWASP, CSV Injection).
fn harmless(text: &str) -> String {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r']) { format!("'{text}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_spreadsheet_would_run_is_made_harmless() {
        for text in ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"] {
            assert_eq!(harmless(text), format!("'{text}"));
        }
        for text in ["", "scan-1", "'=1", " =1", "1=1", "ä"] {
            assert_eq!(harmless(text), text);
        }
    }

    #[test]
    fn rows_have_as_many_cells_as_columns() {
        let job = Job::default();
        assert_eq!(job_cells(&job).expect("cells").len(), JOB_COLUMNS.len());
        assert_eq!(state_cells(&job).len(), STATE_COLUMNS.len());
        assert_eq!(event_cells(&Event::default()).expect("cells").len(), EVENT_COLUMNS.len());
    }
}
