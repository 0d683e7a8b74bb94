//! The machine on which something was measured.

use std::{fs, thread};

/// As in `2 cores of CPU, 8000000 kB of memory, Linux 6.1.0`.
pub fn machine() -> String {
    let file = |path| fs::read_to_string(path).unwrap_or_default();
    let value = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split(':').nth(1));
        value.map_or("unknown".to_owned(), |value| value.trim().to_owned())
    };
    format!(
        "{} cores of {}, {} of memory, Linux {}",
        thread::available_parallelism().unwrap(),
        value(&file("/proc/cpuinfo"), "model name"),
        value(&file("/proc/meminfo"), "MemTotal"),
        file("/proc/sys/kernel/osrelease").trim(),
    )
}
