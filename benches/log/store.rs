//! One interface to milepost and its peers: named logs that are appended to and watched. A
//! log is a job in milepost and in the tables of the naive peer. In etcd it is a key, and the
//! versions of its value are the events; in NATS it is a subject of one stream; in Durable
//! Streams it is a stream.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use milepost_client::{
    Client,
    pb::{
        WatchEventsRequest, WatchEventsResponse,
        watch_events_request::{self, Start},
        watch_events_response::Message,
    },
};
use milepost_testing::{User, connect_client::JsonWatch};
use serde_json::Value;
use tonic::{Streaming, client::Grpc, transport::Channel};
use uuid::Uuid;

use crate::{
    Result,
    event_service::{Connection, endpoint},
    events::{
        Acked, ReceivedEvent, append_request, event_name, new_event, peer_event, received_from_peer, stamp_of,
    },
    peers::{
        PeerKind, durable_streams,
        etcd::{self, WatchResponse},
        naive, nats,
    },
};

/// The logs of milepost or a peer, reached over some connections.
#[derive(Clone)]
pub(crate) struct Store {
    connections: Connections,
    /// Job ids; the peers use the same texts as names.
    pub(crate) logs: Arc<[String]>,
    /// The number of events that were sent to each log of a peer.
    sent: Arc<[AtomicI64]>,
}

#[derive(Clone)]
enum Connections {
    Milepost(Vec<Connection>),
    Etcd(Vec<Channel>),
    Nats(Vec<Arc<nats::Connection>>),
    /// A connection for each call in flight.
    DurableStreams(Arc<durable_streams::Connections>),
    Naive(Arc<naive::Connections>),
}

/// Appends over one of the connections.
pub(crate) struct Writer {
    connection: WriterConnection,
    sent: Arc<[AtomicI64]>,
}

enum WriterConnection {
    Milepost(Connection),
    Etcd(Box<Grpc<Channel>>),
    Nats(Arc<nats::Connection>),
    DurableStreams(Arc<durable_streams::Connections>),
    Naive(Arc<naive::Connections>, usize),
}

/// The stream of an open watch, after milepost's `caught_up`.
pub(crate) enum EventStream {
    Milepost(Box<Streaming<crate::event_service::WatchEventsResponse>>),
    Etcd(Box<Streaming<WatchResponse>>),
    Nats(nats::Events),
    DurableStreams(Box<durable_streams::Events>),
    Naive(Box<naive::Events>),
    /// A watch by JSON over HTTP/1.1, as a page has it.
    Page(Box<JsonWatch>),
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
        Ok(Self::of(Connections::Milepost(open), logs))
    }

    /// The logs of a peer at an address.
    pub(crate) async fn of_peer(
        kind: PeerKind,
        server: SocketAddr,
        logs: &Arc<[String]>,
        connections: usize,
    ) -> Result<Self> {
        let open = match kind {
            PeerKind::Etcd => {
                let endpoint = endpoint(server)?;
                let mut channels = Vec::new();
                for _ in 0..connections {
                    channels.push(endpoint.connect().await?);
                }
                Connections::Etcd(channels)
            }
            PeerKind::Nats => {
                let mut open = Vec::new();
                for _ in 0..connections {
                    open.push(Arc::new(nats::Connection::open(server).await?));
                }
                Connections::Nats(open)
            }
            PeerKind::DurableStreams => {
                Connections::DurableStreams(Arc::new(durable_streams::Connections::open(server, logs).await?))
            }
            PeerKind::Naive => return Err("the naive peer has no address".into()),
        };
        Ok(Self::of(open, Arc::clone(logs)))
    }

    /// The first jobs of a database of the naive peer.
    pub(crate) async fn naive(database: &naive::Database, logs: usize, connections: usize) -> Result<Self> {
        let open = naive::Connections::open(database, connections).await?;
        Ok(Self::of(Connections::Naive(open), database.jobs(logs)))
    }

    fn of(connections: Connections, logs: Arc<[String]>) -> Self {
        let sent = logs.iter().map(|_| AtomicI64::new(0)).collect();
        Self { connections, logs, sent }
    }

    /// A writer over this connection; the number wraps around.
    pub(crate) fn writer(&self, connection: usize) -> Writer {
        let connection = match &self.connections {
            Connections::Milepost(open) => WriterConnection::Milepost(open[connection % open.len()].clone()),
            Connections::Etcd(channels) => {
                WriterConnection::Etcd(Box::new(Grpc::new(channels[connection % channels.len()].clone())))
            }
            Connections::Nats(open) => WriterConnection::Nats(Arc::clone(&open[connection % open.len()])),
            Connections::DurableStreams(open) => WriterConnection::DurableStreams(Arc::clone(open)),
            Connections::Naive(open) => WriterConnection::Naive(Arc::clone(open), connection),
        };
        Writer { connection, sent: Arc::clone(&self.sent) }
    }

    /// Watches a log from now on over this connection; the number wraps around. Returns
    /// the stream, and the log's last sequence if it is known.
    pub(crate) async fn watch(&self, connection: usize, log: usize) -> Result<(EventStream, Option<i64>)> {
        let name = &self.logs[log];
        match &self.connections {
            Connections::Milepost(open) => {
                let (stream, sequence) = open[connection % open.len()].watch(name.clone()).await?;
                Ok((EventStream::Milepost(Box::new(stream)), Some(sequence)))
            }
            Connections::Etcd(channels) => {
                let channel = channels[connection % channels.len()].clone();
                let stream = etcd::watch(channel, name.clone().into(), 0).await?;
                Ok((EventStream::Etcd(Box::new(stream)), None))
            }
            Connections::Nats(open) => {
                Ok((EventStream::Nats(open[connection % open.len()].watch(name).await?), None))
            }
            Connections::DurableStreams(open) => {
                Ok((EventStream::DurableStreams(Box::new(open.watch(name).await?)), None))
            }
            Connections::Naive(open) => {
                let (events, sequence) = open.watch(connection, name).await?;
                Ok((EventStream::Naive(Box::new(events)), Some(sequence)))
            }
        }
    }

    /// What a peer has stored so far, in events; only the growth has a meaning.
    pub(crate) async fn stored(&self) -> Result<i64> {
        match &self.connections {
            Connections::Milepost(_) => Err("the events of milepost are checked one by one".into()),
            Connections::Etcd(channels) => etcd::revision(channels[0].clone()).await,
            Connections::Nats(open) => open[0].stored().await,
            Connections::DurableStreams(open) => {
                let mut stored = 0;
                for log in self.logs.iter() {
                    let event = durable_streams_event(log, 0, 0, 0).len() + 1;
                    stored += open.length(log).await? / i64::try_from(event)?;
                }
                Ok(stored)
            }
            Connections::Naive(open) => open.stored().await,
        }
    }
}

