//! One campaign: starts Postgres, the replicas and the load, injects faults, reads
//! back every log, and has the history checked.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use milepost_client::pb::{self, EventKind};
use milepost_testing::{Clients, Clock, Node, Proxy, TemporaryDir, print_line, url, within};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::{
    checker::{self, Guarantee, Violation},
    clients::UserClient,
    context::{Context, PROVIDERS, Pace},
    fault_injector::{FaultInjector, InjectedFault, RECOVERY_LIMIT},
    history::{FaultWindow, FinalRead, History, MemoryPeak, Moment, Scope, UnexpectedAnswer},
    hostile, memory,
    postgres::Postgres,
    probes::{Successes, probe},
    publishers::publish,
    readers::{cancel_jobs, read_jobs},
    replica::Replica,
    revokers::revoke,
    watchers::{Behavior, Watcher, watch_from_now, watch_jobs},
    writers::{SharedJobs, Writer},
};

/// Writers of each provider.
const WRITERS: [usize; PROVIDERS] = [8, 2];
const READERS: usize = 2;
const PUBLISHERS: usize = 4;
const REVOKERS: usize = 6;
const JOB_WATCHERS: usize = 5;
const NEW_EVENT_WATCHERS: usize = 3;
/// Jobs of a provider that several writers append to at once.
const SHARED_JOBS: usize = 3;
/// Jobs that are watched from the beginning after the campaign, at each replica.
const JOBS_WATCHED_AGAIN: usize = 20;
/// Limit of each step after the last fault has been healed.
const TIMEOUT: Duration = Duration::from_secs(300);
/// A run longer than this uses the pace [`LONG`], so that the history for the
/// checker fits into memory.
pub const LONG_RUN_S: u64 = 300;
const SHORT: Pace = Pace { pause_factor: 1, max_rest_ms: 100, max_fault_ms: 2_500 };
const LONG: Pace = Pace { pause_factor: 3, max_rest_ms: 4_000, max_fault_ms: 8_000 };

pub struct CampaignResult {
    pub history: History,
    pub injected_faults: Vec<InjectedFault>,
    pub messages: u64,
    pub violations: Vec<Violation>,
    strict: bool,
}

impl CampaignResult {
    /// Whether the run has found a fault.
    pub fn has_failed(&self) -> bool {
        let counts = |violation: &Violation| self.strict || violation.guarantee != Guarantee::InTime;
        self.violations.iter().any(counts) || (self.strict && !self.slow_recoveries().is_empty())
    }

    /// Database faults after which a replica did not append again within
    /// [`RECOVERY_LIMIT`].
    pub fn slow_recoveries(&self) -> Vec<&InjectedFault> {
        let is_slow = |injected: &&InjectedFault| {
            injected.fault.is_database_fault()
                && injected.outages.iter().any(|outage| outage.until_recovered > RECOVERY_LIMIT)
        };
        self.injected_faults.iter().filter(is_slow).collect()
    }
}

