//! A job in the terminal: its events, and below them a progress bar. Plain lines without a
//! terminal, and on one that cannot move its cursor (`TERM=dumb`).

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Display,
    io,
    time::Duration,
};

use chrono::{DateTime, Local};
use console::{Style, Term, is_dumb, measure_text_width};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use milepost_client::pb::{
    EstimateJobResponse, Event, EventKind, Job, JobConfiguration, JobState, JobStatus, Progress,
    estimate_job_response::Outcome,
};
use prost_types::Timestamp;

use super::{
    clean,
    output::{self, metadata_value, short},
    print_line,
};

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
    /// The step that the last event with a step was of, if it is under way.
    under_way: Option<UnderWay>,
    /// Whether the customer asked to stop the job.
    is_asked_to_stop: bool,
    /// When the job will probably be complete; empty without an estimate.
    estimate: String,
    /// The last known status and progress.
    status: JobStatus,
    progress: Progress,
}

#[derive(Debug)]
struct UnderWay {
    tag: String,
    name: String,
    /// The highest percent that was reported of it.
    percent: i32,
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
        Self {
            bar,
            message_columns,
            units: units.collect(),
            steps,
            done: BTreeSet::new(),
            under_way: None,
            is_asked_to_stop: false,
            estimate: String::new(),
            status: JobStatus::Pending,
            progress: Progress::default(),
        }
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
        self.move_steps(event);
        self.is_asked_to_stop |= event.kind() == EventKind::CancellationRequested;
        (self.status, self.progress) = (event.status(), event.progress.unwrap_or_default());
        match &self.bar {
            Some(bar) => {
                if !is_shown_by_bar(event) {
                    bar.println(self.colored_line(event));
                }
                self.move_bar(bar);
                Ok(())
            }
            None => print_line(&self.plain_line(event)),
        }
    }

    fn move_steps(&mut self, event: &Event) {
        let tag = &event.step_tag;
        if tag.is_empty() {
            return;
        }
        if event.kind() == EventKind::Step {
            self.done.insert(tag.clone());
        }
        let before = self.under_way.take().filter(|step| step.tag == *tag).map_or(0, |step| step.percent);
        self.under_way = (!self.done.contains(tag)).then(|| UnderWay {
            tag: tag.clone(),
            name: clean(if event.step_name.is_empty() { tag } else { &event.step_name }),
            percent: event.step_percent().max(before),
        });
    }

    /// A function that reports an interruption: in the bar, or once on stderr.
    pub(super) fn interruption_reporter(&self) -> impl FnMut() + Send + 'static {
        let bar = self.bar.clone();
        let mut report = report_once();
        move || match &bar {
            Some(bar) => bar.set_message("connection to the server lost, resuming …"),
            None => report(),
        }
    }

    /// Replaces the message of an interruption once the watch has caught up again.
    pub(super) fn caught_up(&mut self, state: &JobState) {
        (self.status, self.progress) = (state.status(), state.progress.unwrap_or_default());
        if let Some(bar) = &self.bar
            && state.last_sequence > 0
        {
            bar.set_message(self.message());
        }
    }

    /// Shows when the job will probably be complete; nothing without an estimate.
    pub(super) fn estimate(&mut self, answer: Option<&EstimateJobResponse>) -> io::Result<()> {
        let text = answer.and_then(estimate_text).unwrap_or_default();
        if self.bar.is_none() && !text.is_empty() && text != self.estimate {
            print_line(&text)?;
        }
        self.estimate = text;
        if let Some(bar) = &self.bar
            && !self.estimate.is_empty()
        {
            bar.set_message(self.message());
        }
        Ok(())
    }

    /// Shows the job's final status and progress.
    pub(super) fn end(&mut self, state: &JobState) -> io::Result<()> {
        self.estimate.clear();
        (self.status, self.progress) = (state.status(), state.progress.unwrap_or_default());
        match &self.bar {
            Some(bar) => {
                self.move_bar(bar);
                // `finish` would move the bar to 100 %.
                bar.abandon();
                print_line("")
            }
            None => print_line(&last_line(state)),
        }
    }

    fn move_bar(&self, bar: &ProgressBar) {
        bar.set_style(bar_style(self.status, bar_columns(self.message_columns)));
        bar.set_position(u64::try_from(self.progress.percent).unwrap_or(0));
        bar.set_message(self.message());
    }

    fn message(&self) -> String {
        let (name, color, _) = look(self.status);
        let status = Style::from_dotted_str(color).bold().apply_to(name);
        if self.steps == 0 {
            return status.to_string();
        }
        let mut message = format!("{status}  {}", dim(&done(self.done.len(), self.steps, self.progress)));
        if let Some(UnderWay { name, percent, .. }) = &self.under_way {
            message.push_str(&dim(&format!(" · {name} {percent} %")));
        }
        if self.is_asked_to_stop {
            message.push_str(&dim(" · asked to stop"));
        }
        if !self.estimate.is_empty() {
            message.push_str(&dim(&format!(" · {}", self.estimate)));
        }
        message
    }

    fn colored_line(&self, event: &Event) -> String {
        let time = event.created_at.and_then(local_time);
        let (plain, bold) = (Style::new(), Style::new().bold());
        let (mark, style, title_style) = match event.kind() {
            EventKind::Step => ("✔", bold.clone().green(), bold),
            EventKind::Progress => ("›", bold.cyan(), plain),
            EventKind::Error => ("✘", bold.red(), plain.red()),
            EventKind::Info => ("·", bold.cyan(), plain),
            EventKind::Complete => ("★", bold.clone().green(), bold),
            EventKind::Close => ("■", bold.yellow(), plain.yellow()),
            EventKind::Silent => ("…", bold.yellow(), plain.yellow()),
            EventKind::CancellationRequested => ("!", bold.yellow(), plain.yellow()),
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

    fn plain_line(&self, event: &Event) -> String {
        let time = output::time(event.created_at);
        let kind = short(event.kind().as_str_name(), "EVENT_KIND_");
        let (status, ..) = look(event.status());
        let mut line = format!(
            "{time} #{} {:>3} % {status}: {kind} {}",
            event.sequence,
            event.progress.unwrap_or_default().percent,
            clean(title(event))
        );
        if let Some(percent) = event.step_percent {
            line.push_str(&format!(" {percent} %"));
        }
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
                let text = clean(&metadata_value(value));
                (clean(name), units.map_or(text.clone(), |units| format!("{text} {}", clean(units))))
            })
            .collect()
    }
}

