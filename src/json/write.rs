//! The bytes of a message become JSON.

use std::str;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::{
    DecodeError,
    bytes::Buf,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor};
use serde::Serialize as _;

use super::{LIST_VALUE, RAW, STRUCT, VALUE, WELL_KNOWN};

/// Largest integer up to which every integer is a double.
const SAFE_INTEGER: f64 = 9_007_199_254_740_992.0;

/// Writes a message that this server encoded: the elements of a repeated field lie together,
/// and no other field occurs twice. An error for bytes that are no such message.
pub(crate) fn to_json(
    message: &MessageDescriptor,
    bytes: &[u8],
    json: &mut Vec<u8>,
) -> Result<(), Malformed> {
    match message.full_name() {
        STRUCT => return write_struct(bytes, json),
        VALUE => return write_value(bytes, json),
        LIST_VALUE => return write_list(bytes, json),
        _ if message.package_name() == WELL_KNOWN => return write_decoded(message, bytes, json),
        _ => {}
    }
    let start = json.len();
    json.push(b'{');
    let mut left = bytes;
    // The repeated field whose elements are being written.
    let mut list = None;
    while left.has_remaining() {
        let (number, wire_type) = decode_key(&mut left)?;
        let (number, raw) = if number > RAW { (number - RAW, true) } else { (number, false) };
        let Some(field) = message.get_field(number) else {
            skip_field(wire_type, number, &mut left, DecodeContext::default())?;
            continue;
        };
        if field.is_map() {
            // Its entries may leave out their keys and values.
            json.truncate(start);
            return write_decoded(message, bytes, json);
        }
        if list != Some(number) {
            close(&mut list, json);
            begin(&field, start, json)?;
            if field.is_list() {
                list = Some(number);
                json.push(b'[');
            }
        } else {
            json.push(b',');
        }
        if raw {
            json.extend_from_slice(delimited(&mut left)?);
        } else {
            write_field(&field, wire_type, &mut left, json)?;
        }
    }
    close(&mut list, json);
    json.push(b'}');
    Ok(())
}

fn close(list: &mut Option<u32>, json: &mut Vec<u8>) {
    if list.take().is_some() {
        json.push(b']');
    }
}

/// Writes the name of a field, after what stands before it in its object.
fn begin(field: &FieldDescriptor, start: usize, json: &mut Vec<u8>) -> Result<(), Malformed> {
    if json.len() > start + 1 {
        json.push(b',');
    }
    write_text(field.json_name(), json)?;
    json.push(b':');
    Ok(())
}

/// Writes one value, or packed ones with commas between them.
fn write_field(
    field: &FieldDescriptor,
    wire_type: WireType,
    left: &mut &[u8],
    json: &mut Vec<u8>,
) -> Result<(), Malformed> {
    match field.kind() {
        Kind::Message(message) => to_json(&message, delimited(left)?, json),
        Kind::String => write_text(text(delimited(left)?)?, json),
        Kind::Bytes => write_text(&STANDARD.encode(delimited(left)?), json),
        kind if wire_type == WireType::LengthDelimited => {
            let mut packed = delimited(left)?;
            let mut first = true;
            while packed.has_remaining() {
                if !std::mem::take(&mut first) {
                    json.push(b',');
                }
                write_number(&kind, &mut packed, json)?;
            }
            Ok(())
        }
        kind => write_number(&kind, left, json),
    }
}

/// Writes a number, a truth value or an enum. Integers of 64 bits are texts in JSON.
#[expect(clippy::cast_possible_truncation, reason = "protobuf's integers of 32 bits are sent as 64 bits")]
fn write_number(kind: &Kind, left: &mut &[u8], json: &mut Vec<u8>) -> Result<(), Malformed> {
    let written = match kind {
        Kind::Double => return write_double(f64::from_bits(u64::from_le_bytes(fixed(left)?)), json),
        Kind::Float => return write_float(f32::from_bits(u32::from_le_bytes(fixed(left)?)), json),
        Kind::Fixed32 => u32::from_le_bytes(fixed(left)?).to_string(),
        Kind::Sfixed32 => i32::from_le_bytes(fixed(left)?).to_string(),
        Kind::Fixed64 => format!("\"{}\"", u64::from_le_bytes(fixed(left)?)),
        Kind::Sfixed64 => format!("\"{}\"", i64::from_le_bytes(fixed(left)?)),
        Kind::Int32 => (decode_varint(left)? as i32).to_string(),
        Kind::Uint32 => (decode_varint(left)? as u32).to_string(),
        Kind::Sint32 => zigzag(decode_varint(left)?).to_string(),
        Kind::Int64 => format!("\"{}\"", decode_varint(left)?.cast_signed()),
        Kind::Uint64 => format!("\"{}\"", decode_varint(left)?),
        Kind::Sint64 => format!("\"{}\"", zigzag(decode_varint(left)?)),
        Kind::Bool => (decode_varint(left)? != 0).to_string(),
        Kind::Enum(values) => {
            let number = decode_varint(left)? as i32;
            match values.get_value(number) {
                _ if values.full_name() == "google.protobuf.NullValue" => "null".to_owned(),
                Some(value) => format!("\"{}\"", value.name()),
                None => number.to_string(),
            }
        }
        Kind::String | Kind::Bytes | Kind::Message(_) => return Err(Malformed),
    };
    json.extend_from_slice(written.as_bytes());
    Ok(())
}

