//! A job in the terminal: its events, and below them a progress bar. Without a
//! terminal, plain lines.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    time::Duration,
};

use chrono::{DateTime, Local, SecondsFormat, Utc};
use console::{Style, Term};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use milepost_client::pb::{Event, EventKind, Job, JobConfiguration, JobState, JobStatus, Progress};
use prost_types::value::Kind;

use super::{clean, print_line};

/// Shows one job on stdout.
#[derive(Debug)]
pub(super) struct Screen {
    /// None if stdout is no terminal.
    bar: Option<ProgressBar>,
    /// By the step's tag and the name of its metadata.
    units: HashMap<(String, String), String>,
    steps: usize,
    done: BTreeSet<String>,
}

impl Screen {
    /// On a terminal, starts the bar at 0 %.
    pub(super) fn new(configuration: &JobConfiguration) -> Self {
        let bar = Term::stdout().is_term().then(|| {
            let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stdout());
            bar.set_style(bar_style(JobStatus::Pending));
            bar.set_message("waiting for the first event");
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        let units = configuration.steps.iter().flat_map(|step| {
            step.metadata.iter().map(|name| ((step.tag.clone(), name.name.clone()), name.units.clone()))
        });
        Self { bar, units: units.collect(), steps: configuration.steps.len(), done: BTreeSet::new() }
    }

    /// Prints the job's name and its configuration.
    pub(super) fn title(&self, job: &Job, configuration: &JobConfiguration) -> io::Result<()> {
        let name =
            if job.provider_job_name.is_empty() { &job.provider_job_id } else { &job.provider_job_name };
        let name = clean(name);
        let version = clean(&format!("{} {}", configuration.name, configuration.version));
        match &self.bar {
            Some(bar) => {
                bar.println(format!("\n  {}  {}\n\n", Style::new().bold().apply_to(name), dim(&version)));
                Ok(())
            }
            None => print_line(&format!("{}: {name} ({version})", job.id)),
        }
    }

    /// Prints an event and moves the bar to its progress.
    pub(super) fn event(&mut self, event: &Event) -> io::Result<()> {
        if event.kind() == EventKind::Step {
            self.done.insert(event.step_tag.clone());
        }
        let progress = event.progress.unwrap_or_default();
        match &self.bar {
            Some(bar) => {
                bar.println(self.colored_line(event));
                self.move_bar(bar, event.status(), progress);
                Ok(())
            }
            None => print_line(&self.plain_line(event, progress)),
        }
    }

    /// A function that reports an interruption: in the bar, or once on stderr.
    pub(super) fn interruption_reporter(&self) -> impl FnMut() + Send + 'static {
        let bar = self.bar.clone();
        let mut reported = false;
        move || match &bar {
            Some(bar) => bar.set_message("connection to the server lost, resuming …"),
            None if reported => {}
            None => {
                reported = true;
                eprintln!("connection to the server lost, resuming");
            }
        }
    }

    /// Replaces the message of an interruption once the watch has caught up again.
    pub(super) fn caught_up(&self, state: &JobState) {
        if let Some(bar) = &self.bar
            && state.last_sequence > 0
        {
            bar.set_message(self.message(state.status(), state.progress.unwrap_or_default()));
        }
    }

    /// Shows the job's final status and progress.
    pub(super) fn end(&self, state: &JobState) -> io::Result<()> {
        let progress = state.progress.unwrap_or_default();
        let events = state.last_sequence;
        let (status, ..) = look(state.status());
        let line = format!("{status} at {} % after {events} events", progress.percent);
        match &self.bar {
            Some(bar) => {
                self.move_bar(bar, state.status(), progress);
                bar.finish();
                print_line("")
            }
            None => print_line(&line),
        }
    }

    fn move_bar(&self, bar: &ProgressBar, status: JobStatus, progress: Progress) {
        bar.set_style(bar_style(status));
        bar.set_position(u64::try_from(progress.percent).unwrap_or(0));
        bar.set_message(self.message(status, progress));
    }

    fn message(&self, status: JobStatus, progress: Progress) -> String {
        let (name, color, _) = look(status);
        let status = Style::from_dotted_str(color).bold().apply_to(name);
        if self.steps == 0 {
            return status.to_string();
        }
        let (done, of) = (self.done.len(), self.steps);
        let points =
            format!("{done} of {of} steps · {} of {} points", progress.points_done, progress.points_total);
        format!("{status}  {}", dim(&points))
    }