/// The text of an estimate, if there is one.
fn estimate_text(answer: &EstimateJobResponse) -> Option<String> {
    let Some(Outcome::Estimate(estimate)) = &answer.outcome else { return None };
    let now = answer.estimated_at?.seconds;
    let left = |at: Option<Timestamp>| Some(length((at?.seconds - now).unsigned_abs()));
    Some(format!("about {}, 9 in 10 within {}", left(estimate.p50)?, left(estimate.p90)?))
}

/// A length of time for people, rounded up.
fn length(seconds: u64) -> String {
    match seconds {
        0..100 => format!("{} s", seconds.max(1)),
        100..6_000 => format!("{} min", seconds.div_ceil(60)),
        6_000..360_000 => format!("{} h", seconds.div_ceil(3_600)),
        _ => format!("{} d", seconds.div_ceil(86_400)),
    }
}

/// Whether the bar says all that the event does: how far a step is.
fn is_shown_by_bar(event: &Event) -> bool {
    event.kind() == EventKind::Progress && event.name.is_empty() && event.metadata.is_none()
}

/// A function that reports the first interruption of a watch on stderr.
pub(super) fn report_once() -> impl FnMut() + Send + 'static {
    let mut reported = false;
    move || {
        if !std::mem::replace(&mut reported, true) {
            eprintln!("milepost: connection to the server lost, resuming");
        }
    }
}

/// A status's name, its color, and the mark that takes the spinner's place at the end.
fn look(status: JobStatus) -> (&'static str, &'static str, &'static str) {
    match status {
        JobStatus::Unspecified => ("unknown", "cyan", " "),
        JobStatus::Pending => ("pending", "cyan", " "),
        JobStatus::Running => ("running", "cyan", " "),
        JobStatus::Stalled => ("stalled", "yellow", " "),
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
            EventKind::Silent => "no event for too long",
            EventKind::CancellationRequested => "asked to stop",
            EventKind::Error => "error",
            EventKind::Step => "step",
            EventKind::Progress => "progress",
            EventKind::Info | EventKind::Unspecified => "",
        },
        ("", step) => step,
        (name, _) => name,
    }
}