/// A strict run fails, too, if something took too long.
pub async fn run(seed: u64, seconds: u64, strict: bool) -> CampaignResult {
    let mut random = fastrand::Rng::with_seed(seed);
    let dir = TemporaryDir::new();
    let clock = Clock::if_installed(dir.path());
    let postgres = Postgres::start(&dir, seconds).await;
    let [at_0, at_1a, at_1b] = ["proxy-0", "proxy-1a", "proxy-1b"].map(|name| dir.path().join(name));
    let [a, b] = postgres.nodes().each_ref().map(Node::dir);
    let proxies = [vec![Proxy::at(&at_0, a)], vec![Proxy::at(&at_1a, a), Proxy::at(&at_1b, b)]];
    let replicas = [
        Replica::start(url(&[&at_0], "milepost"), None).await,
        Replica::start(url(&[&at_1a, &at_1b], "milepost"), clock).await,
    ];
    let addresses = [replicas[0].address, replicas[1].address];
    let pace = if seconds > LONG_RUN_S { LONG } else { SHORT };
    let context = Arc::new(Context::new(addresses, random.u64(..), pace, strict).await);
    let successes = [Successes::default(), Successes::default()];

    let stop_watching = CancellationToken::new();
    let shared = context.shared_connections();
    let mut load = start_load(&context, &successes, &shared);
    let mut watchers = start_watchers(&context, &stop_watching, &shared);
    let mut injector = FaultInjector {
        _dir: dir,
        postgres,
        proxies,
        replicas,
        context: Arc::clone(&context),
        successes,
        random,
        available_at: Vec::new(),
    };
    let injected_faults = injector.run(Duration::from_secs(seconds)).await;

    context.finishing.cancel();
    within(TIMEOUT, "all requests to be answered", join(&mut load)).await;
    let answered = context.now();
    print_line(format!("{:8.3} s  all requests are answered", answered.as_secs_f64()));
    let jobs = context.history.lock().unwrap().jobs.len();
    for replica in 0..2 {
        within(TIMEOUT, "every job to be read", read_all_jobs(&context, replica, jobs)).await;
        watch_again(&context, replica, jobs, &stop_watching, &mut watchers);
    }
    let read = context.now();
    print_line(format!("{:8.3} s  every job is read", read.as_secs_f64()));
    within(TIMEOUT, "watchers to receive all events", until_no_events_arrive(&context)).await;
    print_line(format!("{:8.3} s  watchers have received all events", context.now().as_secs_f64()));
    stop_watching.cancel();
    within(TIMEOUT, "watchers to close their streams", join(&mut watchers)).await;

    print_line(format!("{:8.3} s  watchers have closed their streams", context.now().as_secs_f64()));
    let mut history = std::mem::take(&mut *context.history.lock().unwrap());
    history.resolve_missing_ids();
    for (number, replica) in injector.replicas.iter().enumerate() {
        record_logged_errors(&mut history, replica.logged_errors());
        let peaks = replica.memory_peaks().into_iter();
        history.memory_peaks.extend(peaks.map(|bytes| MemoryPeak { replica: number, bytes }));
    }
    history.memory_bound_bytes = memory::bound_bytes();
    history.fault_windows = injected_faults.iter().map(InjectedFault::fault_window).collect();
    for (replica, restarts) in history.restarts.iter_mut().enumerate() {
        let of_replica = injected_faults.iter().filter(|injected| injected.replica == Some(replica));
        let restarted = of_replica.filter(|injected| injected.fault.restarts_server());
        *restarts = restarted.map(|injected| injected.began_at).collect();
    }
    // Reading all logs at once slows all other calls down.
    history.fault_windows.push(FaultWindow { from: answered, to: read, affects: [true; 2] });
    let violations = checker::check(&history);
    print_line(format!("{:8.3} s  the history is checked", context.now().as_secs_f64()));
    CampaignResult {
        history,
        injected_faults,
        messages: context.messages_received.load(Ordering::Relaxed),
        violations,
        strict,
    }
}

/// Records the errors that a server has logged, except for one for each time when commits
/// were lost.
fn record_logged_errors(history: &mut History, errors: Vec<String>) {
    let (set_back, other): (Vec<_>, Vec<_>) =
        errors.into_iter().partition(|error| error.contains("the log was set back"));
    for error in set_back.into_iter().skip(history.set_backs.len()).chain(other) {
        let what = format!("a server logged {error}");
        history.unexpected_answers.push(UnexpectedAnswer { at: Moment::ZERO, what });
    }
}

/// Waits for all tasks and passes on their panics.
async fn join(tasks: &mut JoinSet<()>) {
    while let Some(joined) = tasks.join_next().await {
        joined.unwrap();
    }
}

/// The connections of `shared` are also those of the hostile tenant.
fn start_load(context: &Arc<Context>, successes: &[Successes; 2], shared: &[Clients; 2]) -> JoinSet<()> {
    let mut load = JoinSet::new();
    hostile::start(context, shared, &mut load);
    for (provider, writers) in WRITERS.into_iter().enumerate() {
        let shared_jobs: Arc<SharedJobs> = Arc::new(Mutex::new(vec![None; SHARED_JOBS]));
        for n in 0..writers {
            let writer = Writer::new(context, format!("writer {n} of provider {provider}"), provider);
            load.spawn(writer.write(Arc::clone(&shared_jobs)));
        }
        let without_ids =
            Writer::new(context, format!("writer without ids of provider {provider}"), provider);
        load.spawn(without_ids.write_without_ids());
    }
    let writer = Writer::new(context, "writer over shared connections".to_owned(), 1);
    load.spawn(writer.over(shared).write(Arc::new(Mutex::new(vec![None; SHARED_JOBS]))));
    for _ in 0..READERS {
        load.spawn(read_jobs(Arc::clone(context)));
    }
    load.spawn(cancel_jobs(Arc::clone(context)));
    for n in 0..PUBLISHERS {
        load.spawn(publish(Arc::clone(context), format!("publisher {n}")));
    }
    for _ in 0..REVOKERS {
        load.spawn(revoke(Arc::clone(context)));
    }
    for (replica, successes) in successes.iter().enumerate() {
        load.spawn(probe(Arc::clone(context), replica, Arc::clone(successes)));
    }
    load
}

