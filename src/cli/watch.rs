//! `milepost watch JOB`; the demo shows its job by the same watch.

use std::process::ExitCode;

use clap::Args;
use milepost_client::{
    Client,
    pb::{
        GetJobRequest, JobStatus, WatchEventsRequest, get_job_request, watch_events_request::Scope,
        watch_events_response::Message,
    },
};

use super::{job::JobArguments, refused, screen::Screen, usage_error};
use crate::error::BoxError;

/// Exit codes for jobs that were closed without being complete. 1 is an error, 2 a wrong
/// command line.
const FAILED: u8 = 3;
const CANCELLED: u8 = 4;
/// The exit codes in `--help`.
pub(super) const EXIT_CODES: &str = "Exit codes:
  0  the job is complete, or the reader of the output closed it, as `head` does
  1  an error, such as an invalid credential or a job that does not exist
  2  a wrong command line
  3  the job was closed while it was failed
  4  the job was closed before it was complete (cancelled)";

/// The job of a watch.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Watch {
    #[command(flatten)]
    job: JobArguments,
}

impl Watch {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        let Some(secret) = self.job.secret() else {
            return Ok(usage_error(
                "watch",
                "no credential: set the variable MILEPOST_API_KEY (or --api-key) to the secret of an API key with \
                 the scope READ, of a session or of a watch token",
            ));
        };
        let client = self.job.connect(secret).await?;
        Ok(exit_code(follow(&client, self.job.job()).await?))
    }
}

/// The exit code for a job that was closed with this status; see [`EXIT_CODES`].
pub(super) fn exit_code(status: JobStatus) -> ExitCode {
    match status {
        JobStatus::Complete => ExitCode::SUCCESS,
        JobStatus::Failed => ExitCode::from(FAILED),
        JobStatus::Cancelled => ExitCode::from(CANCELLED),
        // No closed job has these.
        JobStatus::Unspecified | JobStatus::Pending | JobStatus::Running => ExitCode::FAILURE,
    }
}

/// Shows a job from its first event until it is closed, and returns its last status.
pub(super) async fn follow(client: &Client, job: get_job_request::Job) -> Result<JobStatus, BoxError> {
    let answer = client.jobs().get_job(GetJobRequest { job: Some(job) }).await;
    let answer = answer.map_err(|status| refused(&status))?.into_inner();
    let job = answer.job.unwrap_or_default();
    let configuration = answer.job_configuration.unwrap_or_default();
    let mut screen = Screen::new(&configuration);
    screen.title(&job, &configuration)?;

    let request = WatchEventsRequest { scope: Some(Scope::JobId(job.id)), ..WatchEventsRequest::default() };
    let mut report = screen.interruption_reporter();
    let mut watch = client.watch(request).on_interruption(move |_, _pause| report());
    let mut last = job.status;
    while let Some(message) = watch.next().await.map_err(|status| refused(&status))? {
        match message.message {
            Some(Message::Events(events)) => {
                for event in &events.events {
                    screen.event(event)?;
                }
            }
            Some(Message::CaughtUp(caught_up)) => screen.caught_up(&caught_up.job.unwrap_or_default()),
            Some(Message::End(end)) => {
                let state = end.job.unwrap_or_default();
                screen.end(&state)?;
                last = state.status;
            }
            Some(Message::Heartbeat(_)) | None => {}
        }
    }
    Ok(JobStatus::try_from(last).unwrap_or_default())
}
