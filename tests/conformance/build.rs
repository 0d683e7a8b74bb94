//! Compiles the protos of the conformance suite.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files([
        "connectrpc/conformance/v1/server_compat.proto",
        "connectrpc/conformance/v1/service.proto",
    ])?;
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("conformance.bin");
    fs::write(descriptors, compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
