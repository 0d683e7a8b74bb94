//! A watch that resumes after interruptions.

use std::{fmt, pin::Pin, time::Duration};

use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Response, Status, Streaming};

use crate::{
    CallError, Service,
    pb::{
        WatchEndReason, WatchEventsRequest, WatchEventsResponse, event_service_client::EventServiceClient,
        watch_events_request::Start, watch_events_response::Message,
    },
    retry::{LONGEST_PAUSE, pause},
};

/// The heartbeat interval of a request without one.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// The server cuts the interval to these.
const SHORTEST_HEARTBEAT: Duration = Duration::from_secs(5);
const LONGEST_HEARTBEAT: Duration = Duration::from_secs(60);
/// What is added to two heartbeat intervals.
const GRACE: Duration = Duration::from_secs(5);

type OnInterruption = dyn FnMut(&CallError, Duration) + Send;
type Opening = dyn Future<Output = Result<Response<Streaming<WatchEventsResponse>>, Status>> + Send;

/// See [`Client::watch`](crate::Client::watch).
pub struct Watch {
    events: EventServiceClient<Service>,
    request: WatchEventsRequest,
    stream: Stream,
    /// Whether the present stream has sent a message.
    has_sent: bool,
    /// How long the caller has waited since the last message.
    silence: Duration,
    /// Consecutive failures, without a message between them.
    failures: u32,
    /// The end of the pause after an interruption.
    resume_at: Option<Instant>,
    ended: bool,
    on_interruption: Box<OnInterruption>,
}

enum Stream {
    Closed,
    /// Kept over dropped futures of [`Watch::next`], as an open stream is.
    Opening(Pin<Box<Opening>>),
    Open(Box<Streaming<WatchEventsResponse>>),
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("request", &self.request)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Watch {
    pub(crate) fn new(events: EventServiceClient<Service>, request: WatchEventsRequest) -> Self {
        Self {
            events,
            request,
            stream: Stream::Closed,
            has_sent: false,
            silence: Duration::ZERO,
            failures: 0,
            resume_at: None,
            ended: false,
            on_interruption: Box::new(|_, _| {}),
        }
    }

    /// Calls `on_interruption` whenever the watch is interrupted, with the cause and
    /// with the pause before the watch is resumed.
    #[must_use]
    pub fn on_interruption(
        mut self,
        on_interruption: impl FnMut(&CallError, Duration) + Send + 'static,
    ) -> Self {
        self.on_interruption = Box::new(on_interruption);
        self
    }

    /// The next message; none after the `end` of a closed job. Every event arrives
    /// exactly once; `caught_up` is sent again after each interruption.
    ///
    /// An error is one that no retry cures, such as UNAUTHENTICATED or NOT_FOUND,
    /// and ends the watch. Dropping the future loses no message.
    ///
    /// A stream without a message for two heartbeat intervals and 5 s is a broken connection.
    /// Only the time in which this method is awaited counts.
    pub async fn next(&mut self) -> Result<Option<WatchEventsResponse>, CallError> {
        while !self.ended {
            if let Some(resume_at) = self.resume_at {
                sleep_until(resume_at).await;
                self.resume_at = None;
            }
            let interruption = match self.receive().await {
                Ok(Some(message)) => {
                    self.request.start = Some(Start::ResumeToken(message.resume_token.clone()));
                    let body = &message.message;
                    let ends_by = |reason| matches!(body, Some(Message::End(end)) if end.reason() == reason);
                    if !ends_by(WatchEndReason::Draining) {
                        self.failures = 0;
                        self.ended = ends_by(WatchEndReason::JobClosed);
                        return Ok(Some(message));
                    }
                    Status::unavailable("the server is shutting down").into()
                }
                Ok(None) => Status::unavailable("the stream ended without an end message").into(),
                Err(status) => CallError::from(status),
            };
            if !interruption.interrupts_stream(self.has_sent) {
                self.ended = true;
                self.stream = Stream::Closed;
                return Err(interruption);
            }
            self.interrupt(&interruption);
        }
        Ok(None)
    }

    fn interrupt(&mut self, interruption: &CallError) {
        self.stream = Stream::Closed;
        self.has_sent = false;
        self.silence = Duration::ZERO;
        let pause = pause(self.failures, LONGEST_PAUSE, interruption);
        self.failures = self.failures.saturating_add(1);
        self.resume_at = Some(Instant::now() + pause);
        (self.on_interruption)(interruption, pause);
    }

    async fn receive(&mut self) -> Result<Option<WatchEventsResponse>, Status> {
        let longest = longest_silence(&self.request);
        let left = longest.saturating_sub(self.silence);
        let waiting = Waiting { silence: &mut self.silence, since: Instant::now() };
        let message = message(&mut self.stream, &self.events, &self.request);
        let received = timeout(left, message).await;
        drop(waiting);
        let late = |_| Err(Status::unavailable(format!("no message came for {} s", longest.as_secs())));
        let received = received.unwrap_or_else(late)?;
        self.has_sent = true;
        self.silence = Duration::ZERO;
        Ok(received)
    }
}

/// Adds the time that the caller waits, also if it drops the future.
struct Waiting<'a> {
    silence: &'a mut Duration,
    since: Instant,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *self.silence += self.since.elapsed();
    }
}

/// The next message of the stream, which is opened before if it is closed.
async fn message(
    stream: &mut Stream,
    events: &EventServiceClient<Service>,
    request: &WatchEventsRequest,
) -> Result<Option<WatchEventsResponse>, Status> {
    loop {
        match stream {
            Stream::Closed => {
                let (mut events, request) = (events.clone(), request.clone());
                *stream = Stream::Opening(Box::pin(async move { events.watch_events(request).await }));
            }
            Stream::Opening(opening) => *stream = Stream::Open(Box::new(opening.await?.into_inner())),
            Stream::Open(messages) => return messages.message().await,
        }
    }
}

/// The longest time without a message in which the connection is not taken for broken.
fn longest_silence(request: &WatchEventsRequest) -> Duration {
    let interval = request.heartbeat_interval.and_then(|interval| Duration::try_from(interval).ok());
    interval.unwrap_or(HEARTBEAT).clamp(SHORTEST_HEARTBEAT, LONGEST_HEARTBEAT) * 2 + GRACE
}
