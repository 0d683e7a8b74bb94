//! `milepost share JOB`: makes a link that shows one job in a browser, without an account.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use milepost_client::{
    Client,
    pb::{CreateWatchTokenRequest, create_watch_token_request, get_job_request},
};

use super::{job::JobArguments, print_line, refused, usage_error};
use crate::error::BoxError;

/// The job, and how long the link works.
#[derive(Args, Clone, Debug)]
pub(super) struct Share {
    #[command(flatten)]
    job: JobArguments,

    /// How long the link works: 1 second to 30 days
    #[arg(long, default_value_t = 3_600, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=2_592_000))]
    lifetime: u32,

    /// Remark about the link, which the list of the watch tokens shows
    #[arg(long, default_value = "", hide_default_value = true)]
    note: String,

    /// Address at which people reach the page, if it is another one than the server's
    #[arg(long, value_name = "URL")]
    page: Option<String>,
}

impl Share {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        let Some(secret) = self.job.secret() else {
            return Ok(usage_error(
                "share",
                "no credential: set the variable MILEPOST_API_KEY (or --api-key) to the secret of the provider's session \
                 or of an API key with the scope APPEND",
            ));
        };
        let client = self.job.connect(secret).await?;
        let page = self.page.clone().unwrap_or_else(|| self.job.page());
        let lifetime = Duration::from_secs(self.lifetime.into());
        print_line(&link(&client, &page, self.job.job(), lifetime, &self.note).await?)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Makes a watch token and returns the address that opens the page with it. The token is in
/// the fragment, which browsers send to no server.
pub(super) async fn link(
    client: &Client,
    page: &str,
    job: get_job_request::Job,
    lifetime: Duration,
    note: &str,
) -> Result<String, BoxError> {
    let job = match job {
        get_job_request::Job::JobId(id) => create_watch_token_request::Job::JobId(id),
        get_job_request::Job::ProviderJobId(id) => create_watch_token_request::Job::ProviderJobId(id),
    };
    let request = CreateWatchTokenRequest {
        job: Some(job),
        note: note.to_owned(),
        lifetime: Some(lifetime.try_into()?),
    };
    let answer = client.auth().create_watch_token(request).await.map_err(|status| refused(&status))?;
    let answer = answer.into_inner();
    let job_id = answer.watch_token.unwrap_or_default().job_id;
    Ok(format!("{}/#/jobs/{job_id}?token={}", page.trim_end_matches('/'), answer.secret))
}
