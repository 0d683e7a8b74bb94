//! Parsers of request fields. Each parser adds a violation and returns a placeholder, so
//! that one answer lists all violations. They are called in field order, and
//! [`Violations::or`] ends the parsing.

use std::{collections::BTreeMap, fmt, time::Duration};

use chrono::{DateTime, Utc};
use prost_types::Timestamp;
use uuid::Uuid;

use crate::{
    error::{Violations, check_text, quoted},
    limits::{EVENT_KINDS, JOB_LABELS, LABEL_KEY_CHARS, PAGE_DEFAULT, PAGE_MAX},
    models::{labels::Labels, max_silence::MaxSilence},
    progress::EventKind,
    proto_enums::ProtoEnum,
};

/// First and last second of the years 1 to 9999, the range of
/// `google.protobuf.Timestamp`.
const TIMESTAMP_SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// A text by the rule of [`check_text`]. It may be empty.
pub(super) fn text(violations: &mut Violations, field: impl fmt::Display, value: String) -> String {
    if let Err(description) = check_text(&value) {
        violations.add(field, description);
    }
    value
}

/// A text that is a key: as [`text`], and neither empty nor with white space around it.
pub(super) fn key_text(violations: &mut Violations, field: impl fmt::Display, value: String) -> String {
    if value.is_empty() {
        violations.add(field, "must not be empty");
    } else if value.trim().len() != value.len() {
        violations.add(field, format!("{} must not begin or end with white space", quoted(&value)));
    } else {
        return text(violations, field, value);
    }
    value
}

/// As [`key_text`]; none for an empty text.
pub(super) fn optional_key_text(
    violations: &mut Violations,
    field: impl fmt::Display,
    value: String,
) -> Option<String> {
    (!value.is_empty()).then(|| key_text(violations, field, value))
}

/// A UUID of any version in its hyphenated form, in any case; nil after a violation.
pub(super) fn uuid(violations: &mut Violations, field: impl fmt::Display, value: &str) -> Uuid {
    // `parse_str` alone accepts other forms, such as one with braces.
    match Uuid::parse_str(value) {
        Ok(uuid) if value.len() == uuid::fmt::Hyphenated::LENGTH => uuid,
        _ => {
            violations.add(field, format!("{} must be a UUID", quoted(value)));
            Uuid::nil()
        }
    }
}

/// As [`uuid()`]; none for an empty text.
pub(super) fn optional_uuid(
    violations: &mut Violations,
    field: impl fmt::Display,
    value: &str,
) -> Option<Uuid> {
    (!value.is_empty()).then(|| uuid(violations, field, value))
}

/// A time, cut to the microseconds that Postgres stores; none if absent or after a
/// violation.
pub(super) fn timestamp(
    violations: &mut Violations,
    field: impl fmt::Display,
    value: Option<Timestamp>,
) -> Option<DateTime<Utc>> {
    let Timestamp { seconds, nanos } = value?;
    let time = u32::try_from(nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000 && TIMESTAMP_SECONDS.contains(&seconds))
        .and_then(|nanos| DateTime::from_timestamp(seconds, nanos / 1_000 * 1_000));
    if time.is_none() {
        violations.add(field, "must be a time of the years 1 to 9999, with 0 to 999,999,999 nanoseconds");
    }
    time
}

/// The values of a repeated enum field, each once; `describe` describes a number that is
/// not one of them.
pub(super) fn distinct<E: ProtoEnum + PartialEq>(
    violations: &mut Violations,
    field: &str,
    numbers: &[i32],
    describe: impl Fn(i32) -> String,
) -> Vec<E> {
    let mut values = Vec::new();
    for (index, &number) in numbers.iter().enumerate() {
        match E::from_proto(number) {
            Some(value) if !values.contains(&value) => values.push(value),
            Some(_) => {}
            None => violations.add(format!("{field}[{index}]"), describe(number)),
        }
    }
    values
}

