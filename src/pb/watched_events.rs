//! The message `WatchedEvents`, which the server encodes from events that were
//! encoded before, and a client decodes as usual.

use prost::{
    DecodeError, Message,
    bytes::{Buf, BufMut, Bytes},
    encoding::{self, DecodeContext, WireType},
};

use super::Event;

/// The number of the field `events`.
pub(crate) const EVENTS_FIELD: u32 = 1;

/// See `milepost.v1.WatchedEvents`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WatchedEvents {
    /// The events that were received.
    pub events: Vec<Event>,
    encoded: Vec<Bytes>,
}

impl WatchedEvents {
    /// A message to send. Each element is a whole field `events`: its key, its
    /// length and the encoded event, or the event as JSON (see [`json`](crate::json)).
    pub(crate) fn from_encoded(encoded: Vec<Bytes>) -> Self {
        Self { events: Vec::new(), encoded }
    }
}

impl Message for WatchedEvents {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        encoding::message::encode_repeated(EVENTS_FIELD, &self.events, buf);
        for field in &self.encoded {
            buf.put_slice(field);
        }
    }

    fn merge_field(
        &mut self,
        number: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        match number {
            EVENTS_FIELD => encoding::message::merge_repeated(wire_type, &mut self.events, buf, context),
            _ => encoding::skip_field(wire_type, number, buf, context),
        }
    }

    fn encoded_len(&self) -> usize {
        encoding::message::encoded_len_repeated(EVENTS_FIELD, &self.events)
            + self.encoded.iter().map(Bytes::len).sum::<usize>()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}
