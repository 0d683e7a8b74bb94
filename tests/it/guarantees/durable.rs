//! An acknowledged event survives `kill -9` of the server and of Postgres.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use diesel::{dsl::sql, sql_types::Text};
use diesel_async::AsyncPgConnection;
use milepost::{
    config::{DatabaseSettings, SynchronousCommit},
    db::{Database, Payer},
};
use milepost_client::pb::{
    self, AppendedEvent, ErrorReason, Event, NewEvent, publish_events_response::Outcome,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::assert_gap_free;
use crate::support::{ServerProcess, TestDatabase, User, assert_refused, info, within_timeout};

/// Acknowledged batches of all writers before a process is killed.
const ENOUGH: usize = 150;

/// The batches that a writer sent, in order, and the answers that it received.
#[derive(Default)]
struct Sent {
    batches: Vec<Vec<NewEvent>>,
    answers: HashMap<usize, Vec<AppendedEvent>>,
}

impl Sent {
    fn next(&mut self) -> Vec<NewEvent> {
        let n = self.batches.len();
        let batch: Vec<NewEvent> = (0..1 + n % 5).map(|index| info(&format!("{n}/{index}"))).collect();
        self.batches.push(batch.clone());
        batch
    }
}

/// Appends until a call fails.
async fn append(mut provider: User, job: pb::Job, acknowledged: Arc<AtomicUsize>) -> Sent {
    let mut sent = Sent::default();
    loop {
        let batch = sent.next();
        let Ok(answer) = provider.try_append(&job, batch).await else { return sent };
        sent.answers.insert(sent.batches.len() - 1, answer);
        acknowledged.fetch_add(1, Ordering::Relaxed);
    }
}

/// Publishes several batches at once until the stream fails.
async fn publish(mut provider: User, job: pb::Job, acknowledged: Arc<AtomicUsize>) -> Sent {
    let mut sent = Sent::default();
    let (batches, stream) = mpsc::channel(4);
    let Ok(answers) = provider.events.publish_events(ReceiverStream::new(stream)).await else { return sent };
    let mut answers = answers.into_inner();
    loop {
        tokio::select! {
            Ok(permit) = batches.reserve() => {
                let batch_id = sent.batches.len().to_string();
                let job = Some(pb::publish_events_request::Job::JobId(job.id.clone()));
                permit.send(pb::PublishEventsRequest { batch_id, job, expected_sequence: None, events: sent.next() });
            }
            answer = answers.message() => {
                let Ok(Some(answer)) = answer else { return sent };
                let Some(Outcome::Appended(appended)) = answer.outcome else { panic!("refused: {answer:?}") };
                sent.answers.insert(answer.batch_id.parse().unwrap(), appended.events);
                acknowledged.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn assert_nothing_acknowledged_is_lost(log: &[Event], sent: &Sent) {
    assert_gap_free(log);
    let stored: HashMap<&str, &Event> = log.iter().map(|event| (event.id.as_str(), event)).collect();
    assert_eq!(stored.len(), log.len(), "an event is stored twice");
    let ids: HashSet<&str> = sent.batches.iter().flatten().map(|event| event.id.as_str()).collect();
    assert!(log.iter().all(|event| ids.contains(event.id.as_str())), "an event is stored that was not sent");
    for (n, batch) in sent.batches.iter().enumerate() {
        let found = batch.iter().filter(|event| stored.contains_key(event.id.as_str())).count();
        assert!(found == 0 || found == batch.len(), "only a part of batch {n} is stored");
        for answer in sent.answers.get(&n).into_iter().flatten() {
            let event = stored
                .get(answer.id.as_str())
                .unwrap_or_else(|| panic!("an acknowledged event is lost: {answer:?}"));
            assert_eq!((event.sequence, event.status), (answer.sequence, answer.status));
        }
    }
    // The batches of one writer are stored in the order sent.
    let mut last = 0;
    for event in sent.batches.iter().flatten().filter_map(|event| stored.get(event.id.as_str())) {
        assert!(event.sequence > last);
        last = event.sequence;
    }
}

/// The process that is killed while the writers append.
enum Killed {
    Server,
    Postgres,
}

async fn assert_acknowledged_events_survive(killed: Killed) {
    let mut server = ServerProcess::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let mut writers = Vec::new();
    for n in 0..8 {
        let job = provider.job(&customer).await;
        let (user, count) = (server.other_clients().same(&provider), Arc::clone(&acknowledged));
        let writer = job.clone();
        let writer = if n % 2 == 0 {
            tokio::spawn(append(user, writer, count))
        } else {
            tokio::spawn(publish(user, writer, count))
        };
        writers.push((job, writer));
    }
    within_timeout("acknowledgements", async {
        while acknowledged.load(Ordering::Relaxed) < ENOUGH {
            tokio::task::yield_now().await;
        }
    })
    .await;
    match killed {
        Killed::Server => {
            server.kill().await;
            server.restart().await;
        }
        // The server restarts its embedded Postgres.
        Killed::Postgres => server.kill_postgres().await,
    }
    let mut sent = Vec::new();
    for (job, writer) in writers {
        sent.push((job, within_timeout("a writer's call to fail", writer).await.unwrap()));
    }
    server.ready().await;
    let mut provider = server.other_clients().same(&provider);
    for (job, sent) in &sent {
        assert_nothing_acknowledged_is_lost(&provider.list(job).await, sent);
    }
    // All batches are sent again, answered or not; each event is then stored once.
    for (job, mut sent) in sent {
        for n in 0..sent.batches.len() {
            let answer = provider.append(&job, sent.batches[n].clone()).await;
            sent.answers.entry(n).or_insert(answer);
        }
        let log = provider.list(&job).await;
        assert_eq!(log.len(), sent.batches.iter().flatten().count());
        assert_nothing_acknowledged_is_lost(&log, &sent);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_events_survive_kill_9_of_the_server() {
    assert_acknowledged_events_survive(Killed::Server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_events_survive_kill_9_of_postgres() {
    assert_acknowledged_events_survive(Killed::Postgres).await;
}

/// Postgres sends the rows of a statement before the error of its commit, so the
/// rows alone are no acknowledgement.
#[tokio::test(flavor = "multi_thread")]
async fn an_append_whose_commit_fails_is_not_acknowledged() {
    let server = crate::support::TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    let refuse_at_the_commit = "
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION 'no room' USING ERRCODE = 'disk_full'; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON events DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN (NEW.name = 'doomed') EXECUTE FUNCTION refuse();";
    server.database.execute(refuse_at_the_commit).await;
    let doomed = provider.try_append(&job, [info("doomed")]).await;
    assert_refused(doomed, Code::Unavailable, ErrorReason::DatabaseUnavailable);
    provider.append(&job, [info("fine")]).await;
    let log = provider.list(&job).await;
    assert_eq!(log.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["fine"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_refuses_a_database_with_fsync_off() {
    let server = crate::support::TestServer::start().await;
    // The tests' shared Postgres runs with fsync off.
    let refusal = ServerProcess::refused_on(&server.database.url).await;
    assert!(refusal.contains("fsync"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_connection_sets_synchronous_commit_whatever_the_default_of_the_database() {
    let created = TestDatabase::migrated().await;
    let setting = "current_setting('synchronous_commit')";
    assert_eq!(created.texts(&format!("SELECT {setting} AS text")).await, ["off"]);
    let settings = DatabaseSettings {
        ca: None,
        connections: 1,
        connect_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(5),
        synchronous_commit: SynchronousCommit::On,
    };
    let database = Database::new(created.url.clone().into(), settings).unwrap();
    let value_on = async |connection: &mut AsyncPgConnection| -> String {
        diesel_async::RunQueryDsl::get_result(diesel::select(sql::<Text>(setting)), connection).await.unwrap()
    };
    assert_eq!(value_on(&mut *database.get(Payer::Server).await.unwrap()).await, "on");
    assert_eq!(value_on(&mut database.connect().await.unwrap()).await, "on");
    assert_eq!(value_on(&mut database.connect_to_listen().await.unwrap().0).await, "on");
}
