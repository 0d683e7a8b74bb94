//! `milepost events`: lists, appends and follows events.

mod append;
mod tail;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use milepost_client::pb::{Event, ListEventsRequest, list_events_request};

pub(super) use self::append::append;
use super::{
    connection::{Api, JobArgument},
    jobs::percent,
    output::{Row, metadata_value, short, time},
    values,
};
use crate::error::BoxError;

/// The columns of [`row`].
const COLUMNS: [&str; 8] = ["SEQUENCE", "CREATED", "KIND", "STATUS", "PROGRESS", "STEP", "NAME", "METADATA"];

/// Lists, appends and follows the events of jobs.
#[derive(Args, Clone, Debug)]
pub(super) struct Events {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// List the events of a job
    List(List),
    /// Append an event to a job, or many from a file
    Append(append::Append),
    /// Follow the events of a job until it is closed, or those of all your jobs
    Tail(tail::Tail),
}

#[derive(Args, Clone, Debug)]
struct List {
    #[command(flatten)]
    job: JobArgument,

    /// Only events after this sequence
    #[arg(long, value_name = "SEQUENCE", default_value_t = 0, hide_default_value = true)]
    after: i64,

    /// Only events of these kinds, separated by commas
    #[arg(long, value_name = "KINDS", value_delimiter = ',', value_parser = values::enum_value("EventKind"))]
    kind: Vec<i32>,

    /// Most events to list [default: all]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,

    #[command(flatten)]
    api: Api,
}

impl Events {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        match self.command {
            Command::List(command) => command.run().await?,
            Command::Append(command) => command.run().await?,
            Command::Tail(command) => return command.run().await,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl List {
    async fn run(self) -> Result<(), BoxError> {
        use list_events_request::Job::{JobId, ProviderJobId};
        let mut events = self.api.connect().await?.events();
        let request = ListEventsRequest {
            job: self.job.key(JobId, ProviderJobId),
            after_sequence: self.after,
            kinds: self.kind,
            ..ListEventsRequest::default()
        };
        let list = self.api.output.list(&COLUMNS, row);
        let page = async |page_size, page_token| {
            let request = ListEventsRequest { page_size, page_token, ..request.clone() };
            let page = events.list_events(request).await?.into_inner();
            Ok((page.events, page.next_page_token))
        };
        list.print_pages(self.limit, page).await
    }
}

fn row(event: &Event) -> Row {
    let metadata = event.metadata.iter().flat_map(|metadata| &metadata.fields);
    let metadata = metadata.map(|(name, value)| format!("{name}={}", metadata_value(value)));
    vec![
        event.sequence.to_string(),
        time(event.created_at),
        short(event.kind().as_str_name(), "EVENT_KIND_"),
        short(event.status().as_str_name(), "JOB_STATUS_"),
        percent(event.progress),
        event.step_tag.clone(),
        event.name.clone(),
        metadata.collect::<Vec<_>>().join(" "),
    ]
}
