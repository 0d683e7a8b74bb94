//! The event log: PublishEvents, WatchEvents, the tail, and retention.

mod exports;
mod histories;
mod holds;
mod past;
mod publish;
mod retention;
mod tail;
mod watch;
