//! Watchers: some stay, some read slowly, and some close their stream and resume with
//! a token, at the same replica or the other.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use milepost_client::pb::{
    self, EventKind,
    watch_events_request::{Scope as RequestScope, Start as RequestStart},
    watch_events_response::Message as ResponseMessage,
};
use milepost_testing::{Clients, User};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::{
    clients::UserClient,
    context::{CallError, Context, configuration_tag},
    history::{Body, JobFilter, Message, Moment, Scope, Start, Stream, StreamEnd, WatcherRecord},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behavior {
    /// Keeps a stream until it ends.
    Stay,
    /// Closes a stream after some messages or 1.5 s at most, and resumes.
    Reconnect,
    /// Now and then reads nothing for seconds.
    ReadSlowly,
}

/// After this time without a message a watcher resumes, perhaps at the other replica.
/// Heartbeats come every 5 s, except while the database is unavailable.
pub const SILENCE: Duration = Duration::from_secs(9);
/// The reason of a refusal where the events that a watcher has received are lost.
const SET_BACK: &str = "LOG_SET_BACK";

pub struct Watcher {
    pub context: Arc<Context>,
    pub record: WatcherRecord,
    pub behavior: Behavior,
    random: fastrand::Rng,
    /// The token of each message, by stream.
    tokens: Vec<Vec<String>>,
    first_start: Start,
    /// When the watcher stops watching, unless the load is finishing by then.
    leave_at: Moment,
    /// Set if all streams go to one replica.
    only_replica: Option<usize>,
    /// Set if the streams go over connections that other users share.
    shared: Option<[Clients; 2]>,
    done: bool,
}

impl Watcher {
    pub fn new(context: &Arc<Context>, name: &str, scope: Scope, behavior: Behavior) -> Self {
        let record = WatcherRecord {
            name: name.to_owned(),
            scope,
            filter: JobFilter::default(),
            reads_promptly: behavior != Behavior::ReadSlowly,
            kinds: Vec::new(),
            streams: Vec::new(),
            read_to_end: false,
        };
        let random = context.random();
        Self {
            context: Arc::clone(context),
            record,
            behavior,
            random,
            tokens: Vec::new(),
            first_start: Start::Beginning,
            leave_at: Moment::MAX,
            only_replica: None,
            shared: None,
            done: false,
        }
    }

    pub fn at(mut self, replica: usize) -> Self {
        self.only_replica = Some(replica);
        self
    }

    pub fn over(mut self, shared: &[Clients; 2]) -> Self {
        self.shared = Some(shared.clone());
        self
    }

    pub fn leaving_at(mut self, moment: Moment) -> Self {
        self.leave_at = moment;
        self
    }

    pub fn with_filter(mut self, configuration: Option<usize>, counterpart: Option<usize>) -> Self {
        self.record.filter = JobFilter { configuration, counterpart };
        self
    }

    pub fn of_kinds(mut self, kinds: &[EventKind]) -> Self {
        self.record.kinds = kinds.to_vec();
        self
    }

    pub fn starting(mut self, start: Start) -> Self {
        self.first_start = start;
        self
    }

    /// Watches until the job is closed, or until `stop` is cancelled and the stream has
    /// caught up. No event can follow then.
    pub async fn watch(mut self, stop: CancellationToken) {
        let user = self.user();
        let mut clients = match &self.shared {
            Some(shared) => UserClient::over(shared, &user),
            None => self.context.clients(&user),
        };
        if self.behavior == Behavior::ReadSlowly {
            clients = [0, 1].map(|replica| self.context.slow_client(replica, &user));
        }
        let mut replica = self.random.usize(..2);
        while !self.done {
            self.stream(self.only_replica.unwrap_or(replica), &mut clients, &stop).await;
            if self.is_set_back() {
                self.begin_anew();
            }
            if self.random.u32(..4) > 0 {
                replica = 1 - replica;
            }
            let received_nothing = self.record.streams.last().is_none_or(|stream| stream.messages.is_empty());
            let pause = if received_nothing { 100 } else { self.random.u64(..50) };
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.context.history.lock().unwrap().watchers.push(self.record);
    }

    fn user(&self) -> User {
        match self.record.scope {
            Scope::OfProvider(provider) => self.context.providers[provider].clone(),
            Scope::OfCustomer(customer) => self.context.customers[customer].clone(),
            Scope::Job(job) => {
                let job_of = self.context.history.lock().unwrap().jobs[job].clone();
                let users =
                    [&self.context.providers[job_of.provider], &self.context.customers[job_of.customer]];
                users[job % 2].clone()
            }
        }
    }

    fn scope(&self) -> RequestScope {
        let JobFilter { configuration, counterpart } = self.record.filter;
        let counterparts = match self.record.scope {
            Scope::Job(job) => return RequestScope::JobId(self.context.job_id(job)),
            Scope::OfProvider(_) => &self.context.customers,
            Scope::OfCustomer(_) => &self.context.providers,
        };
        RequestScope::AllJobs(pb::AllJobs {
            configuration_tag: configuration.map(configuration_tag).unwrap_or_default(),
            counterpart_id: counterpart.map(|number| counterparts[number].id.clone()).unwrap_or_default(),
            labels: BTreeMap::new(),
        })
    }

    /// Where the next stream starts: in 4 of 5 cases after the last message, else
    /// after one of the last 20.
    fn start(&mut self) -> (Start, Option<RequestStart>) {
        let Some(last) = self.tokens.iter().rposition(|tokens| !tokens.is_empty()) else {
            let request_start = match self.first_start {
                Start::AfterSequence(sequence) => Some(RequestStart::AfterSequence(sequence)),
                Start::Now => Some(RequestStart::FromNow(pb::FromNow {})),
                Start::Beginning | Start::Resume { .. } => None,
            };
            return (self.first_start, request_start);
        };
        let received = self.tokens[last].len();
        let earlier = self.random.u32(..5) == 0;
        let messages = if earlier { received - self.random.usize(..received.min(20)) } else { received };
        let token = self.tokens[last][messages - 1].clone();
        (Start::Resume { stream: last, messages }, Some(RequestStart::ResumeToken(token)))
    }

    async fn stream(&mut self, replica: usize, clients: &mut [UserClient; 2], stop: &CancellationToken) {
        let (start, request_start) = self.start();
        let request = pb::WatchEventsRequest {
            scope: Some(self.scope()),
            kinds: self.record.kinds.iter().map(|&kind| kind.into()).collect(),
            start: request_start,
            heartbeat_interval: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
        };
        let opened_at = self.context.now();
        let (messages, end) = (Vec::new(), StreamEnd::ClosedByWatcher);
        self.record.streams.push(Stream { replica, start, opened_at, messages, end, ended_at: opened_at });
        self.tokens.push(Vec::new());
        let call = clients[replica].events.watch_events(request);
        let end = match self.context.call("WatchEvents", call).await {
            Ok(stream) => self.read(stream, stop).await,
            Err(CallError::Refused(refusal)) => StreamEnd::Refused(refusal),
            Err(CallError::Unknown(reason)) => reason.into(),
        };
        // A watcher whose events are lost goes on.
        let refused = matches!(&end, StreamEnd::Refused(refusal) if refusal.reason != SET_BACK);
        let stream = self.record.streams.last_mut().expect("just pushed");
        (stream.end, stream.ended_at) = (end, self.context.now());
        let ended = matches!(
            stream.messages.last().map(|message| &message.body),
            Some(Body::End(pb::WatchEndReason::JobClosed, _))
        );
        self.record.read_to_end |= ended;
        self.done = self.record.read_to_end || refused || self.is_leaving();
        // `start` uses no token of an earlier stream than this.
        let last = self.tokens.iter().rposition(|tokens| !tokens.is_empty()).unwrap_or(0);
        self.tokens[..last].fill(Vec::new());
    }

    /// Whether the last stream was refused because the log was set back.
    fn is_set_back(&self) -> bool {
        self.record.streams.last().is_some_and(|stream| {
            stream.messages.is_empty()
                && matches!(&stream.end, StreamEnd::Refused(refusal) if refusal.reason == SET_BACK)
        })
    }

    /// Records the streams so far, and starts as a watcher without a token. A long log is not
    /// read again.
    fn begin_anew(&mut self) {
        let streams = std::mem::take(&mut self.record.streams);
        let record = WatcherRecord { streams, ..self.record.clone() };
        self.context.history.lock().unwrap().watchers.push(record);
        self.tokens.clear();
        let reads_all = self.context.pace.pause_factor == 1 || matches!(self.record.scope, Scope::Job(_));
        let from_now = self.first_start == Start::Now || !reads_all;
        self.first_start = if from_now { Start::Now } else { Start::Beginning };
    }

    fn is_leaving(&self) -> bool {
        !self.context.is_finishing() && self.context.now() > self.leave_at
    }

    async fn read(
        &mut self,
        mut stream: Streaming<pb::WatchEventsResponse>,
        stop: &CancellationToken,
    ) -> StreamEnd {
        let mut messages_left = match self.behavior {
            Behavior::Reconnect => self.random.usize(1..60),
            Behavior::Stay | Behavior::ReadSlowly => usize::MAX,
        };
        let close_at = self.context.now() + Duration::from_millis(self.random.u64(20..1_500));
        let (mut caught_up, mut ended) = (false, false);
        loop {
            let finishing = self.context.is_finishing();
            if !ended && ((messages_left == 0 && !finishing) || self.is_leaving()) {
                return StreamEnd::ClosedByWatcher;
            }
            if self.behavior == Behavior::Reconnect && !ended && !finishing && self.context.now() > close_at {
                return StreamEnd::ClosedByWatcher;
            }
            if self.behavior == Behavior::ReadSlowly && !finishing && self.random.u32(..40) == 0 {
                self.context.pause(&mut self.random, 3_000).await;
            }
            let message = tokio::select! {
                biased;
                message = tokio::time::timeout(SILENCE, stream.message()) => message,
                () = stop.cancelled(), if caught_up => {
                    self.record.read_to_end = true;
                    return StreamEnd::ClosedByWatcher;
                }
            };
            match message {
                Err(_) => return StreamEnd::Silent,
                Ok(Ok(None)) => return StreamEnd::Ok,
                Ok(Err(status)) => {
                    return match self.context.classify("WatchEvents", &status) {
                        CallError::Refused(refusal) => StreamEnd::Refused(refusal),
                        CallError::Unknown(reason) => reason.into(),
                    };
                }
                Ok(Ok(Some(message))) => {
                    messages_left = messages_left.saturating_sub(1);
                    self.context.count_message(&message);
                    caught_up |= matches!(message.message, Some(ResponseMessage::CaughtUp(_)));
                    ended |= matches!(message.message, Some(ResponseMessage::End(_)));
                    self.receive(message);
                }
            }
        }
    }

    fn receive(&mut self, message: pb::WatchEventsResponse) {
        let body = match message.message.expect("every response has a message") {
            ResponseMessage::Events(watched) => Body::Events(
                watched.events.into_iter().map(|event| self.context.interner.intern(event)).collect(),
            ),
            ResponseMessage::CaughtUp(caught_up) => Body::CaughtUp(caught_up.job, caught_up.steps),
            ResponseMessage::Heartbeat(_) => Body::Heartbeat,
            ResponseMessage::End(end) => Body::End(end.reason(), end.job),
        };
        let received_at = self.context.now();
        self.record
            .streams
            .last_mut()
            .expect("a stream is open")
            .messages
            .push(Message { received_at, body });
        self.tokens.last_mut().expect("a stream is open").push(message.resume_token);
    }
}

/// Watches one job after the other, each until it is closed or for some seconds.
pub async fn watch_jobs(context: Arc<Context>, name: String, stop: CancellationToken) {
    let mut random = context.random();
    while !context.is_finishing() {
        let jobs = context.history.lock().unwrap().jobs.len();
        let Some((acknowledged, sequence)) = context.recently_acknowledged(&mut random) else {
            context.pause(&mut random, 50).await;
            continue;
        };
        let latest = jobs - 1 - random.usize(..jobs.min(12));
        let (job, start) = match random.u32(..5) {
            0 => (latest, Start::AfterSequence(0)),
            1 => (acknowledged, Start::AfterSequence(sequence)),
            2 => (latest, Start::Now),
            _ => (latest, Start::Beginning),
        };
        let behavior = if random.bool() { Behavior::Reconnect } else { Behavior::Stay };
        let leave_at = context.now() + Duration::from_millis(random.u64(3_000..20_000));
        let mut watcher =
            Watcher::new(&context, &name, Scope::Job(job), behavior).starting(start).leaving_at(leave_at);
        if random.u32(..4) == 0 {
            watcher = watcher.of_kinds(&[EventKind::Step, EventKind::Complete]);
        }
        watcher.watch(stop.clone()).await;
    }
}

/// Watches all jobs of a random user from now on, for some seconds, again and again.
pub async fn watch_from_now(context: Arc<Context>, name: String, stop: CancellationToken) {
    let mut random = context.random();
    while !context.is_finishing() {
        let choice = |random: &mut fastrand::Rng| random.bool().then(|| random.usize(..2));
        let scope = [Scope::OfProvider, Scope::OfCustomer][random.usize(..2)](random.usize(..2));
        let behavior = if random.bool() { Behavior::Reconnect } else { Behavior::Stay };
        let leave_at = context.now() + Duration::from_millis(random.u64(3_000..20_000));
        let watcher =
            Watcher::new(&context, &name, scope, behavior).starting(Start::Now).leaving_at(leave_at);
        watcher.with_filter(choice(&mut random), choice(&mut random)).watch(stop.clone()).await;
    }
}
