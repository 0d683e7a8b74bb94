//! Arbitrary messages of any type, generated from its descriptor. Most values are
//! valid, so that calls get far; some are as invalid as the encoding allows.

use std::collections::{BTreeMap, HashMap};

use prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value};

/// Depth at which messages stop nesting; decoders refuse more than 100 levels.
const DEPTH: usize = 12;
/// Lengths of lists at and past the limits.
const LENGTHS: [usize; 10] = [0, 1, 5, 6, 64, 65, 200, 201, 500, 501];
const INTEGERS: [i64; 10] = [0, 1, -1, 2, 500, 501, 1_000_000, 1_000_001, i64::MAX, i64::MIN];
const NUMBERS: [f64; 8] =
    [0.0, -0.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN_POSITIVE, 1e300];
/// The bounds of a Timestamp and of a Duration and the seconds beyond them; the
/// bounds of Postgres and its clients and the seconds beyond them.
const SECONDS: [i64; 14] = [
    0,
    -1,
    315_576_000_000,
    315_576_000_001,
    -62_135_596_800,
    -62_135_596_801,
    253_402_300_799,
    253_402_300_800,
    -210_866_803_201,
    9_224_318_016_000,
    8_210_266_876_799,
    i64::MAX / 1_000_000,
    i64::MAX,
    i64::MIN,
];
const NANOS: [i32; 7] = [0, 1, 999_999_999, 1_000_000_000, -1, i32::MAX, i32::MIN];

/// Pseudo-random numbers, the same for the same seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    /// True in `chance` of 100 cases.
    pub fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    pub fn uuid(&mut self) -> String {
        uuid::Uuid::from_u64_pair(self.next(), self.next()).to_string()
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// Valid values of fields, by the name of the field.
pub type Known = BTreeMap<&'static str, Vec<String>>;

/// Generates messages.
#[derive(Debug)]
pub struct Generator<'a> {
    pub random: &'a mut Random,
    pub known: &'a Known,
    /// How many of 100 values are invalid.
    pub invalid_percent: usize,
}

