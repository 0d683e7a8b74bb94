//! `milepost share JOB`: makes a link that shows one job in a browser, without an account.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use milepost_client::{
    Client,
    pb::{CreateWatchTokenRequest, CreateWatchTokenResponse, create_watch_token_request},
};

use super::{
    connection::{Api, JobArgument},
    output::json,
    print_line,
};
use crate::error::BoxError;

/// The job, and how long the link works.
#[derive(Args, Clone, Debug)]
pub(super) struct Share {
    #[command(flatten)]
    job: JobArgument,

    /// How long the link works: 1 second to 30 days
    #[arg(long, default_value_t = 3_600, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=2_592_000))]
    lifetime: u32,

    /// Remark about the link, which the list of the watch tokens shows
    #[arg(long, default_value = "", hide_default_value = true)]
    note: String,

    /// Address at which people reach the page, if it is another one than the server's
    #[arg(long, value_name = "URL")]
    page: Option<String>,

    #[command(flatten)]
    api: Api,
}

impl Share {
    pub(super) async fn run(&self) -> Result<ExitCode, BoxError> {
        use create_watch_token_request::Job::{JobId, ProviderJobId};
        let client = self.api.connect().await?;
        let page = self.page.clone().unwrap_or_else(|| self.api.connection.page());
        let lifetime = Duration::from_secs(self.lifetime.into());
        let job = self.job.key(JobId, ProviderJobId);
        let (link, created) = link(&client, &page, job, lifetime, &self.note).await?;
        let line = if self.api.output.is_json() { json(&created, &[("link", &link)])? } else { link };
        print_line(&line)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Makes a watch token. Returns the address that opens the page with it, and the token. The
/// secret is in the fragment, which browsers send to no server.
pub(super) async fn link(
    client: &Client,
    page: &str,
    job: Option<create_watch_token_request::Job>,
    lifetime: Duration,
    note: &str,
) -> Result<(String, CreateWatchTokenResponse), BoxError> {
    let request =
        CreateWatchTokenRequest { job, note: note.to_owned(), lifetime: Some(lifetime.try_into()?) };
    let created = client.auth().create_watch_token(request).await?.into_inner();
    let job_id = created.watch_token.as_ref().map_or("", |token| &token.job_id);
    let link = format!("{}/#/jobs/{job_id}?token={}", page.trim_end_matches('/'), created.secret);
    Ok((link, created))
}
