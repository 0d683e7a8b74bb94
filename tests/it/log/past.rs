//! The past of a watch of all jobs costs what the scope has, not what everybody has, and
//! is read in turns by user. It is walked job by job where the log is long.

use std::time::Duration;

use diesel_async::SimpleAsyncConnection as _;
use milepost_client::pb::{
    self, ErrorReason, WatchEndReason,
    watch_events_request::{Scope, Start},
    watch_events_response::Message,
};
use tonic::Code;

use super::tail::append_unreadable;
use crate::{
    database::plans::reads,
    support::{
        CONNECTIONS, Replication, STREAMS_PER_USER, TestDatabase, TestServer, User, Watch, assert_refused,
        complete, info, registration, within_timeout,
    },
};

/// More events than one query of a scan looks through, so that a scope of few jobs is walked.
const FLOOD: u32 = 12_000;
/// Most events of a page.
const PAGE: usize = 200;

/// Appends many events to a job beside the servers.
async fn flood(database: &TestDatabase, job: &pb::Job, events: u32) {
    database
        .execute(&format!(
            "BEGIN;
             UPDATE job_states SET last_sequence = last_sequence + {events}, last_event_id = gen_random_uuid(),
                 status = 'running' WHERE job_id = '{id}';
             UPDATE jobs SET status = 'running' WHERE id = '{id}';
             UPDATE event_log SET position = position + {events};
             INSERT INTO events (job_id, sequence, position, id, kind, name, event_metadata, status,
                                 points_done, percent, created_at)
             SELECT job_id, last_sequence - {events} + n, position - {events} + n, gen_random_uuid(), 'info',
                    '', '', 'running', 0, 0, now()
             FROM job_states, event_log, generate_series(1, {events}) AS n WHERE job_id = '{id}';
             COMMIT",
            id = job.id
        ))
        .await;
}

/// Creates more jobs like this one, without events.
async fn add_jobs(database: &TestDatabase, job: &pb::Job, jobs: u32) {
    database
        .execute(&format!(
            "INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                               provider_job_id, provider_job_name, points_total)
             SELECT gen_random_uuid(), provider_id, customer_id, job_configuration_id, configuration_tag,
                    'scan-' || n, '', points_total
             FROM jobs, generate_series(1, {jobs}) AS n WHERE id = '{}'",
            job.id
        ))
        .await;
}

/// A job of users who are in no other scope.
async fn job_of_others(server: &TestServer) -> pb::Job {
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    provider.job(&customer).await
}

async fn watch(user: &mut User, all: &pb::AllJobs, token: &str) -> Watch {
    let start = (!token.is_empty()).then(|| Start::ResumeToken(token.to_owned()));
    let scope = Some(Scope::AllJobs(all.clone()));
    user.watch_by(pb::WatchEventsRequest { scope, start, ..Default::default() }).await.unwrap()
}

fn infos(count: usize) -> Vec<pb::NewEvent> {
    (0..count).map(|n| info(&n.to_string())).collect()
}

/// The events of a job among these.
fn of_job(events: &[pb::Event], job: &pb::Job) -> Vec<pb::Event> {
    events.iter().filter(|event| event.job_id == job.id).cloned().collect()
}

/// Asserts that these are the whole logs of these jobs, each in order, and nothing else.
async fn assert_whole(received: &[pb::Event], provider: &mut User, jobs: &[pb::Job]) {
    let mut count = 0;
    for job in jobs {
        let log = provider.list(job).await;
        count += log.len();
        let sequences = |events: &[pb::Event]| events.iter().map(|event| event.sequence).collect::<Vec<_>>();
        let received = of_job(received, job);
        assert_eq!(sequences(&received), sequences(&log));
        assert_eq!(received, log);
    }
    assert_eq!(received.len(), count, "events of other jobs");
}

/// The one message with which a page of a walk is sent, and the token after it.
async fn first_page(user: &mut User) -> (Vec<pb::Event>, String) {
    let mut watch = user.watch_all().await;
    let events = watch.events(1).await;
    assert_eq!(events.len(), PAGE);
    (events, watch.resume_token)
}

