//! JSON becomes the bytes of a message.
//!
//! Unknown fields are passed over, as in bytes. A field that is given twice and two fields of
//! one `oneof` are errors.

use std::{borrow::Cow, fmt};

use base64::{
    Engine as _,
    alphabet::{STANDARD, URL_SAFE},
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use prost::{
    Message as _,
    encoding::{self, WireType, encode_key, encode_varint},
};
use prost_reflect::{
    DeserializeOptions, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor,
};
use serde::de::{
    DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor,
};

use super::{
    LIST_VALUE, STRUCT, VALUE, WELL_KNOWN,
    values::{AnyValue, ListValues, StructEntries},
};

const UNPADDED: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
/// Both alphabets are allowed, with and without padding.
const BASE64: [GeneralPurpose; 2] =
    [GeneralPurpose::new(&STANDARD, UNPADDED), GeneralPurpose::new(&URL_SAFE, UNPADDED)];

/// The bytes of a message. The error says where the JSON is at fault.
pub(crate) fn from_json(message: &MessageDescriptor, json: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = Vec::with_capacity(json.len());
    let mut json = serde_json::Deserializer::from_slice(json);
    Object { message, to: &mut bytes }.deserialize(&mut json)?;
    json.end()?;
    Ok(bytes)
}

/// A message.
struct Object<'a> {
    message: &'a MessageDescriptor,
    to: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        match self.message.full_name() {
            STRUCT => json.deserialize_map(StructEntries(self.to)),
            VALUE => json.deserialize_any(AnyValue(self.to)),
            LIST_VALUE => json.deserialize_seq(ListValues(self.to)),
            _ if self.message.package_name() == WELL_KNOWN => {
                let options = DeserializeOptions::new().deny_unknown_fields(false);
                let decoded = DynamicMessage::deserialize_with_options(self.message.clone(), json, &options)?;
                decoded.encode(self.to).map_err(Error::custom)
            }
            _ => json.deserialize_map(self),
        }
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object for {}", self.message.full_name())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen: Vec<FieldDescriptor> = Vec::new();
        while let Some(name) = map.next_key::<Cow<'_, str>>()? {
            let field = self.message.get_field_by_json_name(&name);
            let Some(field) = field.or_else(|| self.message.get_field_by_name(&name)) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if seen.contains(&field) {
                return Err(Error::custom(format_args!("{} is there twice", field.json_name())));
            }
            if !map.next_value_seed(Field { field: &field, to: self.to })? {
                continue;
            }
            if let Some(oneof) = field.containing_oneof()
                && let Some(other) = seen.iter().find(|seen| seen.containing_oneof().as_ref() == Some(&oneof))
            {
                let (one, other) = (other.json_name(), field.json_name());
                return Err(Error::custom(format_args!("only one of {one} and {other} may be there")));
            }
            seen.push(field);
        }
        Ok(())
    }
}

/// The value of a field: whether there is one, since null is none.
struct Field<'a> {
    field: &'a FieldDescriptor,
    to: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<bool, D::Error> {
        let null_is_a_value = match self.field.kind() {
            Kind::Message(message) => message.full_name() == VALUE,
            Kind::Enum(values) => values.full_name() == "google.protobuf.NullValue",
            _ => false,
        };
        if null_is_a_value && !self.field.is_list() && !self.field.is_map() {
            return self.visit_some(json);
        }
        json.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a value for {}", self.field.full_name())
    }

    fn visit_none<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_some<D: Deserializer<'de>>(self, json: D) -> Result<bool, D::Error> {
        let Self { field, to } = self;
        let (kind, number) = (field.kind(), field.number());
        match kind {
            Kind::Message(entry) if field.is_map() => json.deserialize_map(Entries { entry, number, to })?,
            kind if field.is_list() => json.deserialize_seq(Items { kind, number, to })?,
            kind => Item { kind: &kind, number, to }.deserialize(json)?,
        }
        Ok(true)
    }
}

/// The elements of a repeated field.
struct Items<'a> {
    kind: Kind,
    number: u32,
    to: &'a mut Vec<u8>,
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Self { kind, number, to } = self;
        while items.next_element_seed(Item { kind: &kind, number, to: &mut *to })?.is_some() {}
        Ok(())
    }
}

/// The entries of a map.
struct Entries<'a> {
    entry: MessageDescriptor,
    number: u32,
    to: &'a mut Vec<u8>,
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (key, value) = (self.entry.map_entry_key_field(), self.entry.map_entry_value_field());
        let mut content = Vec::new();
        while let Some(name) = map.next_key::<Cow<'_, str>>()? {
            content.clear();
            let key = Item { kind: &key.kind(), number: key.number(), to: &mut content };
            match (key.kind, &*name) {
                (Kind::Bool, "true") => key.visit_bool(true)?,
                (Kind::Bool, "false") => key.visit_bool(false)?,
                (Kind::Bool, other) => {
                    return Err(Error::invalid_value(Unexpected::Str(other), &"true or false"));
                }
                (_, name) => key.visit_str(name)?,
            }
            map.next_value_seed(Item { kind: &value.kind(), number: value.number(), to: &mut content })?;
            put(self.number, &content, self.to);
        }
        Ok(())
    }
}

/// One value, with its key before it.
struct Item<'a> {
    kind: &'a Kind,
    number: u32,
    to: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for Item<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        let Kind::Message(message) = self.kind else { return json.deserialize_any(self) };
        let mut content = Vec::new();
        Object { message, to: &mut content }.deserialize(json)?;
        put(self.number, &content, self.to);
        Ok(())
    }
}

