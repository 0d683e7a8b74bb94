//! The `use` lines of `src` against the tables of floors in `src/lib.rs` and
//! `src/event_log/mod.rs`: a room imports only from lower floors, so that no two rooms
//! import each other.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Rooms by name, with their floors.
type Floors = BTreeMap<String, u32>;

/// Reads a table whose rows are `| floor | rooms in backticks | text |`.
fn floors(source: &str) -> Floors {
    let mut floors = Floors::new();
    for line in source.lines() {
        let mut cells = line.trim_start_matches("//! ").split('|').map(str::trim);
        let (Some(""), Some(floor), Some(rooms)) = (cells.next(), cells.next(), cells.next()) else {
            continue;
        };
        let Ok(floor) = floor.parse() else { continue };
        for room in rooms.split('`').skip(1).step_by(2) {
            assert_eq!(floors.insert(room.trim_end_matches(".rs").to_owned(), floor), None, "{room} twice");
        }
    }
    floors
}

/// Each source file below `directory` with its module path, such as `event_log::watch::past`.
fn modules(directory: &Path, prefix: &[String], found: &mut Vec<(Vec<String>, PathBuf)>) {
    for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        let name = entry.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut module = prefix.to_vec();
        if entry.is_dir() {
            module.push(name);
            modules(&entry, &module, found);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            if !matches!(name.as_str(), "mod" | "lib") {
                module.push(name);
            }
            // The Diesel CLI writes schema.rs, whose imports lie inside of macros.
            if module != ["schema"] {
                found.push((module, entry));
            }
        }
    }
}

/// The paths that the `use` items of a file name, from the crate's root on, without those
/// of its tests.
fn imports(module: &[String], source: &str) -> Vec<Vec<String>> {
    let code = source.split("#[cfg(test)]").next().unwrap();
    let code: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let mut paths = Vec::new();
    for item in code.join("\n").split(';') {
        // A use item begins with a line of its own; before it stands the item before.
        let lines: Vec<&str> = item.lines().collect();
        let uses = |line: &&str| {
            let line = line.trim_start();
            line.starts_with("use ")
                || line.starts_with("pub use ")
                || line.starts_with("pub(") && line.contains(") use ")
        };
        if let Some(first) = lines.iter().rposition(uses) {
            let item = lines[first..].join(" ");
            expand(&[], item.split_once("use ").unwrap().1.trim(), &mut paths);
        }
    }
    paths
        .into_iter()
        .filter_map(|path| {
            let supers = path.iter().take_while(|part| *part == "super").count();
            match path[0].as_str() {
                "crate" => Some(path[1..].to_vec()),
                "self" => Some([module, &path[1..]].concat()),
                "super" => Some([&module[..module.len() - supers], &path[supers..]].concat()),
                _ => None,
            }
        })
        .collect()
}

/// Expands `a::{b, c::d as _}` to `a::b` and `a::c::d`.
fn expand(prefix: &[String], tree: &str, paths: &mut Vec<Vec<String>>) {
    let (head, group) = tree.split_once('{').unwrap_or((tree, ""));
    let mut path = prefix.to_vec();
    let parts = head.split("::").map(|part| part.split(" as ").next().unwrap().trim());
    path.extend(parts.filter(|part| !part.is_empty()).map(str::to_owned));
    if group.is_empty() {
        return paths.push(path);
    }
    let group = group.trim_end().strip_suffix('}').expect("a group in one item");
    let (mut depth, mut start) = (0, 0);
    for (index, character) in group.char_indices().chain([(group.len(), ',')]) {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let part = group[start..index].trim();
                if !part.is_empty() {
                    expand(&path, part, paths);
                }
                start = index + 1;
            }
            _ => {}
        }
    }
}

/// Imports from a room of the same floor or of a higher one. `root` are the module parts
/// above the rooms.
fn upward(root: &[&str], floors: &Floors) -> Vec<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    modules(&source, &[], &mut found);
    let below =
        |path: &[String]| path.len() > root.len() && path.iter().zip(root).all(|(part, root)| part == root);
    let mut wrong = Vec::new();
    for (module, file) in &found {
        let is_root = module.as_slice() == root && !root.is_empty();
        if !below(module) && !is_root {
            continue;
        }
        let room = if is_root { "mod" } else { module[root.len()].as_str() };
        let floor = *floors.get(room).unwrap_or_else(|| panic!("{room} has no floor"));
        for path in imports(module, &fs::read_to_string(file).unwrap()) {
            if !below(&path) || path[root.len()] == room {
                continue;
            }
            let imported = path[root.len()].as_str();
            // A name that the root itself declares.
            let Some(other) = floors.get(imported) else {
                if !is_root {
                    wrong.push(format!("{}: {}: no room {imported}", file.display(), path.join("::")));
                }
                continue;
            };
            if *other >= floor {
                wrong.push(format!("{}: {} is not below", file.display(), path.join("::")));
            }
        }
    }
    wrong
}

fn source(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file)).unwrap()
}

#[test]
fn every_room_imports_only_from_lower_floors() {
    let floors = floors(&source("lib.rs"));
    assert!(floors.len() > 15, "{floors:?}");
    assert_eq!(upward(&[], &floors), Vec::<String>::new());
}

#[test]
fn every_file_of_the_event_log_imports_only_from_lower_floors() {
    let floors = floors(&source("event_log/mod.rs"));
    assert!(floors.len() > 10, "{floors:?}");
    assert_eq!(upward(&["event_log"], &floors), Vec::<String>::new());
}

#[test]
fn imports_are_read_from_nested_groups_and_from_relative_paths() {
    let module: Vec<String> = ["event_log", "watch"].map(str::to_owned).to_vec();
    let source = "//! use crate::no;\nuse std::fmt;\n\nuse super::tail::{self, Tail};\npub(crate) use self::past::Past;\nuse crate::{\n    a::{b, c::D as _},\n    e,\n};\nfn f() {}\n#[cfg(test)]\nmod tests { use crate::cli; }";
    let imports: Vec<String> = imports(&module, source).iter().map(|path| path.join("::")).collect();
    assert_eq!(
        imports,
        [
            "event_log::tail::self",
            "event_log::tail::Tail",
            "event_log::watch::past::Past",
            "a::b",
            "a::c::D",
            "e"
        ]
    );
}
