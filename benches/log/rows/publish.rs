//! `PublishEvents` with batches of 100, compared with the append statement alone, driven
//! by pgbench, and with COPY into the same table.

use std::{collections::VecDeque, process::Stdio, sync::Arc, time::Instant};

use bytes::Bytes;
use futures_util::SinkExt as _;
use milepost_client::{
    Client,
    pb::{
        PublishEventsRequest, PublishEventsResponse, publish_events_request,
        publish_events_response::Outcome as Answer,
    },
};
use milepost_testing::{connect, installed::succeed};
use tokio::{process::Command, sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use uuid::Uuid;

use crate::{
    Result,
    accounts::{self, Accounts},
    check::Checker,
    harness::{Harness, serve},
    load::{Worker, drive},
    report::{Goal, Measure, Outcome},
    store::{Acked, new_event, stamp},
};

/// Events in a batch.
const BATCH: usize = 100;
/// Publish streams, each on a connection of its own.
const STREAMS: usize = 8;
/// Unanswered batches of each stream.
const WINDOW: usize = 16;
const JOBS: usize = 1_000;
/// Clients of pgbench.
const SQL_CLIENTS: usize = 2;
/// Jobs that each pgbench client appends to.
const SQL_CLIENT_JOBS: usize = 500;
/// Jobs in one statement: as many batches as the server appends in one transaction.
const SQL_JOBS: usize = 20;
/// Connections that run COPY.
const COPIERS: usize = 2;
/// Rows of one COPY.
const COPY_ROWS: usize = 2_000;

/// One publish stream.
struct Publisher {
    requests: Option<mpsc::Sender<PublishEventsRequest>>,
    answers: Streaming<PublishEventsResponse>,
    /// The job and the event ids of each unanswered batch, in the order sent.
    unanswered: VecDeque<(usize, Vec<Uuid>)>,
    jobs: Arc<[String]>,
    next: usize,
    first: usize,
    batches: u64,
    started: Instant,
    acked: Vec<Acked>,
}

impl Publisher {
    async fn open(client: &Client, jobs: Arc<[String]>, first: usize) -> Result<Self> {
        let (requests, receiver) = mpsc::channel(WINDOW);
        let answers = client.events().publish_events(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self {
            requests: Some(requests),
            answers,
            unanswered: VecDeque::new(),
            jobs,
            next: first,
            first,
            batches: 0,
            started: Instant::now(),
            acked: Vec::new(),
        })
    }

    async fn send(&mut self) -> Result<()> {
        let job = self.next;
        self.next += STREAMS;
        if self.next >= self.jobs.len() {
            self.next = self.first;
        }
        let events: Vec<_> = (0..BATCH).map(|step| new_event(step, stamp(self.started))).collect();
        let ids = events.iter().map(|event| event.id.parse()).collect::<Result<_, _>>()?;
        self.batches += 1;
        let request = PublishEventsRequest {
            batch_id: self.batches.to_string(),
            job: Some(publish_events_request::Job::JobId(self.jobs[job].clone())),
            expected_sequence: None,
            events,
        };
        self.unanswered.push_back((job, ids));
        self.requests.as_ref().ok_or("the publish stream is closed")?.send(request).await?;
        Ok(())
    }

    /// Receives one answer. Answers arrive in the order of the batches.
    async fn receive(&mut self) -> Result<()> {
        let answer = self.answers.message().await?.ok_or("the publish stream ended")?;
        let (job, ids) = self.unanswered.pop_front().ok_or("there are more answers than batches")?;
        let Some(Answer::Appended(appended)) = answer.outcome else {
            return Err(format!("a batch was refused: {:?}", answer.outcome).into());
        };
        if appended.events.len() != ids.len() {
            return Err("an answer has another number of events than its batch".into());
        }
        let acked = appended.events.iter().zip(ids).map(|(event, id)| Acked {
            log: job,
            sequence: event.sequence,
            id,
        });
        self.acked.extend(acked);
        Ok(())
    }
}

impl Worker for Publisher {
    async fn work(&mut self) -> Result<()> {
        while self.unanswered.len() < WINDOW {
            self.send().await?;
        }
        self.receive().await
    }

    async fn finish(&mut self) -> Result<()> {
        self.requests = None;
        while !self.unanswered.is_empty() {
            self.receive().await?;
        }
        match self.answers.message().await? {
            None => Ok(()),
            Some(_) => Err("there are more answers than batches".into()),
        }
    }
}

pub(super) async fn measure(harness: &Harness, name: &str) -> Result<Vec<Outcome>> {
    let database = harness.database().await?;
    let server = serve(&database).await;
    let accounts = Accounts::create(server.address).await;
    let jobs: Arc<[String]> = accounts.create_jobs(server.address, JOBS).await?.into();
    let clients = accounts::connect(server.address, &accounts.provider, STREAMS).await?;
    let reader = &accounts::connect(server.address, &accounts.customer, 1).await?[0];
    let has_pgbench = Command::new("pgbench").arg("--version").stdout(Stdio::null()).status().await.is_ok();
    if !has_pgbench {
        harness.report_missing_peer("pgbench (Debian: postgresql)")?;
    }
    let mut by_statement = Outcome::new(name, "events/s", "append statement", Some(Goal::AtLeast(0.75)));
    let mut by_copy = Outcome::new(format!("{name}-copy"), "events/s", "COPY", None);
    let mut checker = Checker::default();
    for round in 0..harness.options.rounds {
        harness.checkpoint().await?;
        let mut publishers = Vec::new();
        for (first, client) in clients.iter().enumerate() {
            publishers.push(Publisher::open(client, Arc::clone(&jobs), first).await?);
        }
        let (publishers, calls) = drive(publishers, &harness.options).await?;
        let rate = calls.rate(f64::from(u32::try_from(BATCH)?));
        by_statement.add_milepost(Measure::of(rate.value));
        by_copy.add_milepost(Measure::of(rate.value));
        let acked: Vec<Acked> = publishers.into_iter().flat_map(|publisher| publisher.acked).collect();
        checker.check(reader, &jobs, &acked).await?;
        if has_pgbench {
            let first = insert_jobs(&database, round, SQL_CLIENTS * SQL_CLIENT_JOBS).await?;
            harness.checkpoint().await?;
            by_statement.add_peer(append_statement_rate(harness, &database, first).await?);
        }
        let first = insert_jobs(&database, round + 1_000, COPIERS).await?;
        harness.checkpoint().await?;
        by_copy.add_peer(copy_rate(harness, &database, first, round).await?);
    }
    Ok(vec![by_statement, by_copy])
}

/// Inserts jobs directly into the database. Their ids are made of consecutive numbers;
/// the first number is returned.
async fn insert_jobs(database: &str, set: u32, count: usize) -> Result<i64> {
    let first = i64::from(set) * 1_000_000;
    let (from, to) = (first, first + i64::try_from(count)? - 1);
    let sql = format!(
        "INSERT INTO jobs (id, provider_id, customer_id, job_configuration_id, configuration_tag,
                           provider_job_id, provider_job_name, points_total)
         SELECT {}, provider_id, customer_id, job_configuration_id, configuration_tag, 'set-' || n, '', points_total
         FROM (SELECT * FROM jobs WHERE provider_job_id = 'job-0000000') AS one, generate_series({from}, {to}) AS n",
        job_id("n")
    );
    connect(database).await?.batch_execute(&sql).await?;
    Ok(first)
}

