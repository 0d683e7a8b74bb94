//! A client for etcd's `Put`, `Range` and `Watch`, with those fields of its public API that are
//! used here.

use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::uri::PathAndQuery;
use tonic::{
    Request, Streaming,
    client::Grpc,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use crate::Result;

#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
}

/// Of a `Put` or a `Range`.
#[derive(Clone, PartialEq, prost::Message)]
struct KvResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ResponseHeader {
    #[prost(int64, tag = "3")]
    pub(crate) revision: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WatchRequest {
    // One member of a oneof, declared as a field: the encoding is the same.
    #[prost(message, optional, tag = "1")]
    create_request: Option<WatchCreateRequest>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WatchCreateRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(int64, tag = "3")]
    start_revision: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct WatchResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<ResponseHeader>,
    #[prost(bool, tag = "3")]
    pub(crate) created: bool,
    #[prost(bool, tag = "4")]
    pub(crate) canceled: bool,
    #[prost(message, repeated, tag = "11")]
    pub(crate) events: Vec<Event>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Event {
    #[prost(message, optional, tag = "2")]
    pub(crate) kv: Option<KeyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct KeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) key: Bytes,
    /// 1, 2, 3 … for each key.
    #[prost(int64, tag = "4")]
    pub(crate) version: i64,
    #[prost(bytes = "bytes", tag = "5")]
    pub(crate) value: Bytes,
}

/// Stores a value and returns the revision of the whole store after it.
pub(crate) async fn put(grpc: &mut Grpc<Channel>, key: Bytes, value: Bytes) -> Result<i64> {
    grpc.ready().await?;
    let path = PathAndQuery::from_static("/etcdserverpb.KV/Put");
    let codec = ProstCodec::<PutRequest, KvResponse>::default();
    let response = grpc.unary(Request::new(PutRequest { key, value }), path, codec).await?;
    Ok(response.into_inner().header.ok_or("an answer without a header")?.revision)
}

/// The revision of the whole store, which grows by 1 with every `Put`.
pub(crate) async fn revision(channel: Channel) -> Result<i64> {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await?;
    let path = PathAndQuery::from_static("/etcdserverpb.KV/Range");
    let codec = ProstCodec::<RangeRequest, KvResponse>::default();
    let request = RangeRequest { key: Bytes::from_static(b"probe") };
    let response = grpc.unary(Request::new(request), path, codec).await?;
    Ok(response.into_inner().header.ok_or("an answer without a header")?.revision)
}

/// Opens a stream with a watch of one key and waits until etcd confirms the watch. It
/// starts at a revision, or from now on for revision 0.
pub(crate) async fn watch(
    channel: Channel,
    key: Bytes,
    start_revision: i64,
) -> Result<Streaming<WatchResponse>> {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await?;
    let create = WatchRequest { create_request: Some(WatchCreateRequest { key, start_revision }) };
    // The stream of requests stays open: its end would end the watch.
    let requests = stream::once(async move { create }).chain(stream::pending());
    let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
    let codec = ProstCodec::<WatchRequest, WatchResponse>::default();
    let mut responses = grpc.streaming(Request::new(requests), path, codec).await?.into_inner();
    match responses.message().await? {
        Some(response) if response.created && !response.canceled => Ok(responses),
        other => Err(format!("etcd did not confirm a watch: {other:?}").into()),
    }
}

/// Fails if etcd does not answer.
pub(crate) async fn probe(address: SocketAddr) -> Result<()> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
    put(&mut Grpc::new(channel), Bytes::from_static(b"probe"), Bytes::new()).await?;
    Ok(())
}
