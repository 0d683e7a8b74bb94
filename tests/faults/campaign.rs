//! From the first job to the last read.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use milepost::pb::{self, EventKind};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    checker::{self, Violation},
    cluster::Cluster,
    history::{Disturbance, History, Read, Scope},
    nemesis::{Bed, Episode, PROMISE},
    probes::{Successes, probe},
    proxy::Proxy,
    publishers::publish,
    readers::look_around,
    replica::{Clock, Replica},
    say,
    temporary::TemporaryDir,
    watchers::{Habit, Watcher, watch_from_now, watch_jobs},
    world::{Caller, PROVIDERS, Pace, World, within},
    writers::{Slots, Writer},
};

/// By provider.
const WRITERS: [usize; PROVIDERS] = [8, 2];
const READERS: usize = 2;
const PUBLISHERS: usize = 4;
const JOB_WATCHERS: usize = 5;
const LATE_WATCHERS: usize = 3;
/// Jobs that several write to at once.
const SHARED: usize = 3;
/// Jobs that are watched once more when all is over, at each server.
const WATCHED_AGAIN: usize = 20;
/// Longest that anything may take once all is healed.
const TIMEOUT: Duration = Duration::from_secs(60);
/// From so many seconds on, everybody takes more time, so that what is
/// remembered for the checker fits into memory.
const LONG_S: u64 = 300;
const SHORT: Pace = Pace { slower: 1, rest_ms: 100, fault_ms: 2_500 };
const LONG: Pace = Pace { slower: 3, rest_ms: 4_000, fault_ms: 8_000 };

/// What came of a campaign.
pub struct Finding {
    pub history: History,
    pub episodes: Vec<Episode>,
    pub messages: u64,
    pub violations: Vec<Violation>,
}

impl Finding {
    /// Faults of the database after which the service was not back as promised.
    pub fn late(&self) -> Vec<&Episode> {
        let is_late = |episode: &&Episode| {
            episode.fault.is_of_the_database()
                && episode.outages.iter().any(|outage| outage.until_back > PROMISE)
        };
        self.episodes.iter().filter(is_late).collect()
    }
}

pub async fn run(seed: u64, seconds: u64) -> Finding {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut dir = TemporaryDir::new();
    let clock = Clock::new(&dir);
    let cluster = Cluster::start(&dir, seconds).await;
    let proxies = ["near-0", "near-1"].map(|name| Proxy::start(dir.path().join(name), cluster.socket()));
    let [first, second] = [0, 1].map(|n: usize| proxies[n].database_url());
    let replicas = [
        Replica::start("server-0", first, &mut dir, None).await,
        Replica::start("server-1", second, &mut dir, Some(clock)).await,
    ];
    let addresses = [replicas[0].address, replicas[1].address];
    let pace = if seconds > LONG_S { LONG } else { SHORT };
    let world = Arc::new(World::new(addresses, random.u64(..), pace).await);
    let successes = [Successes::default(), Successes::default()];

    let over = CancellationToken::new();
    let mut load = start_load(&world, &successes);
    let mut watchers = start_watchers(&world, &over);
    let mut bed = Bed { dir, cluster, proxies, replicas, world: Arc::clone(&world), successes, random };
    let episodes = bed.torment(Duration::from_secs(seconds)).await;

    world.finishing.cancel();
    within(TIMEOUT, "everything to be answered", join(&mut load)).await;
    let answered = world.now();
    say(format!("{:8.3} s  everything is answered", answered.as_secs_f64()));
    let jobs = world.history.lock().unwrap().jobs.len();
    for replica in 0..2 {
        within(TIMEOUT * 5, "every job to be read", read_all(&world, replica, jobs)).await;
        watch_again(&world, replica, jobs, &over, &mut watchers);
    }
    let read = world.now();
    say(format!("{:8.3} s  every job was read", read.as_secs_f64()));
    within(TIMEOUT * 5, "watchers to have seen everything", until_quiet(&world)).await;
    say(format!("{:8.3} s  watchers saw everything", world.now().as_secs_f64()));
    over.cancel();
    within(TIMEOUT, "watchers to leave", join(&mut watchers)).await;

    say(format!("{:8.3} s  watchers left", world.now().as_secs_f64()));
    let mut history = std::mem::take(&mut *world.history.lock().unwrap());
    history.name_nameless();
    history.disturbances = episodes.iter().map(Episode::disturbance).collect();
    // Whoever reads everything at once takes it from all others.
    history.disturbances.push(Disturbance { from: answered, to: read, touches: [true; 2] });
    let violations = checker::check(&history);
    say(format!("{:8.3} s  everything is checked", world.now().as_secs_f64()));
    Finding { history, episodes, messages: world.messages.load(Ordering::Relaxed), violations }
}