/// An SQL expression for the id that `insert_jobs` makes of a number.
fn job_id(number: &str) -> String {
    format!("('00000000-0000-7000-8000-' || lpad(to_hex({number}), 12, '0'))::uuid")
}

/// Events a second of the append statement alone, with as many jobs and events in one
/// transaction as the server appends in one.
async fn append_statement_rate(harness: &Harness, database: &str, first: i64) -> Result<Measure> {
    let events = SQL_JOBS * BATCH;
    let (last_job, last_event) = (SQL_JOBS - 1, events - 1);
    // Each pgbench client counts its statements in `i` to know its next job and that
    // job's last sequence: a query for them would cost a round trip.
    let script = format!(
        r"\set first {first} + :client_id * {SQL_CLIENT_JOBS} + (:i * {SQL_JOBS}) % {SQL_CLIENT_JOBS}
\set after ((:i * {SQL_JOBS}) / {SQL_CLIENT_JOBS}) * {BATCH}
\set i :i + 1
SELECT outcomes FROM append_events(
    ARRAY(SELECT {id} FROM generate_series(0, {last_job}) AS j ORDER BY j),
    array_fill((:after)::bigint, ARRAY[{SQL_JOBS}]),
    ARRAY(SELECT CASE WHEN (:after)::bigint > 0 THEN {last_id} END FROM generate_series(0, {last_job}) AS j ORDER BY j),
    array_fill({BATCH}, ARRAY[{SQL_JOBS}]),
    ARRAY(SELECT {new_last_id} FROM generate_series(0, {last_job}) AS j ORDER BY j),
    array_fill('running'::job_status, ARRAY[{SQL_JOBS}]),
    array_fill(5::bigint, ARRAY[{SQL_JOBS}]),
    array_fill(5::smallint, ARRAY[{SQL_JOBS}]),
    array_fill('\x01'::bytea, ARRAY[{SQL_JOBS}]),
    array_fill(false, ARRAY[{SQL_JOBS}]),
    ARRAY(SELECT e / {BATCH} + 1 FROM generate_series(0, {last_event}) AS e ORDER BY e),
    ARRAY(SELECT {event_id} FROM generate_series(0, {last_event}) AS e ORDER BY e),
    array_fill(true, ARRAY[{events}]),
    ARRAY(SELECT (:after)::bigint + e % {BATCH} + 1 FROM generate_series(0, {last_event}) AS e ORDER BY e),
    array_fill('step'::event_kind, ARRAY[{events}]),
    array_fill(repeat('.', 64), ARRAY[{events}]),
    array_fill('{step}'::uuid, ARRAY[{events}]),
    array_fill(''::bytea, ARRAY[{events}]),
    array_fill(NULL::timestamptz, ARRAY[{events}]),
    array_fill('running'::job_status, ARRAY[{events}]),
    array_fill(5::bigint, ARRAY[{events}]),
    array_fill(5::smallint, ARRAY[{events}]));
",
        id = job_id("(:first)::bigint + j"),
        last_id = event_id("j", "(:after)::bigint"),
        new_last_id = event_id("j", &format!("(:after)::bigint + {BATCH}")),
        event_id = event_id(&format!("e / {BATCH}"), &format!("(:after)::bigint + e % {BATCH} + 1")),
        step = step_id(database).await?,
    );
    let script = harness.write_file("append.sql", &script)?;
    let mut pgbench = Command::new("pgbench");
    pgbench
        .args(["--no-vacuum", "--protocol=prepared", "--define=i=0"])
        .arg(format!("--client={SQL_CLIENTS}"))
        .arg(format!("--jobs={SQL_CLIENTS}"))
        .arg(format!("--time={}", harness.options.seconds))
        .arg(format!("--file={}", script.display()))
        .arg(database);
    let before = count_events(database, first).await?;
    let output = succeed(&mut pgbench).await;
    let rate = output
        .lines()
        .find_map(|line| line.strip_prefix("tps = "))
        .ok_or("the output of pgbench has no line `tps = `")?;
    let rate: f64 = rate.split(' ').next().unwrap_or_default().parse()?;
    let transactions =
        output.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
    let statements: i64 =
        transactions.and_then(|text| text.split('/').next()).unwrap_or_default().trim().parse()?;
    let appended = count_events(database, first).await? - before;
    if appended != statements * i64::try_from(events)? {
        return Err(format!(
            "{statements} append statements appended {appended} events, expected {events} each"
        )
        .into());
    }
    Ok(Measure::of(rate * f64::from(u32::try_from(events)?)))
}

