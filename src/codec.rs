//! Protobuf as tonic frames it, in smaller buffers than tonic's own.

use prost::Message;
use tonic::codec::{self, BufferSettings};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// What each call allocates in advance, twice, and each open watch keeps: most
/// messages fit, others make it grow. tonic's own is 8 KiB.
const BUFFER_BYTES: usize = 1024;
/// How much is encoded before it is handed on, as tonic has it.
const YIELD_BYTES: usize = 32 * 1024;

/// What generated clients and servers encode and decode with.
#[derive(Debug, Default)]
pub struct Codec<T, U>(ProstCodec<T, U>);

impl<T, U> codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(buffers())
    }
}

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
}
