//! A client for milepost's `AppendEvents` and `WatchEvents` that decodes only the fields
//! used here, as the client for etcd does.

use std::net::SocketAddr;

use bytes::Bytes;
use http::uri::PathAndQuery;
use milepost_client::{
    Client, Service,
    pb::{self, AppendEventsRequest, WatchEventsRequest, watch_events_request},
};
use milepost_testing::User;
use tonic::{Request, Streaming, client::Grpc, transport::Endpoint};
use tonic_prost::ProstCodec;

use crate::Result;

#[derive(Clone, PartialEq, prost::Message)]
struct AppendEventsResponse {
    #[prost(message, repeated, tag = "1")]
    events: Vec<AppendedEvent>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AppendedEvent {
    #[prost(int64, tag = "2")]
    sequence: i64,
}

/// The members of the oneof as optional fields: the encoding is the same.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct WatchEventsResponse {
    #[prost(message, optional, tag = "2")]
    pub(crate) events: Option<WatchedEvents>,
    #[prost(message, optional, tag = "3")]
    pub(crate) caught_up: Option<CaughtUp>,
    #[prost(message, optional, tag = "4")]
    pub(crate) heartbeat: Option<Heartbeat>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct WatchedEvents {
    #[prost(message, repeated, tag = "1")]
    pub(crate) events: Vec<Event>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Event {
    #[prost(int64, tag = "3")]
    pub(crate) sequence: i64,
    #[prost(bytes = "bytes", tag = "5")]
    pub(crate) name: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CaughtUp {
    #[prost(message, optional, tag = "1")]
    job: Option<JobState>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct JobState {
    #[prost(int64, tag = "1")]
    last_sequence: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Heartbeat {}

/// The endpoint for milepost and etcd. With tonic's default window h2 closes a
/// connection in which 10,000 small messages are unread.
pub(crate) fn endpoint(server: SocketAddr) -> Result<Endpoint> {
    let endpoint = Endpoint::from_shared(format!("http://{server}"))?;
    Ok(endpoint.initial_connection_window_size(64 * 1024 * 1024))
}

/// A connection with an API key for its calls.
#[derive(Clone)]
pub(crate) struct Connection(Service);

impl Connection {
    pub(crate) async fn open(server: SocketAddr, user: &User) -> Result<Self> {
        let client = Client::new(endpoint(server)?.connect().await?);
        Ok(Self(client.with_credential(&user.key_secret)?.service()))
    }

    /// Appends one event and returns its sequence.
    pub(crate) async fn append(&self, request: AppendEventsRequest) -> Result<i64> {
        let path = PathAndQuery::from_static("/milepost.v1.EventService/AppendEvents");
        let codec = ProstCodec::<AppendEventsRequest, AppendEventsResponse>::default();
        let response = self.ready().await?.unary(Request::new(request), path, codec).await?.into_inner();
        Ok(response.events.first().ok_or("an answer without an event")?.sequence)
    }

    /// Watches a job from now on. Returns the stream after `caught_up`, and the job's
    /// last sequence there.
    pub(crate) async fn watch(&self, job_id: String) -> Result<(Streaming<WatchEventsResponse>, i64)> {
        let request = WatchEventsRequest {
            scope: Some(watch_events_request::Scope::JobId(job_id)),
            start: Some(watch_events_request::Start::FromNow(pb::FromNow {})),
            ..Default::default()
        };
        let path = PathAndQuery::from_static("/milepost.v1.EventService/WatchEvents");
        let codec = ProstCodec::<WatchEventsRequest, WatchEventsResponse>::default();
        let responses = self.ready().await?.server_streaming(Request::new(request), path, codec).await?;
        let mut responses = responses.into_inner();
        let first = responses.message().await?.ok_or("a watch ended before it caught up")?;
        match first.caught_up.and_then(|caught_up| caught_up.job) {
            Some(job) => Ok((responses, job.last_sequence)),
            None => Err("a watch from now did not begin with caught_up".into()),
        }
    }

    async fn ready(&self) -> Result<Grpc<Service>> {
        let mut grpc = Grpc::new(self.0.clone());
        grpc.ready().await?;
        Ok(grpc)
    }
}
