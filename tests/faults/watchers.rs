//! Those who watch: patient ones, slow ones, and ones that leave and come back
//! with a token, to the same server or the other.

use std::{sync::Arc, time::Duration};

use milepost::pb::{
    self, EventKind,
    watch_events_request::{Scope as Asked, Start as From},
    watch_events_response::Message as Said,
};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::{
    history::{Body, Chain, End, Message, Moment, Only, Scope, Start, Stream},
    world::{Caller, Failure, User, World, tag},
};

/// How a watcher behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// Stays while it can.
    Patient,
    /// Leaves after a few messages.
    Restless,
    /// Now and then reads nothing for seconds.
    Slow,
}

/// Longest silence before a watcher looks elsewhere; heartbeats come every 5 s,
/// but not while the database is away.
pub const SILENCE: Duration = Duration::from_secs(9);

pub struct Watcher {
    pub world: Arc<World>,
    pub chain: Chain,
    pub habit: Habit,
    random: fastrand::Rng,
    /// A token for each message of each stream.
    tokens: Vec<Vec<String>>,
    from: Start,
    /// It leaves for good then, unless all is nearly over.
    until: Moment,
    /// The one server that it asks.
    only: Option<usize>,
    done: bool,
}

impl Watcher {
    pub fn new(world: &Arc<World>, name: &str, scope: Scope, habit: Habit) -> Self {
        let chain = Chain {
            name: name.to_owned(),
            scope,
            only: Only::default(),
            prompt: habit != Habit::Slow,
            kinds: Vec::new(),
            streams: Vec::new(),
            whole: false,
        };
        let random = world.random();
        Self {
            world: Arc::clone(world),
            chain,
            habit,
            random,
            tokens: Vec::new(),
            from: Start::Beginning,
            until: Moment::MAX,
            only: None,
            done: false,
        }
    }

    pub fn at(mut self, replica: usize) -> Self {
        self.only = Some(replica);
        self
    }

    pub fn until(mut self, moment: Moment) -> Self {
        self.until = moment;
        self
    }

    pub fn only(mut self, configuration: Option<usize>, counterpart: Option<usize>) -> Self {
        self.chain.only = Only { configuration, counterpart };
        self
    }

    pub fn of_kinds(mut self, kinds: &[EventKind]) -> Self {
        self.chain.kinds = kinds.to_vec();
        self
    }

    pub fn from(mut self, start: Start) -> Self {
        self.from = start;
        self
    }

