//! `PublishEvents` with batches of 100, compared with the append statement alone and with
//! COPY into the same table.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use bytes::Bytes;
use futures_util::SinkExt as _;
use milepost_client::{
    Client,
    pb::{
        PublishEventsRequest, PublishEventsResponse, publish_events_request,
        publish_events_response::Outcome as Answer,
    },
};
use milepost_testing::connect;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use uuid::Uuid;

use super::statement::{self, Statement, insert_jobs, step_id};
use crate::{
    Result,
    accounts::{self, Accounts},
    check::Checker,
    events::{Acked, new_event, stamp},
    harness::{Harness, serve},
    load::{Worker, drive},
    report::{Goal, Measure, Outcome},
};

/// Events in a batch.
const BATCH: usize = 100;
/// Publish streams, each on a connection of its own.
const STREAMS: usize = 8;
/// Unanswered batches of each stream.
const WINDOW: usize = 16;
const JOBS: usize = 1_000;
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
    let servers = [serve(&database).await];
    let address = servers[0].address;
    let accounts = Accounts::create(address).await;
    let jobs: Arc<[String]> = accounts.create_jobs(address, JOBS).await?.into();
    let clients = accounts::connect(address, &accounts.provider, STREAMS).await?;
    let reader = &accounts::connect(address, &accounts.customer, 1).await?[0];
    let statement = Statement::find(harness, &database).await?;
    let goal = Some(Goal::AtLeast(0.9));
    let mut by_statement = Outcome::new(name, "events/s").compared_with(statement::NAME, goal);
    let mut cost = Outcome::new(format!("{name}-cost"), "µs/event").compared_with(statement::NAME, None);
    let mut by_copy = Outcome::new(format!("{name}-copy"), "events/s").compared_with("COPY", None);
    let mut checker = Checker::default();
    for round in 0..harness.options.rounds {
        harness.checkpoint().await?;
        let mut publishers = Vec::new();
        for (first, client) in clients.iter().enumerate() {
            publishers.push(Publisher::open(client, Arc::clone(&jobs), first).await?);
        }
        let before = harness.milepost_processor_time(&servers);
        let (publishers, calls) = drive(publishers, &harness.options).await?;
        let time = harness.milepost_processor_time(&servers) - before;
        let rate = calls.rate(f64::from(u32::try_from(BATCH)?));
        by_statement.add_milepost(Measure::of(rate.value));
        by_copy.add_milepost(Measure::of(rate.value));
        let acked: Vec<Acked> = publishers.into_iter().flat_map(|publisher| publisher.acked).collect();
        cost.add_milepost(Measure::cost(time, acked.len()));
        checker.check(reader, &jobs, &acked).await?;
        if let Some(statement) = &statement {
            let run = statement.run(harness, statement::BATCHES, round).await?;
            by_statement.add_peer(run.rate);
            cost.add_peer(run.cost);
        }
        let first = insert_jobs(&database, round + 1_000, COPIERS).await?;
        harness.checkpoint().await?;
        by_copy.add_peer(copy_rate(harness, &database, first, round).await?);
    }
    Ok(vec![by_statement, cost, by_copy])
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
