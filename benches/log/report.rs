//! The outcomes of the rows, printed as a table and as JSON.

use std::fmt::Write as _;

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
}

/// What a row must reach to be met.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    /// The ratio to the peer is at least this.
    AtLeast(f64),
    /// The ratio to the peer is at most this.
    AtMost(f64),
    /// The ratio to the peer is at most the first number, and the value in the row's unit
    /// at most the second.
    AtMostAnd(f64, f64),
    /// The value in the row's unit is at most this.
    Within(f64),
}

/// The measurements of one row of the table, one a round.
pub(crate) struct Outcome {
    pub(crate) row: String,
    pub(crate) unit: &'static str,
    pub(crate) peer_name: &'static str,
    pub(crate) goal: Option<Goal>,
    milepost: Vec<Measure>,
    peer: Vec<Measure>,
}

/// The medians of milepost's or the peer's measurements over the rounds.
struct Side {
    median: f64,
    least: f64,
    most: f64,
    latencies: Option<[f64; 3]>,
}

impl Outcome {
    pub(crate) fn new(
        row: impl Into<String>,
        unit: &'static str,
        peer_name: &'static str,
        goal: Option<Goal>,
    ) -> Self {
        Self { row: row.into(), unit, peer_name, goal, milepost: Vec::new(), peer: Vec::new() }
    }

    /// Adds milepost's measurement of a round.
    pub(crate) fn add_milepost(&mut self, measure: Measure) {
        eprintln!("{:<22} milepost {} {}", self.row, number(measure.value), self.unit);
        self.milepost.push(measure);
    }

    /// Adds the peer's measurement of a round.
    pub(crate) fn add_peer(&mut self, measure: Measure) {
        eprintln!("{:<22} {} {} {}", self.row, self.peer_name, number(measure.value), self.unit);
        self.peer.push(measure);
    }

    /// Median, minimum and maximum of the rounds' ratios.
    fn ratio(&self) -> Option<[f64; 3]> {
        let mut ratios: Vec<f64> = self
            .milepost
            .iter()
            .zip(&self.peer)
            .map(|(milepost, peer)| milepost.value / peer.value)
            .collect();
        ratios.sort_by(f64::total_cmp);
        Some([median(&ratios)?, *ratios.first()?, *ratios.last()?])
    }

    fn met(&self) -> Option<bool> {
        let ratio = self.ratio().map(|[median, ..]| median);
        let value = side(&self.milepost)?.median;
        Some(match self.goal? {
            Goal::AtLeast(bound) => ratio? >= bound,
            Goal::AtMost(bound) => ratio? <= bound,
            Goal::AtMostAnd(bound, most) => ratio? <= bound && value <= most,
            Goal::Within(most) => value <= most,
        })
    }

    fn goal_text(&self) -> String {
        match self.goal {
            None => String::new(),
            Some(Goal::AtLeast(bound)) => format!("≥ {bound} × peer"),
            Some(Goal::AtMost(bound)) => format!("≤ {bound} × peer"),
            Some(Goal::AtMostAnd(bound, most)) => format!("≤ {bound} × peer, ≤ {most} {}", self.unit),
            Some(Goal::Within(most)) => format!("≤ {most} {}", self.unit),
        }
    }

    fn json(&self) -> String {
        let value = |side: Option<Side>| side.map_or("null".to_owned(), |side| side.median.to_string());
        let ratio = self.ratio();
        let spread = ratio.map_or("null".to_owned(), |[_, least, most]| format!("[{least}, {most}]"));
        format!(
            "{{\"row\": \"{}\", \"unit\": \"{}\", \"milepost\": {}, \"peer\": {}, \"peer_name\": \"{}\", \
             \"ratio\": {}, \"spread\": {spread}, \"goal\": {}, \"met\": {}}}",
            self.row,
            self.unit,
            value(side(&self.milepost)),
            value(side(&self.peer)),
            self.peer_name,
            ratio.map_or("null".to_owned(), |[median, ..]| median.to_string()),
            self.goal.map_or("null".to_owned(), |_| format!("\"{}\"", self.goal_text())),
            self.met().map_or("null", |met| if met { "true" } else { "false" }),
        )
    }
}

/// A JSON list with an object for each row.
pub(crate) fn json(outcomes: &[Outcome]) -> String {
    let objects: Vec<String> = outcomes.iter().map(|outcome| format!("  {}", outcome.json())).collect();
    format!("[\n{}\n]\n", objects.join(",\n"))
}

/// Markdown tables, aligned to be readable as plain text.
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let head = ["row", "unit", "milepost", "peer", "", "ratio", "spread of ratio", "goal", "met"];
    let mut rows = vec![head.map(str::to_owned)];
    for outcome in outcomes {
        let ratio = outcome.ratio();
        rows.push([
            outcome.row.clone(),
            outcome.unit.to_owned(),
            side(&outcome.milepost).map_or_else(String::new, |side| side.text()),
            side(&outcome.peer).map_or_else(String::new, |side| side.text()),
            outcome.peer_name.to_owned(),
            ratio.map_or_else(String::new, |[median, ..]| format!("{median:.2}")),
            ratio.map_or_else(String::new, |[_, least, most]| format!("{least:.2} to {most:.2}")),
            outcome.goal_text(),
            outcome.met().map_or("", |met| if met { "yes" } else { "NO" }).to_owned(),
        ]);
    }
    let mut text = lines(&rows);
    let mut latencies = vec![["p50 / p99 / p99.9, ms", "milepost", "peer"].map(str::to_owned)];
    for outcome in outcomes {
        let text = |measures: &[Measure]| {
            side(measures)
                .and_then(|side| side.latencies)
                .map(|of| of.map(|ms| format!("{ms:.2}")).join(" / "))
        };
        if let Some(milepost) = text(&outcome.milepost) {
            latencies.push([outcome.row.clone(), milepost, text(&outcome.peer).unwrap_or_default()]);
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