impl<'de> Visitor<'de> for Item<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Enum(values) => write!(f, "a value of {}", values.full_name()),
            Kind::Bytes => f.write_str("bytes in base64"),
            kind => write!(f, "a value of the type {kind:?}"),
        }
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        match self.kind {
            Kind::Bool => {
                encoding::bool::encode(self.number, &value, self.to);
                Ok(())
            }
            _ => Err(E::invalid_type(Unexpected::Bool(value), &self)),
        }
    }

    /// JSON's null is no value of a scalar, except of this enum.
    fn visit_unit<E: Error>(self) -> Result<(), E> {
        match self.kind {
            Kind::Enum(values) if values.full_name() == "google.protobuf.NullValue" => {
                encoding::int32::encode(self.number, &0, self.to);
                Ok(())
            }
            _ => Err(E::invalid_type(Unexpected::Unit, &self)),
        }
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.integer(value.into(), Unexpected::Signed(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.integer(value.into(), Unexpected::Unsigned(value))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.float(value, Unexpected::Float(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        let Self { kind, number, to } = self;
        let invalid = Unexpected::Str(value);
        match kind {
            Kind::String => {
                put(number, value.as_bytes(), to);
                Ok(())
            }
            Kind::Bytes => {
                let bytes = BASE64.iter().find_map(|base64| base64.decode(value).ok());
                let bytes = bytes.ok_or_else(|| E::invalid_value(invalid, &"bytes in base64"))?;
                put(number, &bytes, to);
                Ok(())
            }
            Kind::Enum(values) => {
                let value = values.get_value_by_name(value);
                let value = value.ok_or_else(|| E::custom(unknown_name(values, invalid)))?;
                encoding::int32::encode(number, &value.number(), to);
                Ok(())
            }
            Kind::Double | Kind::Float => {
                let float = match value {
                    "NaN" => Some(f64::NAN),
                    "Infinity" => Some(f64::INFINITY),
                    "-Infinity" => Some(f64::NEG_INFINITY),
                    // Rust also reads other names of what is not finite.
                    value => value.parse().ok().filter(|float: &f64| float.is_finite()),
                };
                let float = float.ok_or_else(|| E::invalid_value(invalid, &"a number"))?;
                Self { kind, number, to }.float(float, invalid)
            }
            Kind::Bool | Kind::Message(_) => Err(E::invalid_type(invalid, &Self { kind, number, to })),
            _ => match value.parse::<i128>() {
                Ok(integer) => Self { kind, number, to }.integer(integer, invalid),
                Err(_) => {
                    let float = value.parse().map_err(|_| E::invalid_value(invalid, &"a number"))?;
                    Self { kind, number, to }.float(float, invalid)
                }
            },
        }
    }
}

impl Item<'_> {
    fn integer<E: Error>(self, value: i128, given: Unexpected<'_>) -> Result<(), E> {
        let Self { kind, number, to } = self;
        let out_of_range = |_| E::invalid_value(given, &"a number in the range of its type");
        match kind {
            Kind::Int32 | Kind::Enum(_) => {
                encoding::int32::encode(number, &value.try_into().map_err(out_of_range)?, to);
            }
            Kind::Sint32 => encoding::sint32::encode(number, &value.try_into().map_err(out_of_range)?, to),
            Kind::Sfixed32 => {
                encoding::sfixed32::encode(number, &value.try_into().map_err(out_of_range)?, to);
            }
            Kind::Uint32 => encoding::uint32::encode(number, &value.try_into().map_err(out_of_range)?, to),
            Kind::Fixed32 => encoding::fixed32::encode(number, &value.try_into().map_err(out_of_range)?, to),
            Kind::Int64 => encoding::int64::encode(number, &value.try_into().map_err(out_of_range)?, to),
            Kind::Sint64 => encoding::sint64::encode(number, &value.try_into().map_err(out_of_range)?, to),
            Kind::Sfixed64 => {
                encoding::sfixed64::encode(number, &value.try_into().map_err(out_of_range)?, to);
            }
            Kind::Uint64 => encoding::uint64::encode(number, &value.try_into().map_err(out_of_range)?, to),
            Kind::Fixed64 => encoding::fixed64::encode(number, &value.try_into().map_err(out_of_range)?, to),
            // A double is the nearest one to what was given.
            Kind::Double | Kind::Float => return Self { kind, number, to }.float(value as f64, given),
            Kind::Bool | Kind::String | Kind::Bytes | Kind::Message(_) => {
                return Err(E::invalid_type(given, &Self { kind, number, to }));
            }
        }
        Ok(())
    }

    #[expect(clippy::cast_possible_truncation, reason = "the ranges are checked before")]
    fn float<E: Error>(self, value: f64, given: Unexpected<'_>) -> Result<(), E> {
        match self.kind {
            Kind::Double => encoding::double::encode(self.number, &value, self.to),
            Kind::Float if value.is_finite() && value.abs() > f64::from(f32::MAX) => {
                return Err(E::invalid_value(given, &"a number in the range of its type"));
            }
            Kind::Float => encoding::float::encode(self.number, &(value as f32), self.to),
            // Such as 1e3 or 1.0.
            _ if value.fract() == 0.0 && value.abs() < 2f64.powi(100) => {
                return self.integer(value as i128, given);
            }
            _ => return Err(E::invalid_type(given, &self)),
        }
        Ok(())
    }
}

fn unknown_name(values: &EnumDescriptor, given: Unexpected<'_>) -> String {
    format!("{given} is no name of {}", values.full_name())
}

pub(super) fn put(number: u32, content: &[u8], to: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, to);
    encode_varint(content.len() as u64, to);
    to.extend_from_slice(content);
}
