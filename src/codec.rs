//! tonic's protobuf codec with smaller buffers than tonic's own, which takes out of a message
//! what its limits do not allow before it is decoded.

mod prune;
mod rules;
mod wire;

use std::marker::PhantomData;

use prost::{Message, Name};
use tonic::{
    Status,
    codec::{self, BufferSettings, DecodeBuf, EncodeBuf},
};

use self::{prune::prune, rules::rules_of};
use bytes::Buf as _;

/// Initial size of a call's decode buffer. Most messages fit, larger ones make the buffer grow.
/// tonic's own default is 8 KiB.
const DECODE_BYTES: usize = 1024;
/// Initial size of a call's encode buffer, which an open watch keeps: each message makes the room
/// that it takes.
const ENCODE_BYTES: usize = 0;
/// Encoded bytes after which a buffer is sent; tonic's own default.
const YIELD_BYTES: usize = 32 * 1024;

/// The codec of the generated services.
#[derive(Debug)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// Encodes messages.
#[derive(Debug)]
pub struct Encoder<T>(PhantomData<T>);

/// Decodes messages that were pruned, see `codec/prune.rs`.
#[derive(Debug)]
pub struct Decoder<U>(PhantomData<U>);

impl<T, U> codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Name + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = Encoder<T>;
    type Decoder = Decoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        Encoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        Decoder(PhantomData)
    }
}

impl<T: Message> codec::Encoder for Encoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, message: T, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.reserve(message.encoded_len());
        message.encode(to).map_err(|error| internal(&error))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(ENCODE_BYTES, YIELD_BYTES)
    }
}

impl<U: Message + Name + Default> codec::Decoder for Decoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // A message lies in one piece.
        let whole = from.chunk();
        let pruned = rules_of(U::NAME).map_or(Ok(None), |rules| prune(rules, whole));
        let message = match pruned.map_err(|malformed| internal(&malformed))? {
            None => U::decode(from),
            Some(pruned) => {
                from.advance(from.remaining());
                U::decode(pruned.as_slice())
            }
        };
        message.map(Some).map_err(|error| internal(&error))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(DECODE_BYTES, YIELD_BYTES)
    }
}

/// gRPC's status for what cannot be decoded or encoded; tonic's own is the same.
fn internal(error: &impl ToString) -> Status {
    Status::internal(error.to_string())
}
