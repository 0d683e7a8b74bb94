//! tonic's protobuf codec with smaller buffers than tonic's own, which takes out of a message
//! what its limits do not allow before it is decoded.

mod prune;
mod rules;
mod wire;

use std::marker::PhantomData;

use prost::{Message, Name};
use tonic::{
    Status,
    codec::{self, BufferSettings, DecodeBuf},
};
use tonic_prost::{ProstCodec, ProstEncoder};

use self::{prune::prune, rules::rules_of};
use bytes::Buf as _;

/// Initial size of a call's encode buffer and of its decode buffer, which an open
/// watch keeps. Most messages fit, larger ones make a buffer grow. tonic's own
/// default is 8 KiB.
const BUFFER_BYTES: usize = 1024;
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
    type Encoder = ProstEncoder<T>;
    type Decoder = Decoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        Decoder(PhantomData)
    }
}

impl<U: Message + Name + Default> codec::Decoder for Decoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // A message lies in one piece.
        let whole = from.chunk();
        let pruned = rules_of(U::NAME).map_or(Ok(None), |rules| prune(rules, whole));
        let message = match pruned.map_err(|malformed| undecodable(&malformed))? {
            None => U::decode(from),
            Some(pruned) => {
                from.advance(from.remaining());
                U::decode(pruned.as_slice())
            }
        };
        message.map(Some).map_err(|error| undecodable(&error))
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

/// gRPC's status for what is not a message; tonic's own is the same.
fn undecodable(error: &impl ToString) -> Status {
    Status::internal(error.to_string())
}

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
}