async fn assert_expired(watch: &mut Watch) {
    match watch.next().await.unwrap() {
        Some(Message::End(end)) => assert_eq!(end.reason(), WatchEndReason::EventsExpired),
        other => panic!("{other:?}"),
    }
    assert_refused(watch.next().await, Code::OutOfRange, ErrorReason::EventsExpired);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_past_of_a_scope_costs_what_the_scope_has() {
    const EACH: usize = 40;
    let server = TestServer::on(TestDatabase::migrated().await).await;
    let (mut provider, mut other) = (server.provider().await, server.provider().await);
    let (customer, others_customer) = (server.customer().await, server.customer().await);
    let mut tags = [registration("1.0.0", &[]).tag, "rare".to_owned()];
    provider
        .register(pb::RegisterJobConfigurationRequest { tag: tags[1].clone(), ..registration("1.0.0", &[]) })
        .await;
    for provider in [&mut provider, &mut other] {
        provider.configuration(&[]).await;
    }
    let rare = pb::CreateJobRequest { configuration_tag: tags[1].clone(), ..provider.new_job(&customer) };
    let rare = provider.jobs.create_job(rare).await.unwrap().into_inner().job.unwrap();
    let common = provider.job(&customer).await;
    let elsewhere = provider.job(&others_customer).await;
    let of_other = other.job(&customer).await;
    let jobs = [&rare, &common, &elsewhere, &of_other];
    let mut append = async |from: usize, through: usize| {
        for job in jobs {
            let events = (from..through).map(|n| info(&n.to_string()));
            let by = if job == &of_other { &mut other } else { &mut provider };
            by.append(job, events.collect::<Vec<_>>()).await;
        }
    };
    append(0, EACH / 4).await;
    let mut caught_up = customer.clone().watch_all().await;
    caught_up.caught_up().await;
    let flooded = job_of_others(&server).await;
    flood(&server.database, &flooded, 3 * FLOOD).await;
    append(EACH / 4, EACH).await;

    let database = server.database.clone();
    database.log_plans().await;
    let replica = server.replica().await;
    let (of_customer, of_provider) = (replica.same(&customer), replica.same(&provider));
    let none = String::new;
    let [any, tag] = [none(), std::mem::take(&mut tags[0])];
    // Who watches, with which tag and counterpart, after which token; which jobs are received,
    // and how many events of each.
    type Case<'a> = (&'a User, &'a str, String, &'a str, &'a [&'a pb::Job], usize);
    let scopes: [Case<'_>; 9] = [
        (&of_customer, &any, none(), "", &[&rare, &common, &of_other], EACH),
        (&of_customer, &any, none(), &caught_up.resume_token, &[&rare, &common, &of_other], EACH * 3 / 4),
        (&of_customer, &any, provider.id.clone(), "", &[&rare, &common], EACH),
        (&of_customer, &tag, none(), "", &[&common, &of_other], EACH),
        (&of_customer, &tags[1], provider.id.clone(), "", &[&rare], EACH),
        (&of_provider, &any, none(), "", &[&rare, &common, &elsewhere], EACH),
        (&of_provider, &any, customer.id.clone(), "", &[&rare, &common], EACH),
        (&of_provider, &tag, others_customer.id.clone(), "", &[&elsewhere], EACH),
        (&of_provider, &tags[1], none(), "", &[&rare], EACH),
    ];
    for (index, (user, tag, counterpart_id, token, jobs, each)) in scopes.into_iter().enumerate() {
        let before = database.plans().await.len();
        let all = pb::AllJobs { configuration_tag: tag.to_owned(), counterpart_id, ..Default::default() };
        let (past, _) = watch(&mut user.clone(), &all, token).await.caught_up().await;
        for job in jobs {
            let sequences: Vec<_> = of_job(&past, job).iter().map(|event| event.sequence).collect();
            let first = i64::try_from(EACH - each + 1).unwrap();
            assert_eq!(sequences, (first..).take(each).collect::<Vec<_>>(), "scope {index}");
        }
        assert_eq!(past.len(), jobs.len() * each, "scope {index}");
        let read: Vec<_> = database.plans().await[before..].iter().flat_map(reads).collect();
        // Meanwhile the server may also check credentials.
        let of_the_past = |table: &str| ["events", "jobs", "job_states"].contains(&table);
        let rows: f64 = read.iter().filter(|(table, ..)| of_the_past(table)).map(|(.., rows)| rows).sum();
        // Each event once, and some rows for each job.
        let most = f64::from(u32::try_from(past.len() + 20 * jobs.len() + 20).unwrap());
        assert!((1.0..=most).contains(&rows), "scope {index}: {rows} rows: {read:?}");
        assert!(read.iter().all(|(_, node, _)| node != "Seq Scan"), "scope {index}: {read:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_event_of_a_job_at_or_before_a_position_is_found() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let jobs = [provider.job(&customer).await, provider.job(&customer).await, provider.job(&customer).await];
    for events in [1, 3, 1, 7, 2, 20] {
        for job in &jobs[..2] {
            provider.append(job, infos(events)).await;
        }
    }
    let wrong = "SELECT concat_ws(' ', state.job_id, at) AS text
        FROM job_states AS state, generate_series(0, (SELECT position + 1 FROM event_log)) AS at
        WHERE sequence_at(state.job_id, last_sequence, at) <>
            (SELECT count(*) FROM events WHERE job_id = state.job_id AND position <= at)";
    assert_eq!(server.database.texts(wrong).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_of_many_jobs_scans_the_log_and_misses_nothing() {
    const JOBS: u32 = 2_000;
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    provider.append(&job, infos(300)).await;
    add_jobs(&server.database, &job, JOBS).await;
    let flooded = job_of_others(&server).await;
    flood(&server.database, &flooded, FLOOD).await;
    provider.append(&job, infos(300)).await;
    let (past, _) = customer.clone().watch_all().await.caught_up().await;
    assert_whole(&past, &mut provider, &[job]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_walk_that_is_resumed_after_every_message_misses_nothing_while_events_are_appended() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let mut jobs = Vec::new();
    for n in 0..15 {
        let job = provider.job(&customer).await;
        if n == 7 {
            add_jobs(&server.database, &job, 150).await;
        }
        provider.append(&job, infos(70)).await;
        jobs.push(job);
    }
    let flooded = job_of_others(&server).await;
    flood(&server.database, &flooded, FLOOD).await;
    let mut slow = replica.other_clients().same(&customer).watch_all().await;

    let mut received = Vec::new();
    let mut token = String::new();
    for turn in 0.. {
        let mut user = if turn % 2 == 0 { customer.clone() } else { replica.same(&customer) };
        let mut watch = watch(&mut user, &pb::AllJobs::default(), &token).await;
        match watch.next().await.unwrap() {
            Some(Message::Events(watched)) => received.extend(watched.events),
            Some(Message::CaughtUp(_)) => break,
            Some(Message::Heartbeat(_)) => {}
            other => panic!("{other:?}"),
        }
        token = watch.resume_token;
        match turn {
            // A second walk follows the first one, from where that ends.
            4 => flood(&server.database, &flooded, FLOOD).await,
            0..8 => {
                let job = provider.job(&customer).await;
                jobs.push(job);
                for job in jobs.iter().step_by(3).chain(jobs.last()) {
                    provider.append(job, infos(5)).await;
                }
            }
            _ => {}
        }
    }
    assert_whole(&received, &mut provider, &jobs).await;
    let slow = slow.events(received.len()).await;
    assert_whole(&slow, &mut provider, &jobs).await;
}

/// Three jobs, of which one is closed and removed later. A page ends within the second one.
struct Removal {
    server: TestServer,
    provider: User,
    customer: User,
    jobs: [pb::Job; 3],
}

impl Removal {
    async fn of(closed: &[usize]) -> Self {
        let server = TestServer::start().await;
        let (mut provider, customer) = (server.provider().await, server.customer().await);
        provider.configuration(&[]).await;
        let jobs =
            [provider.job(&customer).await, provider.job(&customer).await, provider.job(&customer).await];
        for (job, events) in jobs.iter().zip([50, 300, 10]) {
            provider.append(job, infos(events)).await;
        }
        for index in closed {
            provider.append(&jobs[*index], [complete()]).await;
        }
        let flooded = job_of_others(&server).await;
        flood(&server.database, &flooded, FLOOD).await;
        Self { server, provider, customer, jobs }
    }

    /// A watch whose first page is read, and then the closed jobs are removed before the watch
    /// asks what was removed.
    async fn within_a_page(&self) -> Watch {
        self.server.database.keep_step_times().await;
        let mut connection = self.server.database.connect().await;
        connection.batch_execute("BEGIN; LOCK TABLE removed_logs").await.unwrap();
        let watch = self.customer.clone().watch_all().await;
        self.server.database.wait_for_locks(1).await;
        let step = "SELECT remove_expired_events(interval '0', 100, 1000)";
        connection.batch_execute(&format!("{step}; {step}; COMMIT")).await.unwrap();
        watch
    }

    async fn remove(&self) {
        self.server.database.keep_step_times().await;
        let step = "SELECT remove_expired_events(interval '0', 100, 1000)";
        self.server.database.execute(&format!("{step}; {step}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_within_a_walk_outlives_the_removal_of_jobs_that_were_sent_whole() {
    let mut world = Removal::of(&[0]).await;
    let (mut received, token) = first_page(&mut world.customer).await;
    let first = of_job(&received, &world.jobs[0]);
    assert_eq!((first.len(), of_job(&received, &world.jobs[1]).len()), (51, PAGE - 51));
    world.remove().await;
    received.extend(watch(&mut world.customer, &pb::AllJobs::default(), &token).await.caught_up().await.0);
    received.retain(|event| event.job_id != world.jobs[0].id);
    assert_whole(&received, &mut world.provider, &world.jobs[1..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_within_a_walk_is_refused_if_a_job_was_removed_that_was_not_sent_whole() {
    for closed in [1, 2] {
        let mut world = Removal::of(&[closed]).await;
        let (_, token) = first_page(&mut world.customer).await;
        world.remove().await;
        assert_expired(&mut watch(&mut world.customer, &pb::AllJobs::default(), &token).await).await;
    }
    // The job was sent as far as the walk goes, and went on beyond that.
    let mut world = Removal::of(&[]).await;
    let (_, token) = first_page(&mut world.customer).await;
    world.provider.append(&world.jobs[0], [complete()]).await;
    world.remove().await;
    assert_expired(&mut watch(&mut world.customer, &pb::AllJobs::default(), &token).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_walk_from_the_beginning_sends_a_job_that_is_removed_meanwhile_whole_or_not_at_all() {
    let mut world = Removal::of(&[0, 2]).await;
    let received = world.within_a_page().await.caught_up().await.0;
    let first = of_job(&received, &world.jobs[0]).len();
    assert!([0, 51].contains(&first), "{first} events of a removed job");
    assert_eq!(of_job(&received, &world.jobs[2]), []);
    let rest: Vec<_> = received.into_iter().filter(|event| event.job_id != world.jobs[0].id).collect();
    assert_whole(&rest, &mut world.provider, &world.jobs[1..2]).await;

    // A part of the job was read: the watch ends. If the page was read once more, after the
    // removal, the job is skipped.
    let world = Removal::of(&[1]).await;
    let mut watch = world.within_a_page().await;
    let mut received = Vec::new();
    loop {
        match watch.next().await.unwrap() {
            Some(Message::Events(watched)) => received.extend(watched.events),
            Some(Message::CaughtUp(_)) => break,
            Some(Message::End(end)) => {
                assert_eq!(end.reason(), WatchEndReason::EventsExpired);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(of_job(&received, &world.jobs[1]), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_walk_goes_on_to_where_the_log_was_set_back_and_then_reads_the_new_history() {
    let mut replication = Replication::start().await;
    let server = TestServer::on(replication.database()).await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let jobs = [provider.job(&customer).await, provider.job(&customer).await, provider.job(&customer).await];
    for (job, events) in jobs.iter().zip([50, 300, 300]) {
        provider.append(job, infos(events)).await;
    }
    let flooded = job_of_others(&server).await;
    flood(&replication.on("a"), &flooded, FLOOD).await;
    replication.in_step().await;
    replication.part().await;
    provider.append(&jobs[1], infos(20)).await;
    let (received, token) = first_page(&mut customer).await;
    // The second page has the lost events, and after them some that are kept.
    let all = pb::AllJobs::default();
    let mut further = watch(&mut customer, &all, &token).await;
    assert_eq!(of_job(&further.events(1).await, &jobs[2]).len(), 2 * PAGE - 370);
    replication.stop_primary().await;
    replication.promote().await;
    within_timeout("the server to serve the promoted standby", async {
        // The events are of the job that the walk has sent, at the positions of lost ones.
        while provider.try_append(&jobs[0], infos(40)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    provider.append(&jobs[1], infos(5)).await;
    let replica = server.replica().await;
    for mut user in [customer.clone(), replica.same(&customer)] {
        let rest = watch(&mut user, &all, &token).await.caught_up().await.0;
        assert_whole(&[received.clone(), rest].concat(), &mut provider, &jobs).await;
        let start = Some(Start::ResumeToken(further.resume_token.clone()));
        let scope = Some(Scope::AllJobs(all.clone()));
        let refused = user.watch_by(pb::WatchEventsRequest { scope, start, ..Default::default() }).await;
        assert_refused(refused, Code::OutOfRange, ErrorReason::LogSetBack);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_cannot_be_read_ends_a_walk_after_all_before_it() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let mut unconcerned = server.customer().await;
    provider.configuration(&[]).await;
    let jobs =
        [provider.job(&customer).await, provider.job(&customer).await, provider.job(&unconcerned).await];
    for job in &jobs {
        provider.append(job, infos(30)).await;
    }
    append_unreadable(&server, &jobs[1]).await;
    let flooded = job_of_others(&server).await;
    flood(&server.database, &flooded, FLOOD).await;
    let mut past = provider.watch_all().await;
    let mut received = past.events(60).await;
    received.sort_by_key(|event| (event.job_id != jobs[0].id, event.sequence));
    assert_eq!(received[..30], provider.list(&jobs[0]).await);
    let second: Vec<_> = received[30..].iter().map(|event| (event.job_id.as_str(), event.sequence)).collect();
    assert_eq!(second, (1..=30).map(|sequence| (jobs[1].id.as_str(), sequence)).collect::<Vec<_>>());
    assert_refused(past.next().await, Code::Internal, ErrorReason::Internal);
    let whole = unconcerned.watch_all().await.caught_up().await.0;
    assert_whole(&whole, &mut provider, &jobs[2..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_past_is_read_in_turns_by_user() {
    // Half of the pool's connections are for watches that read the past; half of these are
    // the most that one user has.
    const OF_ONE_USER: usize = CONNECTIONS / 4;
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[]).await;
    provider.append(&job, infos(3)).await;
    let mut lock = server.database.connect().await;
    lock.batch_execute("BEGIN; LOCK TABLE removed_logs").await.unwrap();
    // Watches that wait for the lock have read a page and keep their turn.
    let reading = async |column: &str| {
        let sql = format!(
            "SELECT count(*)::text AS text FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%\"{column}\" = $%'"
        );
        server.database.texts(&sql).await[0].parse::<usize>().unwrap()
    };
    let mut watches = Vec::new();
    for _ in 1..STREAMS_PER_USER {
        watches.push(customer.clone().watch_all().await);
    }
    let mut last = customer
        .clone()
        .watch_by(pb::WatchEventsRequest {
            scope: Some(Scope::AllJobs(pb::AllJobs::default())),
            heartbeat_interval: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
            ..Default::default()
        })
        .await
        .unwrap();
    within_timeout("the customer's turns", async {
        while reading("customer_id").await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let mut behind = provider.watch_all().await;
    within_timeout("the provider's turn", async {
        while reading("provider_id").await == 0 {
            let of_customer = reading("customer_id").await;
            assert!(of_customer <= OF_ONE_USER, "{of_customer} of one user at once");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    // Whoever waits for a turn is not silent.
    assert!(matches!(last.next().await.unwrap(), Some(Message::Heartbeat(_))));
    watches.push(last);
    lock.batch_execute("COMMIT").await.unwrap();
    assert_eq!(behind.caught_up().await.0.len(), 3);
    for mut watch in watches {
        assert_eq!(watch.caught_up().await.0.len(), 3);
    }
}
