//! tonic's protobuf codec with smaller buffers than tonic's own.

use prost::Message;
use tonic::codec::{self, BufferSettings};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Initial size of a call's encode buffer and of its decode buffer, which an open
/// watch keeps. Most messages fit, larger ones make a buffer grow. tonic's own
/// default is 8 KiB.
const BUFFER_BYTES: usize = 1024;
/// Encoded bytes after which a buffer is sent; tonic's own default.
const YIELD_BYTES: usize = 32 * 1024;

/// The codec of the generated clients and servers.
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
