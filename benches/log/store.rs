//! milepost and etcd behind one face: many named logs, appended to and watched
//! over some connections. A job is a log of milepost's; of etcd's, a key whose
//! versions are the events.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use bytes::Bytes;
use milepost::{
    client::Client,
    pb::{
        self, NewEvent, WatchEventsRequest, WatchEventsResponse, append_events_request,
        watch_events_request::{self, Start},
        watch_events_response::Message,
    },
};
use prost::Message as _;
use tonic::{Streaming, client::Grpc, transport::Channel};
use uuid::Uuid;

use crate::{
    Result,
    etcd::{self, WatchResponse},
    service::{Connection, endpoint},
    tenant::step_tag,
};

/// Length of each event's name, in bytes.
const NAME_BYTES: usize = 64;

/// One of the two, over some connections.
#[derive(Clone)]
pub(crate) struct Store {
    connections: Connections,
    /// Job ids, which are etcd's keys as well.
    pub(crate) logs: Arc<[String]>,
}

#[derive(Clone)]
enum Connections {
    Milepost(Vec<Connection>),
    Etcd(Vec<Channel>),
}

/// One who appends, over one of the connections.
pub(crate) enum Writer {
    Milepost(Connection),
    Etcd(Box<Grpc<Channel>>),
}

/// An event that was acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acked {
    /// Which log.
    pub(crate) log: usize,
    /// Its place there; of etcd, the revision of the whole store.
    pub(crate) sequence: i64,
    /// Its client's id; none for etcd.
    pub(crate) id: Uuid,
}

/// An open watch, past `caught_up`.
pub(crate) enum Feed {
    Milepost(Box<Streaming<crate::service::WatchEventsResponse>>),
    Etcd(Box<Streaming<WatchResponse>>),
}

/// An event that was watched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Its place in its log: 1, 2, 3 … with both.
    pub(crate) sequence: i64,
    /// What it was stamped with.
    pub(crate) stamp: u64,
}

impl Store {
    /// A server's jobs, called with a key.
    pub(crate) async fn milepost(
        server: SocketAddr,
        key: &str,
        logs: Arc<[String]>,
        connections: usize,
    ) -> Result<Self> {
        let mut open = Vec::new();
        for _ in 0..connections {
            open.push(Connection::open(server, key).await?);
        }
        Ok(Self { connections: Connections::Milepost(open), logs })
    }

    /// An etcd's keys.
    pub(crate) async fn etcd(server: SocketAddr, logs: Arc<[String]>, connections: usize) -> Result<Self> {
        let endpoint = endpoint(server)?;
        let mut channels = Vec::new();
        for _ in 0..connections {
            channels.push(endpoint.connect().await?);
        }
        Ok(Self { connections: Connections::Etcd(channels), logs })
    }

    /// Somebody who appends over this connection, counted round and round.
    pub(crate) fn writer(&self, connection: usize) -> Writer {
        match &self.connections {
            Connections::Milepost(open) => Writer::Milepost(open[connection % open.len()].clone()),
            Connections::Etcd(channels) => {
                Writer::Etcd(Box::new(Grpc::new(channels[connection % channels.len()].clone())))
            }
        }
    }

    /// Watches one log over this connection, from now on; and the sequence up
    /// to which nothing will come, which etcd does not tell.
    pub(crate) async fn watch(&self, connection: usize, log: usize) -> Result<(Feed, Option<i64>)> {
        let name = self.logs[log].clone();
        match &self.connections {
            Connections::Milepost(open) => {
                let (stream, sequence) = open[connection % open.len()].watch(name).await?;
                Ok((Feed::Milepost(Box::new(stream)), Some(sequence)))
            }
            Connections::Etcd(channels) => {
                let channel = channels[connection % channels.len()].clone();
                Ok((Feed::Etcd(Box::new(etcd::watch(channel, name.into(), 0).await?)), None))
            }
        }
    }
}

