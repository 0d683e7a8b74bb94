//! What a watch is asked for, and the messages that it sends.

use std::{sync::Arc, time::Duration};

use crate::{
    event_log::{event::LogEvent, position::ResumeToken, scope::Filter},
    models::job_identity::Configuration,
    progress::JobState,
};

/// What to watch, and how.
#[derive(Debug)]
pub(crate) struct WatchQuery {
    pub(crate) filter: Filter,
    pub(crate) start: Start,
    /// Interval of heartbeats.
    pub(crate) heartbeat: Duration,
}

#[derive(Debug)]
pub(crate) enum Start {
    Beginning,
    /// For a scope of one job only.
    AfterSequence(i64),
    Resume(ResumeToken),
    Now,
}

/// A message of a watch.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) resume_token: String,
    pub(crate) body: Body,
}

/// The content of a message. Only a watch of one job has a job state.
#[derive(Debug)]
pub(crate) enum Body {
    Events(Vec<Arc<LogEvent>>),
    CaughtUp(Option<(JobState, Arc<Configuration>)>),
    Heartbeat,
    End(EndReason, Option<JobState>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndReason {
    JobClosed,
    Draining,
    CredentialEnded,
    /// Retention removed events before they could be sent.
    EventsExpired,
    /// Events that were sent or filtered are lost.
    LogSetBack,
}
