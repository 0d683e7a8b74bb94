//! A watch, read message by message.

use milepost::pb::{self, watch_events_response::Message};
use tonic::{Status, Streaming};

use super::within_timeout;

/// A running watch.
#[derive(Debug)]
pub struct Watch {
    stream: Streaming<pb::WatchEventsResponse>,
    /// That of the last message received; empty before the first.
    pub resume_token: String,
}

/// All that a watch of one job said, from its start to its end.
#[derive(Debug)]
pub struct Film {
    pub events: Vec<pb::Event>,
    /// How many of them came before `caught_up`.
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
        Ok(Some(response.message.expect("every message says something")))
    }

    /// Messages up to and with the first that the predicate holds for. It is not
    /// waited for over a heartbeat, which says that there is nothing.
    pub async fn until(&mut self, mut predicate: impl FnMut(&Message) -> bool) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            let message = self.next().await.unwrap().expect("the watch goes on");
            let found = predicate(&message);
            assert!(found || !matches!(message, Message::Heartbeat(_)), "all is quiet: it will not come");
            messages.push(message);
            if found {
                return messages;
            }
        }
    }

    /// Reads through the past: its events, and what `caught_up` says.
    pub async fn caught_up(&mut self) -> (Vec<pb::Event>, pb::CaughtUp) {
        let mut messages = self.until(|message| matches!(message, Message::CaughtUp(_))).await;
        let Some(Message::CaughtUp(caught_up)) = messages.pop() else { unreachable!("just matched") };
        (events(messages), caught_up)
    }

    /// At least the next `count` events; more, if more came with the last.
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

    /// Reads to the end of a job that closes, and checks that the stream is
    /// then over with OK.
    pub async fn film(mut self) -> Film {
        let mut film = Film { events: Vec::new(), past: None, end: pb::WatchEnd::default() };
        loop {
            match self.next().await.unwrap().expect("`end` is the last message") {
                Message::Events(watched) => film.events.extend(watched.events),
                Message::CaughtUp(_) => {
                    assert_eq!(film.past, None, "`caught_up` comes once");
                    film.past = Some(film.events.len());
                }
                Message::Heartbeat(_) => panic!("all is quiet after {} events", film.events.len()),
                Message::End(end) => {
                    film.end = end;
                    break;
                }
            }
        }
        assert_eq!(self.next().await.unwrap(), None, "nothing comes after `end`");
        film
    }
}

/// The events of these messages.
fn events(messages: Vec<Message>) -> Vec<pb::Event> {
    let of_one = |message| match message {
        Message::Events(watched) => watched.events,
        _ => Vec::new(),
    };
    messages.into_iter().flat_map(of_one).collect()
}