fn local_time(at: Timestamp) -> Option<String> {
    let at = DateTime::from_timestamp(at.seconds, 0)?;
    Some(at.with_timezone(&Local).format("%H:%M:%S").to_string())
}

fn dim(text: &str) -> String {
    Style::new().dim().apply_to(text).to_string()
}

#[cfg(test)]
mod tests {
    use milepost_client::pb;
    use prost_types::{Struct, Value, value::Kind};

    use super::*;

    fn screen(bar: Option<ProgressBar>) -> Screen {
        Screen { bar, steps: 2, ..Screen::new(&JobConfiguration::default()) }
    }

    #[test]
    fn an_estimate_is_told_in_round_numbers_and_gone_with_the_job() {
        let at = |seconds| Some(Timestamp { seconds, nanos: 0 });
        let estimate = pb::Estimate { p50: at(1_000 + 200), p90: at(1_000 + 6_900) };
        let answer = EstimateJobResponse {
            outcome: Some(Outcome::Estimate(estimate)),
            jobs: 12,
            estimated_at: at(1_000),
        };
        let mut screen = screen(Some(ProgressBar::hidden()));
        screen.estimate(Some(&answer)).expect("stdout");
        assert!(screen.message().contains("about 4 min, 9 in 10 within 2 h"), "{}", screen.message());
        screen.estimate(None).expect("stdout");
        assert!(!screen.message().contains("about"));
    }

    #[test]
    fn the_message_names_the_step_under_way_with_its_highest_percent() {
        let mut screen = screen(Some(ProgressBar::hidden()));
        let event = |kind: EventKind, tag: &str, step_percent| Event {
            kind: kind.into(),
            step_tag: tag.to_owned(),
            step_name: tag.to_uppercase(),
            step_percent,
            status: JobStatus::Running.into(),
            ..Event::default()
        };
        let mut shown = |event: &Event| {
            screen.event(event).expect("stdout");
            let message = screen.message();
            console::strip_ansi_codes(&message).into_owned()
        };
        use EventKind::{Info, Progress as Moves, Step};
        assert!(shown(&event(Info, "load", None)).ends_with(" · LOAD 0 %"));
        assert!(shown(&event(Moves, "load", Some(40))).ends_with(" · LOAD 40 %"));
        assert!(shown(&event(Moves, "load", Some(30))).ends_with(" · LOAD 40 %"));
        assert!(shown(&event(Step, "load", None)).ends_with("1 of 2 steps · 0 of 0 points"));
        assert!(shown(&event(Moves, "load", Some(50))).ends_with("1 of 2 steps · 0 of 0 points"));
    }

    #[test]
    fn a_step_event_without_a_step_tag_is_no_done_step() {
        let mut screen = screen(None);
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
        let units = [(("measure".to_owned(), "mean".to_owned()), "HU".to_owned())].into();
        let screen = Screen { units, ..screen(None) };
        assert_eq!(screen.plain_line(&event), " #3  40 % running: step Measure\u{fffd}[2J; mean = -412.5 HU");
    }

    #[test]
    fn the_end_of_a_cancelled_job_leaves_the_bar_at_its_progress_and_counts_one_event() {
        let progress = Some(Progress { points_done: 2, points_total: 5, percent: 40 });
        let state = JobState { status: JobStatus::Cancelled.into(), last_sequence: 1, progress };
        let bar = ProgressBar::hidden();
        bar.set_length(100);
        let mut screen = screen(Some(bar.clone()));
        screen.end(&state).expect("stdout");
        assert_eq!((bar.position(), bar.is_finished()), (40, true));
        assert_eq!(last_line(&state), "cancelled at 40 % after 1 event");
        assert_eq!(done(0, 1, state.progress.unwrap_or_default()), "0 of 1 step · 2 of 5 points");
    }
}
