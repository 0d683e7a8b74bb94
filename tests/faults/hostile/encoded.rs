//! A codec for requests that are encoded already: the generated types would take many times
//! the memory.

use bytes::{BufMut as _, Bytes};
use milepost_client::pb;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
};
use tonic_prost::{ProstCodec, ProstDecoder};

/// Sends encoded requests of `PublishEvents`, and decodes its answers.
#[derive(Default)]
pub struct EncodedRequests;

pub struct AsItIs;

impl Codec for EncodedRequests {
    type Encode = Bytes;
    type Decode = pb::PublishEventsResponse;
    type Encoder = AsItIs;
    type Decoder = ProstDecoder<pb::PublishEventsResponse>;

    fn encoder(&mut self) -> AsItIs {
        AsItIs
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<(), pb::PublishEventsResponse>::raw_decoder(BufferSettings::default())
    }
}

impl Encoder for AsItIs {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(message);
        Ok(())
    }
}
