//! Writers that append until each batch is acknowledged, watchers whose streams must stay open,
//! and the comparison of both with what is stored.

use std::{
    collections::HashMap,
    panic::resume_unwind,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use milepost_client::pb::{self, watch_events_request::Scope, watch_events_response::Message};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use milepost_testing::{Clients, User, info};

/// Pause of a writer between two batches.
const PAUSE: Duration = Duration::from_millis(20);
/// Pause before a batch is sent again. RetryInfo asks clients for a longer one, which would
/// hide how soon a server appends again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How long a writer waits for an answer before it sends the batch again.
const ANSWER: Duration = Duration::from_secs(3);
/// Longest that servers may take to append again, or to deliver what is stored, once the
/// database is complete.
const LIMIT: Duration = Duration::from_secs(60);
const MAX_BATCH: usize = 5;
const PROVIDERS: usize = 2;
/// To which servers the writers of a provider send, attempt by attempt.
const ROUTES: [&[usize]; 3] = [&[0], &[1], &[0, 1]];

/// The ids of the events of each job, by the id of the job, in order.
type Logs = HashMap<String, Vec<String>>;

pub struct Load {
    writers: JoinSet<Written>,
    watchers: JoinSet<()>,
    pub acknowledgements: Arc<Acknowledgements>,
    stop_writers: CancellationToken,
    /// Tells the watchers in the end what each of them must have received.
    stored: watch::Sender<Option<Arc<Logs>>>,
}

/// When each server acknowledged appends.
#[derive(Default)]
pub struct Acknowledgements([Mutex<Vec<Instant>>; 2]);

/// Numbers of what was done and compared.
#[derive(Debug, Default)]
pub struct Totals {
    pub events: usize,
    pub batches: usize,
    pub repeated_batches: usize,
    pub watchers: usize,
}

/// Appends to a job of its own.
struct Writer {
    /// The provider as a client of each server.
    users: [User; 2],
    job: pb::Job,
    route: &'static [usize],
    acknowledgements: Arc<Acknowledgements>,
    stop: CancellationToken,
}

/// What was acknowledged to a writer.
struct Written {
    users: [User; 2],
    job: pb::Job,
    ids: Vec<String>,
    batches: usize,
    repeated_batches: usize,
}

struct Watcher {
    name: String,
    jobs: Vec<String>,
    stream: Streaming<pb::WatchEventsResponse>,
    received: Logs,
    stored: watch::Receiver<Option<Arc<Logs>>>,
}

impl Load {
    /// Creates users and jobs, opens all streams, and starts to append.
    pub async fn start(servers: [&Clients; 2]) -> Self {
        let mut load = Self {
            writers: JoinSet::new(),
            watchers: JoinSet::new(),
            acknowledgements: Arc::default(),
            stop_writers: CancellationToken::new(),
            stored: watch::Sender::default(),
        };
        let at_each = |user: &User| servers.map(|server| server.same(user));
        let customer = servers[0].customer().await;
        let mut writers = Vec::new();
        for provider in 0..PROVIDERS {
            let mut user = servers[0].provider().await;
            user.configuration(&[("a", 1)]).await;
            let mut jobs = Vec::new();
            for route in ROUTES {
                let job = user.job(&customer).await;
                load.watch_job(at_each(&user), &job).await;
                jobs.push(job.id.clone());
                let acknowledgements = Arc::clone(&load.acknowledgements);
                let stop = load.stop_writers.clone();
                writers.push(Writer { users: at_each(&user), job, route, acknowledgements, stop });
            }
            load.watch_all(&format!("provider {provider}"), at_each(&user), &jobs).await;
        }
        let jobs: Vec<String> = writers.iter().map(|writer| writer.job.id.clone()).collect();
        load.watch_all("the customer", at_each(&customer), &jobs).await;
        for writer in writers {
            load.writers.spawn(writer.write());
        }
        load
    }

    async fn watch_job(&mut self, users: [User; 2], job: &pb::Job) {
        let scope = Scope::JobId(job.id.clone());
        self.watch(&format!("the job {}", job.id), users, &scope, std::slice::from_ref(&job.id)).await;
    }

    async fn watch_all(&mut self, name: &str, users: [User; 2], jobs: &[String]) {
        let scope = Scope::AllJobs(pb::AllJobs::default());
        self.watch(&format!("all jobs of {name}"), users, &scope, jobs).await;
    }

    /// Opens a stream on each server.
    async fn watch(&mut self, name: &str, users: [User; 2], scope: &Scope, jobs: &[String]) {
        for (server, mut user) in users.into_iter().enumerate() {
            let request = pb::WatchEventsRequest { scope: Some(scope.clone()), ..Default::default() };
            let watcher = Watcher {
                name: format!("the watcher of {name} at server {server}"),
                jobs: jobs.to_vec(),
                stream: user.events.watch_events(request).await.unwrap().into_inner(),
                received: Logs::new(),
                stored: self.stored.subscribe(),
            };
            self.watchers.spawn(watcher.watch());
        }
    }

    /// Waits for a writer or a watcher to fail, and panics as it did.
    pub async fn failure(&mut self) {
        let failed = tokio::select! {
            Some(ended) = self.writers.join_next() => ended.err(),
            Some(ended) = self.watchers.join_next() => ended.err(),
        };
        resume_unwind(failed.expect("no task ends before the load is finished").into_panic());
    }

    /// Ends the load: compares all that was acknowledged with what each server lists, and that
    /// with all that was received.
    pub async fn finish(self) -> Totals {
        self.stop_writers.cancel();
        let mut totals = Totals { watchers: self.watchers.len(), ..Totals::default() };
        let mut stored = Logs::new();
        for written in
            timeout(LIMIT, self.writers.join_all()).await.expect("the last batches are acknowledged")
        {
            for mut user in written.users {
                let listed = user.list(&written.job).await;
                let sequences: Vec<i64> = listed.iter().map(|event| event.sequence).collect();
                let ids: Vec<String> = listed.into_iter().map(|event| event.id).collect();
                assert_eq!(ids, written.ids, "the job {} has what was acknowledged", written.job.id);
                assert!(sequences.into_iter().eq((1..).take(ids.len())), "a job is numbered without a gap");
            }
            totals.events += written.ids.len();
            totals.batches += written.batches;
            totals.repeated_batches += written.repeated_batches;
            stored.insert(written.job.id, written.ids);
        }
        self.stored.send_replace(Some(Arc::new(stored)));
        // Each of them gives up by itself.
        self.watchers.join_all().await;
        totals
    }
}

impl Acknowledgements {
    fn record(&self, server: usize) {
        self.0[server].lock().unwrap().push(Instant::now());
    }

    /// Waits until each server has acknowledged an append from now on.
    pub async fn wait_for_each(&self) {
        let now = Instant::now();
        let waiting = async {
            while !self.0.iter().all(|of_one| of_one.lock().unwrap().last().is_some_and(|last| *last > now)) {
                sleep(PAUSE).await;
            }
        };
        assert!(timeout(LIMIT, waiting).await.is_ok(), "a server did not append within {LIMIT:?}");
    }

    /// The longest time since `from` without an acknowledgement of this server.
    pub fn longest_gap(&self, server: usize, from: Instant) -> Duration {
        let mut moments = self.0[server].lock().unwrap().clone();
        moments.retain(|moment| *moment > from);
        let before = [from].into_iter().chain(moments.iter().copied());
        before.zip(&moments).map(|(before, after)| *after - before).max().unwrap_or_default()
    }
}

impl Writer {
    async fn write(mut self) -> Written {
        let mut random = fastrand::Rng::new();
        let (mut ids, mut batches, mut repeated_batches) = (Vec::new(), 0, 0);
        while !self.stop.is_cancelled() {
            let count = if random.bool() { 1 } else { random.usize(2..=MAX_BATCH) };
            let events: Vec<pb::NewEvent> = (0..count).map(|_| info("progress")).collect();
            let (appended, attempts) = self.append_until_acknowledged(&events).await;
            let acknowledged: Vec<(i64, String)> =
                appended.into_iter().map(|event| (event.sequence, event.id)).collect();
            let sent: Vec<(i64, String)> =
                (1..).skip(ids.len()).zip(events.into_iter().map(|event| event.id)).collect();
            assert_eq!(acknowledged, sent, "the job {} is numbered in the order of its events", self.job.id);
            ids.extend(sent.into_iter().map(|(_, id)| id));
            batches += 1;
            repeated_batches += usize::from(attempts > 1);
            sleep(PAUSE).await;
        }
        Written { users: self.users, job: self.job, ids, batches, repeated_batches }
    }

    async fn append_until_acknowledged(
        &mut self,
        events: &[pb::NewEvent],
    ) -> (Vec<pb::AppendedEvent>, usize) {
        for (attempt, server) in self.route.iter().cycle().enumerate() {
            let append = self.users[*server].try_append(&self.job, events.to_vec());
            match timeout(ANSWER, append).await {
                Ok(Ok(appended)) => {
                    self.acknowledgements.record(*server);
                    return (appended, attempt + 1);
                }
                Ok(Err(status)) => {
                    assert!(may_be_repeated(&status), "an append at server {server}: {status:?}")
                }
                // Whether the batch is stored is unknown.
                Err(_) => {}
            }
            sleep(RETRY_PAUSE).await;
        }
        unreachable!("a route does not end")
    }
}

fn may_be_repeated(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Aborted)
}

