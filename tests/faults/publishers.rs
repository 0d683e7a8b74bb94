//! Publishers that append with `PublishEvents`. When a stream breaks, the next one
//! starts with the unanswered batches, in their order.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use milepost_client::pb::{self, publish_events_response::Outcome as Answer};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::{
    context::{self, CallError, Context},
    history::{Attempt, Batch, Moment, Outcome, Refusal, UnknownReason},
    writers::{Writer, complete, events},
};

/// Maximum of unanswered batches.
const WINDOW: usize = 12;
/// How long an answer may take before the publisher gives the stream up.
const TIMEOUT: Duration = Duration::from_secs(context::TIMEOUT.as_secs() + 1);

/// A job that only this publisher appends to.
struct OwnJob {
    job: usize,
    /// The last sequence once all sent batches are appended.
    last_sequence: i64,
    batches_left: u32,
}

struct Publisher {
    writer: Writer,
    jobs: Vec<OwnJob>,
    /// In the order in which they were sent.
    unanswered: VecDeque<Batch>,
    /// The next batch's [`Batch::order`].
    next_order: u64,
}

/// Publishes to jobs of its own until the load finishes and every batch is answered.
pub async fn publish(context: Arc<Context>, name: String) {
    let writer = Writer::new(&context, name, 0);
    let mut publisher = Publisher { writer, jobs: Vec::new(), unanswered: VecDeque::new(), next_order: 0 };
    while !(context.is_finishing() && publisher.unanswered.is_empty()) {
        publisher.stream().await;
        let rest = Duration::from_millis(publisher.writer.random.u64(5..context.pace.max_rest_ms));
        let _ = timeout(rest, context.finishing.cancelled()).await;
    }
}

impl Publisher {
    /// Opens one stream and publishes until it ends.
    async fn stream(&mut self) {
        let context = Arc::clone(&self.writer.context);
        let replica = self.writer.random.usize(..2);
        let (batches, requests) = mpsc::channel(WINDOW);
        let opened_at = context.now();
        for batch in &mut self.unanswered {
            batches.try_send(request(&context, batch)).expect("the channel has room for a whole window");
            start_attempt(batch, replica, opened_at);
        }
        let call = self.writer.clients[replica].events.publish_events(ReceiverStream::new(requests));
        let reason = match context.call("PublishEvents", call).await {
            Ok(answers) => self.exchange(&context, replica, batches, answers).await,
            Err(CallError::Refused(refusal)) => {
                panic!("PublishEvents was refused: {refusal:?}");
            }
            Err(CallError::Unknown(reason)) => reason,
        };
        let ended_at = context.now();
        for batch in &mut self.unanswered {
            finish_attempt(batch, ended_at, Outcome::Unknown(reason.clone()));
        }
        // A client that crashes does not send its unanswered batches again.
        if self.writer.random.u32(..60) == 0 {
            context.history.lock().unwrap().batches.extend(self.unanswered.drain(..));
            self.jobs.clear();
        }
    }

    /// Sends batches and receives answers until the stream ends. Returns why the
    /// outcome of the unanswered batches is unknown.
    async fn exchange(
        &mut self,
        context: &Context,
        replica: usize,
        batches: mpsc::Sender<pb::PublishEventsRequest>,
        mut answers: Streaming<pb::PublishEventsResponse>,
    ) -> UnknownReason {
        let mut batches_left = self.writer.random.u32(5..400);
        let half_closes = self.writer.random.bool();
        let mut batches = Some(batches);
        loop {
            if batches_left == 0 || context.is_finishing() {
                if !half_closes && !context.is_finishing() {
                    return UnknownReason::Abandoned;
                }
                batches = None;
            } else if self.unanswered.len() < WINDOW
                && let Some(batches) = &batches
            {
                batches_left -= 1;
                let mut batch = self.next_batch(context).await;
                start_attempt(&mut batch, replica, context.now());
                let request = request(context, &batch);
                self.unanswered.push_back(batch);
                // Sending fails if the server has ended the stream: its status follows.
                let _ = batches.try_send(request);
            }
            let max_wait = if self.unanswered.len() < WINDOW && batches.is_some() {
                Duration::from_millis(self.writer.random.u64(..60)) * context.pace.pause_factor
            } else {
                TIMEOUT
            };
            match timeout(max_wait, answers.message()).await {
                Err(_) if max_wait < TIMEOUT && !self.is_overdue(context) => {}
                Err(_) => return UnknownReason::Abandoned,
                Ok(Ok(Some(answer))) => self.receive(context, answer),
                Ok(Ok(None)) => {
                    if batches.is_some() || !self.unanswered.is_empty() {
                        self.record_unexpected(
                            context,
                            "PublishEvents ended with OK before all requests were sent and answered",
                        );
                    }
                    return UnknownReason::Abandoned;
                }
                Ok(Err(status)) => match context.classify("PublishEvents", &status) {
                    CallError::Unknown(reason) => return reason,
                    CallError::Refused(refusal) => {
                        self.record_unexpected(context, &format!("PublishEvents ended with {refusal:?}"));
                        return UnknownReason::Abandoned;
                    }
                },
            }
        }
    }

