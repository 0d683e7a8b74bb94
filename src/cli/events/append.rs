//! `milepost events append`. Each event gets an id, so that a call whose answer is lost can be
//! repeated.

use std::{
    io::{BufRead as _, BufReader, Read},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Args;
use milepost_client::{
    Service,
    pb::{
        AppendEventsRequest, AppendEventsResponse, AppendedEvent, NewEvent, append_events_request,
        event_service_client::EventServiceClient,
    },
};
use prost_types::{Struct, Timestamp, Value};
use tonic::Status;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::{
    cli::{
        connection::{Api, JobArgument},
        exit::{WrongInput, may_succeed_later},
        jobs::percent,
        output::{List, Row, short},
        values,
    },
    error::BoxError,
    limits::BATCH_EVENTS,
};

/// How long a batch is sent again while the server does not answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause before a batch is sent again, where the server names none.
const PAUSE: Duration = Duration::from_millis(200);
/// How much of a file is read at once, and so the most of it that becomes one batch. The
/// largest message that this much JSON becomes is far below the limit of a request.
const READ_BYTES: usize = 64 * 1024;
/// Longest line of a file. An event of this length exceeds the limit of its metadata.
const LINE_BYTES: usize = 256 * 1024;

#[derive(Args, Clone, Debug)]
pub(super) struct Append {
    #[command(flatten)]
    job: JobArgument,

    /// Kind of the event
    #[arg(long, value_parser = values::enum_value("EventKind"), required_unless_present = "file")]
    kind: Option<i32>,

    /// Tag of the step that the event belongs to; an event of kind step marks it as done
    #[arg(long, value_name = "TAG", default_value = "", hide_default_value = true, conflicts_with = "file")]
    step: String,

    /// How far the step is, 0 to 99, by an event of kind progress
    #[arg(long, value_name = "PERCENT", conflicts_with = "file")]
    step_percent: Option<i32>,

    /// Text to display
    #[arg(long, default_value = "", hide_default_value = true, conflicts_with = "file")]
    name: String,

    /// A measurement or fact; may be given several times. VALUE is a number, true, false or a quoted text as
    /// in JSON, otherwise a text as it stands
    #[arg(long, value_name = "NAME=VALUE", value_parser = values::metadata, conflicts_with = "file")]
    metadata: Vec<(String, Value)>,

    /// When the event occurred
    #[arg(long, value_name = "TIME", value_parser = values::time, conflicts_with = "file")]
    occurred_at: Option<Timestamp>,

    /// UUID of the event: the same command again stores it once [default: a new one]
    #[arg(long, value_name = "UUID", default_value = "", hide_default_value = true, conflicts_with = "file")]
    id: String,

    /// Append the events of this file, a NewEvent in JSON a line; - is standard input
    #[arg(long, conflicts_with = "kind")]
    file: Option<PathBuf>,

    /// Append only if this is the sequence of the last event; 0 for a job without events
    #[arg(long, value_name = "SEQUENCE")]
    expected_sequence: Option<i64>,

    #[command(flatten)]
    api: Api,
}

impl Append {
    pub(super) async fn run(mut self) -> Result<(), BoxError> {
        use append_events_request::Job::{JobId, ProviderJobId};
        let client = self.api.connect().await?;
        let mut log = Log {
            events: client.events(),
            request: AppendEventsRequest {
                job: self.job.key(JobId, ProviderJobId),
                expected_sequence: self.expected_sequence,
                events: Vec::new(),
            },
            answers: self.api.output.list(&["SEQUENCE", "EXISTED", "STATUS", "PROGRESS", "ID"], row),
        };
        match self.file.take() {
            None => log.append(vec![self.event()]).await,
            Some(file) => log.append_file(&file).await,
        }
    }

    fn event(self) -> NewEvent {
        let fields = self.metadata.into_iter().collect();
        NewEvent {
            id: self.id,
            kind: self.kind.unwrap_or_default(),
            name: self.name,
            step_tag: self.step,
            metadata: Some(Struct { fields }),
            occurred_at: self.occurred_at,
            step_percent: self.step_percent,
        }
    }
}

/// The log of a job, to which batches are appended, and the answers, which are printed.
struct Log {
    events: EventServiceClient<Service>,
    /// The job and the expected sequence of the next batch.
    request: AppendEventsRequest,
    answers: List<AppendedEvent>,
}

impl Log {
    async fn append(&mut self, mut events: Vec<NewEvent>) -> Result<(), BoxError> {
        for event in events.iter_mut().filter(|event| event.id.is_empty()) {
            event.id = Uuid::now_v7().to_string();
        }
        let request = AppendEventsRequest { events, ..self.request.clone() };
        let answer = append(&mut self.events, &request, PATIENCE).await?;
        if let (Some(expected), Some(last)) = (&mut self.request.expected_sequence, answer.events.last()) {
            *expected = last.sequence;
        }
        self.answers.print(&answer.events)
    }

    async fn append_file(&mut self, file: &Path) -> Result<(), BoxError> {
        let mut lines = Lines::new(values::open(file)?);
        loop {
            let first = lines.read + 1;
            let events = lines.next_events()?;
            if events.is_empty() {
                return Ok(());
            }
            if let Err(error) = self.append(events).await {
                eprintln!("milepost: not appended: lines {first} to {}", lines.read);
                return Err(error);
            }
        }
    }
}

/// The lines of a file, each an event.
struct Lines {
    input: BufReader<Box<dyn Read>>,
    /// How many lines were read.
    read: usize,
}

impl Lines {
    fn new(input: Box<dyn Read>) -> Self {
        Self { input: BufReader::with_capacity(READ_BYTES, input), read: 0 }
    }

    /// The event of the next line, and those of the lines that were read together with it: what
    /// another program writes is appended as it comes. None at the end of the file.
    fn next_events(&mut self) -> Result<Vec<NewEvent>, BoxError> {
        let (mut events, mut line) = (Vec::new(), Vec::new());
        loop {
            line.clear();
            let most = u64::try_from(LINE_BYTES)?;
            if self.input.by_ref().take(most).read_until(b'\n', &mut line)? == 0 {
                return Ok(events);
            }
            self.read += 1;
            if line.len() == LINE_BYTES {
                let error = format!("line {} is longer than {LINE_BYTES} bytes", self.read);
                return Err(WrongInput(error).into());
            }
            if !line.trim_ascii().is_empty() {
                events.push(self.parse(&line)?);
            }
            let more = self.input.buffer().contains(&b'\n') && events.len() < BATCH_EVENTS;
            if !more && !events.is_empty() {
                return Ok(events);
            }
        }
    }

    fn parse(&self, line: &[u8]) -> Result<NewEvent, WrongInput> {
        let line = str::from_utf8(line).map_err(|error| error.to_string());
        line.and_then(values::from_json).map_err(|error| {
            // serde_json counts lines within this one.
            let error = error.replace(" at line 1 column ", " at column ");
            WrongInput(format!("line {}: {error}", self.read))
        })
    }
}

/// Appends events that have ids. Sends them again for as long as `patience`, while the same
/// call may succeed later.
pub(in crate::cli) async fn append(
    events: &mut EventServiceClient<Service>,
    request: &AppendEventsRequest,
    patience: Duration,
) -> Result<AppendEventsResponse, Status> {
    let began = Instant::now();
    loop {
        let status = match events.append_events(request.clone()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => status,
        };
        let named = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let pause = named.unwrap_or(PAUSE);
        if !may_succeed_later(&status) || began.elapsed().saturating_add(pause) > patience {
            return Err(status);
        }
        tokio::time::sleep(pause).await;
    }
}

fn row(event: &AppendedEvent) -> Row {
    vec![
        event.sequence.to_string(),
        if event.existed { "yes" } else { "no" }.to_owned(),
        short(event.status().as_str_name(), "JOB_STATUS_"),
        percent(event.progress),
        event.id.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: impl Into<Vec<u8>>) -> Lines {
        Lines::new(Box::new(std::io::Cursor::new(text.into())))
    }

    #[test]
    fn a_batch_has_at_most_500_events_and_lines_without_text_are_none() {
        let mut lines = lines("{\"name\": \"x\"}\n\n".repeat(501));
        let batches: Vec<usize> =
            std::iter::from_fn(|| Some(lines.next_events().expect("events").len()).filter(|len| *len > 0))
                .collect();
        assert_eq!((batches, lines.read), (vec![500, 1], 1002));
    }

    #[test]
    fn a_wrong_line_is_refused_with_its_number_and_column() {
        let mut lines = lines("{\"name\": \"x\"}\n{\"nam\": 1}\n");
        let error = lines.next_events().expect_err("an unknown field").to_string();
        assert!(
            error.starts_with("line 2: ") && error.contains("nam") && error.contains("column 6"),
            "{error}"
        );
        let mut lines = self::lines(" ".repeat(LINE_BYTES));
        let error = lines.next_events().expect_err("too long").to_string();
        assert_eq!(error, "line 1 is longer than 262144 bytes");
    }
}
