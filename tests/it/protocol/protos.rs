//! Invariants of the protos, read from their descriptors.

use std::collections::BTreeSet;

use milepost::pb;
use prost_reflect::{DescriptorPool, FileDescriptor};

fn files() -> Vec<FileDescriptor> {
    let pool = DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
    pool.files().filter(|file| file.package_name() == "milepost.v1").collect()
}

#[test]
fn every_file_has_the_options_with_which_protoc_generates_go_and_java() {
    let (mut packages, mut classes) = (BTreeSet::new(), BTreeSet::new());
    for file in files() {
        let options = file.file_descriptor_proto().options.clone().unwrap();
        assert_eq!(options.java_multiple_files, Some(true), "{}", file.name());
        packages.insert((options.go_package.unwrap(), options.java_package.unwrap()));
        classes.insert(options.java_outer_classname.unwrap());
    }
    assert_eq!(packages.len(), 1, "one Go package and one Java package: {packages:?}");
    assert_eq!(classes.len(), files().len(), "{classes:?}");
}

#[test]
fn the_message_of_every_entity_has_id_created_at_and_updated_at() {
    let messages: Vec<_> = files().iter().flat_map(FileDescriptor::messages).collect();
    for name in [
        "User",
        "Session",
        "ApiKey",
        "WatchToken",
        "JobConfiguration",
        "StepConfiguration",
        "MetadataConfiguration",
        "Job",
    ] {
        let message = messages.iter().find(|message| message.name() == name).unwrap();
        for field in ["id", "created_at", "updated_at"] {
            assert!(message.get_field_by_name(field).is_some(), "{name}.{field}");
        }
    }
}