/// Opens a watch and reads through the past to `caught_up`: the stream, the
/// token there, and for one job its last sequence.
pub(crate) async fn watch(
    client: &Client,
    scope: watch_events_request::Scope,
    start: Start,
) -> Result<(Streaming<WatchEventsResponse>, String, i64)> {
    let request = WatchEventsRequest { scope: Some(scope), start: Some(start), ..Default::default() };
    let mut stream = client.events().watch_events(request).await?.into_inner();
    loop {
        let response = stream.message().await?.ok_or("a watch that ended before it caught up")?;
        if let Some(Message::CaughtUp(caught_up)) = response.message {
            let sequence = caught_up.job.map_or(0, |job| job.last_sequence);
            return Ok((stream, response.resume_token, sequence));
        }
    }
}

impl Writer {
    /// Appends one event; returns when it is acknowledged.
    pub(crate) async fn append(&mut self, logs: &[String], log: usize, stamp: u64) -> Result<Acked> {
        match self {
            Self::Milepost(connection) => {
                let event = new_event(log, stamp);
                let id = event.id.parse()?;
                let sequence = connection.append(append(logs[log].clone(), vec![event])).await?;
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

/// An event with an id, of one of the steps, that carries a stamp.
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

/// A batch for a job.
pub(crate) fn append(job_id: String, events: Vec<NewEvent>) -> pb::AppendEventsRequest {
    let job = Some(append_events_request::Job::JobId(job_id));
    pb::AppendEventsRequest { job, expected_sequence: None, events }
}

/// The same for etcd, so long that its request has as many bytes.
fn etcd_event(job_id: &str, step: usize, stamp: u64) -> (Bytes, Bytes) {
    let mut value = format!("{stamp:020}");
    // Of the whole request but for the key and the value's own tag and length.
    let length = payload_bytes(job_id, step) - (job_id.len() + 2) - 2;
    value.extend(std::iter::repeat_n('.', length.saturating_sub(value.len())));
    (job_id.to_owned().into(), value.into())
}

/// Bytes of a request that appends one event.
pub(crate) fn payload_bytes(job_id: &str, step: usize) -> usize {
    // An id and a stamp of any value have the same length; made without the
    // cost of a new id.
    let event = NewEvent {
        id: job_id.to_owned(),
        kind: pb::EventKind::Step.into(),
        name: ".".repeat(NAME_BYTES),
        step_tag: step_tag(step),
        ..Default::default()
    };
    append(job_id.to_owned(), vec![event]).encoded_len()
}

impl Feed {
    /// The next events; a watch that ends or jumps is an error.
    pub(crate) async fn next(&mut self) -> Result<Vec<Seen>> {
        match self {
            Self::Milepost(stream) => loop {
                let response = stream.message().await?.ok_or("a watch ended")?;
                match (response.events, response.heartbeat) {
                    (Some(watched), _) => {
                        let seen = |event: &crate::service::Event| {
                            Ok(Seen { sequence: event.sequence, stamp: stamp_of(&event.name)? })
                        };
                        return watched.events.iter().map(seen).collect();
                    }
                    (None, Some(_)) => {}
                    (None, None) => return Err("a watch said neither events nor a heartbeat".into()),
                }
            },
            Self::Etcd(stream) => {
                let response = stream.message().await?.ok_or("a watch ended")?;
                if response.canceled {
                    return Err("etcd canceled a watch".into());
                }
                let seen = response
                    .events
                    .into_iter()
                    .filter_map(|event| event.kv)
                    .map(|kv| Ok(Seen { sequence: kv.version, stamp: stamp_of(&kv.value)? }));
                seen.collect()
            }
        }
    }
}

/// Each log's events exactly once and in order: what follows what.
pub(crate) struct Order(Option<i64>);

impl Order {
    pub(crate) fn after(sequence: Option<i64>) -> Self {
        Self(sequence)
    }

    pub(crate) fn check(&mut self, seen: Seen) -> Result<()> {
        match self.0.replace(seen.sequence) {
            Some(last) if seen.sequence != last + 1 => {
                Err(format!("a watcher got event {} after event {last}", seen.sequence).into())
            }
            _ => Ok(()),
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
