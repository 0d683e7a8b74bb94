//! Random messages of every type, compared with prost-reflect.

use std::iter::repeat_with;

use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, Kind, MapKey, MessageDescriptor, ReflectMessage as _,
    Value,
    prost_types::{
        DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
        field_descriptor_proto::Label,
    },
};

use super::{DESCRIPTORS, RAW, from_json, read::put, to_json};

/// A message with a field and a repeated field of each type of protobuf.
fn scalars() -> MessageDescriptor {
    // Without groups (10); messages (11) and enums (14) need names.
    let types = (1..=18).filter(|kind| ![10, 11, 14].contains(kind));
    let field = |number: i32, kind: i32, label: Label| FieldDescriptorProto {
        name: Some(format!("field_{number}")),
        number: Some(number),
        label: Some(label.into()),
        r#type: Some(kind),
        ..Default::default()
    };
    let fields =
        types.flat_map(|kind| [field(kind, kind, Label::Optional), field(kind + 100, kind, Label::Repeated)]);
    let message =
        DescriptorProto { name: Some("Scalars".to_owned()), field: fields.collect(), ..Default::default() };
    let file = FileDescriptorProto {
        name: Some("scalars.proto".to_owned()),
        message_type: vec![message],
        syntax: Some("proto3".to_owned()),
        ..Default::default()
    };
    let pool = DescriptorPool::from_file_descriptor_set(FileDescriptorSet { file: vec![file] });
    pool.expect("a valid file").get_message_by_name("Scalars").expect("the message")
}

fn text(random: &mut fastrand::Rng) -> String {
    let length = random.usize(..6);
    repeat_with(|| random.char(..)).take(length).collect()
}

fn message(descriptor: &MessageDescriptor, random: &mut fastrand::Rng, depth: usize) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    match descriptor.full_name() {
        "google.protobuf.Timestamp" | "google.protobuf.Duration" => {
            message.set_field_by_name("seconds", Value::I64(random.i64(0..200_000_000_000)));
            message.set_field_by_name("nanos", Value::I32(random.i32(0..1_000_000_000)));
            return message;
        }
        "google.protobuf.FieldMask" => {
            let paths = ["first_name", "last_name"].map(|path| Value::String(path.to_owned()));
            message.set_field_by_name("paths", Value::List(paths.to_vec()));
            return message;
        }
        _ => {}
    }
    let mut fields: Vec<_> = descriptor.fields().collect();
    random.shuffle(&mut fields);
    for field in fields {
        let oneof = field.containing_oneof();
        let taken = oneof.is_some_and(|oneof| oneof.fields().any(|field| message.has_field(&field)));
        let is_value = descriptor.full_name() == "google.protobuf.Value";
        // A value is always one of its kinds.
        if taken || (!is_value && random.u8(..4) == 0) {
            continue;
        }
        let value = if field.is_map() {
            let Kind::Message(entry) = field.kind() else { unreachable!("a map") };
            let pairs = (0..random.usize(..3)).map(|_| {
                let value = value(&entry.map_entry_value_field().kind(), random, depth);
                value.map(|value| (MapKey::String(text(random)), value))
            });
            pairs.collect::<Option<_>>().map(Value::Map)
        } else if field.is_list() {
            let items = (0..random.usize(..4)).map(|_| value(&field.kind(), random, depth));
            items.collect::<Option<_>>().map(Value::List)
        } else {
            value(&field.kind(), random, depth)
        };
        if let Some(value) = value {
            message.set_field(&field, value);
        }
    }
    message
}

/// None where a message would be nested too deeply.
fn value(kind: &Kind, random: &mut fastrand::Rng, depth: usize) -> Option<Value> {
    let double = |random: &mut fastrand::Rng| match random.u8(..6) {
        0 => -0.0,
        1 => f64::from(random.i32(..)),
        2 => f64::MAX,
        3 => f64::MIN_POSITIVE,
        4 => random.f64() * 1e18,
        _ => random.f64(),
    };
    Some(match kind {
        Kind::Double => Value::F64(double(random)),
        Kind::Float => Value::F32(random.f32()),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(random.i32(..)),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(random.i64(..)),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(random.u32(..)),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(random.u64(..)),
        Kind::Bool => Value::Bool(random.bool()),
        Kind::String => Value::String(text(random)),
        Kind::Bytes => Value::Bytes(text(random).into_bytes().into()),
        Kind::Message(_) if depth > 5 => return None,
        // Its content is a message of any type.
        Kind::Message(inner) if inner.full_name() == "google.protobuf.Any" => return None,
        Kind::Message(inner) => Value::Message(message(inner, random, depth + 1)),
        Kind::Enum(values) => {
            let numbers: Vec<_> = values.values().map(|value| value.number()).collect();
            Value::EnumNumber(*random.choice(&numbers).expect("an enum has values"))
        }
    })
}

/// The message without fields that are there and have their defaults.
fn normal(message: &DynamicMessage) -> DynamicMessage {
    DynamicMessage::decode(message.descriptor(), message.encode_to_vec().as_slice()).expect("a message")
}

fn parsed(descriptor: &MessageDescriptor, json: &[u8]) -> DynamicMessage {
    let mut json = serde_json::Deserializer::from_slice(json);
    let options = DeserializeOptions::new();
    DynamicMessage::deserialize_with_options(descriptor.clone(), &mut json, &options).expect("valid JSON")
}

