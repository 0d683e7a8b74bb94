//! The client library in Rust: its publisher, its spool and its watch.

mod publisher;
mod spool;
mod watch;

use std::sync::{Arc, Mutex};

use milepost_client::{
    Client,
    pb::{self, append_events_request::Job},
};

use crate::support::User;

/// What callbacks were told, in order.
#[derive(Clone)]
struct Told<T>(Arc<Mutex<Vec<T>>>);

impl<T: Clone> Told<T> {
    fn new() -> Self {
        Self(Arc::default())
    }

    fn push(&self, told: T) {
        self.0.lock().unwrap().push(told);
    }

    fn all(&self) -> Vec<T> {
        self.0.lock().unwrap().clone()
    }
}

/// A client of this URL with the key of a provider, which connects with its first call.
async fn client(url: &str, provider: &User) -> Client {
    Client::connect_lazy(url, None).await.unwrap().with_credential(&provider.key_secret).unwrap()
}

fn by_id(job: &pb::Job) -> Job {
    Job::JobId(job.id.clone())
}

fn names(log: &[pb::Event]) -> Vec<&str> {
    log.iter().map(|event| event.name.as_str()).collect()
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}
