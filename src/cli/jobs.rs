//! `milepost jobs`: lists, shows, creates, estimates and closes jobs, and asks for their
//! cancellation.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use milepost_client::pb::{
    CloseJobRequest, CreateJobRequest, EstimateJobRequest, GetJobRequest, Job, JobFilter, JobOpenness,
    ListJobsRequest, NoEstimateReason, Party, Progress, RequestCancellationRequest, StepState,
    close_job_request, create_job_request, estimate_job_request, estimate_job_response::Outcome,
    get_job_request,
};
use prost_types::{Duration, Timestamp};

use super::{
    connection::{Api, JobArgument},
    output::{Output, Row, seconds, short, time},
    print_line, values,
};
use crate::error::BoxError;

/// Lists, shows, creates, estimates and closes jobs, and asks for their cancellation.
#[derive(Args, Clone, Debug)]
pub(super) struct Jobs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// List your jobs, newest first: those that match all filters
    List(List),
    /// Show a job with its configuration
    Get(Get),
    /// Create a job
    Create(Create),
    /// Close a job that will not complete
    Close(Close),
    /// As the customer, ask the provider of a job to stop it
    RequestCancellation(RequestCancellation),
    /// Say when a job will probably be complete
    Estimate(Estimate),
}

#[derive(Args, Clone, Debug)]
struct List {
    #[command(flatten)]
    filter: Filter,

    /// Most jobs to list [default: all]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,

    #[command(flatten)]
    api: Api,
}

/// Which jobs: those that match all that is given.
#[derive(Args, Clone, Debug)]
pub(super) struct Filter {
    /// Only jobs with one of these statuses, separated by commas
    #[arg(long, value_name = "STATUSES", value_delimiter = ',', value_parser = values::enum_value("JobStatus"))]
    status: Vec<i32>,

    /// Only open jobs, or only closed ones
    #[arg(long, value_name = "STATE", value_parser = values::enum_value("JobOpenness"))]
    openness: Option<i32>,

    /// Only jobs with this configuration tag
    #[arg(long, value_name = "TAG", default_value = "", hide_default_value = true)]
    configuration_tag: String,

    /// Only jobs with this user as the other party: for a provider the customer, for a customer the provider
    #[arg(long, value_name = "USER_ID", default_value = "", hide_default_value = true)]
    counterpart_id: String,

    /// Only jobs that were created at this time or later
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    created_from: Option<Timestamp>,

    /// Only jobs that were created before this time
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    created_before: Option<Timestamp>,

    /// Only jobs whose provider_job_id begins with this text
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    provider_job_id_prefix: String,

    /// Only jobs whose provider_job_name begins with this text
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    provider_job_name_prefix: String,

    /// Only jobs with this label; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::label)]
    label: Vec<(String, String)>,

    /// Only jobs whose provider_job_id or name contains this text of at least 3 characters, in any case
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    text: String,
}

impl From<Filter> for JobFilter {
    fn from(filter: Filter) -> Self {
        Self {
            statuses: filter.status,
            openness: filter.openness.unwrap_or(JobOpenness::Unspecified.into()),
            configuration_tag: filter.configuration_tag,
            counterpart_id: filter.counterpart_id,
            created_from: filter.created_from,
            created_before: filter.created_before,
            provider_job_id_prefix: filter.provider_job_id_prefix,
            provider_job_name_prefix: filter.provider_job_name_prefix,
            labels: filter.label.into_iter().collect(),
            text: filter.text,
        }
    }
}

#[derive(Args, Clone, Debug)]
struct Get {
    #[command(flatten)]
    job: JobArgument,

    #[command(flatten)]
    api: Api,
}

#[derive(Args, Clone, Debug)]
struct Create {
    /// Your own id of the job, unique among your jobs; the same job again is returned as it is
    #[arg(long, value_name = "ID")]
    provider_job_id: String,

    /// User id of the customer
    #[arg(long, value_name = "USER_ID", required_unless_present = "customer_code")]
    customer_id: Option<String>,

    /// The customer's code, instead of the id
    #[arg(long, value_name = "CODE", conflicts_with = "customer_id")]
    customer_code: Option<String>,

    /// Tag of one of your configurations
    #[arg(long, value_name = "TAG")]
    configuration_tag: String,

