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

use super::{connect, refused, screen::Screen};
use crate::{config::ClientTls, error::BoxError};

/// Exit code for a job that was closed without being complete.
const NOT_COMPLETE: u8 = 2;

/// The job, the server and the credential of a watch.
#[derive(Args, Clone, Debug)]
pub(super) struct Watch {
    /// Id of the job
    job: String,

    /// Take JOB as the provider_job_id, the provider's own id of the job
    #[arg(long)]
    provider_job_id: bool,

    /// Address of the server; https:// encrypts, http:// does not; without either, milepost encrypts unless
    /// the address is loopback and no TLS flag is set
    #[arg(long, env = "MILEPOST_SERVER", default_value = "127.0.0.1:50051", value_name = "HOST:PORT")]
    server: String,

    #[command(flatten)]
    credential: Credential,

    #[command(flatten)]
    tls: ClientTls,
}

/// The caller's secret, in a type of its own whose `Debug` does not print it.
#[derive(Args, Clone)]
struct Credential {
    /// Secret of an API key with the scope READ, of a session or of a watch token
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
        let client = connect(&self.server, &self.tls).await?;
        let client = client.with_credential(&self.credential.api_key)?;
        let job = if self.provider_job_id {
            get_job_request::Job::ProviderJobId(self.job.clone())
        } else {
            get_job_request::Job::JobId(self.job.clone())
        };
        Ok(exit_code(follow(&client, job).await?))
    }
}

/// Success for a complete job, 2 otherwise.
pub(super) fn exit_code(status: JobStatus) -> ExitCode {
    if status == JobStatus::Complete { ExitCode::SUCCESS } else { ExitCode::from(NOT_COMPLETE) }
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
