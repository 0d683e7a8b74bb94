//! The outcomes of the rows, printed as a table and as JSON.

use std::{fmt::Write as _, time::Duration};

/// The measurement of milepost or a peer in one round.
#[derive(Clone, Copy)]
pub(crate) struct Measure {
    /// In the row's unit.
    pub(crate) value: f64,
    /// p50, p99 and p99.9 in milliseconds.
    pub(crate) latencies: Option<[f64; 3]>,
}

impl Measure {
    pub(crate) fn of(value: f64) -> Self {
        Self { value, latencies: None }
    }

    /// The median of the latencies, as a row of its own.
    pub(crate) fn p50(self) -> Self {
        Self::of(self.latencies.map_or(f64::NAN, |[p50, ..]| p50))
    }

    /// The microseconds of processor time that each of these events has cost.
    pub(crate) fn cost(time: Duration, events: usize) -> Self {
        let events = f64::from(u32::try_from(events).unwrap_or(u32::MAX));
        Self::of(time.as_secs_f64() * 1e6 / events)
    }
}

/// What a row must reach to be met.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    /// The ratio to the peer is at least this.
    AtLeast(f64),
    /// The ratio to the peer is at most this.
    AtMost(f64),
    /// The value in the row's unit is at most this.
    Within(f64),
}

/// The measurements of milepost for one row of the table, one a round, and those of its
/// peers.
pub(crate) struct Outcome {
    row: String,
    unit: &'static str,
    milepost: Vec<Measure>,
    compared: Vec<Comparison>,
}

/// A line of the table: the measurements of one peer, and the goal against it.
struct Comparison {
    peer: &'static str,
    goal: Option<Goal>,
    measures: Vec<Measure>,
    /// The row whose goal is enough, and whether that one is met.
    alternative: Option<(String, bool)>,
}

/// The medians of milepost's or the peer's measurements over the rounds.
struct Side {
    median: f64,
    least: f64,
    most: f64,
    latencies: Option<[f64; 3]>,
}

impl Outcome {
    pub(crate) fn new(row: impl Into<String>, unit: &'static str) -> Self {
        Self { row: row.into(), unit, milepost: Vec::new(), compared: Vec::new() }
    }

    /// Compares the row with this peer, too. The first goal is the one of the row.
    pub(crate) fn compared_with(mut self, peer: &'static str, goal: Option<Goal>) -> Self {
        self.compared.push(Comparison { peer, goal, measures: Vec::new(), alternative: None });
        self
    }

    /// Adds milepost's measurement of a round.
    pub(crate) fn add_milepost(&mut self, measure: Measure) {
        eprintln!("{:<22} milepost {} {}", self.row, number(measure.value), self.unit);
        self.milepost.push(measure);
    }

    /// Adds the measurement of the only peer of a round.
    pub(crate) fn add_peer(&mut self, measure: Measure) {
        self.add(self.compared[0].peer, measure);
    }

    /// Adds the measurement of this peer of a round.
    pub(crate) fn add(&mut self, peer: &'static str, measure: Measure) {
        eprintln!("{:<22} {peer} {} {}", self.row, number(measure.value), self.unit);
        let comparison = self.compared.iter_mut().find(|comparison| comparison.peer == peer);
        comparison.expect("a row is compared with the peers that it names").measures.push(measure);
    }

    /// Lets the first goal of one of the two rows be enough for both.
    pub(crate) fn either(&mut self, other: &mut Self) {
        let met = |outcome: &Self| outcome.compared[0].met(&outcome.milepost).unwrap_or(false);
        let (own, others) = (met(self), met(other));
        self.compared[0].alternative = Some((other.row.clone(), others));
        other.compared[0].alternative = Some((self.row.clone(), own));
    }
}

impl Comparison {
    /// Median, minimum and maximum of the rounds' ratios.
    fn ratio(&self, milepost: &[Measure]) -> Option<[f64; 3]> {
        let ratio = |(milepost, peer): (&Measure, &Measure)| milepost.value / peer.value;
        let mut ratios: Vec<f64> = milepost.iter().zip(&self.measures).map(ratio).collect();
        ratios.sort_by(f64::total_cmp);
        Some([median(&ratios)?, *ratios.first()?, *ratios.last()?])
    }

    fn met(&self, milepost: &[Measure]) -> Option<bool> {
        let ratio = self.ratio(milepost).map(|[median, ..]| median);
        let met = match self.goal? {
            Goal::AtLeast(bound) => ratio? >= bound,
            Goal::AtMost(bound) => ratio? <= bound,
            Goal::Within(most) => side(milepost)?.median <= most,
        };
        Some(met || self.alternative.as_ref().is_some_and(|(_, met)| *met))
    }

    fn goal_text(&self, unit: &str) -> String {
        let goal = match self.goal {
            None => return String::new(),
            Some(Goal::AtLeast(bound)) => format!("≥ {bound} × peer"),
            Some(Goal::AtMost(bound)) => format!("≤ {bound} × peer"),
            Some(Goal::Within(most)) => format!("≤ {most} {unit}"),
        };
        match &self.alternative {
            None => goal,
            Some((row, _)) => format!("{goal}, or {row}"),
        }
    }

