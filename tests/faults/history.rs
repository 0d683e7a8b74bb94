//! The record of a campaign: every request, answer and received message, with
//! its time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use milepost_client::pb;
use tonic::Code;

use crate::hostile::{Answers, Load};

/// Time since the campaign began.
pub type Moment = Duration;

/// The tag and points of each step of a configuration.
pub type Configuration = Vec<(String, i64)>;

#[derive(Clone, Debug)]
pub struct Job {
    pub id: String,
    pub configuration: usize,
    pub provider: usize,
    pub customer: usize,
}

/// One append request and all attempts to send it.
#[derive(Clone, Debug)]
pub struct Batch {
    pub writer: String,
    pub job: usize,
    /// The request's `expected_sequence`.
    pub expected: Option<i64>,
    /// How many events at the start of the batch were already acknowledged
    /// before its first attempt.
    pub repeats: usize,
    pub events: Vec<pb::NewEvent>,
    /// In the order in which they were sent.
    pub attempts: Vec<Attempt>,
    /// The number of a published batch within all its writer's streams; none
    /// for `AppendEvents`.
    pub order: Option<u64>,
}

#[derive(Clone, Debug)]
pub struct Attempt {
    pub replica: usize,
    pub sent_at: Moment,
    pub ended_at: Moment,
    pub outcome: Outcome,
}

#[derive(Clone, Debug)]
pub enum Outcome {
    Appended(Vec<pb::AppendedEvent>),
    Refused(Refusal),
    Unknown(UnknownReason),
}

/// Why the client does not know whether its request was executed.
#[derive(Clone, Debug)]
pub enum UnknownReason {
    /// The connection broke, or the status leaves it open, such as UNAVAILABLE.
    Broken(String),
    /// The client stopped waiting for the answer.
    Abandoned,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    /// The reason in the status's details; empty in the answers of publish streams.
    pub reason: String,
    pub message: String,
    /// The job's last sequence as given in the status.
    pub last_sequence: Option<i64>,
}

impl Batch {
    /// The first acknowledged attempt and its answer.
    pub fn answer(&self) -> Option<(&Attempt, &Vec<pb::AppendedEvent>)> {
        self.attempts.iter().find_map(|attempt| match &attempt.outcome {
            Outcome::Appended(events) => Some((attempt, events)),
            Outcome::Refused(_) | Outcome::Unknown(_) => None,
        })
    }

    pub fn first_sent_at(&self) -> Moment {
        self.attempts.first().map_or(Moment::MAX, |attempt| attempt.sent_at)
    }
}

/// An answered `RequestCancellation`: whether it was requested before.
#[derive(Clone, Debug)]
pub struct Cancellation {
    pub job: usize,
    pub reason: String,
    /// When its first attempt was sent.
    pub sent_at: Moment,
    pub outcome: Result<bool, Refusal>,
}

/// An answered `CloseJob`.
#[derive(Clone, Debug)]
pub struct Close {
    pub job: usize,
    pub reason: String,
    /// When its first attempt was sent.
    pub sent_at: Moment,
    pub ended_at: Moment,
    pub outcome: Result<Closed, Refusal>,
}

#[derive(Clone, Copy, Debug)]
pub struct Closed {
    pub last_sequence: i64,
    pub existed: bool,
}

/// What a watcher watches: all jobs of a provider or a customer, or one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    OfProvider(usize),
    OfCustomer(usize),
    Job(usize),
}

/// The filter of a watch of all jobs.
#[derive(Clone, Copy, Debug, Default)]
pub struct JobFilter {
    pub configuration: Option<usize>,
    /// The customer if a provider watches, the provider if a customer does.
    pub counterpart: Option<usize>,
}