    fn colored_line(&self, event: &Event) -> String {
        let time = time(event).map(|at| at.with_timezone(&Local).format("%H:%M:%S").to_string());
        let (plain, bold) = (Style::new(), Style::new().bold());
        let (mark, style, title_style) = match event.kind() {
            EventKind::Step => ("✔", bold.clone().green(), bold),
            EventKind::Error => ("✘", bold.red(), plain.red()),
            EventKind::Info => ("·", bold.cyan(), plain),
            EventKind::Complete => ("★", bold.clone().green(), bold),
            EventKind::Close => ("■", bold.yellow(), plain.yellow()),
            EventKind::Unspecified => ("?", bold.clone().magenta(), bold),
        };
        let (mark, title) = (style.apply_to(mark), title_style.apply_to(clean(title(event))));
        let mut line = format!("  {}  {mark}  {title}", dim(&time.unwrap_or_default()));
        let metadata = self.metadata(event);
        if !metadata.is_empty() {
            let shown: Vec<String> = metadata
                .into_iter()
                .map(|(name, value)| format!("{} {}", dim(&name), Style::new().cyan().apply_to(value)))
                .collect();
            line.push_str("\n               ");
            line.push_str(&shown.join(&dim("  ·  ")));
        }
        line
    }

    fn plain_line(&self, event: &Event, progress: Progress) -> String {
        let time = time(event).map(|at| at.to_rfc3339_opts(SecondsFormat::Millis, true)).unwrap_or_default();
        let kind = event.kind().as_str_name().trim_start_matches("EVENT_KIND_").to_ascii_lowercase();
        let (status, ..) = look(event.status());
        let mut line = format!(
            "{time} #{} {:>3} % {status}: {kind} {}",
            event.sequence,
            progress.percent,
            clean(title(event))
        );
        for (name, value) in self.metadata(event) {
            line.push_str(&format!("; {name} = {value}"));
        }
        line
    }

    /// Names and values of an event's metadata, values with their units.
    fn metadata(&self, event: &Event) -> Vec<(String, String)> {
        let fields = event.metadata.iter().flat_map(|metadata| &metadata.fields);
        fields
            .map(|(name, value)| {
                let units = self.units.get(&(event.step_tag.clone(), name.clone()));
                let units = units.filter(|units| !units.is_empty());
                let text = match &value.kind {
                    Some(Kind::NumberValue(number)) => number.to_string(),
                    Some(Kind::StringValue(text)) => clean(text),
                    Some(Kind::BoolValue(yes)) => yes.to_string(),
                    Some(Kind::NullValue(_) | Kind::StructValue(_) | Kind::ListValue(_)) | None => "?".into(),
                };
                (clean(name), units.map_or(text.clone(), |units| format!("{text} {}", clean(units))))
            })
            .collect()
    }
}

/// A status's name, its color, and the mark that takes the spinner's place at the end.
fn look(status: JobStatus) -> (&'static str, &'static str, &'static str) {
    match status {
        JobStatus::Unspecified => ("unknown", "cyan", " "),
        JobStatus::Pending => ("pending", "cyan", " "),
        JobStatus::Running => ("running", "cyan", " "),
        JobStatus::Failed => ("failed", "red", "✘"),
        JobStatus::Complete => ("complete", "green", "★"),
        JobStatus::Cancelled => ("cancelled", "yellow", "■"),
    }
}

fn bar_style(status: JobStatus) -> ProgressStyle {
    let (_, color, end) = look(status);
    let template = format!("\n  {{spinner:.{color}}} {{bar:40.{color}/238}} {{percent:>3.bold}} %  {{msg}}");
    ProgressStyle::with_template(&template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─")
        .tick_strings(&["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏", end])
}

/// The event's name, or its step's name, or a word for its kind.
fn title(event: &Event) -> &str {
    match (event.name.as_str(), event.step_name.as_str()) {
        ("", "") => match event.kind() {
            EventKind::Complete => "complete",
            EventKind::Close => "closed",
            EventKind::Error => "error",
            EventKind::Step | EventKind::Info | EventKind::Unspecified => "",
        },
        ("", step) => step,
        (name, _) => name,
    }
}

fn time(event: &Event) -> Option<DateTime<Utc>> {
    let at = event.created_at?;
    DateTime::from_timestamp(at.seconds, u32::try_from(at.nanos).ok()?)
}

fn dim(text: &str) -> String {
    Style::new().dim().apply_to(text).to_string()
}

#[cfg(test)]
mod tests {
    use prost_types::{Struct, Value};

    use super::*;

    #[test]
    fn a_plain_line_shows_the_whole_event_without_control_characters() {
        let event = Event {
            sequence: 3,
            kind: EventKind::Step.into(),
            step_tag: "measure".to_owned(),
            step_name: "Measure\u{1b}[2J".to_owned(),
            status: JobStatus::Running.into(),
            progress: Some(Progress { points_done: 4, points_total: 10, percent: 40 }),
            metadata: Some(Struct {
                fields: [("mean".to_owned(), Value { kind: Some(Kind::NumberValue(-412.5)) })].into(),
            }),
            ..Event::default()
        };
        let screen = Screen {
            bar: None,
            units: [(("measure".to_owned(), "mean".to_owned()), "HU".to_owned())].into(),
            steps: 2,
            done: BTreeSet::new(),
        };
        assert_eq!(
            screen.plain_line(&event, event.progress.unwrap_or_default()),
            " #3  40 % running: step Measure\u{fffd}[2J; mean = -412.5 HU"
        );
    }
}