    /// Watches until the job is closed, or until `over`. Once that is so, and
    /// it has caught up, nothing more can come.
    pub async fn watch(mut self, over: CancellationToken) {
        let user = self.user();
        let mut callers = self.world.callers(&user);
        if self.habit == Habit::Slow {
            for (replica, caller) in callers.iter_mut().enumerate() {
                caller.events = self.world.slow_caller(replica, &user);
            }
        }
        let mut replica = self.random.usize(..2);
        while !self.done {
            self.stream(self.only.unwrap_or(replica), &mut callers, &over).await;
            if self.random.u32(..4) > 0 {
                replica = 1 - replica;
            }
            let nothing_came = self.chain.streams.last().is_none_or(|stream| stream.messages.is_empty());
            let pause = if nothing_came { 100 } else { self.random.u64(..50) };
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.world.history.lock().unwrap().chains.push(self.chain);
    }

    fn user(&self) -> User {
        match self.chain.scope {
            Scope::OfProvider(provider) => self.world.providers[provider].clone(),
            Scope::OfCustomer(customer) => self.world.customers[customer].clone(),
            Scope::Job(job) => {
                let of = self.world.history.lock().unwrap().jobs[job].clone();
                [&self.world.providers[of.provider], &self.world.customers[of.customer]][job % 2].clone()
            }
        }
    }

    fn asked(&self) -> Asked {
        let Only { configuration, counterpart } = self.chain.only;
        let others = match self.chain.scope {
            Scope::Job(job) => return Asked::JobId(self.world.job_id(job)),
            Scope::OfProvider(_) => &self.world.customers,
            Scope::OfCustomer(_) => &self.world.providers,
        };
        Asked::AllJobs(pb::AllJobs {
            configuration_tag: configuration.map(tag).unwrap_or_default(),
            counterpart_id: counterpart.map(|other| others[other].id.clone()).unwrap_or_default(),
        })
    }

    /// Where the next stream starts: mostly after the last message, now and then
    /// after an earlier one.
    fn start(&mut self) -> (Start, Option<From>) {
        let Some(last) = self.tokens.iter().rposition(|tokens| !tokens.is_empty()) else {
            let from = match self.from {
                Start::AfterSequence(sequence) => Some(From::AfterSequence(sequence)),
                Start::Now => Some(From::FromNow(pb::FromNow {})),
                Start::Beginning | Start::After { .. } => None,
            };
            return (self.from, from);
        };
        let received = self.tokens[last].len();
        let earlier = self.random.u32(..5) == 0;
        let messages = if earlier { received - self.random.usize(..received.min(20)) } else { received };
        let token = self.tokens[last][messages - 1].clone();
        (Start::After { stream: last, messages }, Some(From::ResumeToken(token)))
    }

    async fn stream(&mut self, replica: usize, callers: &mut [Caller; 2], over: &CancellationToken) {
        let (start, from) = self.start();
        let request = pb::WatchEventsRequest {
            scope: Some(self.asked()),
            kinds: self.chain.kinds.iter().map(|&kind| kind.into()).collect(),
            start: from,
            heartbeat_interval: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
        };
        let opened = self.world.now();
        let (messages, end) = (Vec::new(), End::Left);
        self.chain.streams.push(Stream { replica, start, opened, messages, end, over: opened });
        self.tokens.push(Vec::new());
        let call = callers[replica].events.watch_events(request);
        let end = match self.world.answer("WatchEvents", call).await {
            Ok(stream) => self.read(stream, over).await,
            Err(Failure::Refused(refusal)) => End::Refused(refusal),
            Err(Failure::Unknown(lost)) => lost.into(),
        };
        // What it was told is that nothing more comes.
        let refused = matches!(end, End::Refused(_));
        let stream = self.chain.streams.last_mut().expect("just pushed");
        (stream.end, stream.over) = (end, self.world.now());
        let ended = matches!(
            stream.messages.last().map(|message| &message.body),
            Some(Body::Ended(pb::WatchEndReason::JobClosed, _))
        );
        self.chain.whole |= ended;
        self.done = self.chain.whole || refused || self.is_leaving();
        // Nobody goes back further than to the last stream that said anything.
        let last = self.tokens.iter().rposition(|tokens| !tokens.is_empty()).unwrap_or(0);
        self.tokens[..last].fill(Vec::new());
    }

    fn is_leaving(&self) -> bool {
        !self.world.is_finishing() && self.world.now() > self.until
    }

    async fn read(
        &mut self,
        mut stream: Streaming<pb::WatchEventsResponse>,
        over: &CancellationToken,
    ) -> End {
        let mut left = match self.habit {
            Habit::Restless => self.random.usize(1..60),
            Habit::Patient | Habit::Slow => usize::MAX,
        };
        let leave_at = self.world.now() + Duration::from_millis(self.random.u64(20..1_500));
        let (mut caught_up, mut ended) = (false, false);
        loop {
            let finishing = self.world.is_finishing();
            if !ended && ((left == 0 && !finishing) || self.is_leaving()) {
                return End::Left;
            }
            if self.habit == Habit::Restless && !ended && !finishing && self.world.now() > leave_at {
                return End::Left;
            }
            if self.habit == Habit::Slow && !finishing && self.random.u32(..40) == 0 {
                self.world.pause(&mut self.random, 3_000).await;
            }
            let message = tokio::select! {
                biased;
                message = tokio::time::timeout(SILENCE, stream.message()) => message,
                () = over.cancelled(), if caught_up => {
                    self.chain.whole = true;
                    return End::Left;
                }
            };
            match message {
                Err(_) => return End::Silent,
                Ok(Ok(None)) => return End::Ok,
                Ok(Err(status)) => {
                    return match self.world.failure("WatchEvents", &status) {
                        Failure::Refused(refusal) => End::Refused(refusal),
                        Failure::Unknown(lost) => lost.into(),
                    };
                }
                Ok(Ok(Some(message))) => {
                    left = left.saturating_sub(1);
                    self.world.received(&message);
                    caught_up |= matches!(message.message, Some(Said::CaughtUp(_)));
                    ended |= matches!(message.message, Some(Said::End(_)));
                    self.hear(message);
                }
            }
        }
    }

    fn hear(&mut self, message: pb::WatchEventsResponse) {
        let body = match message.message.expect("every message says something") {
            Said::Events(watched) => Body::Events(
                watched.events.into_iter().map(|event| self.world.events.one_of(event)).collect(),
            ),
            Said::CaughtUp(caught_up) => Body::CaughtUp(caught_up.job),
            Said::Heartbeat(_) => Body::Heartbeat,
            Said::End(end) => Body::Ended(end.reason(), end.job),
        };
        let at = self.world.now();
        self.chain.streams.last_mut().expect("it is open").messages.push(Message { at, body });
        self.tokens.last_mut().expect("it is open").push(message.resume_token);
    }
}

/// Watches one job after the other from its beginning, or from where it is,
/// each until it is closed.
pub async fn watch_jobs(world: Arc<World>, name: String, over: CancellationToken) {
    let mut random = world.random();
    while !world.is_finishing() {
        let jobs = world.history.lock().unwrap().jobs.len();
        let Some((known, sequence)) = world.recently_acknowledged(&mut random) else {
            world.pause(&mut random, 50).await;
            continue;
        };
        let latest = jobs - 1 - random.usize(..jobs.min(12));
        let (job, start) = match random.u32(..5) {
            0 => (latest, Start::AfterSequence(0)),
            1 => (known, Start::AfterSequence(sequence)),
            2 => (latest, Start::Now),
            _ => (latest, Start::Beginning),
        };
        let habit = if random.bool() { Habit::Restless } else { Habit::Patient };
        let until = world.now() + Duration::from_millis(random.u64(3_000..20_000));
        let mut watcher = Watcher::new(&world, &name, Scope::Job(job), habit).from(start).until(until);
        if random.u32(..4) == 0 {
            watcher = watcher.of_kinds(&[EventKind::Step, EventKind::Complete]);
        }
        watcher.watch(over.clone()).await;
    }
}

/// Watches all jobs of somebody from now on, for a while, again and again.
pub async fn watch_from_now(world: Arc<World>, name: String, over: CancellationToken) {
    let mut random = world.random();
    while !world.is_finishing() {
        let one = |random: &mut fastrand::Rng| random.bool().then(|| random.usize(..2));
        let scope = [Scope::OfProvider, Scope::OfCustomer][random.usize(..2)](random.usize(..2));
        let habit = if random.bool() { Habit::Restless } else { Habit::Patient };
        let until = world.now() + Duration::from_millis(random.u64(3_000..20_000));
        let watcher = Watcher::new(&world, &name, scope, habit).from(Start::Now).until(until);
        watcher.only(one(&mut random), one(&mut random)).watch(over.clone()).await;
    }
}
