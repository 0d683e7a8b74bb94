//! Messages as JSON, by the canonical mapping of proto3
//! (<https://protobuf.dev/programming-guides/json/>) and by descriptors, so that no message
//! needs code of its own.
//!
//! The bytes of a message are written as JSON, and JSON as the bytes of a message, without a
//! message in memory in between: the JSON of a request would take up to a hundred times its
//! size there. Only the well-known types other than `Struct` are decoded, by prost-reflect.
//!
//! **JSON that is made once.** A message may carry elements of a repeated field that are JSON
//! already: as a length-delimited field whose number is [`RAW`] more than that of the
//! repeated field. The numbers from 19,000 on belong to the implementation of protobuf, and
//! no message can declare them. Such a message is only ever read by [`to_json`].

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "most rules concern one or two of the seventeen kinds of fields"
)]

mod read;
mod values;
mod write;

#[cfg(test)]
mod tests;

use std::sync::LazyLock;

use prost::{
    Message as _, Name,
    encoding::{decode_key, decode_varint},
};
use prost_reflect::{DescriptorPool, MessageDescriptor};
use prost_types::FileDescriptorSet;

use self::read::put;
pub(crate) use self::{
    read::from_json,
    write::{Malformed, to_json},
};
use crate::pb;

/// See "JSON that is made once".
pub(crate) const RAW: u32 = 19_000;
/// The well-known types that are JSON objects, arrays and values of any shape.
const STRUCT: &str = "google.protobuf.Struct";
const VALUE: &str = "google.protobuf.Value";
const LIST_VALUE: &str = "google.protobuf.ListValue";
/// The package of all well-known types.
const WELL_KNOWN: &str = "google.protobuf";

/// The descriptors of the API, of health, and of the details of errors.
pub(crate) static DESCRIPTORS: LazyLock<DescriptorPool> = LazyLock::new(|| {
    let sets = [
        pb::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_types::pb::FILE_DESCRIPTOR_SET,
    ];
    let files = sets.into_iter().flat_map(|set| match FileDescriptorSet::decode(set) {
        Ok(set) => set.file,
        Err(error) => unreachable!("build scripts wrote these descriptors: {error}"),
    });
    let mut pool = DescriptorPool::new();
    for file in files {
        // Both the first and the last set have google.rpc.Status, from files of different names.
        let mut names =
            file.message_type.iter().map(|message| format!("{}.{}", file.package(), message.name()));
        if names.any(|name| pool.get_message_by_name(&name).is_some()) {
            continue;
        }
        if let Err(error) = pool.add_file_descriptor_proto(file) {
            unreachable!("each file stands behind those that it imports: {error}");
        }
    }
    pool
});

/// The descriptor of a message that is generated from the protos of [`DESCRIPTORS`].
pub(crate) fn descriptor<M: Name>() -> MessageDescriptor {
    let name = M::full_name();
    DESCRIPTORS.get_message_by_name(&name).unwrap_or_else(|| unreachable!("{name} is in the descriptors"))
}

/// The descriptor of `milepost.v1.Event`.
static EVENT: LazyLock<MessageDescriptor> = LazyLock::new(descriptor::<pb::Event>);

/// A whole field `events` of `WatchedEvents` with the event in it as JSON instead.
pub(crate) fn event_field_to_json(field: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut event = field;
    let (number, _) = decode_key(&mut event)?;
    decode_varint(&mut event)?;
    let mut json = Vec::with_capacity(2 * event.len());
    to_json(&EVENT, event, &mut json)?;
    let mut field = Vec::with_capacity(json.len() + 8);
    put(RAW + number, &json, &mut field);
    Ok(field)
}