/// A duration between the shortest and the longest; the default if absent or after a
/// violation.
pub(super) fn duration(
    violations: &mut Violations,
    field: impl fmt::Display,
    value: Option<prost_types::Duration>,
    (shortest, default, longest): (Duration, Duration, Duration),
) -> Duration {
    let Some(value) = value else { return default };
    match not_negative(value) {
        Some(value) if (shortest..=longest).contains(&value) => value,
        _ => {
            violations.add(field, format!("must be {shortest:?} to {longest:?}"));
            default
        }
    }
}

/// At most [`JOB_LABELS`] labels: keys by the rule of [`label_key`], and texts. Each violation is of the
/// field, or of the value of a key.
pub(super) fn labels(violations: &mut Violations, field: &str, given: BTreeMap<String, String>) -> Labels {
    if given.len() > JOB_LABELS {
        violations.add(field, format!("must be at most {JOB_LABELS}"));
        return Labels::default();
    }
    let labels = given.into_iter().filter_map(|(key, value)| {
        let key = label_key(violations, field, key)?;
        let value = text(violations, format_args!("{field}.{key}"), value);
        Some((key, value))
    });
    Labels(labels.collect())
}

/// A key by the rule of [`key_text`], of at most [`LABEL_KEY_CHARS`] characters; none if it has more.
pub(super) fn label_key(violations: &mut Violations, field: &str, key: String) -> Option<String> {
    if key.chars().nth(LABEL_KEY_CHARS).is_some() {
        violations.add(field, format!("{} must have at most {LABEL_KEY_CHARS} characters", quoted(&key)));
        return None;
    }
    Some(key_text(violations, field, key))
}

/// The field `kinds`.
pub(super) fn event_kinds(violations: &mut Violations, kinds: &[i32]) -> Vec<EventKind> {
    if kinds.len() > EVENT_KINDS {
        violations.add("kinds", format!("must be at most {}", EVENT_KINDS));
        return Vec::new();
    }
    distinct(violations, "kinds", kinds, |_| "is not a kind of event".to_owned())
}

/// The field `max_silence`; none if absent or after a violation.
pub(super) fn max_silence(
    violations: &mut Violations,
    value: Option<prost_types::Duration>,
) -> Option<MaxSilence> {
    let parsed = not_negative(value?).and_then(MaxSilence::new);
    if parsed.is_none() {
        violations.add("max_silence", "must be 10 seconds to 30 days");
    }
    parsed
}

/// Converts a duration; none if either of its numbers is negative. prost's own
/// conversion overflows for the smallest numbers.
pub(super) fn not_negative(value: prost_types::Duration) -> Option<Duration> {
    let (seconds, nanos) = (u64::try_from(value.seconds).ok()?, u64::try_from(value.nanos).ok()?);
    Some(Duration::from_secs(seconds).saturating_add(Duration::from_nanos(nanos)))
}

