//! What commands print: tables for people, and for scripts the messages of the API in their
//! canonical JSON, one a line.

use std::io;

use chrono::{DateTime, SecondsFormat, Utc};
use clap::{Args, ValueEnum};
use console::measure_text_width;
use prost::Name;
use prost_types::{Duration, Timestamp, Value, value::Kind};

use super::{clean, print_line};
use crate::{
    error::BoxError,
    json::{descriptor, to_json},
};

/// Most items that a page is asked for; the server gives no more.
const PAGE_ITEMS: u32 = 500;

/// The format of a command's output.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct Output {
    /// Format of the output. json is a line for each message of the API, or for each item of a list
    #[arg(long = "output", short = 'o', value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Aligned text, for people
    #[default]
    Table,
    /// Canonical JSON of protobuf, for scripts
    Json,
}

/// A line of a table.
pub(super) type Row = Vec<String>;

impl Output {
    pub(super) fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// Prints a message as a line of JSON, or its fields as a line each, without empty ones.
    pub(super) fn answer<M: Name>(
        self,
        message: &M,
        fields: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<(), BoxError> {
        if self.is_json() {
            return Ok(print_line(&json(message, &[])?)?);
        }
        let fields = fields.into_iter().filter(|(_, value)| !value.is_empty());
        Ok(Table::default().print(fields.map(|(name, value)| vec![name.to_owned(), value]).collect())?)
    }

    /// A list of messages.
    pub(super) fn list<M: Name>(self, columns: &[&str], row: fn(&M) -> Row) -> List<M> {
        self.list_by(columns, row, |message| json(message, &[]))
    }

    /// A list of items that these functions show in a table and in JSON.
    pub(super) fn list_by<T>(
        self,
        columns: &[&str],
        row: fn(&T) -> Row,
        json: fn(&T) -> Result<String, BoxError>,
    ) -> List<T> {
        if self.is_json() {
            return List::Json(json);
        }
        List::Table(Table::with(columns), row)
    }
}

/// Prints the items of a list as they come.
#[derive(Debug)]
pub(super) enum List<T> {
    Table(Table, fn(&T) -> Row),
    Json(fn(&T) -> Result<String, BoxError>),
}

impl<T> List<T> {
    pub(super) fn print(&mut self, items: &[T]) -> Result<(), BoxError> {
        match self {
            Self::Table(table, row) => Ok(table.print(items.iter().map(&*row).collect())?),
            Self::Json(json) => items.iter().try_for_each(|item| Ok(print_line(&json(item)?)?)),
        }
    }

    /// Prints the items of all pages, or the first `limit`. `page` takes a page size and the
    /// token of the page, and returns the items and the token of the next page.
    pub(super) async fn print_pages(
        mut self,
        limit: Option<u32>,
        mut page: impl AsyncFnMut(i32, String) -> Result<(Vec<T>, String), BoxError>,
    ) -> Result<(), BoxError> {
        let size = i32::try_from(limit.unwrap_or(PAGE_ITEMS).min(PAGE_ITEMS))?;
        let mut left = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        let mut token = String::new();
        loop {
            let (mut items, next) = page(size, token).await?;
            items.truncate(left);
            left -= items.len();
            self.print(&items)?;
            if next.is_empty() || left == 0 {
                return Ok(());
            }
            token = next;
        }
    }
}

/// Columns that are as wide as their widest text so far.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Printed above the first rows.
    header: Option<Row>,
    widths: Vec<usize>,
}

impl Table {
    /// A table with this header.
    pub(super) fn with(columns: &[&str]) -> Self {
        let header = columns.iter().map(|&column| column.to_owned()).collect();
        Self { header: Some(header), widths: Vec::new() }
    }

    pub(super) fn print(&mut self, rows: Vec<Row>) -> io::Result<()> {
        let rows = self.header.take().into_iter().chain(rows);
        let rows: Vec<Row> = rows.map(|row| row.iter().map(|text| clean(text)).collect()).collect();
        for row in &rows {
            self.widths.resize(row.len(), 0);
            for (width, text) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(measure_text_width(text));
            }
        }
        rows.iter().try_for_each(|row| print_line(&self.line(row)))
    }

    fn line(&self, row: &[String]) -> String {
        let mut line = String::new();
        for (text, width) in row.iter().zip(&self.widths) {
            line.push_str(text);
            line.push_str(&" ".repeat(width + 2 - measure_text_width(text)));
        }
        line.truncate(line.trim_end().len());
        line
    }
}

/// The canonical JSON of a message, on one line, with more fields of texts at its end.
pub(super) fn json<M: Name>(message: &M, more: &[(&str, &str)]) -> Result<String, BoxError> {
    let mut json = Vec::new();
    to_json(&descriptor::<M>(), &message.encode_to_vec(), &mut json)?;
    let mut json = String::from_utf8(json)?;
    for (name, value) in more {
        json.pop();
        let comma = if json.len() > 1 { "," } else { "" };
        json.push_str(&format!("{comma}\"{name}\":{}}}", serde_json::to_string(value)?));
    }
    Ok(json)
}

/// A time in UTC, with milliseconds.
pub(super) fn time(at: Option<Timestamp>) -> String {
    let time = at.and_then(|at| DateTime::<Utc>::from_timestamp(at.seconds, u32::try_from(at.nanos).ok()?));
    time.map_or_else(String::new, |time| time.to_rfc3339_opts(SecondsFormat::Millis, true))
}

/// A length of time; empty for none.
pub(super) fn seconds(length: Option<Duration>) -> String {
    length.map_or_else(String::new, |length| format!("{} s", length.seconds))
}

/// The name of an enum's value without the prefix that all its values have, in lower case.
pub(super) fn short(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

/// A value of an event's metadata.
pub(super) fn metadata_value(value: &Value) -> String {
    match &value.kind {
        Some(Kind::NumberValue(number)) => number.to_string(),
        Some(Kind::StringValue(text)) => text.clone(),
        Some(Kind::BoolValue(yes)) => yes.to_string(),
        Some(Kind::NullValue(_) | Kind::StructValue(_) | Kind::ListValue(_)) | None => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use milepost_client::pb::LogOutRequest;

    use super::*;

    fn row(texts: &[&str]) -> Row {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn columns_stay_as_wide_as_the_widest_text_so_far_in_columns_of_the_terminal() {
        let mut table = Table::default();
        table.print(vec![row(&["ID", "NAME"]), row(&["日本", "x"])]).expect("stdout");
        assert_eq!(table.line(&row(&["ID", "NAME"])), "ID    NAME");
        assert_eq!(table.line(&row(&["日本", ""])), "日本");
    }

    #[test]
    fn more_fields_stand_behind_those_of_the_message() {
        assert_eq!(
            json(&LogOutRequest {}, &[("a", "\"\n"), ("b", "c")]).expect("JSON"),
            "{\"a\":\"\\\"\\n\",\"b\":\"c\"}"
        );
    }
}