#[test]
fn random_messages_of_every_type_become_json_and_back_as_prost_reflect_has_it() {
    let mut random = fastrand::Rng::with_seed(11);
    let api = DESCRIPTORS.all_messages().filter(|message| {
        let package = message.package_name();
        !message.is_map_entry() && (package.starts_with("milepost") || package == "google.rpc")
    });
    let struct_types = ["Struct", "Value", "ListValue"]
        .map(|name| DESCRIPTORS.get_message_by_name(&format!("google.protobuf.{name}")).expect("known"));
    for descriptor in api.chain(struct_types).chain([scalars()]) {
        for _ in 0..200 {
            let message = normal(&message(&descriptor, &mut random, 0));
            let bytes = message.encode_to_vec();
            let mut json = Vec::new();
            to_json(&descriptor, &bytes, &mut json).expect("a message");
            let shown = String::from_utf8_lossy(&json);
            assert_eq!(normal(&parsed(&descriptor, &json)), message, "{shown}");

            for json in [json.clone(), serde_json::to_vec(&message).expect("JSON")] {
                let read = from_json(&descriptor, &json).expect("valid JSON");
                let read = DynamicMessage::decode(descriptor.clone(), read.as_slice()).expect("a message");
                assert_eq!(normal(&read), message, "{shown}");
            }
        }
    }
}

#[test]
fn json_that_is_no_message_is_refused_and_says_why() {
    let append = DESCRIPTORS.get_message_by_name("milepost.v1.AppendEventsRequest").expect("known");
    for (json, why) in [
        ("", "EOF"),
        ("[]", "an object for milepost.v1.AppendEventsRequest"),
        ("{} {}", "trailing"),
        (r#"{"jobId": 1}"#, "integer `1`"),
        (r#"{"jobId": "a", "providerJobId": "b"}"#, "only one of jobId and providerJobId"),
        (r#"{"jobId": "a", "job_id": "b"}"#, "jobId is there twice"),
        (r#"{"expectedSequence": "x"}"#, "a number"),
        (r#"{"expectedSequence": 1.5}"#, "floating point `1.5`"),
        (r#"{"expectedSequence": "9223372036854775808"}"#, "in the range"),
        (r#"{"events": {}}"#, "an array"),
        (r#"{"events": [null]}"#, "null"),
        (r#"{"events": [{"kind": "EVENT_KIND_NONE"}]}"#, "is no name of milepost.v1.EventKind"),
        (r#"{"events": [{"occurredAt": "yesterday"}]}"#, "line 1"),
        (r#"{"events": [{"metadata": [1]}]}"#, "an object"),
        ("{\"jobId\": \"\u{0}\"}", "control character"),
    ] {
        let error = from_json(&append, json.as_bytes()).expect_err(json).to_string();
        assert!(error.contains(why), "{json}: {error}");
    }
    let deep = format!(r#"{{"events": [{{"metadata": {{"a": {}1{}}}}}]}}"#, "[".repeat(500), "]".repeat(500));
    assert!(from_json(&append, deep.as_bytes()).expect_err("too deep").to_string().contains("recursion"));
}

#[test]
fn what_json_may_leave_out_or_write_in_other_ways_is_read() {
    let append = DESCRIPTORS.get_message_by_name("milepost.v1.AppendEventsRequest").expect("known");
    let expected =
        from_json(&append, br#"{"expectedSequence": "1000", "events": [{"kind": 1}]}"#).expect("valid");
    for json in [
        r#"{"expectedSequence": 1e3, "events": [{"kind": "EVENT_KIND_STEP"}]}"#,
        r#"{"expected_sequence": 1000.0, "jobId": null, "events": [{"kind": 1.0, "name": null}]}"#,
        r#"{"unknown": {"a": [1]}, "expectedSequence": "1e3", "events": [{"kind": 1, "new": true}]}"#,
    ] {
        assert_eq!(from_json(&append, json.as_bytes()).expect(json), expected, "{json}");
    }
}

#[test]
fn elements_that_are_json_already_are_written_as_they_are() {
    let watched = DESCRIPTORS.get_message_by_name("milepost.v1.WatchedEvents").expect("known");
    let (mut bytes, mut json) = (Vec::new(), Vec::new());
    put(RAW + 1, br#"{"a":1}"#, &mut bytes);
    put(RAW + 1, b"2", &mut bytes);
    to_json(&watched, &bytes, &mut json).expect("a message");
    assert_eq!(json, br#"{"events":[{"a":1},2]}"#);
}

#[test]
fn numbers_of_metadata_are_written_as_javascript_writes_them() {
    let event = DESCRIPTORS.get_message_by_name("milepost.v1.NewEvent").expect("known");
    for (read, written) in [
        ("5.0", "5"),
        ("-5.0", "-5"),
        ("0.0", "0"),
        ("-0.0", "-0.0"),
        ("1.5", "1.5"),
        ("1e2", "100"),
        ("1e300", "1e+300"),
    ] {
        let given = format!(r#"{{"metadata":{{"a":{read}}}}}"#);
        let mut json = Vec::new();
        let message = from_json(&event, given.as_bytes()).expect("valid");
        to_json(&event, &message, &mut json).expect("a message");
        assert_eq!(String::from_utf8(json).expect("text"), format!(r#"{{"metadata":{{"a":{written}}}}}"#));
    }
}
