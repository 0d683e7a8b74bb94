//! A job in the terminal: its events, and below them a progress bar. Plain lines without a
//! terminal, and on one that cannot move its cursor (`TERM=dumb`).

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Display,
    io,
    time::Duration,
};

use chrono::{DateTime, Local, SecondsFormat, Utc};
use console::{Style, Term, is_dumb, measure_text_width};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use milepost_client::pb::{Event, EventKind, Job, JobConfiguration, JobState, JobStatus, Progress};
use prost_types::value::Kind;

use super::{clean, print_line};

/// Columns of the bar's line beside the bar and the message: `  ⠋ ` and ` 100 %  `.
const FRAME_COLUMNS: usize = 12;
/// Least and most columns of the bar.
const BAR_COLUMNS: (usize, usize) = (10, 40);

/// Shows one job on stdout.
#[derive(Debug)]
pub(super) struct Screen {
    /// None if stdout is no terminal, or one that cannot move its cursor.
    bar: Option<ProgressBar>,
    /// Columns of the longest message beside the bar.
    message_columns: usize,
    /// By the step's tag and the name of its metadata.
    units: HashMap<(String, String), String>,
    steps: usize,
    done: BTreeSet<String>,
}

impl Screen {
    /// On a terminal, starts the bar at 0 %.
    pub(super) fn new(configuration: &JobConfiguration) -> Self {
        let (steps, points) = (configuration.steps.len(), configuration.steps.iter().map(|step| step.points));
        let points = points.sum();
        let all = Progress { points_done: points, points_total: points, percent: 100 };
        let message_columns = measure_text_width(&format!("cancelled  {}", done(steps, steps, all)));
        let bar = (Term::stdout().is_term() && !is_dumb()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stdout());
            bar.set_style(bar_style(JobStatus::Pending, bar_columns(message_columns)));
            bar.set_message("waiting for the first event");
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        let units = configuration.steps.iter().flat_map(|step| {
            step.metadata.iter().map(|name| ((step.tag.clone(), name.name.clone()), name.units.clone()))
        });
        Self { bar, message_columns, units: units.collect(), steps, done: BTreeSet::new() }
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
        if event.kind() == EventKind::Step && !event.step_tag.is_empty() {
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
        match &self.bar {
            Some(bar) => {
                self.move_bar(bar, state.status(), state.progress.unwrap_or_default());
                // `finish` would move the bar to 100 %.
                bar.abandon();
                print_line("")
            }
            None => print_line(&last_line(state)),
        }
    }

    fn move_bar(&self, bar: &ProgressBar, status: JobStatus, progress: Progress) {
        bar.set_style(bar_style(status, bar_columns(self.message_columns)));
        bar.set_position(u64::try_from(progress.percent).unwrap_or(0));
        bar.set_message(self.message(status, progress));
    }

    fn message(&self, status: JobStatus, progress: Progress) -> String {
        let (name, color, _) = look(status);
        let status = Style::from_dotted_str(color).bold().apply_to(name);
        if self.steps == 0 {
            return status.to_string();
        }
        format!("{status}  {}", dim(&done(self.done.len(), self.steps, progress)))
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

/// The columns that the bar has beside the longest message, on the terminal as wide as it is now.
fn bar_columns(message_columns: usize) -> usize {
    let (_, columns) = Term::stdout().size();
    let (least, most) = BAR_COLUMNS;
    usize::from(columns).saturating_sub(FRAME_COLUMNS + message_columns).clamp(least, most)
}

/// The message is cut where the terminal ends: a line that wraps would not be drawn over.
fn bar_style(status: JobStatus, columns: usize) -> ProgressStyle {
    let (_, color, end) = look(status);
    let template =
        format!("\n  {{spinner:.{color}}} {{bar:{columns}.{color}/238}} {{percent:>3.bold}} %  {{wide_msg}}");
    ProgressStyle::with_template(&template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─")
        .tick_strings(&["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏", end])
}

/// How many steps and points are done, of how many.
fn done(steps: usize, of_steps: usize, progress: Progress) -> String {
    let Progress { points_done, points_total, .. } = progress;
    let (of_steps, of_points) = (count(of_steps, "step"), count(points_total, "point"));
    format!("{steps} of {of_steps} · {points_done} of {of_points}")
}

/// A number with its noun, in the plural unless it is 1.
fn count<N: Copy + Display + PartialEq + From<u8>>(number: N, noun: &str) -> String {
    let plural = if number == N::from(1) { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

/// The end of a job without a bar.
fn last_line(state: &JobState) -> String {
    let (status, ..) = look(state.status());
    let percent = state.progress.unwrap_or_default().percent;
    format!("{status} at {percent} % after {}", count(state.last_sequence, "event"))
}

/// The event's name, or its step's name, or a word for its kind.
fn title(event: &Event) -> &str {
    match (event.name.as_str(), event.step_name.as_str()) {
        ("", "") => match event.kind() {
            EventKind::Complete => "complete",
            EventKind::Close => "closed",
            EventKind::Error => "error",
            EventKind::Step => "step",
            EventKind::Info | EventKind::Unspecified => "",
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
    fn a_step_event_without_a_step_tag_is_no_done_step() {
        let mut screen =
            Screen { bar: None, message_columns: 0, units: HashMap::new(), steps: 0, done: BTreeSet::new() };
        let event = Event { kind: EventKind::Step.into(), ..Event::default() };
        screen.event(&event).expect("stdout");
        assert!(screen.done.is_empty());
        assert_eq!(title(&event), "step");
    }

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
            message_columns: 0,
            units: [(("measure".to_owned(), "mean".to_owned()), "HU".to_owned())].into(),
            steps: 2,
            done: BTreeSet::new(),
        };
        assert_eq!(
            screen.plain_line(&event, event.progress.unwrap_or_default()),
            " #3  40 % running: step Measure\u{fffd}[2J; mean = -412.5 HU"
        );
    }

    #[test]
    fn the_end_of_a_cancelled_job_leaves_the_bar_at_its_progress_and_counts_one_event() {
        let progress = Some(Progress { points_done: 2, points_total: 5, percent: 40 });
        let state = JobState { status: JobStatus::Cancelled.into(), last_sequence: 1, progress };
        let bar = ProgressBar::hidden();
        bar.set_length(100);
        let screen = Screen {
            bar: Some(bar.clone()),
            message_columns: 0,
            units: HashMap::new(),
            steps: 1,
            done: BTreeSet::new(),
        };
        screen.end(&state).expect("stdout");
        assert_eq!((bar.position(), bar.is_finished()), (40, true));
        assert_eq!(last_line(&state), "cancelled at 40 % after 1 event");
        assert_eq!(done(0, 1, state.progress.unwrap_or_default()), "0 of 1 step · 2 of 5 points");
    }
}