impl Generator<'_> {
    /// A message within the size limit, so that the server decodes it.
    pub fn message(&mut self, kind: &MessageDescriptor) -> DynamicMessage {
        loop {
            let message = self.nested(kind, 0);
            if message.encoded_len() <= milepost::limits::MESSAGE_BYTES {
                return message;
            }
        }
    }

    fn is_invalid(&mut self) -> bool {
        self.random.percent(self.invalid_percent)
    }

    fn nested(&mut self, kind: &MessageDescriptor, depth: usize) -> DynamicMessage {
        let mut message = DynamicMessage::new(kind.clone());
        match kind.full_name() {
            "google.protobuf.Timestamp" | "google.protobuf.Duration" => {
                self.set_time(&mut message, kind.name() == "Timestamp");
                return message;
            }
            "google.protobuf.Value" if !self.is_invalid() => {
                let field = *self.random.pick(&["number_value", "string_value", "bool_value"]);
                let field = kind.get_field_by_name(field).unwrap();
                let value = self.single(&field, depth);
                message.set_field(&field, value);
                return message;
            }
            _ => {}
        }
        for oneof in kind.oneofs().filter(|oneof| !oneof.is_synthetic()) {
            let fields: Vec<_> = oneof.fields().collect();
            let field = self.random.pick(&fields).clone();
            let too_deep = depth > DEPTH && matches!(field.kind(), Kind::Message(_));
            if !self.is_invalid() && !too_deep {
                let value = self.single(&field, depth);
                message.set_field(&field, value);
            }
        }
        for field in kind.fields() {
            if field.containing_oneof().is_some_and(|oneof| !oneof.is_synthetic()) {
                continue;
            }
            let present = if field.supports_presence() { 70 } else { 95 };
            if depth > DEPTH || !self.random.percent(present) {
                continue;
            }
            let value = if field.is_map() {
                self.map(&field, depth)
            } else if field.is_list() {
                let length = self.length(field.name(), depth);
                Value::List((0..length).map(|_| self.single(&field, depth)).collect())
            } else {
                self.single(&field, depth)
            };
            message.set_field(&field, value);
        }
        message
    }

    fn length(&mut self, field: &str, depth: usize) -> usize {
        // Long lists within long lists would make the message too large.
        if !self.is_invalid() || depth > 2 {
            let least = usize::from(field == "events");
            return least + self.random.below(3);
        }
        *self.random.pick(&LENGTHS)
    }

    fn map(&mut self, field: &FieldDescriptor, depth: usize) -> Value {
        let Kind::Message(entry) = field.kind() else { unreachable!("the kind of a map field is a message") };
        let value = entry.map_entry_value_field();
        let length = self.length(field.name(), depth);
        let entries = (0..length).map(|_| {
            let key = MapKey::String(self.text("key"));
            (key, self.single(&value, depth))
        });
        Value::Map(entries.collect::<HashMap<_, _>>())
    }

    fn single(&mut self, field: &FieldDescriptor, depth: usize) -> Value {
        let invalid = self.is_invalid();
        match field.kind() {
            Kind::String => Value::String(self.text(field.name())),
            Kind::Bool => Value::Bool(self.random.percent(50)),
            Kind::Double if invalid => Value::F64(*self.random.pick(&NUMBERS)),
            Kind::Double => Value::F64(self.random.below(1_000) as f64 / 8.0),
            Kind::Int64 if invalid => Value::I64(*self.random.pick(&INTEGERS)),
            Kind::Int64 => Value::I64(self.random.below(7).try_into().unwrap()),
            Kind::Int32 if invalid => {
                let value = *self.random.pick(&INTEGERS);
                Value::I32(i32::try_from(value).unwrap_or(if value < 0 { i32::MIN } else { i32::MAX }))
            }
            Kind::Int32 => Value::I32(self.random.below(7).try_into().unwrap()),
            Kind::Enum(_) if invalid => {
                Value::EnumNumber(*self.random.pick(&[-1, 0, 9, 99, i32::MIN, i32::MAX]))
            }
            Kind::Enum(kind) => {
                let values: Vec<i32> = kind.values().map(|value| value.number()).collect();
                // Not the first value, which is UNSPECIFIED.
                let value =
                    values[self.random.below(values.len().max(2) - 1) + usize::from(values.len() > 1)];
                Value::EnumNumber(value)
            }
            Kind::Message(kind) => Value::Message(self.nested(&kind, depth + 1)),
            other => panic!("no value is defined for fields of kind {other:?}"),
        }
    }

    fn set_time(&mut self, message: &mut DynamicMessage, is_time: bool) {
        let (seconds, nanos) = if self.is_invalid() {
            (*self.random.pick(&SECONDS), *self.random.pick(&NANOS))
        } else {
            let base = if is_time { chrono::Utc::now().timestamp() - 3_600 } else { 0 };
            (base + i64::try_from(self.random.below(7_200)).unwrap(), *self.random.pick(&[0, 1, 999_999_999]))
        };
        message.set_field_by_name("seconds", Value::I64(seconds));
        message.set_field_by_name("nanos", Value::I32(nanos));
    }

    fn text(&mut self, field: &str) -> String {
        let words = || vec!["load".to_owned(), "a word".to_owned(), "über".to_owned(), "x".to_owned()];
        let known = self.known.get(field).cloned().unwrap_or_else(words);
        let valid = self.random.pick(&known).clone();
        if !self.is_invalid() {
            return valid;
        }
        match self.random.below(12) {
            0 => String::new(),
            1 => "x".repeat(256),
            2 => "x".repeat(257),
            3 => "\u{1F9E0}".repeat(256),
            4 => "\u{1F9E0}".repeat(257),
            5 => format!("{valid}\0"),
            6 => "\0".repeat(300),
            7 => format!(" {valid}\u{2003}"),
            8 => "x".repeat(40_000),
            9 => self.random.uuid(),
            10 => "\u{202E}\u{FEFF}'; DROP TABLE events; -- %s \\ \u{10FFFF}\r\n".to_owned(),
            _ => self.mangled(&valid),
        }
    }

    /// The text with one change.
    pub fn mangled(&mut self, text: &str) -> String {
        let mut chars: Vec<char> = text.chars().collect();
        let at = self.random.below(chars.len() + 1);
        match self.random.below(4) {
            0 => chars.truncate(at),
            1 => chars.insert(at, 'A'),
            2 if at < chars.len() => chars[at] = *self.random.pick(&['A', 'z', '_', '0', 'é']),
            _ => chars = text.to_uppercase().chars().collect(),
        }
        chars.into_iter().collect()
    }

    /// A token with the version and binding of this one (9 bytes), and with another
    /// position.
    pub fn forged(&mut self, token: &str) -> String {
        use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
        let Ok(mut bytes) = URL_SAFE_NO_PAD.decode(token) else { return self.mangled(token) };
        let bound = bytes.len().min(9);
        match self.random.below(4) {
            0 => bytes.truncate(bound + self.random.below(8)),
            1 => bytes.extend([0; 8]),
            2 => {
                let position = *self.random.pick(&INTEGERS);
                bytes.splice(bound..(bound + 8).min(bytes.len()), position.to_be_bytes());
            }
            _ => {
                let count = bytes.len() - bound;
                bytes.truncate(bound);
                bytes.extend(self.random.bytes(count));
            }
        }
        URL_SAFE_NO_PAD.encode(bytes)
    }
}
