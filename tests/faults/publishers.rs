//! Those who append over a stream, and send again, in order, what was not
//! answered when it broke.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use milepost::pb::{self, publish_events_response::Outcome as Answer};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::{
    history::{Attempt, Batch, Lost, Moment, Outcome, Refusal},
    world::{Failure, World},
    writers::{Writer, complete, events},
};

/// Most batches that are unanswered at once.
const WINDOW: usize = 12;
/// How long an answer may take before a stream is given up.
const TIMEOUT: Duration = Duration::from_secs(4);

struct Own {
    job: usize,
    /// Its last sequence once everything sent is appended.
    last: i64,
    batches_left: u32,
}

struct Publisher {
    writer: Writer,
    jobs: Vec<Own>,
    /// Unanswered, in the order sent.
    sent: VecDeque<Batch>,
    next: u64,
}

/// Publishes to jobs of its own until the end, and then until everything is
/// answered.
pub async fn publish(world: Arc<World>, name: String) {
    let writer = Writer::new(&world, name, 0);
    let mut publisher = Publisher { writer, jobs: Vec::new(), sent: VecDeque::new(), next: 0 };
    while !(world.is_finishing() && publisher.sent.is_empty()) {
        publisher.stream().await;
        let rest = Duration::from_millis(publisher.writer.random.u64(5..world.pace.rest_ms));
        let _ = timeout(rest, world.finishing.cancelled()).await;
    }
}

impl Publisher {
    /// One stream, until it breaks or is left.
    async fn stream(&mut self) {
        let world = Arc::clone(&self.writer.world);
        let replica = self.writer.random.usize(..2);
        let (batches, requests) = mpsc::channel(WINDOW);
        let opened = world.now();
        for batch in &mut self.sent {
            batches.try_send(request(&world, batch)).expect("the window has room");
            begin(batch, replica, opened);
        }
        let call = self.writer.callers[replica].events.publish_events(ReceiverStream::new(requests));
        let broken = match world.answer("PublishEvents", call).await {
            Ok(answers) => self.converse(&world, replica, batches, answers).await,
            Err(Failure::Refused(refusal)) => {
                panic!("a publish stream was refused: {refusal:?}");
            }
            Err(Failure::Unknown(lost)) => lost,
        };
        let over = world.now();
        for batch in &mut self.sent {
            settle(batch, over, Outcome::Unknown(broken.clone()));
        }
        // A client that crashes never comes back to what was not answered.
        if self.writer.random.u32(..60) == 0 {
            world.history.lock().unwrap().batches.extend(self.sent.drain(..));
            self.jobs.clear();
        }
    }

    /// Sends and hears until the stream is over; what that is to what was not
    /// answered.
    async fn converse(
        &mut self,
        world: &World,
        replica: usize,
        batches: mpsc::Sender<pb::PublishEventsRequest>,
        mut answers: Streaming<pb::PublishEventsResponse>,
    ) -> Lost {
        let mut left = self.writer.random.u32(5..400);
        let half_closes = self.writer.random.bool();
        let mut batches = Some(batches);
        loop {
            if left == 0 || world.is_finishing() {
                if !half_closes && !world.is_finishing() {
                    return Lost::GaveUp;
                }
                batches = None;
            } else if self.sent.len() < WINDOW
                && let Some(batches) = &batches
            {
                left -= 1;
                let mut batch = self.next_batch(world).await;
                begin(&mut batch, replica, world.now());
                let request = request(world, &batch);
                self.sent.push_back(batch);
                // If it is closed, the answers tell why.
                let _ = batches.try_send(request);
            }
            let longest = if self.sent.len() < WINDOW && batches.is_some() {
                Duration::from_millis(self.writer.random.u64(..60)) * world.pace.slower
            } else {
                TIMEOUT
            };
            match timeout(longest, answers.message()).await {
                Err(_) if longest < TIMEOUT && !self.is_overdue(world) => {}
                Err(_) => return Lost::GaveUp,
                Ok(Ok(Some(answer))) => self.hear(world, answer),
                Ok(Ok(None)) => {
                    if batches.is_some() || !self.sent.is_empty() {
                        self.complain(world, "a stream of answers ended with OK and answers were missing");
                    }
                    return Lost::GaveUp;
                }
                Ok(Err(status)) => match world.failure("PublishEvents", &status) {
                    Failure::Unknown(lost) => return lost,
                    Failure::Refused(refusal) => {
                        self.complain(world, &format!("a stream ended with {refusal:?}"));
                        return Lost::GaveUp;
                    }
                },
            }
        }
    }

