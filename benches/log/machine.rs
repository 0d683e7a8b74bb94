//! Describes the machine and the versions that were measured.

use std::{fs, thread};

use crate::{Result, etcd};

/// The lines to print above the table.
pub(crate) fn describe(postgres: &str) -> Result<String> {
    let file = |path| fs::read_to_string(path).unwrap_or_default();
    let value = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(':').nth(1))
            .map_or("unknown".to_owned(), |value| value.trim().to_owned())
    };
    let cores = thread::available_parallelism()?;
    let (cpu, memory) = (file("/proc/cpuinfo"), file("/proc/meminfo"));
    let kernel = file("/proc/sys/kernel/osrelease");
    Ok(format!(
        "{cores} cores of {}, {} of memory, Linux {}\nmilepost {}, Postgres {postgres}, etcd {}\n",
        value(&cpu, "model name"),
        value(&memory, "MemTotal"),
        kernel.trim(),
        env!("CARGO_PKG_VERSION"),
        etcd::version().unwrap_or_else(|| "not installed".to_owned()),
    ))
}
