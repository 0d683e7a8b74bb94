//! What the programs print.

use serde_json::Value;

/// An event, as a program or the log has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) job: String,
    pub(crate) sequence: i64,
    pub(crate) id: String,
    pub(crate) name: String,
}

/// A line of the output of a program. A watch is the id of its job, or `all`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Event { watch: String, event: Event },
    CaughtUp { watch: String },
    Heartbeat,
    Interruption,
    End { watch: String, last_sequence: i64 },
    Stored { job: String, sequence: i64, id: String },
    Refused { job: String, id: String, reason: String },
    CancellationRequested { job: String },
    Flushed,
}

impl Line {
    /// None if the line is not what a program prints.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        let text = |name: &str| value.get(name)?.as_str().map(str::to_owned);
        let number = |name: &str| value.get(name)?.as_i64();
        Some(match text("kind")?.as_str() {
            "event" => {
                let (job, sequence) = (text("job")?, number("sequence")?);
                let event = Event { job, sequence, id: text("id")?, name: text("name")? };
                Self::Event { watch: text("watch")?, event }
            }
            "caught_up" => Self::CaughtUp { watch: text("watch")? },
            "heartbeat" => text("watch").map(|_| Self::Heartbeat)?,
            "interruption" => text("watch").and(text("error")).map(|_| Self::Interruption)?,
            "end" => Self::End { watch: text("watch")?, last_sequence: number("last_sequence")? },
            "stored" => Self::Stored { job: text("job")?, sequence: number("sequence")?, id: text("id")? },
            "refused" => Self::Refused { job: text("job")?, id: text("id")?, reason: text("reason")? },
            "cancellation_requested" => Self::CancellationRequested { job: text("job")? },
            "flushed" => Self::Flushed,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_lines_are_parsed() {
        let stored = r#"{"kind":"stored","job":"a","sequence":3,"id":"b"}"#;
        let expected = Line::Stored { job: "a".to_owned(), sequence: 3, id: "b".to_owned() };
        assert_eq!(Line::parse(stored), Some(expected));
        assert_eq!(Line::parse(r#"{"kind":"flushed"}"#), Some(Line::Flushed));
        for wrong in [
            "",
            "stored",
            r#"{"kind":"unknown"}"#,
            r#"{"kind":"stored","job":"a","sequence":"3","id":"b"}"#,
            r#"{"kind":"end","watch":"a"}"#,
            r#"{"kind":"refused","job":"a","id":"b","reason":null}"#,
            r#"{"kind":"heartbeat"}"#,
        ] {
            assert_eq!(Line::parse(wrong), None, "{wrong}");
        }
    }
}
