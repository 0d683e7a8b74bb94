//! Processes of this machine, by `/proc`.

use std::{fs, time::Duration};

pub use rustix::process::Signal;
use rustix::{io::Errno, process::Pid};

/// Sends a signal to a process, which must not have ended.
pub fn signal(pid: u32, signal: Signal) {
    send(pid, signal).unwrap_or_else(|error| panic!("{signal:?} to process {pid}: {error}"));
}

/// Sends a signal to those of the processes that have not ended, in their order.
pub fn signal_those_that_run(pids: &[u32], signal: Signal) {
    for &pid in pids {
        match send(pid, signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => panic!("{signal:?} to process {pid}: {error}"),
        }
    }
}

fn send(pid: u32, signal: Signal) -> Result<(), Errno> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("the id of a process");
    rustix::process::kill_process(pid, signal)
}

/// Whether the process runs; a zombie does not.
pub fn runs(pid: u32) -> bool {
    status(pid, "State").is_some_and(|state| !state.starts_with('Z'))
}

pub fn parent(pid: u32) -> Option<u32> {
    status(pid, "PPid")?.parse().ok()
}

/// Those children of the process that have ended and that it has not waited for.
pub fn zombies_of(pid: u32) -> Vec<u32> {
    all().filter(|child| parent(*child) == Some(pid) && !runs(*child)).collect()
}

/// The children that the main thread of the process has started; none of a process that
/// has ended.
pub fn children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().map(|child| child.parse().unwrap()).collect()
}

pub fn all() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
}

/// The most memory that the process has had so far, in bytes.
pub fn peak_bytes(pid: u32) -> usize {
    memory(pid, "VmHWM")
}

/// The memory that the process has now, in bytes.
pub fn resident_bytes(pid: u32) -> usize {
    memory(pid, "VmRSS")
}

/// The processor time that the process has used, in user and system mode. The operating
/// system counts it in ticks, most often of 10 ms.
pub fn processor_time(pid: u32) -> Duration {
    of_ticks(ticks(pid, &USED).unwrap_or_else(|| panic!("process {pid} runs")))
}

/// The processor time of the process and of its children. Those that have ended count as
/// soon as the process has waited for them.
pub fn processor_time_with_children(pid: u32) -> Duration {
    let children = children(pid).into_iter().filter_map(|child| ticks(child, &USED)).sum::<u64>();
    let own = ticks(pid, &[USED, ENDED].concat()).unwrap_or_else(|| panic!("process {pid} runs"));
    of_ticks(own + children)
}

/// The fields of `/proc/PID/stat` with the ticks of the process, in user and system mode.
const USED: [usize; 2] = [11, 12];
/// Those with the ticks of its children that have ended.
const ENDED: [usize; 2] = [13, 14];

/// The sum of these fields; none of a process that has ended.
fn ticks(pid: u32, fields: &[usize]) -> Option<u64> {
    fields.iter().map(|&field| stat(pid, field)?.parse::<u64>().ok()).sum()
}

fn of_ticks(ticks: u64) -> Duration {
    Duration::from_micros(ticks * 1_000_000 / rustix::param::clock_ticks_per_second())
}

fn memory(pid: u32, name: &str) -> usize {
    let memory = status(pid, name).unwrap_or_else(|| panic!("process {pid} runs"));
    memory.trim_end_matches(" kB").parse::<usize>().expect("kilobytes") * 1024
}

/// When the process started, in clock ticks since the start of the machine.
pub(crate) fn start_time(pid: u32) -> Option<String> {
    stat(pid, 19)
}

/// A field of `/proc/PID/stat`, counted from 0 after the name of the program.
fn stat(pid: u32, field: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may have spaces.
    Some(stat.rsplit_once(')')?.1.split_whitespace().nth(field)?.to_owned())
}

/// A line of `/proc/PID/status`.
fn status(pid: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(found, _)| *found == name).map(|(_, value)| value.trim().to_owned())
}

/// Processes that are stopped (SIGSTOP) until this is dropped, or until they have ended.
#[derive(Debug)]
pub struct Stopped(Vec<u32>);

impl Stopped {
    /// Stops the processes with these ids, as a query returns those of backends.
    pub fn new(pids: &[String]) -> Self {
        let pids: Vec<u32> = pids.iter().map(|pid| pid.parse().unwrap()).collect();
        pids.iter().for_each(|&pid| signal(pid, Signal::STOP));
        Self(pids)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal_those_that_run(&self.0, Signal::CONT);
    }
}
