//! A watcher receives every event in its scope exactly once per stream, and the
//! events of each job in order, however slow the watcher is.

mod filters;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use milepost_client::pb::{self, Event, watch_events_request::Scope, watch_events_request::Start};
use prost_types::{Value, value::Kind};

use super::{assert_gap_free, by_job};
use crate::support::{TestServer, User, Watch, complete, error, info, step, with_metadata};

/// Reads exactly `count` events; panics if the last message has more.
async fn collect(mut watch: Watch, count: usize) -> Vec<Event> {
    let events = watch.events(count).await;
    assert_eq!(events.len(), count);
    events
}

fn write(mut caller: User, job: pb::Job, events: usize) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        for n in 0..events {
            caller.append(&job, [info(&format!("{n}"))]).await;
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_receive_every_event_of_writers_on_two_replicas() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let (jobs, each) = (12, 40);
    let mut all = Vec::new();
    for _ in 0..jobs {
        all.push(provider.job(&customer).await);
    }
    let watch_all = |mut user: User| async move { user.watch_all().await };
    let mut watchers = Vec::new();
    // Watches that start before the first event, on both replicas.
    for user in [replica.same(&provider), replica.same(&customer), customer.clone()] {
        watchers.push(tokio::spawn(collect(watch_all(user).await, jobs * each)));
    }
    let writers: Vec<_> = (all.iter().enumerate())
        .map(|(n, job)| {
            let caller = if n % 2 == 0 { provider.clone() } else { replica.same(&provider) };
            write(caller, job.clone(), each)
        })
        .collect();
    // Watches that start while the writers append.
    let mut pace = provider.watch_all().await;
    let mut passed = 0;
    for n in 0..20 {
        while passed < (n + 1) * jobs * each / 25 {
            passed += pace.events(1).await.len();
        }
        let user = if n % 2 == 0 { replica.same(&customer) } else { provider.clone() };
        watchers.push(tokio::spawn(collect(watch_all(user).await, jobs * each)));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    for watcher in watchers {
        let events = watcher.await.unwrap();
        let by_job = by_job(&events);
        assert_eq!(by_job.len(), jobs);
        assert!(by_job.values().all(|log| log.len() == each && log[0].sequence == 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_committed_between_the_past_and_the_first_live_event_are_received() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    for round in 0..25 {
        let job = provider.job(&customer).await;
        for n in 0..round {
            provider.append(&job, [info(&format!("past {n}"))]).await;
        }
        let mut writer = provider.clone();
        let written = {
            let job = job.clone();
            tokio::spawn(async move {
                for n in 0..10 {
                    writer.append(&job, [info(&format!("{n}")), step("load")]).await;
                }
                writer.append(&job, [complete()]).await;
            })
        };
        let mut watches = Vec::new();
        for mut user in [customer.clone(), replica.same(&customer), provider.clone()] {
            watches.push(user.watch(&job).await);
            tokio::task::yield_now().await;
        }
        for watch in watches {
            let watched = watch.read_to_end().await;
            assert_gap_free(&watched.events);
            assert_eq!(watched.events.len(), round + 21);
            assert!(watched.past.is_some());
        }
        written.await.unwrap();
    }
    // A job's last event, whose loss no later event reveals.
    for round in 0..60 {
        let job = provider.job(&customer).await;
        provider.append(&job, (0..round % 3).map(|n| info(&format!("past {n}"))).chain([step("load")])).await;
        let mut writer = provider.clone();
        let written = {
            let job = job.clone();
            tokio::spawn(async move { writer.append(&job, [complete()]).await })
        };
        let users = [customer.clone(), replica.same(&customer), provider.clone()];
        let watches = users.map(|mut user| {
            let job = job.clone();
            async move { user.watch(&job).await.read_to_end().await }
        });
        for watched in futures_util::future::join_all(watches).await {
            assert_gap_free(&watched.events);
            assert_eq!(watched.events.len(), round % 3 + 2);
        }
        written.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_watcher_receives_every_event_beside_fast_watchers() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    // One connection for each watcher: a watcher that does not read must not fill
    // the HTTP/2 window of another.
    let others = server.other_clients();
    let mut slow = others.same(&customer).watch(&job).await;
    let fast = customer.clone().watch(&job).await;
    let fast_all = watch_all_on_own_connection(&server, &customer).await;
    slow.caught_up().await;
    let text = Value { kind: Some(Kind::StringValue("x".repeat(12_000))) };
    let (batches, each) = (60, 20);
    let fast = tokio::spawn(fast.read_to_end());
    let fast_all = tokio::spawn(collect(fast_all, batches * each + 1));
    // 14 MB: far more than the mailbox, the stream and the connection buffer together.
    for batch in 0..batches {
        let events =
            (0..each).map(|n| with_metadata(info(&format!("{batch}/{n}")), [("text", text.clone())]));
        provider.append(&job, events).await;
    }
    provider.append(&job, [complete()]).await;
    // The fast watches end although the slow watcher has read no event.
    assert_eq!(fast.await.unwrap().events.len(), batches * each + 1);
    fast_all.await.unwrap();
    let watched = slow.read_to_end().await;
    assert_gap_free(&watched.events);
    assert_eq!(watched.events.len(), batches * each + 1);
}

async fn watch_all_on_own_connection(server: &TestServer, customer: &User) -> Watch {
    server.other_clients().same(customer).watch_all().await
}

/// A job's last sequence, status and progress.
type State = (i64, i32, Option<pb::Progress>);

/// Follows all jobs in the documented way, until each has `each` events: watches
/// from now, lists the jobs at `caught_up`, then drops the events that the listed
/// states include.
async fn follow(mut watcher: User, mut lister: User, jobs: usize, each: i64) -> HashMap<String, State> {
    let scope = Some(Scope::AllJobs(pb::AllJobs::default()));
    let start = Some(Start::FromNow(pb::FromNow {}));
    let request = pb::WatchEventsRequest { scope, start, ..Default::default() };
    let mut watch = watcher.watch_by(request).await.unwrap();
    assert_eq!(watch.caught_up().await.0, []);

    let mut states: HashMap<String, State> = HashMap::new();
    let mut request = pb::ListJobsRequest { page_size: 5, ..Default::default() };
    loop {
        let page = lister.jobs.list_jobs(request).await.unwrap().into_inner();
        states
            .extend(page.jobs.into_iter().map(|job| (job.id, (job.last_sequence, job.status, job.progress))));
        if page.next_page_token.is_empty() {
            break;
        }
        request =
            pb::ListJobsRequest { page_token: page.next_page_token, page_size: 5, ..Default::default() };
    }
    while states.len() < jobs || states.values().any(|state| state.0 < each) {
        for event in watch.events(1).await {
            let last = states.get(&event.job_id).map_or(0, |state| state.0);
            if event.sequence > last {
                assert_eq!(event.sequence, last + 1, "a gap in job {}", event.job_id);
                states.insert(event.job_id, (event.sequence, event.status, event.progress));
            }
        }
    }
    states
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_now_and_a_list_at_caught_up_give_the_state_of_all_jobs() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let tags: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    provider.configuration(&tags.iter().map(|tag| (tag.as_str(), 1)).collect::<Vec<_>>()).await;
    let (jobs, each) = (16, 60);
    let mut writers = Vec::new();
    for n in 0..jobs / 2 {
        let mut writer = if n % 2 == 0 { provider.clone() } else { replica.same(&provider) };
        let (customer, tags) = (customer.clone(), tags.clone());
        writers.push(tokio::spawn(async move {
            let mut written = Vec::new();
            // The second job is created while other writers append.
            for ends in [true, false] {
                let job = writer.job(&customer).await;
                for tag in &tags {
                    let last = if ends && *tag == tags[19] { complete() } else { error("hm") };
                    writer.append(&job, [info("so far"), step(tag), last]).await;
                }
                written.push(job);
            }
            written
        }));
    }
    let mut pace = provider.watch_all().await;
    let mut passed = 0;
    let mut followers = Vec::new();
    for n in 0..20 {
        while passed < n * jobs * 60 / 20 {
            passed += pace.events(1).await.len();
        }
        let [here, there] = [customer.clone(), replica.same(&customer)];
        let [watcher, lister] = if n % 2 == 0 { [here, there] } else { [there, here] };
        followers.push(tokio::spawn(follow(watcher, lister, jobs, each)));
    }
    let mut expected = HashMap::new();
    for writer in writers {
        for job in writer.await.unwrap() {
            let log = provider.list(&job).await;
            assert_gap_free(&log);
            let last = log.last().unwrap();
            expected.insert(job.id, (last.sequence, last.status, last.progress));
        }
    }
    for follower in followers {
        assert_eq!(follower.await.unwrap(), expected);
    }
}

/// Asserts that the median is below a second: a sweep runs every half second, but
/// a busy machine may delay a single one.
#[track_caller]
fn assert_within_a_second(mut delays: Vec<Duration>) {
    delays.sort();
    assert!(delays[delays.len() / 2] < Duration::from_secs(1), "{delays:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_arrives_within_a_second_when_its_notification_is_lost() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    let mut watch = replica.same(&customer).watch(&job).await;
    watch.caught_up().await;
    let mut delays = Vec::new();
    for n in 0..7 {
        server
            .database
            .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND query = 'LISTEN milepost'")
            .await;
        let at = Instant::now();
        provider.append(&job, [info(&format!("{n}"))]).await;
        watch.events(1).await;
        delays.push(at.elapsed());
    }
    assert_within_a_second(delays);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_arrives_within_a_second_when_no_notification_was_sent() {
    let server = TestServer::start().await;
    let (_provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let mut watches = [customer.watch(&job).await, customer.watch_all().await];
    for watch in &mut watches {
        watch.caught_up().await;
    }
    let mut delays = Vec::new();
    for n in 0..7 {
        // Like a replica that exits between the commit and the notification.
        let append = format!(
            "SELECT append_events(ARRAY[job_id], ARRAY[{n}]::bigint[], ARRAY[last_event_id], ARRAY[1],
                ARRAY[event_id], ARRAY['running']::job_status[], ARRAY[0]::bigint[], ARRAY[0]::smallint[],
                ARRAY[steps], ARRAY[0]::bigint[], ARRAY[false], ARRAY[{n} = 0],
                ARRAY[false], ARRAY[false], ARRAY[false],
                ARRAY[1], ARRAY[event_id], ARRAY[false], ARRAY[{n} + 1]::bigint[],
                ARRAY['info']::event_kind[], ARRAY['{n}'], ARRAY[NULL]::uuid[], ARRAY[NULL]::smallint[],
                ARRAY['']::bytea[],
                ARRAY[NULL]::timestamptz[], ARRAY['running']::job_status[], ARRAY[0]::bigint[],
                ARRAY[0]::smallint[])
             FROM job_states, gen_random_uuid() AS event_id WHERE job_id = '{id}'",
            id = job.id,
        );
        server.database.execute(&append).await;
        let at = Instant::now();
        for watch in &mut watches {
            assert_eq!(watch.events(1).await[0].sequence, n + 1);
        }
        delays.push(at.elapsed());
    }
    assert_within_a_second(delays);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_on_another_replica_does_not_wait_for_a_poll() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    let now = Some(Start::FromNow(pb::FromNow {}));
    let mut watch = replica.same(&customer).watch_from(&job, now).await;
    watch.caught_up().await;
    let mut delays = Vec::new();
    for n in 0..21 {
        provider.append(&job, [info(&format!("{n}"))]).await;
        let at = Instant::now();
        watch.events(1).await;
        delays.push(at.elapsed());
    }
    delays.sort();
    // With the sweep alone, which runs every half second, the median would be a
    // quarter of a second.
    assert!(delays[10] < Duration::from_millis(50), "{delays:?}");
}