/// Waits for all of them; what panics, panics here.
async fn join(tasks: &mut JoinSet<()>) {
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

fn start_load(world: &Arc<World>, successes: &[Successes; 2]) -> JoinSet<()> {
    let mut load = JoinSet::new();
    for (provider, writers) in WRITERS.into_iter().enumerate() {
        let slots: Arc<Slots> = Arc::new(Mutex::new(vec![None; SHARED]));
        for n in 0..writers {
            let writer = Writer::new(world, format!("writer {n} of {provider}"), provider);
            load.spawn(writer.write(Arc::clone(&slots)));
        }
        let careless = Writer::new(world, format!("careless writer of {provider}"), provider);
        load.spawn(careless.write_carelessly());
    }
    for _ in 0..READERS {
        load.spawn(look_around(Arc::clone(world)));
    }
    for n in 0..PUBLISHERS {
        load.spawn(publish(Arc::clone(world), format!("publisher {n}")));
    }
    for (replica, successes) in successes.iter().enumerate() {
        load.spawn(probe(Arc::clone(world), replica, Arc::clone(successes)));
    }
    load
}

fn start_watchers(world: &Arc<World>, over: &CancellationToken) -> JoinSet<()> {
    let watcher = |name: &str, scope, habit| Watcher::new(world, name, scope, habit);
    let rare = [EventKind::Error, EventKind::Complete, EventKind::Close];
    let all = [
        watcher("the provider", Scope::OfProvider(0), Habit::Patient),
        watcher("the other provider", Scope::OfProvider(1), Habit::Patient),
        watcher("a customer", Scope::OfCustomer(0), Habit::Patient),
        watcher("a restless provider", Scope::OfProvider(0), Habit::Restless),
        watcher("the other restless provider", Scope::OfProvider(1), Habit::Restless),
        watcher("a restless customer", Scope::OfCustomer(1), Habit::Restless),
        watcher("a slow provider", Scope::OfProvider(0), Habit::Slow),
        watcher("a slow customer", Scope::OfCustomer(1), Habit::Slow),
        watcher("a provider who looks for trouble", Scope::OfProvider(0), Habit::Restless).of_kinds(&rare),
        watcher("a provider with one configuration", Scope::OfProvider(0), Habit::Restless)
            .only(Some(1), None),
        watcher("a customer with one provider", Scope::OfCustomer(1), Habit::Patient).only(None, Some(1)),
        watcher("a customer with little time", Scope::OfCustomer(0), Habit::Slow).only(Some(2), Some(0)),
    ];
    let mut watchers = JoinSet::new();
    for watcher in all {
        watchers.spawn(watcher.watch(over.clone()));
    }
    for n in 0..JOB_WATCHERS {
        watchers.spawn(watch_jobs(Arc::clone(world), format!("job watcher {n}"), over.clone()));
    }
    for n in 0..LATE_WATCHERS {
        watchers.spawn(watch_from_now(Arc::clone(world), format!("late watcher {n}"), over.clone()));
    }
    watchers
}

/// Everything once more, from its beginning.
fn watch_again(
    world: &Arc<World>,
    replica: usize,
    jobs: usize,
    over: &CancellationToken,
    watchers: &mut JoinSet<()>,
) {
    for provider in 0..PROVIDERS {
        let all = Watcher::new(world, "a last watcher", Scope::OfProvider(provider), Habit::Patient);
        watchers.spawn(all.at(replica).watch(over.clone()));
    }
    for job in (0..jobs).rev().take(WATCHED_AGAIN) {
        let one = Watcher::new(world, "a last watcher", Scope::Job(job), Habit::Patient).at(replica);
        watchers.spawn(one.watch(over.clone()));
    }
}

/// Returns once nobody has seen an event for a while.
async fn until_quiet(world: &World) {
    let mut seen = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        let now = world.seen.load(Ordering::Relaxed);
        if now == seen {
            return;
        }
        seen = now;
    }
}

/// What a server says of every job.
async fn read_all(world: &Arc<World>, replica: usize, jobs: usize) {
    let mut readers = JoinSet::new();
    for first in 0..8 {
        let world = Arc::clone(world);
        let mut callers: Vec<_> =
            world.providers.iter().map(|provider| world.caller(replica, provider)).collect();
        readers.spawn(async move {
            for job in (first..jobs).step_by(8) {
                let provider = world.history.lock().unwrap().jobs[job].provider;
                let read = read(&world, &mut callers[provider], replica, job).await;
                world.history.lock().unwrap().reads.push(read);
            }
        });
    }
    join(&mut readers).await;
}

/// What a server says of a job.
pub async fn read(world: &World, caller: &mut Caller, replica: usize, job: usize) -> Read {
    let id = world.job_id(job);
    let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(id.clone())) };
    let found = caller.jobs.get_job(request).await.unwrap().into_inner().job.unwrap();
    let mut log = Vec::new();
    let mut request = pb::ListEventsRequest {
        job: Some(pb::list_events_request::Job::JobId(id)),
        page_size: 20 + i32::try_from(job % 7).unwrap() * 80,
        ..Default::default()
    };
    loop {
        let page = caller.events.list_events(request.clone()).await.unwrap().into_inner();
        log.extend(page.events.into_iter().map(|event| world.events.one_of(event)));
        if page.next_page_token.is_empty() {
            return Read { replica, job, found, log };
        }
        request.page_token = page.next_page_token;
    }
}
