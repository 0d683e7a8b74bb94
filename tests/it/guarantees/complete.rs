//! A watcher gets every event in its scope exactly once per stream, each job's
//! in order, however slow it is.

use std::time::{Duration, Instant};

use milepost::pb::{self, Event, watch_events_request::Scope, watch_events_request::Start};
use prost_types::{Value, value::Kind};

use super::{assert_gap_free, by_job};
use crate::support::{TestServer, User, Watch, complete, info, noted, step};

/// Reads events until there are so many, and not one more in the same message.
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
async fn complete_for_watchers_on_one_replica_of_writers_on_both() {
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
    // Before the first event, on either side.
    for user in [replica.same(&provider), replica.same(&customer), customer.clone()] {
        watchers.push(tokio::spawn(collect(watch_all(user).await, jobs * each)));
    }
    let writers: Vec<_> = (all.iter().enumerate())
        .map(|(n, job)| {
            let caller = if n % 2 == 0 { provider.clone() } else { replica.same(&provider) };
            write(caller, job.clone(), each)
        })
        .collect();
    // In the middle of it all, again and again.
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
async fn complete_when_events_arrive_between_the_past_and_the_first_live_one() {
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
        let mut films = Vec::new();
        for mut user in [customer.clone(), replica.same(&customer), provider.clone()] {
            films.push(user.watch(&job).await);
            tokio::task::yield_now().await;
        }
        for watch in films {
            let film = watch.film().await;
            assert_gap_free(&film.events);
            assert_eq!(film.events.len(), round + 21);
            assert!(film.past.is_some());
        }
        written.await.unwrap();
    }
    // The very last one, which no later one can betray.
    for round in 0..60 {
        let job = provider.job(&customer).await;
        provider.append(&job, (0..round % 3).map(|n| info(&format!("past {n}"))).chain([step("load")])).await;
        let mut writer = provider.clone();
        let written = {
            let job = job.clone();
            tokio::spawn(async move { writer.append(&job, [complete()]).await })
        };
        let users = [customer.clone(), replica.same(&customer), provider.clone()];
        let films = users.map(|mut user| {
            let job = job.clone();
            async move { user.watch(&job).await.film().await }
        });
        for film in futures_util::future::join_all(films).await {
            assert_gap_free(&film.events);
            assert_eq!(film.events.len(), round % 3 + 2);
        }
        written.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_for_a_slow_watcher_beside_fast_ones() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    // Watchers with a connection each: one that does not read must not fill
    // another's.
    let others = server.other_clients();
    let mut slow = others.same(&customer).watch(&job).await;
    let fast = customer.clone().watch(&job).await;
    let fast_all = replica_watch(&server, &customer).await;
    slow.caught_up().await;
    let text = Value { kind: Some(Kind::StringValue("x".repeat(12_000))) };
    let (batches, each) = (60, 20);
    let fast = tokio::spawn(fast.film());
    let fast_all = tokio::spawn(collect(fast_all, batches * each + 1));
    // 14 MB: far more than mailbox, stream and connection hold together.
    for batch in 0..batches {
        let events = (0..each).map(|n| noted(info(&format!("{batch}/{n}")), [("text", text.clone())]));
        provider.append(&job, events).await;
    }
    provider.append(&job, [complete()]).await;
    // The fast ones end while the slow one has not read a thing.
    assert_eq!(fast.await.unwrap().events.len(), batches * each + 1);
    fast_all.await.unwrap();
    let film = slow.film().await;
    assert_gap_free(&film.events);
    assert_eq!(film.events.len(), batches * each + 1);
}

async fn replica_watch(server: &TestServer, customer: &User) -> Watch {
    server.other_clients().same(customer).watch_all().await
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_with_jobs_that_are_created_later_and_filters() {
    let server = TestServer::start().await;
    let (mut provider, mut customer, other) =
        (server.provider().await, server.customer().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let everything = provider.watch_all().await;
    let filtered = |all| pb::WatchEventsRequest { scope: Some(Scope::AllJobs(all)), ..Default::default() };
    let counterpart = pb::AllJobs { counterpart_id: customer.id.clone(), ..Default::default() };
    let one = provider.watch_by(filtered(counterpart)).await.unwrap();
    let tag = pb::AllJobs { configuration_tag: "another".to_owned(), ..Default::default() };
    let mut none = provider.watch_by(filtered(tag)).await.unwrap();
    let own = customer.watch_all().await;
    let (mine, theirs) = (provider.job(&customer).await, provider.job(&other).await);
    for n in 0..5 {
        provider.append(&mine, [info(&format!("{n}"))]).await;
        provider.append(&theirs, [info(&format!("{n}"))]).await;
    }
    assert_eq!(by_job(&collect(everything, 10).await).len(), 2);
    for watch in [one, own] {
        let events = collect(watch, 5).await;
        assert!(events.iter().all(|event| event.job_id == mine.id));
    }
    assert_eq!(none.caught_up().await.0, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_found_within_a_second_when_the_bell_is_lost() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let mut watch = replica.same(&customer).watch(&job).await;
    watch.caught_up().await;
    for n in 0..5 {
        server
            .database
            .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND query = 'LISTEN milepost'")
            .await;
        let at = Instant::now();
        provider.append(&job, [info(&format!("{n}"))]).await;
        watch.events(1).await;
        assert!(at.elapsed() < Duration::from_secs(1), "{:?}", at.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_found_within_a_second_when_who_committed_it_never_rang() {
    let server = TestServer::start().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let mut watches = [customer.watch(&job).await, customer.watch_all().await];
    for watch in &mut watches {
        watch.caught_up().await;
    }
    for n in 0..4 {
        // As a replica does that dies between the commit and the bell.
        let append = format!(
            "SELECT append_events(ARRAY['{id}']::uuid[], ARRAY[{n}]::bigint[], ARRAY[1],
                ARRAY['running']::job_status[], ARRAY[0]::bigint[], ARRAY[0]::smallint[],
                ARRAY(SELECT steps_done FROM jobs WHERE id = '{id}'), ARRAY[false],
                ARRAY[1], ARRAY[gen_random_uuid()], ARRAY[false], ARRAY[{n} + 1]::bigint[],
                ARRAY['info']::event_kind[], ARRAY['{n}'], ARRAY[NULL]::uuid[], ARRAY['']::bytea[],
                ARRAY[NULL]::timestamptz[], ARRAY['running']::job_status[], ARRAY[0]::bigint[],
                ARRAY[0]::smallint[])",
            id = job.id,
        );
        server.database.execute(&append).await;
        let at = Instant::now();
        for watch in &mut watches {
            assert_eq!(watch.events(1).await[0].sequence, n + 1);
        }
        assert!(at.elapsed() < Duration::from_secs(1), "{:?}", at.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_poll() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
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
    // A look now and then would take a quarter of a second in the median.
    assert!(delays[10] < Duration::from_millis(50), "{delays:?}");
}
