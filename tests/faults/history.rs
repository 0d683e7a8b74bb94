//! What everybody sent, was told and saw, and when.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use milepost::pb;
use tonic::Code;

/// Since the campaign began.
pub type Moment = Duration;

/// A configuration's steps and their points.
pub type Configuration = Vec<(String, i64)>;

#[derive(Clone, Debug)]
pub struct Job {
    pub id: String,
    pub configuration: usize,
    pub provider: usize,
    pub customer: usize,
}

/// One request to append, however often it was sent.
#[derive(Clone, Debug)]
pub struct Batch {
    pub writer: String,
    pub job: usize,
    pub expected: Option<i64>,
    /// How many of its events, its first ones, had been acknowledged before
    /// it was first sent.
    pub repeats: usize,
    pub events: Vec<pb::NewEvent>,
    /// In the order sent.
    pub attempts: Vec<Attempt>,
    /// For one that was published: its place among those of its writer.
    pub order: Option<u64>,
}

#[derive(Clone, Debug)]
pub struct Attempt {
    pub replica: usize,
    pub sent: Moment,
    pub over: Moment,
    pub outcome: Outcome,
}

#[derive(Clone, Debug)]
pub enum Outcome {
    Appended(Vec<pb::AppendedEvent>),
    Refused(Refusal),
    Unknown(Lost),
}

/// Why it is not known what became of a request.
#[derive(Clone, Debug)]
pub enum Lost {
    /// The connection broke, or the server said that it cannot tell or could not
    /// do it.
    Broken(String),
    /// The client did not wait any longer.
    GaveUp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    pub message: String,
    /// Where the log was said to end.
    pub last_sequence: Option<i64>,
}

impl Batch {
    pub fn answer(&self) -> Option<(&Attempt, &Vec<pb::AppendedEvent>)> {
        self.attempts.iter().find_map(|attempt| match &attempt.outcome {
            Outcome::Appended(events) => Some((attempt, events)),
            Outcome::Refused(_) | Outcome::Unknown(_) => None,
        })
    }

    pub fn first_sent(&self) -> Moment {
        self.attempts.first().map_or(Moment::MAX, |attempt| attempt.sent)
    }
}

/// A CloseJob that was answered.
#[derive(Clone, Debug)]
pub struct Close {
    pub job: usize,
    pub reason: String,
    /// For the first time.
    pub sent: Moment,
    pub over: Moment,
    pub outcome: Result<Closed, Refusal>,
}

#[derive(Clone, Copy, Debug)]
pub struct Closed {
    pub last_sequence: i64,
    pub existed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    OfProvider(usize),
    OfCustomer(usize),
    Job(usize),
}

/// Which of all jobs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Only {
    pub configuration: Option<usize>,
    /// A customer for a provider, and the other way round.
    pub counterpart: Option<usize>,
}

/// Streams of one watcher, each resuming one before it.
#[derive(Clone, Debug)]
pub struct Chain {
    pub name: String,
    pub scope: Scope,
    pub only: Only,
    /// Delivery to it is not held up by itself.
    pub prompt: bool,
    pub kinds: Vec<pb::EventKind>,
    pub streams: Vec<Stream>,
    /// It was read until nothing more could come: what it lacks is missing.
    pub whole: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Beginning,
    AfterSequence(i64),
    /// After so many messages of that stream of the same chain.
    After {
        stream: usize,
        messages: usize,
    },
    Now,
}

#[derive(Clone, Debug)]
pub struct Stream {
    pub replica: usize,
    pub start: Start,
    pub opened: Moment,
    pub messages: Vec<Message>,
    pub end: End,
    pub over: Moment,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By the server, with OK.
    Ok,
    /// Nothing came for so long that the watcher gave up.
    Silent,
    /// By the watcher.
    Left,
    /// The connection broke, or the server said so.
    Broken(String),
    /// It was not opened at all, for what it asked for.
    Refused(Refusal),
}

impl From<Lost> for End {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Broken(why) => Self::Broken(why),
            Lost::GaveUp => Self::Left,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Message {
    pub at: Moment,
    pub body: Body,
}

impl Message {
    pub fn last_event(&self) -> Option<&pb::Event> {
        match &self.body {
            Body::Events(events) => events.last().map(Arc::as_ref),
            Body::CaughtUp(_) | Body::Heartbeat | Body::Ended(..) | Body::Listed => None,
        }
    }
}

#[derive(Clone, Debug)]
pub enum Body {
    Events(Vec<Arc<pb::Event>>),
    CaughtUp(Option<pb::JobState>),
    Heartbeat,
    Ended(pb::WatchEndReason, Option<pb::JobState>),
    /// Of pages, not of a watch: there is no more.
    Listed,
}

/// What a replica said of a job when all was over.
#[derive(Clone, Debug)]
pub struct Read {
    pub replica: usize,
    pub job: usize,
    pub found: pb::Job,
    pub log: Vec<Arc<pb::Event>>,
}

/// What a replica said of a job, by its id, in between.
#[derive(Clone, Debug)]
pub struct Glance {
    pub replica: usize,
    pub sent: Moment,
    pub over: Moment,
    pub found: pb::Job,
}

/// A time in which something was broken, or was just being mended.
#[derive(Clone, Copy, Debug)]
pub struct Disturbance {
    pub from: Moment,
    pub to: Moment,
    /// By server.
    pub touches: [bool; 2],
}

/// An answer that no fault excuses.
#[derive(Clone, Debug)]
pub struct Unexcused {
    pub at: Moment,
    pub what: String,
}

#[derive(Clone, Debug, Default)]
pub struct History {
    pub configurations: Vec<Configuration>,
    pub jobs: Vec<Job>,
    pub batches: Vec<Batch>,
    pub closes: Vec<Close>,
    pub chains: Vec<Chain>,
    pub reads: Vec<Read>,
    pub glances: Vec<Glance>,
    pub disturbances: Vec<Disturbance>,
    pub unexcused: Vec<Unexcused>,
}

impl History {
    /// Gives events that were sent without an id, and never answered, the one
    /// under which they are stored, if they are: by their name, which nothing
    /// else has.
    pub fn name_nameless(&mut self) {
        let logs: HashMap<usize, &Read> =
            self.reads.iter().filter(|read| read.replica == 0).map(|read| (read.job, read)).collect();
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

/// Keeps one copy of each event, however often it is received; of one that is
/// received with different content, one of each.
#[derive(Default)]
pub struct Events(Mutex<HashMap<Place, Vec<Arc<pb::Event>>>>);

/// A job's id and a sequence.
type Place = (String, i64);

impl Events {
    pub fn one_of(&self, event: pb::Event) -> Arc<pb::Event> {
        let mut all = self.0.lock().unwrap();
        let known = all.entry((event.job_id.clone(), event.sequence)).or_default();
        if let Some(same) = known.iter().find(|known| ***known == event) {
            return Arc::clone(same);
        }
        let event = Arc::new(event);
        known.push(Arc::clone(&event));
        event
    }
}