impl Watcher {
    /// Returns when all that is stored was received, each event once.
    async fn watch(mut self) {
        let stored = loop {
            tokio::select! {
                answer = self.stream.message() => self.receive(answer),
                _ = self.stored.changed() => {
                    let stored = self.stored.borrow().clone();
                    break stored.expect("the logs are sent once");
                }
            }
        };
        let of_mine = |(job, _): &(&String, &Vec<String>)| self.jobs.contains(job);
        let expected: Logs =
            stored.iter().filter(of_mine).map(|(job, ids)| (job.clone(), ids.clone())).collect();
        let count = |logs: &Logs| logs.values().map(Vec::len).sum::<usize>();
        let deadline = tokio::time::Instant::now() + LIMIT;
        while count(&self.received) < count(&expected) {
            let Ok(answer) = tokio::time::timeout_at(deadline, self.stream.message()).await else {
                let [received, expected] = [&self.received, &expected].map(count);
                panic!("{} received {received} of {expected} events", self.name);
            };
            self.receive(answer);
        }
        assert!(self.received == expected, "{} received other events than are stored", self.name);
    }

    fn receive(&mut self, answer: Result<Option<pb::WatchEventsResponse>, Status>) {
        let message = match answer {
            Ok(Some(response)) => response.message.expect("every response has a message"),
            Ok(None) => panic!("the stream of {} ended", self.name),
            Err(status) => panic!("the stream of {} ended: {status:?}", self.name),
        };
        match message {
            Message::Events(watched) => {
                for event in watched.events {
                    let ids = self.received.entry(event.job_id).or_default();
                    let next = i64::try_from(ids.len()).unwrap() + 1;
                    assert_eq!(event.sequence, next, "{} received an event out of order", self.name);
                    ids.push(event.id);
                }
            }
            Message::CaughtUp(_) | Message::Heartbeat(_) => {}
            Message::End(end) => panic!("{} was told to end: {end:?}", self.name),
        }
    }
}
