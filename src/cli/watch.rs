//! `milepost watch JOB`; the demo shows its job by the same watch.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use milepost_client::{
    Client,
    pb::{
        EstimateJobRequest, EstimateJobResponse, EventKind, GetJobRequest, JobStatus, WatchEventsRequest,
        estimate_job_request, get_job_request, watch_events_request::Scope, watch_events_response::Message,
    },
};

use tokio::time::timeout;
use tonic::Response;

use super::{
    connection::{Connection, JobArgument},
    exit::{self, EXIT_CODES},
    screen::Screen,
};
use crate::error::BoxError;

/// Longest that the watch waits for an estimate.
const ESTIMATE_WITHIN: Duration = Duration::from_secs(2);

/// The job of a watch.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Watch {
    #[command(flatten)]
    job: JobArgument,

    #[command(flatten)]
    connection: Connection,
}

impl Watch {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        use get_job_request::Job::{JobId, ProviderJobId};
        let client = self.connection.connect().await?;
        Ok(exit::of_job(follow(&client, self.job.key(JobId, ProviderJobId)).await?))
    }
}

/// Shows a job from its first event until it is closed, and returns its last status.
pub(super) async fn follow(
    client: &Client,
    job: Option<get_job_request::Job>,
) -> Result<JobStatus, BoxError> {
    let answer = client.jobs().get_job(GetJobRequest { job }).await?.into_inner();
    let job = answer.job.unwrap_or_default();
    let configuration = answer.job_configuration.unwrap_or_default();
    let mut screen = Screen::new(&configuration);
    screen.title(&job, &configuration)?;

    let scope = Some(Scope::JobId(job.id.clone()));
    let request = WatchEventsRequest { scope, ..WatchEventsRequest::default() };
    let mut report = screen.interruption_reporter();
    let mut watch = client.watch(request).on_interruption(move |_, _pause| report());
    let (mut last, mut is_live) = (job.status, false);
    while let Some(message) = watch.next().await? {
        match message.message {
            Some(Message::Events(events)) => {
                for event in &events.events {
                    screen.event(event)?;
                }
                if is_live && events.events.iter().any(|event| event.kind() == EventKind::Step) {
                    screen.estimate(estimate(client, &job.id).await.as_ref())?;
                }
            }
            Some(Message::CaughtUp(caught_up)) => {
                is_live = true;
                screen.caught_up(&caught_up.job.unwrap_or_default());
                screen.estimate(estimate(client, &job.id).await.as_ref())?;
            }
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

/// An estimate of the job; none without an answer soon, which is no reason to end the watch.
async fn estimate(client: &Client, job_id: &str) -> Option<EstimateJobResponse> {
    let job = Some(estimate_job_request::Job::JobId(job_id.to_owned()));
    let mut jobs = client.jobs();
    let answer = timeout(ESTIMATE_WITHIN, jobs.estimate_job(EstimateJobRequest { job })).await.ok()?;
    answer.ok().map(Response::into_inner)
}
