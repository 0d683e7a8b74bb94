//! One interface to milepost and etcd: named logs that are appended to and watched. A
//! log is a job in milepost. In etcd it is a key, and the versions of its value are the
//! events.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use milepost_client::{
    Client,
    pb::{
        self, NewEvent, WatchEventsRequest, WatchEventsResponse, append_events_request,
        watch_events_request::{self, Start},
        watch_events_response::Message,
    },
};
use milepost_testing::User;
use prost::Message as _;
use tokio::sync::watch;
use tonic::{Streaming, client::Grpc, transport::Channel};
use uuid::Uuid;

use crate::{
    Result,
    accounts::step_tag,
    etcd::{self, WatchResponse},
    event_service::{Connection, endpoint},
};

/// Length of each event's name, in bytes.
const NAME_BYTES: usize = 64;

/// The logs of milepost or etcd, reached over some connections.
#[derive(Clone)]
pub(crate) struct Store {
    connections: Connections,
    /// Job ids; the same texts are the keys in etcd.
    pub(crate) logs: Arc<[String]>,
}

#[derive(Clone)]
enum Connections {
    Milepost(Vec<Connection>),
    Etcd(Vec<Channel>),
}

/// Appends over one of the connections.
pub(crate) enum Writer {
    Milepost(Connection),
    Etcd(Box<Grpc<Channel>>),
}

/// An acknowledged event.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acked {
    /// Index of the log in [`Store::logs`].
    pub(crate) log: usize,
    /// In milepost the job's sequence; in etcd the revision of the whole store.
    pub(crate) sequence: i64,
    /// The event id given by the client; nil for etcd.
    pub(crate) id: Uuid,
}

/// The stream of an open watch, after milepost's `caught_up`.
pub(crate) enum EventStream {
    Milepost(Box<Streaming<crate::event_service::WatchEventsResponse>>),
    Etcd(Box<Streaming<WatchResponse>>),
}

/// An event that a watch received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReceivedEvent {
    /// 1, 2, 3 … in each log, for milepost and etcd.
    pub(crate) sequence: i64,
    /// The stamp that the event was appended with.
    pub(crate) stamp: u64,
}

impl Store {
    /// The jobs of a milepost server, called with the API key of a user.
    pub(crate) async fn milepost(
        server: SocketAddr,
        user: &User,
        logs: Arc<[String]>,
        connections: usize,
    ) -> Result<Self> {
        let mut open = Vec::new();
        for _ in 0..connections {
            open.push(Connection::open(server, user).await?);
        }
        Ok(Self { connections: Connections::Milepost(open), logs })
    }

    /// The keys of an etcd server.
    pub(crate) async fn etcd(server: SocketAddr, logs: Arc<[String]>, connections: usize) -> Result<Self> {
        let endpoint = endpoint(server)?;
        let mut channels = Vec::new();
        for _ in 0..connections {
            channels.push(endpoint.connect().await?);
        }
        Ok(Self { connections: Connections::Etcd(channels), logs })
    }

    /// A writer over this connection; the number wraps around.
    pub(crate) fn writer(&self, connection: usize) -> Writer {
        match &self.connections {
            Connections::Milepost(open) => Writer::Milepost(open[connection % open.len()].clone()),
            Connections::Etcd(channels) => {
                Writer::Etcd(Box::new(Grpc::new(channels[connection % channels.len()].clone())))
            }
        }
    }

    /// Watches a log from now on over this connection; the number wraps around. Returns
    /// the stream, and for milepost the log's last sequence, which etcd does not give.
    pub(crate) async fn watch(&self, connection: usize, log: usize) -> Result<(EventStream, Option<i64>)> {
        let name = self.logs[log].clone();
        match &self.connections {
            Connections::Milepost(open) => {
                let (stream, sequence) = open[connection % open.len()].watch(name).await?;
                Ok((EventStream::Milepost(Box::new(stream)), Some(sequence)))
            }
            Connections::Etcd(channels) => {
                let channel = channels[connection % channels.len()].clone();
                Ok((EventStream::Etcd(Box::new(etcd::watch(channel, name.into(), 0).await?)), None))
            }
        }
    }
}

/// Opens a watch and reads to `caught_up`. Returns the stream, the resume token there,
/// and for one job its last sequence.
pub(crate) async fn watch(
    client: &Client,
    scope: watch_events_request::Scope,
    start: Start,
) -> Result<(Streaming<WatchEventsResponse>, String, i64)> {
    let request = WatchEventsRequest { scope: Some(scope), start: Some(start), ..Default::default() };
    let mut stream = client.events().watch_events(request).await?.into_inner();
    loop {
        let response = stream.message().await?.ok_or("a watch ended before it caught up")?;
        if let Some(Message::CaughtUp(caught_up)) = response.message {
            let sequence = caught_up.job.map_or(0, |job| job.last_sequence);
            return Ok((stream, response.resume_token, sequence));
        }
    }
}