/// The field `page_size`: [`PAGE_DEFAULT`] if absent, at most [`PAGE_MAX`].
pub(super) fn page_size(violations: &mut Violations, value: i32) -> i64 {
    match i64::from(value) {
        0 => PAGE_DEFAULT,
        size if size < 0 => {
            violations.add("page_size", format!("{size} must not be negative"));
            PAGE_DEFAULT
        }
        size => size.min(PAGE_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the value of `parse` and the violations that it adds.
    fn parsed_with<T>(parse: impl FnOnce(&mut Violations) -> T) -> (T, Vec<String>) {
        let mut violations = Violations::default();
        let value = parse(&mut violations);
        let descriptions = violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
        (value, descriptions)
    }

    #[test]
    fn texts_are_counted_in_scalar_values() {
        for fine in ["", " ", "x", &"\u{1F9E0}".repeat(256), "tab\tand\nline"] {
            assert_eq!(parsed_with(|v| text(v, "f", fine.to_owned())), (fine.to_owned(), vec![]));
        }
        for long in ["x".repeat(257), "\u{1F9E0}".repeat(257), "x".repeat(100_000)] {
            let (_, violations) = parsed_with(|v| text(v, "f", long));
            assert!(violations[0].ends_with("must have at most 256 characters"), "{violations:?}");
            assert!(violations[0].chars().count() < 120);
        }
        let (_, violations) = parsed_with(|v| text(v, "f", "a\0b".to_owned()));
        assert_eq!(violations, [r#"f: "a\0b" must not contain NUL"#]);
    }

    #[test]
    fn keys_are_neither_empty_nor_surrounded_by_white_space() {
        assert_eq!(parsed_with(|v| key_text(v, "f", "a b".to_owned())), ("a b".to_owned(), vec![]));
        for bad in ["", " ", " a", "a\n", "a\u{2003}", "a\0", &"a".repeat(257)] {
            assert_eq!(parsed_with(|v| key_text(v, "f", bad.to_owned())).1.len(), 1, "{bad:?}");
        }
    }

    #[test]
    fn only_hyphenated_uuids_are_accepted() {
        let id = Uuid::now_v7();
        assert_eq!(parsed_with(|v| uuid(v, "f", &id.to_string())), (id, vec![]));
        assert_eq!(parsed_with(|v| uuid(v, "f", &id.to_string().to_uppercase())), (id, vec![]));
        let simple = id.simple().to_string();
        let braced = id.braced().to_string();
        for bad in ["", "x", &simple, &braced, "0190-", &"é".repeat(18)] {
            let (value, violations) = parsed_with(|v| uuid(v, "f", bad));
            assert!(value.is_nil() && violations.len() == 1, "{bad}");
        }
        assert_eq!(parsed_with(|v| optional_uuid(v, "f", "")), (None, vec![]));
        assert_eq!(parsed_with(|v| optional_uuid(v, "f", "x")).1.len(), 1);
    }

    #[test]
    fn times_are_cut_to_microseconds_and_bounded() {
        let (time, violations) =
            parsed_with(|v| timestamp(v, "f", Some(Timestamp { seconds: -1, nanos: 999_999_999 })));
        assert!(violations.is_empty());
        let time = time.expect("a time");
        assert_eq!(crate::proto_enums::timestamp(time), Timestamp { seconds: -1, nanos: 999_999_000 });
        assert_eq!(parsed_with(|v| timestamp(v, "f", None)), (None, vec![]));
        for (seconds, nanos) in [(-62_135_596_800, 0), (253_402_300_799, 999_999_999)] {
            assert!(parsed_with(|v| timestamp(v, "f", Some(Timestamp { seconds, nanos }))).0.is_some());
        }
        for (seconds, nanos) in
            [(0, -1), (0, 1_000_000_000), (-62_135_596_801, 0), (253_402_300_800, 0), (i64::MAX, i32::MAX)]
        {
            let (time, violations) = parsed_with(|v| timestamp(v, "f", Some(Timestamp { seconds, nanos })));
            assert!(time.is_none() && violations.len() == 1, "{seconds} {nanos}");
        }
    }

    #[test]
    fn durations_have_a_default_and_limits() {
        let limits = [1, 5, 10].map(Duration::from_secs).into();
        let given = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
        let parsed = |value| parsed_with(|v| duration(v, "f", value, limits));
        assert_eq!(parsed(None), (Duration::from_secs(5), vec![]));
        assert_eq!(parsed(given(1, 0)), (Duration::from_secs(1), vec![]));
        assert_eq!(parsed(given(10, 0)), (Duration::from_secs(10), vec![]));
        for bad in [
            given(0, 999_999_999),
            given(10, 1),
            given(-1, 0),
            given(i64::MAX, i32::MAX),
            given(i64::MIN, i32::MIN),
        ] {
            assert_eq!(parsed(bad).1, ["f: must be 1s to 10s"], "{bad:?}");
        }
    }

    #[test]
    fn page_sizes_have_a_default_and_a_limit() {
        for (asked, given) in [(0, 50), (1, 1), (500, 500), (501, 500), (i32::MAX, 500)] {
            assert_eq!(parsed_with(|v| page_size(v, asked)), (given, vec![]));
        }
        assert_eq!(parsed_with(|v| page_size(v, -1)).1, ["page_size: -1 must not be negative"]);
    }
}