fn start_watchers(context: &Arc<Context>, stop: &CancellationToken, shared: &[Clients; 2]) -> JoinSet<()> {
    let watcher = |name: &str, scope, behavior| Watcher::new(context, name, scope, behavior);
    let rare_kinds = [EventKind::Error, EventKind::Complete, EventKind::Close];
    let all = [
        watcher("provider 0, staying", Scope::OfProvider(0), Behavior::Stay),
        watcher("provider 1, staying", Scope::OfProvider(1), Behavior::Stay),
        watcher("customer 0, staying", Scope::OfCustomer(0), Behavior::Stay),
        watcher("provider 0, reconnecting", Scope::OfProvider(0), Behavior::Reconnect),
        watcher("provider 1, reconnecting", Scope::OfProvider(1), Behavior::Reconnect),
        watcher("customer 1, reconnecting", Scope::OfCustomer(1), Behavior::Reconnect),
        watcher("provider 0, reading slowly", Scope::OfProvider(0), Behavior::ReadSlowly),
        watcher("customer 1, reading slowly", Scope::OfCustomer(1), Behavior::ReadSlowly),
        watcher("provider 0, some kinds, reconnecting", Scope::OfProvider(0), Behavior::Reconnect)
            .of_kinds(&rare_kinds),
        watcher("provider 0, configuration 1, reconnecting", Scope::OfProvider(0), Behavior::Reconnect)
            .with_filter(Some(1), None),
        watcher("customer 1, provider 1, staying", Scope::OfCustomer(1), Behavior::Stay)
            .with_filter(None, Some(1)),
        watcher(
            "customer 0, configuration 2, provider 0, reading slowly",
            Scope::OfCustomer(0),
            Behavior::ReadSlowly,
        )
        .with_filter(Some(2), Some(0)),
        watcher("provider 1, over shared connections", Scope::OfProvider(1), Behavior::Stay).over(shared),
    ];
    let mut watchers = JoinSet::new();
    for watcher in all {
        watchers.spawn(watcher.watch(stop.clone()));
    }
    for n in 0..JOB_WATCHERS {
        watchers.spawn(watch_jobs(Arc::clone(context), format!("watcher {n} of single jobs"), stop.clone()));
    }
    for n in 0..NEW_EVENT_WATCHERS {
        watchers.spawn(watch_from_now(
            Arc::clone(context),
            format!("watcher {n} of new events"),
            stop.clone(),
        ));
    }
    watchers
}

/// Starts watches from the beginning: of all jobs, and of the last jobs singly.
fn watch_again(
    context: &Arc<Context>,
    replica: usize,
    jobs: usize,
    stop: &CancellationToken,
    watchers: &mut JoinSet<()>,
) {
    for provider in 0..PROVIDERS {
        let name = format!("final watcher of provider {provider}");
        let watcher = Watcher::new(context, &name, Scope::OfProvider(provider), Behavior::Stay);
        watchers.spawn(watcher.at(replica).watch(stop.clone()));
    }
    for job in (0..jobs).rev().take(JOBS_WATCHED_AGAIN) {
        let watcher = Watcher::new(context, "final watcher of a job", Scope::Job(job), Behavior::Stay);
        watchers.spawn(watcher.at(replica).watch(stop.clone()));
    }
}

/// Returns once no watcher has received an event for 1.5 s.
async fn until_no_events_arrive(context: &Context) {
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        let now = context.events_received.load(Ordering::Relaxed);
        if now == before {
            return;
        }
        before = now;
    }
}

/// Records every job and its log as a replica returns them.
async fn read_all_jobs(context: &Arc<Context>, replica: usize, jobs: usize) {
    let mut readers = JoinSet::new();
    for first in 0..8 {
        let context = Arc::clone(context);
        let mut clients: Vec<_> =
            context.providers.iter().map(|provider| context.client(replica, provider)).collect();
        readers.spawn(async move {
            for job in (first..jobs).step_by(8) {
                let provider = context.history.lock().unwrap().jobs[job].provider;
                let read = read_job(&context, &mut clients[provider], replica, job).await;
                context.history.lock().unwrap().final_reads.extend(read);
            }
        });
    }
    join(&mut readers).await;
}

/// A job and its whole log, read in pages whose size differs by job; none if the job does not
/// exist.
pub async fn read_job(
    context: &Context,
    client: &mut UserClient,
    replica: usize,
    job: usize,
) -> Option<FinalRead> {
    let id = context.job_id(job);
    let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(id.clone())) };
    let found = match client.jobs.get_job(request).await {
        Err(status) if status.code() == Code::NotFound => return None,
        found => found.unwrap().into_inner().job.unwrap(),
    };
    let mut log = Vec::new();
    let mut request = pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(id)),
        page_size: 20 + i32::try_from(job % 7).unwrap() * 80,
        ..Default::default()
    };
    loop {
        let page = client.events.list_events(request.clone()).await.unwrap().into_inner();
        log.extend(page.events.into_iter().map(|event| context.interner.intern(event)));
        if page.next_page_token.is_empty() {
            return Some(FinalRead { replica, job, found, log });
        }
        request.page_token = page.next_page_token;
    }
}