    fn json(&self, outcome: &Outcome) -> String {
        let value = |side: Option<Side>| side.map_or("null".to_owned(), |side| side.median.to_string());
        let ratio = self.ratio(&outcome.milepost);
        let spread = ratio.map_or("null".to_owned(), |[_, least, most]| format!("[{least}, {most}]"));
        format!(
            "{{\"row\": \"{}\", \"unit\": \"{}\", \"milepost\": {}, \"peer\": {}, \"peer_name\": \"{}\", \
             \"ratio\": {}, \"spread\": {spread}, \"goal\": {}, \"met\": {}}}",
            outcome.row,
            outcome.unit,
            value(side(&outcome.milepost)),
            value(side(&self.measures)),
            self.peer,
            ratio.map_or("null".to_owned(), |[median, ..]| median.to_string()),
            self.goal.map_or("null".to_owned(), |_| format!("\"{}\"", self.goal_text(outcome.unit))),
            self.met(&outcome.milepost).map_or("null", |met| if met { "true" } else { "false" }),
        )
    }
}

/// Every row with each of its peers.
fn comparisons(outcomes: &[Outcome]) -> impl Iterator<Item = (&Outcome, &Comparison)> {
    outcomes.iter().flat_map(|outcome| outcome.compared.iter().map(move |comparison| (outcome, comparison)))
}

/// A JSON list with an object for each row and peer.
pub(crate) fn json(outcomes: &[Outcome]) -> String {
    let objects: Vec<String> = comparisons(outcomes)
        .map(|(outcome, comparison)| format!("  {}", comparison.json(outcome)))
        .collect();
    format!("[\n{}\n]\n", objects.join(",\n"))
}

/// Markdown tables, aligned to be readable as plain text.
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let head = ["row", "unit", "milepost", "peer", "", "ratio", "spread of ratio", "goal", "met"];
    let mut rows = vec![head.map(str::to_owned)];
    for (outcome, comparison) in comparisons(outcomes) {
        let ratio = comparison.ratio(&outcome.milepost);
        rows.push([
            outcome.row.clone(),
            outcome.unit.to_owned(),
            side(&outcome.milepost).map_or_else(String::new, |side| side.text()),
            side(&comparison.measures).map_or_else(String::new, |side| side.text()),
            comparison.peer.to_owned(),
            ratio.map_or_else(String::new, |[median, ..]| format!("{median:.2}")),
            ratio.map_or_else(String::new, |[_, least, most]| format!("{least:.2} to {most:.2}")),
            comparison.goal_text(outcome.unit),
            comparison.met(&outcome.milepost).map_or("", |met| if met { "yes" } else { "NO" }).to_owned(),
        ]);
    }
    let mut text = lines(&rows);
    let mut latencies = vec![["p50 / p99 / p99.9, ms", "milepost", "peer", ""].map(str::to_owned)];
    for (outcome, comparison) in comparisons(outcomes) {
        let text = |measures: &[Measure]| {
            side(measures)
                .and_then(|side| side.latencies)
                .map(|of| of.map(|ms| format!("{ms:.2}")).join(" / "))
        };
        if let Some(milepost) = text(&outcome.milepost) {
            let peer = text(&comparison.measures).unwrap_or_default();
            latencies.push([outcome.row.clone(), milepost, peer, comparison.peer.to_owned()]);
        }
    }
    if latencies.len() > 1 {
        text.push('\n');
        text.push_str(&lines(&latencies));
    }
    text
}

fn lines<const N: usize>(rows: &[[String; N]]) -> String {
    let mut text = String::new();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    for (number, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a `String` does not fail.
            let _ = write!(text, "| {cell:<width$} ");
        }
        text.push_str("|\n");
        if number == 0 {
            for width in widths {
                let _ = write!(text, "|{}", "-".repeat(width + 2));
            }
            text.push_str("|\n");
        }
    }
    text
}

impl Side {
    fn text(&self) -> String {
        format!("{} ({} to {})", number(self.median), number(self.least), number(self.most))
    }
}

fn side(measures: &[Measure]) -> Option<Side> {
    let mut values: Vec<f64> = measures.iter().map(|measure| measure.value).collect();
    values.sort_by(f64::total_cmp);
    let latencies: Vec<[f64; 3]> = measures.iter().filter_map(|measure| measure.latencies).collect();
    let of = |index: usize| {
        let mut values: Vec<f64> = latencies.iter().map(|latency| latency[index]).collect();
        values.sort_by(f64::total_cmp);
        median(&values)
    };
    let latencies = of(0).zip(of(1)).zip(of(2)).map(|((p50, p99), p999)| [p50, p99, p999]);
    Some(Side { median: median(&values)?, least: *values.first()?, most: *values.last()?, latencies })
}

/// The median of sorted values; none of an empty list.
pub(crate) fn median(sorted: &[f64]) -> Option<f64> {
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get((sorted.len() - 1) / 2)?;
    Some(f64::midpoint(*lower, *upper))
}

/// A number with three decimals below 10, one below 100, and none from there on.
fn number(value: f64) -> String {
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        3
    };
    format!("{value:.decimals$}")
}