/// The streams of one watcher, each of which resumes an earlier one.
#[derive(Clone, Debug)]
pub struct WatcherRecord {
    pub name: String,
    pub scope: Scope,
    pub filter: JobFilter,
    /// The watcher reads without pauses, so that events and the stream's end
    /// reach it when they are sent.
    pub reads_promptly: bool,
    pub kinds: Vec<pb::EventKind>,
    pub streams: Vec<Stream>,
    /// The watcher read until no event could follow: an event that it has not
    /// received is missing.
    pub read_to_end: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Beginning,
    AfterSequence(i64),
    /// With the token of the last of the first `messages` messages of an earlier
    /// stream of the same watcher.
    Resume {
        stream: usize,
        messages: usize,
    },
    Now,
}

#[derive(Clone, Debug)]
pub struct Stream {
    pub replica: usize,
    pub start: Start,
    pub opened_at: Moment,
    pub messages: Vec<Message>,
    pub end: StreamEnd,
    pub ended_at: Moment,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The server ended it with OK.
    Ok,
    /// The watcher received no message for [`SILENCE`](crate::watchers::SILENCE)
    /// and gave up.
    Silent,
    ClosedByWatcher,
    /// The connection broke, or the server ended it with a status that names no
    /// fault of the request.
    Broken(String),
    /// The server refused the request.
    Refused(Refusal),
}