    fn is_overdue(&self, context: &Context) -> bool {
        let oldest = self.unanswered.front().and_then(|batch| batch.attempts.last());
        oldest.is_some_and(|attempt| context.now() > attempt.sent_at + TIMEOUT)
    }

    fn receive(&mut self, context: &Context, answer: pb::PublishEventsResponse) {
        let expected = self.unanswered.front().and_then(|batch| batch.order).map(|order| order.to_string());
        if expected.as_deref() != Some(&answer.batch_id) {
            let what = format!("batch {} was answered, expected batch {expected:?}", answer.batch_id);
            return self.record_unexpected(context, &what);
        }
        let Some(mut batch) = self.unanswered.pop_front() else { return };
        let outcome = match answer.outcome {
            Some(Answer::Appended(appended)) => Outcome::Appended(appended.events),
            Some(Answer::Refused(status)) => Outcome::Refused(Refusal {
                code: Code::from_i32(status.code),
                reason: String::new(),
                message: status.message,
                last_sequence: None,
            }),
            None => return self.record_unexpected(context, "an answer has no outcome"),
        };
        finish_attempt(&mut batch, context.now(), outcome);
        context.history.lock().unwrap().batches.push(batch);
    }

    fn record_unexpected(&self, context: &Context, what: &str) {
        context.record_unexpected(format!("{}: {what}", self.writer.name));
    }

    /// A batch for one of the publisher's jobs. Half of the batches carry an
    /// `expected_sequence`, which is known because no other writer appends there.
    async fn next_batch(&mut self, context: &Context) -> Batch {
        while self.jobs.len() < 3 {
            let job = self.writer.create_job().await;
            self.jobs.push(OwnJob { job, last_sequence: 0, batches_left: self.writer.random.u32(3..40) });
        }
        let random = &mut self.writer.random;
        let chosen = random.usize(..self.jobs.len());
        let own = &mut self.jobs[chosen];
        own.batches_left -= 1;
        let mut events = events(context, random, own.job);
        if own.batches_left == 0 {
            events.push(complete());
        }
        let expected = random.bool().then_some(own.last_sequence);
        let batch = Batch { expected, order: Some(self.next_order), ..self.writer.batch(own.job, events) };
        self.next_order += 1;
        own.last_sequence += i64::try_from(batch.events.len()).unwrap();
        if own.batches_left == 0 {
            self.jobs.remove(chosen);
        }
        batch
    }
}

fn request(context: &Context, batch: &Batch) -> pb::PublishEventsRequest {
    pb::PublishEventsRequest {
        batch_id: batch.order.expect("a published batch has an order").to_string(),
        job: Some(pb::publish_events_request::Job::JobId(context.job_id(batch.job))),
        expected_sequence: batch.expected,
        events: batch.events.clone(),
    }
}

/// Adds an attempt, whose outcome `finish_attempt` fills in.
fn start_attempt(batch: &mut Batch, replica: usize, sent_at: Moment) {
    let outcome = Outcome::Unknown(UnknownReason::Abandoned);
    batch.attempts.push(Attempt { replica, sent_at, ended_at: Moment::MAX, outcome });
}

fn finish_attempt(batch: &mut Batch, ended_at: Moment, outcome: Outcome) {
    if let Some(attempt) = batch.attempts.last_mut() {
        (attempt.ended_at, attempt.outcome) = (ended_at, outcome);
    }
}
