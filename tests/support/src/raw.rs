//! Calls of any method with encoded messages, and the methods that the
//! descriptor set lists.

use bytes::{Buf as _, BufMut as _, Bytes};
use futures_util::stream;
use http::uri::PathAndQuery;
use prost_reflect::{DescriptorPool, MethodDescriptor};
use tonic::{
    Request, Status, Streaming,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

/// A codec that passes encoded messages through unchanged.
#[derive(Clone, Copy, Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, message: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Calls `SERVICE/METHOD` of the API, but sends no message and does not
/// half-close.
pub async fn begin(channel: Channel, method: &str) -> Result<(), Status> {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = PathAndQuery::try_from(format!("/milepost.v1.{method}")).unwrap();
    grpc.streaming(Request::new(stream::pending()), path, Raw).await.map(drop)
}

/// Calls `SERVICE/METHOD` of the API with these messages and half-closes.
pub async fn open(
    channel: Channel,
    secret: Option<&str>,
    method: &str,
    messages: impl IntoIterator<Item = Vec<u8>, IntoIter: Send + 'static>,
) -> Result<Streaming<Bytes>, Status> {
    let mut request = Request::new(stream::iter(messages));
    if let Some(secret) = secret {
        request.metadata_mut().insert("authorization", format!("Bearer {secret}").parse().unwrap());
    }
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = PathAndQuery::try_from(format!("/milepost.v1.{method}")).unwrap();
    Ok(grpc.streaming(request, path, Raw).await?.into_inner())
}

/// Every method of the API.
pub fn methods() -> Vec<MethodDescriptor> {
    let pool = DescriptorPool::decode(milepost::pb::FILE_DESCRIPTOR_SET).unwrap();
    let services = pool.services().filter(|service| service.package_name() == "milepost.v1");
    services.flat_map(|service| service.methods().collect::<Vec<_>>()).collect()
}

/// `SERVICE/METHOD`.
pub fn name(method: &MethodDescriptor) -> String {
    format!("{}/{}", method.parent_service().name(), method.name())
}
