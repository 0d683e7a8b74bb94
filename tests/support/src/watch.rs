//! A watch, read message by message.

use milepost_client::pb::{self, watch_events_response::Message};
use tonic::{Status, Streaming};

use crate::within_timeout;

/// An open stream of WatchEvents.
#[derive(Debug)]
pub struct Watch {
    stream: Streaming<pb::WatchEventsResponse>,
    /// The token of the last message received; empty before the first.
    pub resume_token: String,
}

/// All that a watch of one closed job received.
#[derive(Debug)]
pub struct WatchedJob {
    pub events: Vec<pb::Event>,
    /// The number of events before `caught_up`; `None` without `caught_up`.
    pub past: Option<usize>,
    pub end: pb::WatchEnd,
}

impl Watch {
    pub fn new(stream: Streaming<pb::WatchEventsResponse>) -> Self {
        Self { stream, resume_token: String::new() }
    }

    /// The next message, heartbeats included; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Message>, Status> {
        let Some(response) = within_timeout("a message of the watch", self.stream.message()).await? else {
            return Ok(None);
        };
        assert!(!response.resume_token.is_empty(), "every message has a resume token");
        self.resume_token = response.resume_token;
        Ok(Some(response.message.expect("every response has a message")))
    }

    /// Reads messages up to and including the first for which the predicate holds.
    /// Panics at an earlier heartbeat, since it means that the server has no more
    /// to send.
    pub async fn until(&mut self, mut predicate: impl FnMut(&Message) -> bool) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            let message =
                self.next().await.unwrap().expect("the awaited message comes before the watch ends");
            let found = predicate(&message);
            assert!(
                found || !matches!(message, Message::Heartbeat(_)),
                "a heartbeat came instead of the awaited message"
            );
            messages.push(message);
            if found {
                return messages;
            }
        }
    }

    /// Reads the past; returns its events and the `caught_up` message.
    pub async fn caught_up(&mut self) -> (Vec<pb::Event>, pb::CaughtUp) {
        let mut messages = self.until(|message| matches!(message, Message::CaughtUp(_))).await;
        let Some(Message::CaughtUp(caught_up)) = messages.pop() else { unreachable!("just matched") };
        (events(messages), caught_up)
    }

    /// Reads at least `count` events, and more if the last message has more.
    pub async fn events(&mut self, count: usize) -> Vec<pb::Event> {
        let mut seen = 0;
        let messages = self
            .until(|message| {
                if let Message::Events(watched) = message {
                    seen += watched.events.len();
                }
                seen >= count
            })
            .await;
        events(messages)
    }

    /// Reads up to the `end` of a closed job, and checks that the stream then ends
    /// with OK.
    pub async fn read_to_end(mut self) -> WatchedJob {
        let mut job = WatchedJob { events: Vec::new(), past: None, end: pb::WatchEnd::default() };
        loop {
            match self.next().await.unwrap().expect("`end` is the last message") {
                Message::Events(watched) => job.events.extend(watched.events),
                Message::CaughtUp(_) => {
                    assert_eq!(job.past, None, "`caught_up` comes once");
                    job.past = Some(job.events.len());
                }
                Message::Heartbeat(_) => {
                    panic!("a heartbeat came before `end`, after {} events", job.events.len())
                }
                Message::End(end) => {
                    job.end = end;
                    break;
                }
            }
        }
        assert_eq!(self.next().await.unwrap(), None, "nothing comes after `end`");
        job
    }
}

fn events(messages: Vec<Message>) -> Vec<pb::Event> {
    let of_one = |message| match message {
        Message::Events(watched) => watched.events,
        _ => Vec::new(),
    };
    messages.into_iter().flat_map(of_one).collect()
}