/// Opens a watch, by default from the beginning, and reads to `caught_up`. Returns the stream, the resume token there,
/// and for one job its last sequence.
pub(crate) async fn watch(
    client: &Client,
    scope: watch_events_request::Scope,
    start: impl Into<Option<Start>>,
) -> Result<(Streaming<WatchEventsResponse>, String, i64)> {
    let request = WatchEventsRequest { scope: Some(scope), start: start.into(), ..Default::default() };
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
        let name = &logs[log];
        let number = || self.sent[log].fetch_add(1, Ordering::Relaxed) + 1;
        let mut id = Uuid::nil();
        let sequence = match &mut self.connection {
            WriterConnection::Milepost(connection) => {
                let event = new_event(log, stamp);
                id = event.id.parse()?;
                connection.append(append_request(name.clone(), vec![event])).await?
            }
            WriterConnection::Etcd(grpc) => {
                // The tags and lengths of the key and of the value are four bytes.
                let value = peer_event(name, log, stamp, number(), 4);
                etcd::put(grpc, name.clone().into(), value.into()).await?
            }
            WriterConnection::Nats(connection) => {
                connection.publish(name, &peer_event(name, log, stamp, number(), 0)).await?
            }
            WriterConnection::DurableStreams(connections) => {
                connections.append(name, durable_streams_event(name, log, stamp, number())).await?
            }
            WriterConnection::Naive(connections, session) => {
                id = Uuid::now_v7();
                connections.append(*session, name, &id.to_string(), &event_name(stamp)).await?
            }
        };
        Ok(Acked { log, sequence, id })
    }
}

/// A string in JSON.
fn durable_streams_event(log: &str, step: usize, stamp: u64, number: i64) -> String {
    format!("\"{}\"", peer_event(log, step, stamp, number, 2))
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
            Self::Page(watch) => loop {
                let (_, message) = watch.next().await.ok_or("a watch broke off")?;
                if let Some(events) = message["events"]["events"].as_array() {
                    return events.iter().map(event_of_json).collect();
                }
                if message.get("heartbeat").is_none() {
                    return Err(format!("a watch sent {message}").into());
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
            Self::Nats(events) => events.next().await?.iter().map(|text| received_from_peer(text)).collect(),
            Self::DurableStreams(events) => {
                events.next().await?.iter().map(|text| received_from_peer(text.as_bytes())).collect()
            }
            Self::Naive(events) => {
                let received = events.next().await?.into_iter().map(|(sequence, name)| {
                    Ok(ReceivedEvent { sequence, stamp: stamp_of(name.as_bytes())? })
                });
                received.collect()
            }
        }
    }
}

fn event_of_json(event: &Value) -> Result<ReceivedEvent> {
    let text = |name: &str| event[name].as_str().ok_or_else(|| format!("no {name} in {event}"));
    Ok(ReceivedEvent { sequence: text("sequence")?.parse()?, stamp: stamp_of(text("name")?.as_bytes())? })
}
