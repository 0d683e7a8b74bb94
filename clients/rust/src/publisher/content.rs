//! What a publisher sends, and what comes back of it.

use prost::Message as _;

use crate::{
    CallError,
    pb::{CreateJobRequest, NewEvent, append_events_request::Job},
};

/// What a publisher sends for a job.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Content {
    Job(CreateJobRequest),
    Event(NewEvent),
}

impl Content {
    /// The size of the message, in bytes.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Job(request) => request.encoded_len(),
            Self::Event(event) => event.encoded_len(),
        }
    }

    pub(super) fn refused(self, job: &Job) -> Refused {
        match self {
            Self::Job(request) => Refused::Job(request),
            Self::Event(event) => Refused::Event { job: job.clone(), event },
        }
    }
}

/// What is not stored and never will be, and why.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// What is not stored.
    pub refused: Refused,
    /// Why the server refused it. The code is DATA_LOSS if a spool was damaged.
    pub error: CallError,
}

/// What the server refused for its content, or could not be sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Refused {
    /// A job was not created.
    Job(CreateJobRequest),
    /// An event was not appended.
    Event {
        /// The job of the event, as it was given.
        job: Job,
        /// The event, with its id.
        event: NewEvent,
    },
    /// A part of a spool cannot be read. These are its bytes.
    Damaged(Vec<u8>),
}
