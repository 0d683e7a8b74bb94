//! `milepost hold JOB`: keeps retention from a job, or no longer.

use std::process::ExitCode;

use clap::Args;
use milepost_client::pb::{HoldJobRequest, hold_job_request};

use super::{
    connection::{Api, JobArgument},
    jobs::fields,
};
use crate::error::BoxError;

/// The job, and whether to hold it.
#[derive(Args, Clone, Debug)]
pub(super) struct Hold {
    #[command(flatten)]
    job: JobArgument,

    /// Lift your hold; the other side of the job may still hold it
    #[arg(long)]
    lift: bool,

    #[command(flatten)]
    api: Api,
}

impl Hold {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        use hold_job_request::Job::{JobId, ProviderJobId};
        let request = HoldJobRequest { job: self.job.key(JobId, ProviderJobId), held: !self.lift };
        let answer = self.api.connect().await?.jobs().hold_job(request).await?.into_inner();
        self.api.output.answer(&answer, fields(answer.job.as_ref(), answer.existed))?;
        Ok(ExitCode::SUCCESS)
    }
}
