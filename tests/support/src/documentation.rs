//! The pages of the documentation, whose commands and tables the tests hold against milepost.

use std::{fs, path::Path};

/// A page, by its path from the root of the repository.
pub fn page(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)).unwrap()
}

/// The fenced blocks of a page in this language, in order.
pub fn blocks(path: &str, language: &str) -> Vec<String> {
    let fence = format!("\n```{language}\n");
    let page = page(path);
    let blocks = page.split(&fence).skip(1).map(|block| block.split("```").next().unwrap().to_owned());
    let blocks: Vec<String> = blocks.collect();
    assert!(!blocks.is_empty(), "{path} has blocks in {language}");
    blocks
}
