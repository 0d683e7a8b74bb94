//! `milepost events tail`: prints each event as a line, as it comes.

use std::process::ExitCode;

use clap::Args;
use milepost_client::pb::{
    AllJobs, Event, FromNow, JobStatus, WatchEventsRequest,
    watch_events_request::{Scope, Start},
    watch_events_response::Message,
};

use super::{COLUMNS, row};
use crate::{
    cli::{
        connection::Api,
        exit::{self, EXIT_CODES},
        output::Row,
        screen::report_once,
        values,
    },
    error::BoxError,
};

#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Tail {
    /// Id of the job [default: all your jobs, also those that are created later]
    job: Option<String>,

    /// Take JOB as the provider_job_id, the provider's own id of the job
    #[arg(long, requires = "job")]
    provider_job_id: bool,

    /// Only jobs with this configuration tag
    #[arg(long, value_name = "TAG", default_value = "", hide_default_value = true, conflicts_with = "job")]
    configuration_tag: String,

    /// Only jobs with this user as the other party: for a provider the customer, for a customer the provider
    #[arg(
        long,
        value_name = "USER_ID",
        default_value = "",
        hide_default_value = true,
        conflicts_with = "job"
    )]
    counterpart_id: String,

    /// Only jobs with this label; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::label, conflicts_with = "job")]
    label: Vec<(String, String)>,

    /// Only events of these kinds, separated by commas
    #[arg(long, value_name = "KINDS", value_delimiter = ',', value_parser = values::enum_value("EventKind"))]
    kind: Vec<i32>,

    /// Start after the event of JOB with this sequence
    #[arg(long, value_name = "SEQUENCE", requires = "job")]
    after: Option<i64>,

    /// Start with the events that come from now on
    #[arg(long, conflicts_with = "after")]
    from_now: bool,

    #[command(flatten)]
    api: Api,
}

impl Tail {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        let client = self.api.connect().await?;
        let (columns, row): (_, fn(&Event) -> Row) = match self.job {
            Some(_) => (COLUMNS.to_vec(), row),
            None => ([&["JOB"], &COLUMNS[..]].concat(), row_of_job),
        };
        let mut list = self.api.output.list(&columns, row);
        let scope = match self.job {
            Some(id) if self.provider_job_id => Scope::ProviderJobId(id),
            Some(id) => Scope::JobId(id),
            None => Scope::AllJobs(AllJobs {
                configuration_tag: self.configuration_tag,
                counterpart_id: self.counterpart_id,
                labels: self.label.into_iter().collect(),
            }),
        };
        let start = if self.from_now {
            Some(Start::FromNow(FromNow {}))
        } else {
            self.after.map(Start::AfterSequence)
        };
        let request =
            WatchEventsRequest { scope: Some(scope), kinds: self.kind, start, heartbeat_interval: None };
        let mut report = report_once();
        let mut watch = client.watch(request).on_interruption(move |_, _pause| report());
        let mut last = JobStatus::Unspecified;
        while let Some(message) = watch.next().await? {
            match message.message {
                Some(Message::Events(events)) => list.print(&events.events)?,
                Some(Message::End(end)) => last = end.job.unwrap_or_default().status(),
                Some(Message::CaughtUp(_) | Message::Heartbeat(_)) | None => {}
            }
        }
        Ok(exit::of_job(last))
    }
}

fn row_of_job(event: &Event) -> Row {
    [vec![event.job_id.clone()], row(event)].concat()
}
