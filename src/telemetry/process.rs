//! The metrics `process_*`, with the names that all clients of Prometheus give them. They are
//! read from `/proc` at each scrape, and are absent on systems without it.

use std::{fmt, fs, io, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

/// The metrics of this process.
#[derive(Debug)]
pub(super) struct Process {
    /// The start of the system, since the Unix epoch. It is read once, since it changes
    /// whenever the clock is set.
    booted: Option<Duration>,
}

impl Process {
    pub(super) fn new() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let booted = stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok());
        Self { booted: booted.map(Duration::from_secs) }
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Ok((stat, open_files)) = Stat::read().and_then(|stat| Ok((stat, open_files()?))) else {
            return Ok(());
        };
        let mut encode = |name, help, unit: Option<&Unit>, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
        };
        let (seconds, bytes) = (Some(&Unit::Seconds), Some(&Unit::Bytes));
        let cpu = ConstCounter::new(stat.cpu.as_secs_f64());
        encode("process_cpu", "CPU time, of user and system", seconds, &cpu)?;
        let resident = ConstGauge::new(stat.resident_bytes);
        encode("process_resident_memory", "Resident memory", bytes, &resident)?;
        let virtual_bytes = ConstGauge::new(stat.virtual_bytes);
        encode("process_virtual_memory", "Virtual memory", bytes, &virtual_bytes)?;
        encode("process_open_fds", "Open file descriptors", None, &ConstGauge::new(open_files))?;
        if let Some(most) = getrlimit(Resource::Nofile).current {
            encode(
                "process_max_fds",
                "Most file descriptors that may be open",
                None,
                &ConstGauge::new(most),
            )?;
        }
        if let Some(booted) = self.booted {
            let started = ConstGauge::new((booted + stat.started).as_secs_f64());
            encode("process_start_time", "Start of the process, since the Unix epoch", seconds, &started)?;
        }
        Ok(())
    }
}

fn open_files() -> io::Result<u64> {
    // The directory is open itself while it is read.
    Ok((fs::read_dir("/proc/self/fd")?.count() as u64).saturating_sub(1))
}

/// From `/proc/self/stat`, see proc_pid_stat(5).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu: Duration,
    /// Since the start of the system.
    started: Duration,
    virtual_bytes: u64,
    resident_bytes: u64,
}

impl Stat {
    fn read() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/self/stat")?;
        Self::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(text: &str) -> Option<Self> {
        // The second field, the name of the program in parentheses, may contain spaces and
        // parentheses itself.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        // The page counts fields from 1, of which two are cut off here.
        let field = |number: usize| -> Option<u64> { fields.get(number - 3)?.parse().ok() };
        let time = |ticks: u64| Duration::from_millis(ticks * 1000 / clock_ticks_per_second());
        Some(Self {
            cpu: time(field(14)? + field(15)?),
            started: time(field(22)?),
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * page_size() as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_is_read_whatever_the_name_of_the_program_contains() {
        let fields: Vec<String> = (4..=52).map(|number| number.to_string()).collect();
        let stat = Stat::parse(&format!("7 (a) b (c)) R {}\n", fields.join(" "))).unwrap();
        let time = |ticks: u64| Duration::from_secs(ticks) / u32::try_from(clock_ticks_per_second()).unwrap();
        let (cpu, started) = (time(14 + 15), time(22));
        assert_eq!(stat, Stat { cpu, started, virtual_bytes: 23, resident_bytes: 24 * page_size() as u64 });
        assert_eq!(Stat::parse("7 (a) R 4 5"), None);
    }
}