    fn is_overdue(&self, world: &World) -> bool {
        let oldest = self.sent.front().and_then(|batch| batch.attempts.last());
        oldest.is_some_and(|attempt| world.now() > attempt.sent + TIMEOUT)
    }

    fn hear(&mut self, world: &World, answer: pb::PublishEventsResponse) {
        let due = self.sent.front().and_then(|batch| batch.order).map(|order| order.to_string());
        if due.as_deref() != Some(&answer.batch_id) {
            return self
                .complain(world, &format!("batch {} was answered when {due:?} was due", answer.batch_id));
        }
        let Some(mut batch) = self.sent.pop_front() else { return };
        let outcome = match answer.outcome {
            Some(Answer::Appended(appended)) => Outcome::Appended(appended.events),
            Some(Answer::Refused(status)) => Outcome::Refused(Refusal {
                code: Code::from_i32(status.code),
                message: status.message,
                last_sequence: None,
            }),
            None => return self.complain(world, "an answer says nothing"),
        };
        settle(&mut batch, world.now(), outcome);
        world.history.lock().unwrap().batches.push(batch);
    }

    fn complain(&self, world: &World, what: &str) {
        let what = format!("{}: {what}", self.writer.name);
        let unexcused = crate::history::Unexcused { at: world.now(), what };
        world.history.lock().unwrap().unexcused.push(unexcused);
    }

    /// A batch for any of its jobs; as it alone writes to them, it knows where
    /// each will end.
    async fn next_batch(&mut self, world: &World) -> Batch {
        while self.jobs.len() < 3 {
            let job = self.writer.new_job().await;
            self.jobs.push(Own { job, last: 0, batches_left: self.writer.random.u32(3..40) });
        }
        let random = &mut self.writer.random;
        let chosen = random.usize(..self.jobs.len());
        let own = &mut self.jobs[chosen];
        own.batches_left -= 1;
        let mut events = events(world, random, own.job);
        if own.batches_left == 0 {
            events.push(complete());
        }
        let expected = random.bool().then_some(own.last);
        let batch = Batch { expected, order: Some(self.next), ..self.writer.batch(own.job, events) };
        self.next += 1;
        own.last += i64::try_from(batch.events.len()).unwrap();
        if own.batches_left == 0 {
            self.jobs.remove(chosen);
        }
        batch
    }
}

fn request(world: &World, batch: &Batch) -> pb::PublishEventsRequest {
    pb::PublishEventsRequest {
        batch_id: batch.order.expect("it is published").to_string(),
        job: Some(pb::publish_events_request::Job::JobId(world.job_id(batch.job))),
        expected_sequence: batch.expected,
        events: batch.events.clone(),
    }
}

/// It goes out; whatever comes of it is filled in later.
fn begin(batch: &mut Batch, replica: usize, sent: Moment) {
    let outcome = Outcome::Unknown(Lost::GaveUp);
    batch.attempts.push(Attempt { replica, sent, over: Moment::MAX, outcome });
}

fn settle(batch: &mut Batch, over: Moment, outcome: Outcome) {
    if let Some(attempt) = batch.attempts.last_mut() {
        (attempt.over, attempt.outcome) = (over, outcome);
    }
}
