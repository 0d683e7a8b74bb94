//! Values of flags and of input files that become messages of the API.

use std::{
    collections::BTreeMap,
    fmt::Display,
    fs::File,
    io::{self, Read},
    path::Path,
};

use chrono::DateTime;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use prost::Name;
use prost_reflect::DynamicMessage;
use prost_types::{Timestamp, Value};

use super::{exit::WrongInput, output::short};
use crate::{
    error::BoxError,
    json::{DESCRIPTORS, descriptor},
    proto_enums::timestamp,
};

/// Largest integer up to which a double holds every integer.
const SAFE_INTEGER: u64 = 1 << 53;

/// Parses the values of an enum of the API by their names, without the prefix that all of
/// them have, in lower case.
pub(super) fn enum_value(name: &str) -> impl TypedValueParser<Value = i32> {
    let descriptor = DESCRIPTORS.get_enum_by_name(&format!("milepost.v1.{name}"));
    let descriptor = descriptor.unwrap_or_else(|| unreachable!("the API has {name}"));
    let unspecified = descriptor.default_value();
    let prefix = unspecified.name().trim_end_matches("UNSPECIFIED");
    let named = descriptor.values().filter(|value| value.number() != unspecified.number());
    let numbers: BTreeMap<String, i32> =
        named.map(|value| (short(value.name(), prefix), value.number())).collect();
    PossibleValuesParser::new(numbers.keys().cloned()).map(move |name| numbers[&name])
}

/// Parses a time.
pub(super) fn time(text: &str) -> Result<Timestamp, String> {
    match DateTime::parse_from_rfc3339(text) {
        Ok(time) => Ok(timestamp(time.to_utc())),
        Err(_) => Err("write a time as in 2026-11-26T10:00:00Z".to_owned()),
    }
}

/// Parses `KEY=VALUE`.
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Parses `NAME=VALUE`. VALUE is a number, true, false or a quoted text if it is so in JSON.
/// Otherwise it is a text as it stands.
pub(super) fn metadata(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    let value = match serde_json::from_str(value) {
        Ok(serde_json::Value::Bool(yes)) => Value::from(yes),
        Ok(serde_json::Value::String(text)) => Value::from(text),
        Ok(serde_json::Value::Number(number)) => {
            let integer = number.as_u64().or_else(|| number.as_i64().map(i64::unsigned_abs));
            match number.as_f64() {
                Some(double) if integer.is_none_or(|integer| integer <= SAFE_INTEGER) => Value::from(double),
                _ => return Err(format!("a number would lose digits: write {name}='\"{value}\"', a text")),
            }
        }
        Ok(_) | Err(_) => Value::from(value),
    };
    Ok((name.to_owned(), value))
}

/// Opens an input file, or standard input for `-`.
pub(super) fn open(file: &Path) -> Result<Box<dyn Read>, BoxError> {
    if file.as_os_str() == "-" {
        return Ok(Box::new(io::stdin()));
    }
    match File::open(file) {
        Ok(file) => Ok(Box::new(file)),
        Err(error) => Err(WrongInput(format!("cannot read {}: {error}", file.display())).into()),
    }
}

/// A message from its canonical JSON. Unlike the server, it refuses unknown fields, which are
/// mistyped ones.
pub(super) fn from_json<M: Name + Default>(json: &str) -> Result<M, String> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let parsed = DynamicMessage::deserialize(descriptor::<M>(), &mut deserializer);
    let parsed = parsed.and_then(|message| deserializer.end().map(|()| message));
    message(parsed)
}

/// As [`from_json`], from YAML.
pub(super) fn from_yaml<M: Name + Default>(yaml: &str) -> Result<M, String> {
    // An error is one line, without an excerpt of the file.
    let options = serde_saphyr::options! { with_snippet: false };
    message(serde_saphyr::with_deserializer_from_str_with_options(yaml, options, |yaml| {
        DynamicMessage::deserialize(descriptor::<M>(), yaml)
    }))
}

fn message<M: Name + Default>(parsed: Result<DynamicMessage, impl Display>) -> Result<M, String> {
    let parsed = parsed.map_err(|error| error.to_string())?;
    parsed.transcode_to().map_err(|error| error.to_string())
}