/// The id of a step of the configuration.
async fn step_id(database: &str) -> Result<String> {
    let client = connect(database).await?;
    Ok(client.query_one("SELECT min(id::text) FROM step_configurations", &[]).await?.get(0))
}

/// The id that the script gives the event of this sequence of its job with this number: the
/// function compares the id of a job's last event.
fn event_id(job: &str, sequence: &str) -> String {
    format!("md5(((:first)::bigint + {job}) || ' ' || ({sequence}))::uuid")
}

/// The number of events of the jobs inserted from this number on, by their
/// `last_sequence`.
async fn count_events(database: &str, first: i64) -> Result<i64> {
    let last = first + i64::try_from(SQL_CLIENTS * SQL_CLIENT_JOBS)? - 1;
    let sql = format!(
        "SELECT sum(last_sequence)::bigint FROM jobs WHERE id BETWEEN {} AND {}",
        job_id(&first.to_string()),
        job_id(&last.to_string())
    );
    Ok(connect(database).await?.query_one(&sql, &[]).await?.get(0))
}

/// Rows a second of COPY into the table `events`, with the same columns, indexes and
/// checks, but without numbering events and without updating jobs.
async fn copy_rate(harness: &Harness, database: &str, first: i64, round: u32) -> Result<Measure> {
    let step: Arc<str> = step_id(database).await?.into();
    let (started, window) = (Instant::now(), harness.options.round());
    let mut copying = JoinSet::new();
    for copier in 0..COPIERS {
        let (client, step) = (connect(database).await?, Arc::clone(&step));
        let number = first + i64::try_from(copier)?;
        let job = format!("00000000-0000-7000-8000-{number:012x}");
        // Far beyond the end of the log, where no server reads.
        let mut position = (1_i64 << 50) + ((i64::from(round) * 16 + i64::try_from(copier)?) << 40);
        copying.spawn(async move {
            let (mut sequence, mut copied) = (0_i64, 0_u32);
            while started.elapsed() < window {
                let mut text = String::with_capacity(COPY_ROWS * 256);
                for _ in 0..COPY_ROWS {
                    (position, sequence) = (position + 1, sequence + 1);
                    let id = Uuid::now_v7();
                    let name = format!("{sequence:.<64}");
                    text.push_str(&format!(
                        "{job}\t{sequence}\t{position}\t{id}\tstep\t{name}\t{step}\t\\\\x\t\\N\trunning\t5\t5\t2026-11-23 00:00:00Z\n"
                    ));
                }
                let sink = client
                    .copy_in(
                        "COPY events (job_id, sequence, position, id, kind, name, step_configuration_id, \
                         event_metadata, occurred_at, status, points_done, percent, created_at) FROM STDIN",
                    )
                    .await?;
                let mut sink = std::pin::pin!(sink);
                sink.send(Bytes::from(text)).await?;
                copied += u32::try_from(sink.as_mut().finish().await?)?;
            }
            Ok::<_, crate::Error>(copied)
        });
    }
    let mut copied = 0;
    while let Some(done) = copying.join_next().await {
        copied += done??;
    }
    Ok(Measure::of(f64::from(copied) / started.elapsed().as_secs_f64()))
}
