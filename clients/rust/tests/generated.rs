//! The committed code of `src/generated` against `proto/`.
//!
//! After a change of the protos, `UPDATE_GENERATED=1 cargo test -p milepost-client --test
//! generated` writes it.

use std::{env, error::Error, fs, path::Path};

#[path = "../../../build.rs"]
#[allow(dead_code, reason = "its `main` is that of the server's build script")]
mod build;

/// The only file that is generated, by the name of the package.
const FILE: &str = "milepost.v1.rs";

fn generate() -> Result<String, Box<dyn Error>> {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generated");
    fs::create_dir_all(&out)?;
    let (files, _) = build::compile(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto"))?;
    let generator = build::generator().build_server(false).out_dir(&out);
    generator.compile_fds_with_config(files, build::config())?;
    Ok(fs::read_to_string(out.join(FILE))?)
}

#[test]
fn the_generated_code_is_that_of_the_protos() -> Result<(), Box<dyn Error>> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generated").join(FILE);
    let generated = generate()?;
    if env::var_os("UPDATE_GENERATED").is_some() {
        fs::write(&committed, &generated)?;
    }
    assert!(
        fs::read_to_string(&committed)? == generated,
        "{} is not what the protos give; write it with \
         `UPDATE_GENERATED=1 cargo test -p milepost-client --test generated`",
        committed.display()
    );
    Ok(())
}