fn zigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

/// Writes integers without a fraction, as JavaScript does.
#[expect(clippy::cast_possible_truncation, reason = "the value is an integer of at most 53 bits")]
fn write_double(value: f64, json: &mut Vec<u8>) -> Result<(), Malformed> {
    let integral = value.fract() == 0.0 && value.abs() <= SAFE_INTEGER;
    if integral && (value != 0.0 || value.is_sign_positive()) {
        json.extend_from_slice((value as i64).to_string().as_bytes());
        return Ok(());
    }
    write_finite(value, &value, json)
}

fn write_float(value: f32, json: &mut Vec<u8>) -> Result<(), Malformed> {
    write_finite(f64::from(value), &value, json)
}

fn write_finite(value: f64, shown: &impl serde::Serialize, json: &mut Vec<u8>) -> Result<(), Malformed> {
    if value.is_nan() {
        write_text("NaN", json)
    } else if value.is_infinite() {
        write_text(if value > 0.0 { "Infinity" } else { "-Infinity" }, json)
    } else {
        serde_json::to_writer(json, shown).map_err(|_| Malformed)
    }
}

/// Writes the entries of a `google.protobuf.Struct`.
fn write_struct(mut bytes: &[u8], json: &mut Vec<u8>) -> Result<(), Malformed> {
    json.push(b'{');
    let mut first = true;
    while let Some((_, entry)) = next_delimited(&mut bytes)? {
        if !std::mem::take(&mut first) {
            json.push(b',');
        }
        let (mut name, mut value, mut entry): (_, &[u8], _) = ("", &[], entry);
        while let Some((number, content)) = next_delimited(&mut entry)? {
            match number {
                1 => name = text(content)?,
                _ => value = content,
            }
        }
        write_text(name, json)?;
        json.push(b':');
        write_value(value, json)?;
    }
    json.push(b'}');
    Ok(())
}

fn write_list(mut bytes: &[u8], json: &mut Vec<u8>) -> Result<(), Malformed> {
    json.push(b'[');
    let mut first = true;
    while let Some((_, value)) = next_delimited(&mut bytes)? {
        if !std::mem::take(&mut first) {
            json.push(b',');
        }
        write_value(value, json)?;
    }
    json.push(b']');
    Ok(())
}

/// Writes a `google.protobuf.Value`.
fn write_value(mut bytes: &[u8], json: &mut Vec<u8>) -> Result<(), Malformed> {
    if bytes.is_empty() {
        json.extend_from_slice(b"null");
        return Ok(());
    }
    let (number, _) = decode_key(&mut bytes)?;
    match number {
        1 => json.extend_from_slice(b"null"),
        2 => write_double(f64::from_bits(u64::from_le_bytes(fixed(&mut bytes)?)), json)?,
        3 => write_text(text(delimited(&mut bytes)?)?, json)?,
        4 => json.extend_from_slice((decode_varint(&mut bytes)? != 0).to_string().as_bytes()),
        5 => write_struct(delimited(&mut bytes)?, json)?,
        6 => write_list(delimited(&mut bytes)?, json)?,
        _ => return Err(Malformed),
    }
    Ok(())
}

/// Writes a message by decoding it.
fn write_decoded(message: &MessageDescriptor, bytes: &[u8], json: &mut Vec<u8>) -> Result<(), Malformed> {
    let decoded = DynamicMessage::decode(message.clone(), bytes)?;
    decoded.serialize(&mut serde_json::Serializer::new(json)).map_err(|_| Malformed)
}

fn write_text(text: &str, json: &mut Vec<u8>) -> Result<(), Malformed> {
    // Writing to memory does not fail.
    serde_json::to_writer(json, text).map_err(|_| Malformed)
}

fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    str::from_utf8(bytes).map_err(|_| Malformed)
}

/// The next field of a message whose fields are all length-delimited.
fn next_delimited<'a>(left: &mut &'a [u8]) -> Result<Option<(u32, &'a [u8])>, Malformed> {
    if left.is_empty() {
        return Ok(None);
    }
    match decode_key(left)? {
        (number, WireType::LengthDelimited) => Ok(Some((number, delimited(left)?))),
        _ => Err(Malformed),
    }
}

fn delimited<'a>(left: &mut &'a [u8]) -> Result<&'a [u8], Malformed> {
    let length = usize::try_from(decode_varint(left)?).map_err(|_| Malformed)?;
    let (content, rest) = left.split_at_checked(length).ok_or(Malformed)?;
    *left = rest;
    Ok(content)
}

fn fixed<const N: usize>(left: &mut &[u8]) -> Result<[u8; N], Malformed> {
    let (value, rest) = left.split_first_chunk().ok_or(Malformed)?;
    *left = rest;
    Ok(*value)
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the message is malformed")]
pub(crate) struct Malformed;

impl From<DecodeError> for Malformed {
    fn from(_: DecodeError) -> Self {
        Self
    }
}
