//! `milepost watch JOB`, and the watch that the demo shows.

use std::process::ExitCode;

use clap::Args;

use super::{refused, screen::Screen};
use crate::{
    client::Client,
    config::ClientTls,
    error::BoxError,
    pb::{
        GetJobRequest, JobStatus, WatchEventsRequest, get_job_request, watch_events_request::Scope,
        watch_events_response::Message,
    },
};

/// What a job that was cancelled or failed for good ends with.
const NOT_COMPLETE: u8 = 2;

/// Which job, on which server, as whom.
#[derive(Args, Clone, Debug)]
pub(super) struct Watch {
    /// The job's id
    job: String,

    /// JOB is the provider's own id of the job
    #[arg(long)]
    provider_job_id: bool,

    /// Address of the server; https:// encrypts, http:// does not, and without either only what is not this machine
    /// is encrypted
    #[arg(long, env = "MILEPOST_SERVER", default_value = "127.0.0.1:50051", value_name = "HOST:PORT")]
    server: String,

    #[command(flatten)]
    credential: Credential,

    #[command(flatten)]
    tls: ClientTls,
}

/// As whom. Its own type, so that it is not shown by accident.
#[derive(Args, Clone)]
struct Credential {
    /// Secret of an API key (scope READ), of a session or of a watch token
    #[arg(long, env = "MILEPOST_API_KEY", hide_env_values = true, value_name = "SECRET")]
    api_key: String,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credential(…)")
    }
}

impl Watch {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        let client = Client::connect_with(&self.server, &self.tls).await?;
        let client = client.with_credential(&self.credential.api_key)?;
        let job = if self.provider_job_id {
            get_job_request::Job::ProviderJobId(self.job.clone())
        } else {
            get_job_request::Job::JobId(self.job.clone())
        };
        Ok(exit_code(follow(&client, job).await?))
    }
}

/// 0 for a complete job.
pub(super) fn exit_code(status: JobStatus) -> ExitCode {
    if status == JobStatus::Complete { ExitCode::SUCCESS } else { ExitCode::from(NOT_COMPLETE) }
}

/// Shows a job from its first event until it is closed. Its last status.
pub(super) async fn follow(client: &Client, job: get_job_request::Job) -> Result<JobStatus, BoxError> {
    let answer = client.jobs().get_job(GetJobRequest { job: Some(job) }).await;
    let answer = answer.map_err(|status| refused(&status))?.into_inner();
    let job = answer.job.unwrap_or_default();
    let configuration = answer.job_configuration.unwrap_or_default();
    let mut screen = Screen::new(&configuration);
    screen.title(&job, &configuration)?;

    let request = WatchEventsRequest { scope: Some(Scope::JobId(job.id)), ..WatchEventsRequest::default() };
    let mut tell = screen.teller();
    let mut watch = client.watch(request).on_interruption(move |_, pause| tell(pause));
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