impl From<UnknownReason> for StreamEnd {
    fn from(reason: UnknownReason) -> Self {
        match reason {
            UnknownReason::Broken(why) => Self::Broken(why),
            UnknownReason::Abandoned => Self::ClosedByWatcher,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Message {
    pub received_at: Moment,
    pub body: Body,
}

impl Message {
    pub fn last_event(&self) -> Option<&pb::Event> {
        match &self.body {
            Body::Events(events) => events.last().map(Arc::as_ref),
            Body::CaughtUp(..) | Body::Heartbeat | Body::End(..) | Body::ListEnd => None,
        }
    }
}

#[derive(Clone, Debug)]
pub enum Body {
    Events(Vec<Arc<pb::Event>>),
    CaughtUp(Option<pb::JobState>, Vec<pb::StepState>),
    Heartbeat,
    End(pb::WatchEndReason, Option<pb::JobState>),
    /// Not of a watch: the last page of `ListEvents` was read.
    ListEnd,
}

/// A job and its whole log as a replica returns them after the campaign.
#[derive(Clone, Debug)]
pub struct FinalRead {
    pub replica: usize,
    pub job: usize,
    pub found: pb::Job,
    pub log: Vec<Arc<pb::Event>>,
}

/// A job as a replica returns it during the campaign.
#[derive(Clone, Debug)]
pub struct JobRead {
    pub replica: usize,
    pub sent_at: Moment,
    pub ended_at: Moment,
    pub found: pb::Job,
}

/// A call, other than an append, that got no answer or one that leaves open whether it was
/// executed.
#[derive(Clone, Debug)]
pub struct FailedCall {
    pub replica: usize,
    pub method: &'static str,
    pub sent_at: Moment,
    pub ended_at: Moment,
    pub reason: UnknownReason,
}

/// The most memory that one process of a server had.
#[derive(Clone, Copy, Debug)]
pub struct MemoryPeak {
    pub replica: usize,
    pub bytes: usize,
}

/// A session, an API key or a watch token that a revoker made and ended.
#[derive(Clone, Debug)]
pub struct CredentialRecord {
    pub name: String,
    /// When the creation was sent and answered.
    pub created_from: Moment,
    pub created_by: Moment,
    /// None if the credential did not exist when it was to be ended.
    pub end: Option<CredentialEnd>,
    pub uses: Vec<CredentialUse>,
    pub streams: Vec<CredentialStream>,
}

#[derive(Clone, Copy, Debug)]
pub struct CredentialEnd {
    /// When the first attempt was sent.
    pub sent_at: Moment,
    pub acknowledged_at: Moment,
    /// The server that ended it; none if an earlier attempt may have done so, whose answer
    /// was lost.
    pub by: Option<usize>,
}

/// A call, or the opening of a watch, with a credential.
#[derive(Clone, Debug)]
pub struct CredentialUse {
    pub replica: usize,
    pub sent_at: Moment,
    pub ended_at: Moment,
    pub outcome: UseOutcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UseOutcome {
    Accepted,
    /// UNAUTHENTICATED.
    Refused,
    /// The call failed, or the server could not check the credential.
    Unknown,
}

/// A watch that was opened with a credential.
#[derive(Clone, Debug)]
pub struct CredentialStream {
    pub replica: usize,
    pub opened_at: Moment,
    /// When the last message came, `end` not counted.
    pub last_message_at: Option<Moment>,
    /// When and how it ended; none if it was open when the revoker stopped reading.
    pub end: Option<(Moment, CredentialStreamEnd)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialStreamEnd {
    /// By `end` with CREDENTIAL_ENDED and the status UNAUTHENTICATED.
    Told,
    /// The connection broke, or the server ended the stream for a reason that does not
    /// concern the credential.
    Broken,
    /// In any other way.
    Other(String),
}

/// A time in which a fault, or the recovery from it, excuses failed calls.
#[derive(Clone, Copy, Debug)]
pub struct FaultWindow {
    pub from: Moment,
    pub to: Moment,
    /// By replica.
    pub affects: [bool; 2],
}

/// A loss of commits: a standby without the last ones became the primary.
#[derive(Clone, Debug)]
pub struct SetBack {
    /// The earliest moment of a commit that may be lost.
    pub lost_from: Moment,
    /// When the former primary had ended: what was sent later was executed by the new one.
    pub until: Moment,
    /// When both servers had used the new primary.
    pub noticed_at: Moment,
    /// By job; jobs that lost nothing are missing.
    pub logs: BTreeMap<usize, LostLog>,
}

/// The log of a job as the former primary had it.
#[derive(Clone, Debug)]
pub struct LostLog {
    /// How many of the events, from the first one on, the new primary had when it began.
    pub kept: usize,
    pub events: Vec<Arc<pb::Event>>,
    /// The job itself is lost.
    pub is_gone: bool,
}

/// An answer that no fault excuses.
#[derive(Clone, Debug)]
pub struct UnexpectedAnswer {
    pub at: Moment,
    pub what: String,
}

#[derive(Clone, Debug, Default)]
pub struct History {
    pub configurations: Vec<Configuration>,
    pub jobs: Vec<Job>,
    pub batches: Vec<Batch>,
    pub closes: Vec<Close>,
    pub cancellations: Vec<Cancellation>,
    pub watchers: Vec<WatcherRecord>,
    pub final_reads: Vec<FinalRead>,
    pub job_reads: Vec<JobRead>,
    pub failed_calls: Vec<FailedCall>,
    pub credentials: Vec<CredentialRecord>,
    /// What the hostile tenant was answered.
    pub hostile: BTreeMap<Load, Answers>,
    /// Of each process of the servers.
    pub memory_peaks: Vec<MemoryPeak>,
    /// The most memory that a server may have.
    pub memory_bound_bytes: usize,
    /// When each server was killed or terminated, and forgot what it had refused.
    pub restarts: [Vec<Moment>; 2],
    pub set_backs: Vec<SetBack>,
    pub fault_windows: Vec<FaultWindow>,
    pub unexpected_answers: Vec<UnexpectedAnswer>,
}

impl History {
    /// Fills in the ids of events that were sent without one and never answered.
    /// The stored event is found by its name, which is unique.
    pub fn resolve_missing_ids(&mut self) {
        let logs: HashMap<usize, &FinalRead> =
            self.final_reads.iter().filter(|read| read.replica == 0).map(|read| (read.job, read)).collect();
        for batch in &mut self.batches {
            for event in batch.events.iter_mut().filter(|event| event.id.is_empty()) {
                let stored = logs
                    .get(&batch.job)
                    .and_then(|read| read.log.iter().find(|stored| stored.name == event.name));
                if let Some(stored) = stored {
                    event.id.clone_from(&stored.id);
                }
            }
        }
    }
}
