//! What one provider sends costs another one's append no more than a round.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use milepost_client::pb::{self, NewEvent};
use tokio::task::JoinSet;

use crate::{
    operations::metrics::get,
    support::{TestServer, User, info, processes::Stopped, with_metadata, within_timeout},
};

/// How often a quiet append is measured. The smallest figure counts: a busy machine may
/// keep the test's own client waiting for longer than the server did.
const ATTEMPTS: usize = 8;

/// Calls that go on until this is dropped, and how many were answered.
struct Flood {
    _calls: JoinSet<()>,
    answered: Arc<AtomicUsize>,
}

impl Flood {
    /// Sends this many batches at once, over and over: what `batch` makes for each.
    async fn start(
        provider: &User,
        job: &pb::Job,
        in_flight: usize,
        batch: impl Fn() -> Vec<NewEvent> + Clone + Send + 'static,
    ) -> Self {
        let (mut calls, answered) = (JoinSet::new(), Arc::<AtomicUsize>::default());
        for _ in 0..in_flight {
            let (mut provider, job) = (provider.clone(), job.clone());
            let (batch, answered) = (batch.clone(), Arc::clone(&answered));
            calls.spawn(async move {
                loop {
                    // A limit of what a user has in flight may refuse some.
                    if provider.try_append(&job, batch()).await.is_ok() {
                        answered.fetch_add(1, Relaxed);
                    }
                }
            });
        }
        let flood = Self { _calls: calls, answered };
        flood.goes_on(2 * in_flight.min(32)).await;
        flood
    }

    /// Waits for so many more answers.
    async fn goes_on(&self, answers: usize) {
        let before = self.answered.load(Relaxed);
        let more = async {
            while self.answered.load(Relaxed) < before + answers {
                tokio::task::yield_now().await;
            }
        };
        within_timeout("answers of the flood", more).await;
    }
}

struct Neighbours {
    server: TestServer,
    flooding: (User, pb::Job),
    quiet: (User, pb::Job),
}

async fn neighbours() -> Neighbours {
    let server = TestServer::start().await;
    let (mut flooding, mut quiet) = (server.provider().await, server.provider().await);
    let customer = server.customer().await;
    let mut jobs = Vec::new();
    for provider in [&mut flooding, &mut quiet] {
        provider.configuration(&[]).await;
        jobs.push(provider.job(&customer).await);
    }
    let [flooded, job] = <[pb::Job; 2]>::try_from(jobs).unwrap();
    // So that the server remembers the job.
    quiet.append(&job, [info("first")]).await;
    Neighbours { server, flooding: (flooding, flooded), quiet: (quiet, job) }
}

/// The least growth of a figure while a quiet append is on its way.
async fn least_growth(
    (provider, job): &mut (User, pb::Job),
    flood: &Flood,
    figure: impl AsyncFn() -> usize,
) -> usize {
    let mut least = usize::MAX;
    for _ in 0..ATTEMPTS {
        let before = figure().await;
        provider.append(job, [info("quiet")]).await;
        least = least.min(figure().await - before);
        flood.goes_on(4).await;
    }
    least
}

/// The value of a metric, named with its labels.
pub async fn metric(server: &TestServer, name: &str) -> usize {
    let (_, text) = get(server.metrics_address, "/metrics").await;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = line.unwrap_or_else(|| panic!("no {name}"));
    // A sum is printed with a decimal point.
    value.split('.').next().unwrap().parse().unwrap()
}

async fn rounds(server: &TestServer) -> usize {
    metric(server, "milepost_transaction_duration_seconds_count").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_append_waits_for_one_round_of_many_batches() {
    let Neighbours { server, flooding: (provider, job), mut quiet } = neighbours().await;
    let batch = || (0..200).map(|_| info("flood")).collect();
    let flood = Flood::start(&provider, &job, 128, batch).await;
    let waited = least_growth(&mut quiet, &flood, async || rounds(&server).await).await;
    // The round under way, its own, and one that ended while the figure was read.
    assert!(waited <= 3, "{waited} rounds");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_has_few_of_the_largest_batches() {
    let Neighbours { server, flooding: (provider, job), mut quiet } = neighbours().await;
    let batch =
        || (0..60).map(|_| with_metadata(info("large"), [("text", "x".repeat(16_000).into())])).collect();
    let flood = Flood::start(&provider, &job, 14, batch).await;
    let (rounds_before, before) =
        (rounds(&server).await, metric(&server, "milepost_transaction_batches_sum").await);
    let waited = least_growth(&mut quiet, &flood, async || rounds(&server).await).await;
    assert!(waited <= 3, "{waited} rounds");
    let batches = metric(&server, "milepost_transaction_batches_sum").await - before;
    let rounds = rounds(&server).await - rounds_before;
    assert!(batches <= 2 * rounds + 1, "{batches} batches of a megabyte in {rounds} rounds");
}

/// The backend that looks up which events are stored.
const LOOKS_UP_EVENTS: &str = "SELECT pid::text AS text FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'milepost'
      AND query ~ 'unnest.*AS given \\(id\\) CROSS JOIN LATERAL'";

#[tokio::test(flavor = "multi_thread")]
async fn replays_hold_no_round_up() {
    let Neighbours { server, flooding: (mut provider, job), quiet: (mut quiet, quiet_job) } =
        neighbours().await;
    let stored: Vec<NewEvent> = (0..500).map(|_| info("stored")).collect();
    provider.append(&job, stored.clone()).await;
    provider.append(&job, stored.clone()).await;
    let stopped = Stopped::new(&server.database.texts(LOOKS_UP_EVENTS).await);
    let (mut replaying, replayed, again) = (provider.clone(), job.clone(), stored.clone());
    let mut replay = tokio::spawn(async move { replaying.append(&replayed, again).await });
    for _ in 0..10 {
        quiet.append(&quiet_job, [info("quiet")]).await;
    }
    assert!(!replay.is_finished(), "no event was looked up");
    drop(stopped);
    let answer = within_timeout("the replay", &mut replay).await.unwrap();
    assert!(answer.iter().all(|event| event.existed));
}

#[tokio::test(flavor = "multi_thread")]
async fn replays_and_new_batches_of_one_job_keep_their_order() {
    let Neighbours { server: _server, quiet: (mut provider, job), .. } = neighbours().await;
    let mut rounds = JoinSet::new();
    for round in 0..40 {
        let (mut provider, job) = (provider.clone(), job.clone());
        rounds.spawn(async move {
            let batch: Vec<NewEvent> = (0..5).map(|event| info(&format!("{round} {event}"))).collect();
            let first = provider.append(&job, batch.clone()).await;
            let again = provider.append(&job, batch).await;
            let sequences = |events: &[pb::AppendedEvent]| -> Vec<i64> {
                events.iter().map(|event| event.sequence).collect()
            };
            assert_eq!(sequences(&first), sequences(&again));
            assert!(first.iter().all(|event| !event.existed) && again.iter().all(|event| event.existed));
        });
    }
    rounds.join_all().await;
    let sequences: Vec<i64> = provider.list(&job).await.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, (1..=201).collect::<Vec<i64>>());
}