impl Writer {
    /// Appends one event and returns once it is acknowledged.
    pub(crate) async fn append(&mut self, logs: &[String], log: usize, stamp: u64) -> Result<Acked> {
        match self {
            Self::Milepost(connection) => {
                let event = new_event(log, stamp);
                let id = event.id.parse()?;
                let sequence = connection.append(append_request(logs[log].clone(), vec![event])).await?;
                Ok(Acked { log, sequence, id })
            }
            Self::Etcd(grpc) => {
                let (key, value) = etcd_event(&logs[log], log, stamp);
                let sequence = etcd::put(grpc, key, value).await?;
                Ok(Acked { log, sequence, id: Uuid::nil() })
            }
        }
    }
}

/// A `step` event with a new id; its name begins with the stamp.
pub(crate) fn new_event(step: usize, stamp: u64) -> NewEvent {
    NewEvent {
        id: Uuid::now_v7().to_string(),
        kind: pb::EventKind::Step.into(),
        name: format!("{stamp:020}{:.<1$}", "", NAME_BYTES - 20),
        step_tag: step_tag(step),
        metadata: None,
        occurred_at: None,
    }
}

/// A request that appends events to a job.
pub(crate) fn append_request(job_id: String, events: Vec<NewEvent>) -> pb::AppendEventsRequest {
    let job = Some(append_events_request::Job::JobId(job_id));
    pb::AppendEventsRequest { job, expected_sequence: None, events }
}

/// The key and value of an event in etcd. The value is padded so that the `Put` request
/// has as many bytes as the `AppendEvents` request.
fn etcd_event(job_id: &str, step: usize, stamp: u64) -> (Bytes, Bytes) {
    let mut value = format!("{stamp:020}");
    // The request without the key's field and without the value's tag and length.
    let length = payload_bytes(job_id, step) - (job_id.len() + 2) - 2;
    value.extend(std::iter::repeat_n('.', length.saturating_sub(value.len())));
    (job_id.to_owned().into(), value.into())
}

/// The size in bytes of an `AppendEvents` request with one event.
pub(crate) fn payload_bytes(job_id: &str, step: usize) -> usize {
    // All ids have the same length: the job id stands in for an event id, which costs
    // time to generate.
    let event = NewEvent {
        id: job_id.to_owned(),
        kind: pb::EventKind::Step.into(),
        name: ".".repeat(NAME_BYTES),
        step_tag: step_tag(step),
        ..Default::default()
    };
    append_request(job_id.to_owned(), vec![event]).encoded_len()
}

impl EventStream {
    /// The next events. The end of the watch is an error.
    pub(crate) async fn next(&mut self) -> Result<Vec<ReceivedEvent>> {
        match self {
            Self::Milepost(stream) => loop {
                let response = stream.message().await?.ok_or("a watch ended")?;
                match (response.events, response.heartbeat) {
                    (Some(watched), _) => {
                        let received = |event: &crate::event_service::Event| {
                            Ok(ReceivedEvent { sequence: event.sequence, stamp: stamp_of(&event.name)? })
                        };
                        return watched.events.iter().map(received).collect();
                    }
                    (None, Some(_)) => {}
                    (None, None) => {
                        return Err("a watch sent a message with neither events nor a heartbeat".into());
                    }
                }
            },
            Self::Etcd(stream) => {
                let response = stream.message().await?.ok_or("a watch ended")?;
                if response.canceled {
                    return Err("etcd canceled a watch".into());
                }
                let received = response
                    .events
                    .into_iter()
                    .filter_map(|event| event.kv)
                    .map(|kv| Ok(ReceivedEvent { sequence: kv.version, stamp: stamp_of(&kv.value)? }));
                received.collect()
            }
        }
    }
}

/// Checks that a watch receives each event of a log once and in order. It holds the last
/// sequence, if it is known.
pub(crate) struct SequenceCheck(Option<i64>);

impl SequenceCheck {
    pub(crate) fn after(sequence: Option<i64>) -> Self {
        Self(sequence)
    }

    pub(crate) fn check(&mut self, event: ReceivedEvent) -> Result<()> {
        match self.0.replace(event.sequence) {
            Some(last) if event.sequence != last + 1 => {
                Err(format!("a watch received event {} after event {last}", event.sequence).into())
            }
            _ => Ok(()),
        }
    }
}

/// Reads a watch until it has received each event once and in order. `total` says how many
/// these are, after the last append. Returns the delays of the events that were sent `from`
/// this time after `started` on.
pub(crate) async fn delays(
    mut stream: EventStream,
    mut order: SequenceCheck,
    started: Instant,
    from: Duration,
    mut total: watch::Receiver<Option<usize>>,
) -> Result<Vec<Duration>> {
    let (mut count, mut delays) = (0, Vec::new());
    loop {
        let received = tokio::select! {
            received = stream.next() => received?,
            changed = total.changed() => { changed?; Vec::new() }
        };
        let now = started.elapsed();
        for event in received {
            order.check(event)?;
            count += 1;
            let sent = Duration::from_nanos(event.stamp);
            if sent >= from {
                delays.push(now.saturating_sub(sent));
            }
        }
        match *total.borrow() {
            Some(total) if count == total => return Ok(delays),
            Some(total) if count > total => {
                return Err(format!("a watcher received {count} events of {total}").into());
            }
            _ => {}
        }
    }
}

fn stamp_of(text: &[u8]) -> Result<u64> {
    Ok(std::str::from_utf8(text.get(..20).ok_or("an event without a stamp")?)?.parse()?)
}

/// Nanoseconds since `start`, for stamps.
pub(crate) fn stamp(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
