//! Compiles `proto/` without protoc: messages, clients and servers, and the
//! descriptor set that reflection serves.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const CONFORMANCE: &str = "tests/conformance/proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=migrations");

    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true).open_files([
        "milepost/v1/auth.proto",
        "milepost/v1/configurations.proto",
        "milepost/v1/errors.proto",
        "milepost/v1/events.proto",
        "milepost/v1/jobs.proto",
    ])?;
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(descriptors, compiler.encode_file_descriptor_set())?;

    let mut files = compiler.file_descriptor_set();
    // The comments of the standard types are not rustdoc's.
    for file in &mut files.file {
        if file.package().starts_with("google.") {
            file.source_code_info = None;
        }
    }
    debug_assert!(files.encoded_len() > 0);
    // The codec knows the limits of requests by the names of their messages.
    let mut config = prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        .codec_path("crate::codec::Codec")
        // The server sends bytes that were encoded once for all watchers.
        .extern_path(".milepost.v1.WatchedEvents", "crate::pb::WatchedEvents")
        .compile_fds_with_config(files, config)?;
    conformance_suite()
}

/// The protos of Connect's conformance suite, for the test target `conformance`.
fn conformance_suite() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={CONFORMANCE}");
    let mut compiler = protox::Compiler::new([CONFORMANCE])?;
    compiler.include_imports(true).open_files([
        "connectrpc/conformance/v1/server_compat.proto",
        "connectrpc/conformance/v1/service.proto",
    ])?;
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("conformance.bin");
    fs::write(descriptors, compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