    /// Version of the configuration [default: the latest]
    #[arg(long, value_name = "VERSION", default_value = "", hide_default_value = true)]
    configuration_version: String,

    /// Name of the job, to display
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    provider_job_name: String,

    /// Seconds without an event after which the job is stalled, 10 to 2592000 [default: as the configuration
    /// says]
    #[arg(long, value_name = "SECONDS")]
    max_silence: Option<u32>,

    /// Label to file the job under; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::label)]
    label: Vec<(String, String)>,

    #[command(flatten)]
    api: Api,
}

#[derive(Args, Clone, Debug)]
struct RequestCancellation {
    /// Id of the job
    job_id: String,

    /// Why the job is to stop, for its provider and its watchers
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,

    #[command(flatten)]
    api: Api,
}

#[derive(Args, Clone, Debug)]
struct Estimate {
    #[command(flatten)]
    job: JobArgument,

    #[command(flatten)]
    api: Api,
}

#[derive(Args, Clone, Debug)]
struct Close {
    #[command(flatten)]
    job: JobArgument,

    /// Why the job is closed, for its watchers
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,

    #[command(flatten)]
    api: Api,
}

impl Jobs {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        match self.command {
            Command::List(command) => command.run().await?,
            Command::Get(command) => command.run().await?,
            Command::Create(command) => command.run().await?,
            Command::Close(command) => command.run().await?,
            Command::RequestCancellation(command) => command.run().await?,
            Command::Estimate(command) => command.run().await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl List {
    async fn run(self) -> Result<(), BoxError> {
        let mut jobs = self.api.connect().await?.jobs();
        let filter = Some(self.filter.into());
        let request = ListJobsRequest { filter, ..ListJobsRequest::default() };
        let columns =
            ["ID", "STATUS", "PROGRESS", "CONFIGURATION", "CREATED", "CLOSED", "PROVIDER JOB ID", "NAME"];
        let list = self.api.output.list(&columns, row);
        let page = async |page_size, page_token| {
            let request = ListJobsRequest { page_size, page_token, ..request.clone() };
            let page = jobs.list_jobs(request).await?.into_inner();
            Ok((page.jobs, page.next_page_token))
        };
        list.print_pages(self.limit, page).await
    }
}

impl Get {
    async fn run(&self) -> Result<(), BoxError> {
        use get_job_request::Job::{JobId, ProviderJobId};
        let request = GetJobRequest { job: self.job.key(JobId, ProviderJobId) };
        let answer = self.api.connect().await?.jobs().get_job(request).await?.into_inner();
        self.api.output.answer(&answer, fields(answer.job.as_ref(), false))?;
        print_step_states(self.api.output, &answer.steps)
    }
}

impl Create {
    async fn run(self) -> Result<(), BoxError> {
        use create_job_request::Customer::{CustomerCode, CustomerId};
        let mut jobs = self.api.connect().await?.jobs();
        let request = CreateJobRequest {
            provider_job_id: self.provider_job_id,
            customer: self.customer_id.map(CustomerId).or(self.customer_code.map(CustomerCode)),
            configuration_tag: self.configuration_tag,
            configuration_version: self.configuration_version,
            provider_job_name: self.provider_job_name,
            max_silence: self.max_silence.map(|seconds| Duration { seconds: seconds.into(), nanos: 0 }),
            labels: self.label.into_iter().collect(),
        };
        let answer = jobs.create_job(request).await?.into_inner();
        self.api.output.answer(&answer, fields(answer.job.as_ref(), answer.existed))
    }
}

impl Close {
    async fn run(self) -> Result<(), BoxError> {
        use close_job_request::Job::{JobId, ProviderJobId};
        let request = CloseJobRequest { job: self.job.key(JobId, ProviderJobId), reason: self.reason };
        let answer = self.api.connect().await?.jobs().close_job(request).await?.into_inner();
        self.api.output.answer(&answer, fields(answer.job.as_ref(), answer.existed))
    }
}

impl RequestCancellation {
    async fn run(self) -> Result<(), BoxError> {
        let request = RequestCancellationRequest { job_id: self.job_id, reason: self.reason };
        let answer = self.api.connect().await?.jobs().request_cancellation(request).await?.into_inner();
        self.api.output.answer(&answer, fields(answer.job.as_ref(), answer.existed))
    }
}

impl Estimate {
    async fn run(self) -> Result<(), BoxError> {
        use estimate_job_request::Job::{JobId, ProviderJobId};
        let request = EstimateJobRequest { job: self.job.key(JobId, ProviderJobId) };
        let answer = self.api.connect().await?.jobs().estimate_job(request).await?.into_inner();
        let fields = match &answer.outcome {
            Some(Outcome::Estimate(estimate)) => vec![
                ("likely complete", time(estimate.p50)),
                ("nine in ten by", time(estimate.p90)),
                ("by jobs", answer.jobs.to_string()),
            ],
            Some(Outcome::NoEstimate(reason)) => {
                vec![("no estimate", no_estimate(*reason).to_owned()), ("by jobs", answer.jobs.to_string())]
            }
            None => Vec::new(),
        };
        self.api.output.answer(&answer, fields)
    }
}

fn no_estimate(reason: i32) -> &'static str {
    match NoEstimateReason::try_from(reason).unwrap_or_default() {
        NoEstimateReason::TooFewJobs => "too few completed jobs to compare with",
        NoEstimateReason::JobClosed => "the job is closed",
        NoEstimateReason::Unspecified => "",
    }
}

fn row(job: &Job) -> Row {
    vec![
        job.id.clone(),
        status(job),
        percent(job.progress),
        format!("{} {}", job.configuration_tag, job.configuration_version),
        time(job.created_at),
        time(job.closed_at),
        job.provider_job_id.clone(),
        job.provider_job_name.clone(),
    ]
}

pub(super) fn fields(job: Option<&Job>, existed: bool) -> Vec<(&'static str, String)> {
    let Some(job) = job else { return Vec::new() };
    let Progress { points_done, points_total, .. } = job.progress.unwrap_or_default();
    vec![
        ("id", job.id.clone()),
        ("existed", if existed { "yes".to_owned() } else { String::new() }),
        ("provider job id", job.provider_job_id.clone()),
        ("name", job.provider_job_name.clone()),
        ("status", status(job)),
        ("progress", format!("{}, {points_done} of {points_total} points", percent(job.progress))),
        ("events", job.last_sequence.to_string()),
        ("configuration", format!("{} {}", job.configuration_tag, job.configuration_version)),
        ("provider", party(job.provider.as_ref())),
        ("customer", party(job.customer.as_ref())),
        ("created", time(job.created_at)),
        ("closed", time(job.closed_at)),
        ("asked to stop", time(job.cancellation_requested_at)),
        ("longest silence", seconds(job.max_silence)),
        ("labels", labels(job)),
        ("held by", held_by(job).to_owned()),
    ]
}

/// Prints the table of the job's steps; nothing for scripts, for whom the message has them.
fn print_step_states(output: Output, steps: &[StepState]) -> Result<(), BoxError> {
    if output.is_json() || steps.is_empty() {
        return Ok(());
    }
    print_line("")?;
    let row = |step: &StepState| {
        let status = short(step.status().as_str_name(), "STEP_STATUS_").replace('_', " ");
        vec![step.step_tag.clone(), status, format!("{} %", step.percent), step.step_name.clone()]
    };
    output.list(&["STEP", "STATUS", "PROGRESS", "NAME"], row).print(steps)
}

fn party(party: Option<&Party>) -> String {
    let texts = party.map(|party| [&party.id, &party.first_name, &party.last_name].map(String::as_str));
    texts.unwrap_or_default().join(" ").trim_end().to_owned()
}

fn labels(job: &Job) -> String {
    let labels: Vec<String> = job.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    labels.join(" ")
}

fn held_by(job: &Job) -> &'static str {
    match (job.held_by_provider, job.held_by_customer) {
        (true, true) => "provider and customer",
        (true, false) => "provider",
        (false, true) => "customer",
        (false, false) => "",
    }
}

fn status(job: &Job) -> String {
    short(job.status().as_str_name(), "JOB_STATUS_")
}

/// The progress of a job or after an event.
pub(super) fn percent(progress: Option<Progress>) -> String {
    format!("{} %", progress.unwrap_or_default().percent)
}
