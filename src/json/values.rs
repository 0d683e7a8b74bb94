//! JSON of any shape becomes a `google.protobuf.Struct`, `ListValue` or `Value`.

use std::{borrow::Cow, fmt};

use prost::encoding;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::read::put;

/// The entries of a `google.protobuf.Struct`.
pub(super) struct StructEntries<'a>(pub(super) &'a mut Vec<u8>);

impl<'de> Visitor<'de> for StructEntries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut entry, mut value) = (Vec::new(), Vec::new());
        while let Some(name) = map.next_key::<Cow<'_, str>>()? {
            entry.clear();
            value.clear();
            map.next_value_seed(Nested(&mut value))?;
            put(1, name.as_bytes(), &mut entry);
            put(2, &value, &mut entry);
            put(1, &entry, self.0);
        }
        Ok(())
    }
}

/// The elements of a `google.protobuf.ListValue`.
pub(super) struct ListValues<'a>(pub(super) &'a mut Vec<u8>);

impl<'de> Visitor<'de> for ListValues<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        let mut value = Vec::new();
        while values.next_element_seed(Nested(&mut value))?.is_some() {
            put(1, &value, self.0);
            value.clear();
        }
        Ok(())
    }
}

/// A `google.protobuf.Value` within another.
struct Nested<'a>(pub(super) &'a mut Vec<u8>);

impl<'de> DeserializeSeed<'de> for Nested<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(AnyValue(self.0))
    }
}

/// The content of a `google.protobuf.Value`.
pub(super) struct AnyValue<'a>(pub(super) &'a mut Vec<u8>);

impl<'de> Visitor<'de> for AnyValue<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        encoding::int32::encode(1, &0, self.0);
        Ok(())
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        encoding::bool::encode(4, &value, self.0);
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        encoding::double::encode(2, &(value as f64), self.0);
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        encoding::double::encode(2, &(value as f64), self.0);
        Ok(())
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        encoding::double::encode(2, &value, self.0);
        Ok(())
    }

    fn visit_str<E>(self, value: &str) -> Result<(), E> {
        put(3, value.as_bytes(), self.0);
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        let mut content = Vec::new();
        StructEntries(&mut content).visit_map(map)?;
        put(5, &content, self.0);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, values: A) -> Result<(), A::Error> {
        let mut content = Vec::new();
        ListValues(&mut content).visit_seq(values)?;
        put(6, &content, self.0);
        Ok(())
    }
}
