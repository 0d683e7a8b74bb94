//! Counts the bytes of messages in flight. The body of a request is read through
//! [`CountedBody`], which knows the length of each message from the five bytes before it, and
//! lets the message pass only when its user's bytes in flight have room for it. A message that
//! ends with the body is counted as it grows.

use std::{
    future::ready,
    pin::Pin,
    sync::Arc,
    task::{self, Context, Poll},
};

use bytes::Bytes;
use http::Response;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt as _, Full};
use tonic::{Status, body::Body};

use crate::{
    auth::{HeldBytes, HeldMessages, OpenCall, Tenants},
    limits::{ANSWER_BYTES, MESSAGE_BYTES, MESSAGE_CHARGE_BYTES},
    models::caller::Tenant,
    services::Encoding,
    turns::Acquire,
};

/// Bytes before each message: whether it is compressed, and its length (gRPC over HTTP/2,
/// "Length-Prefixed-Message").
pub(super) const PREFIX_BYTES: usize = 5;
/// In place of whether it is compressed: the message of a unary call, whose client did not say
/// how long it is, ends with the body.
pub(super) const UNTIL_THE_END: u8 = 0x80;

/// How many bytes of protobuf a byte of JSON may become: six bytes, as in `"a":1,`, become an
/// entry of metadata of sixteen.
const JSON_FACTOR: usize = 3;

/// What happens to a message for which there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// The call is refused.
    Refuse,
    /// The body is not read on, so that HTTP/2's flow control stops the client.
    Wait,
}

/// The body of a request, whose messages are counted before they are read.
#[derive(Debug)]
pub(super) struct CountedBody {
    inner: Body,
    tenants: Tenants,
    tenant: Tenant,
    no_room: NoRoom,
    held: HeldMessages,
    /// What a byte counts as.
    factor: usize,
    messages: Messages,
    /// What was received and may not pass yet.
    waiting: Bytes,
    acquiring: Option<Acquire<Tenant>>,
}

impl CountedBody {
    /// What the messages hold goes to `held` in their order.
    pub(super) fn new(
        inner: Body,
        tenants: Tenants,
        tenant: Tenant,
        no_room: NoRoom,
        (held, encoding): (HeldMessages, Encoding),
    ) -> Self {
        let factor = match encoding {
            Encoding::Protobuf => 1,
            Encoding::Json => JSON_FACTOR,
        };
        let messages = Messages { is_unary: no_room == NoRoom::Refuse, ..Messages::default() };
        let (waiting, acquiring) = (Bytes::new(), None);
        Self { inner, tenants, tenant, no_room, held, factor, messages, waiting, acquiring }
    }

    /// Lets pass what may pass of what was received. None if nothing may; then `acquiring` is
    /// set.
    fn pass(&mut self) -> Result<Option<Bytes>, Status> {
        let mut passed = 0;
        while let Some(Needed { at, bytes }) = self.messages.advance(&self.waiting[passed..]) {
            let (end, bytes) = (passed + at, bytes.saturating_mul(self.factor));
            match self.tenants.hold(self.tenant, bytes) {
                Ok(held) => self.held.push(held),
                Err(error) if self.no_room == NoRoom::Refuse => return Err(error.into()),
                Err(_) => {
                    self.acquiring = Some(self.tenants.wait_to_hold(self.tenant, bytes));
                    // The last byte of the prefix waits: only with it is room made for the message.
                    let before = self.waiting.split_to(end - 1);
                    return Ok(Some(before).filter(|before| !before.is_empty()));
                }
            }
            passed = end;
        }
        Ok(Some(std::mem::take(&mut self.waiting)))
    }
}

impl http_body::Body for CountedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let body = &mut *self;
        loop {
            if let Some(acquiring) = &mut body.acquiring {
                let permits = task::ready!(Pin::new(acquiring).poll(cx));
                body.acquiring = None;
                body.held.push(permits.into());
                // The last byte of the prefix, which `messages` has gone through.
                let waited = body.waiting.split_to(1);
                return Poll::Ready(Some(Ok(Frame::data(waited))));
            }
            if body.waiting.is_empty() {
                match task::ready!(Pin::new(&mut body.inner).poll_frame(cx)) {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(data) => body.waiting = data,
                        Err(other) => return Poll::Ready(Some(Ok(other))),
                    },
                    end => return Poll::Ready(end),
                }
            }
            if let Some(passed) = body.pass()? {
                return Poll::Ready(Some(Ok(Frame::data(passed))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.waiting.is_empty() && self.acquiring.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Finds in a stream of bytes where room is needed: at the beginnings of messages, and within
/// those that end with the body.
#[derive(Debug, Default)]
struct Messages {
    prefix: [u8; PREFIX_BYTES],
    /// How much of the next prefix was seen.
    seen: usize,
    /// How many bytes of the message under way are still to come, at most.
    rest: usize,
    /// For how many of them there is room.
    covered: usize,
    /// The body has one message, which may end with it.
    is_unary: bool,
    /// The server refuses what follows: it needs no room.
    refused: bool,
}

/// What follows this place needs room for this many bytes.
#[derive(Debug, PartialEq, Eq)]
struct Needed {
    at: usize,
    bytes: usize,
}

impl Messages {
    /// Goes through bytes until room is needed; none if none is in them.
    fn advance(&mut self, bytes: &[u8]) -> Option<Needed> {
        let mut at = 0;
        while at < bytes.len() && !self.refused {
            if self.rest > 0 {
                if self.covered == 0 {
                    self.covered = self.rest.min(MESSAGE_CHARGE_BYTES);
                    return Some(Needed { at, bytes: self.covered });
                }
                let step = self.covered.min(bytes.len() - at);
                (self.rest, self.covered, at) = (self.rest - step, self.covered - step, at + step);
                continue;
            }
            let step = (PREFIX_BYTES - self.seen).min(bytes.len() - at);
            self.prefix[self.seen..self.seen + step].copy_from_slice(&bytes[at..at + step]);
            (self.seen, at) = (self.seen + step, at + step);
            if self.seen < PREFIX_BYTES {
                return None;
            }
            self.seen = 0;
            let [flags, length @ ..] = self.prefix;
            let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
            if length > MESSAGE_BYTES {
                self.refused = true;
                return None;
            }
            self.rest = length;
            let grows = self.is_unary && flags == UNTIL_THE_END;
            self.covered = if grows { length.min(MESSAGE_CHARGE_BYTES) } else { length };
            // How large a compressed message is, is known too late.
            let bytes = if grows || flags == 0 { self.covered } else { MESSAGE_BYTES };
            return Some(Needed { at, bytes });
        }
        None
    }
}

/// What a unary call holds until the last of its answer was sent.
#[derive(Clone, Debug)]
pub(super) struct InFlight(#[expect(dead_code, reason = "it is held until it is dropped")] Arc<Held>);

#[derive(Debug)]
struct Held {
    _call: OpenCall,
    _messages: HeldMessages,
    _answer: Option<HeldBytes>,
}

/// Leaves with the response what its call holds. An answer that may be large is encoded now and
/// counted: a client that does not read it would keep the server from freeing the message.
pub(super) async fn count_answer(
    response: Response<Body>,
    may_be_large: bool,
    (tenants, tenant): (&Tenants, Tenant),
    (call, messages): (OpenCall, HeldMessages),
) -> Response<Body> {
    let (parts, body) = response.into_parts();
    // A response without a body ends with its headers, and must go on to.
    let (body, answer) = if may_be_large && !body.is_end_stream() {
        let Ok(encoded) = body.collect().await else {
            return Status::internal("the answer cannot be encoded").into_http();
        };
        let trailers = encoded.trailers().cloned().map(Ok);
        let encoded = encoded.to_bytes();
        let beyond = encoded.len().saturating_sub(ANSWER_BYTES);
        match (beyond > 0).then(|| tenants.hold_answer(tenant, beyond)).transpose() {
            Ok(answer) => (Body::new(Full::new(encoded).with_trailers(ready(trailers))), answer),
            Err(error) => return Status::from(error).into_http(),
        }
    } else {
        (body, None)
    };
    let mut response = Response::from_parts(parts, body);
    let held = Held { _call: call, _messages: messages, _answer: answer };
    response.extensions_mut().insert(InFlight(Arc::new(held)));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, StreamBody};
    use uuid::Uuid;

    use super::*;
    use crate::config::TenantSettings;

    const MIB: usize = 1024 * 1024;

    fn tenants() -> Tenants {
        Tenants::new(TenantSettings {
            calls_per_second: 10,
            calls_in_flight: 3,
            events_per_second: 1_000,
            bytes_in_flight_mib: 1,
            total_bytes_in_flight_mib: 4,
        })
    }

    fn message(length: usize) -> Vec<u8> {
        let mut message = vec![0];
        message.extend_from_slice(&u32::try_from(length).expect("small").to_be_bytes());
        message.resize(PREFIX_BYTES + length, 7);
        message
    }

    /// A body that is received in frames of this many bytes.
    fn body(bytes: &[u8], frame_bytes: usize) -> Body {
        let frames: Vec<_> =
            bytes.chunks(frame_bytes).map(|bytes| Ok(Frame::data(Bytes::copy_from_slice(bytes)))).collect();
        Body::new(StreamBody::new(futures_util::stream::iter(
            frames.into_iter().map(|frame: Result<_, Status>| frame),
        )))
    }

    fn tenant() -> Tenant {
        Tenant::of_user(Uuid::now_v7())
    }

    #[tokio::test]
    async fn the_bytes_pass_unchanged_and_each_message_is_counted() {
        let sent: Vec<u8> = [0, 1, 20_000, 0, 300_000, 5].map(message).concat();
        for frame_bytes in [1, 4, 5, 6, 1_000, 16_384, 1_000_000] {
            let (held, tenants) = (HeldMessages::default(), tenants());
            let inner = body(&sent, frame_bytes);
            let counted = CountedBody::new(
                inner,
                tenants.clone(),
                tenant(),
                NoRoom::Wait,
                (held.clone(), Encoding::Protobuf),
            );
            let received = counted.collect().await.expect("no error").to_bytes();
            assert_eq!(received, sent, "in frames of {frame_bytes} bytes");
            assert_eq!(std::iter::from_fn(|| held.pop()).count(), 6);
        }
    }

    #[tokio::test]
    async fn a_message_without_room_is_refused_or_waits_with_its_prefix() {
        let sent = [message(MIB), message(10)].concat();
        for frame_bytes in [3, 16_384, 2 * MIB] {
            let (tenants, tenant) = (tenants(), tenant());
            let read = |no_room, held: &HeldMessages| {
                let (body, held) = (body(&sent, frame_bytes), (held.clone(), Encoding::Protobuf));
                CountedBody::new(body, tenants.clone(), tenant, no_room, held)
            };
            let held = HeldMessages::default();
            let refused = read(NoRoom::Refuse, &held).collect().await.expect_err("no room for the second");
            assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
            drop(held);

            let held = HeldMessages::default();
            let mut waiting = read(NoRoom::Wait, &held);
            let mut received = Vec::new();
            loop {
                tokio::select! {
                    biased;
                    frame = waiting.frame() => {
                        let frame = frame.expect("it waits").expect("no error");
                        received.extend_from_slice(&frame.into_data().expect("data"));
                    }
                    () = std::future::ready(()) => break,
                }
            }
            // All of the first message, and of the second less than its prefix.
            assert_eq!(received, sent[..PREFIX_BYTES + MIB + PREFIX_BYTES - 1], "{frame_bytes}");
            drop(held.pop().expect("the first message"));
            received.extend_from_slice(&waiting.collect().await.expect("room now").to_bytes());
            assert_eq!(received, sent);
            assert!(held.pop().is_some() && held.pop().is_none());
            assert!(tenants.hold(tenant, MIB - MESSAGE_CHARGE_BYTES).is_ok(), "nothing is held any more");
        }
    }

    #[tokio::test]
    async fn a_message_beyond_the_limit_is_left_to_tonic() {
        let (tenants, held) = (tenants(), HeldMessages::default());
        let sent = message(3 * MIB);
        let (body, kept) = (body(&sent, 16_384), (held.clone(), Encoding::Protobuf));
        let counted = CountedBody::new(body, tenants, tenant(), NoRoom::Refuse, kept);
        assert_eq!(counted.collect().await.expect("no error").to_bytes(), sent);
        assert!(held.pop().is_none());
    }

    #[tokio::test]
    async fn a_large_answer_counts_until_it_was_sent() {
        let (tenants, tenant) = (tenants(), tenant());
        let answered = async |bytes: usize| {
            let call = (tenants.open_call(tenant).expect("few calls"), HeldMessages::default());
            let response = Response::new(body(&vec![7; bytes], MIB));
            count_answer(response, true, (&tenants, tenant), call).await
        };
        let first = answered(MIB - MESSAGE_CHARGE_BYTES + ANSWER_BYTES).await;
        let second = answered(ANSWER_BYTES).await;
        assert!(tenants.hold(tenant, MESSAGE_CHARGE_BYTES).is_ok(), "an answer of this size takes nothing");
        let refused = answered(ANSWER_BYTES + 2 * MESSAGE_CHARGE_BYTES).await;
        let status = Status::from_header_map(refused.headers()).expect("a status");
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        let sent = first.into_body().collect().await.expect("no error").to_bytes();
        assert_eq!(sent.len(), MIB - MESSAGE_CHARGE_BYTES + ANSWER_BYTES);
        drop(second);
        assert!(tenants.hold(tenant, MIB).is_ok());
    }

    #[tokio::test]
    async fn a_message_in_json_counts_as_the_bytes_that_it_may_become() {
        let (tenants, tenant, held) = (tenants(), tenant(), HeldMessages::default());
        let (inner, kept) = (body(&message(MIB / 4), 16_384), (held.clone(), Encoding::Json));
        let counted = CountedBody::new(inner, tenants.clone(), tenant, NoRoom::Refuse, kept);
        counted.collect().await.expect("no error");
        assert!(tenants.hold(tenant, MIB / 4 + 1).is_err(), "three quarters of the bytes are held");
        drop(held);
        assert!(tenants.hold(tenant, MIB).is_ok());
    }

    #[tokio::test]
    async fn a_message_that_ends_with_the_body_counts_as_it_grows() {
        let prefix = [&[UNTIL_THE_END][..], &u32::try_from(MESSAGE_BYTES).expect("small").to_be_bytes()];
        for frame_bytes in [1, 1_000, 16_384, MIB] {
            for (bytes, steps) in [(0, 1), (10, 1), (MESSAGE_CHARGE_BYTES, 1), (100_000, 7)] {
                let (tenants, tenant, held) = (tenants(), tenant(), HeldMessages::default());
                let sent = [&prefix.concat()[..], &vec![7; bytes]].concat();
                let (inner, kept) = (body(&sent, frame_bytes), (held.clone(), Encoding::Protobuf));
                let counted = CountedBody::new(inner, tenants.clone(), tenant, NoRoom::Refuse, kept);
                assert_eq!(counted.collect().await.expect("room").to_bytes(), sent);
                let rest = MIB - steps * MESSAGE_CHARGE_BYTES;
                assert!(tenants.hold(tenant, rest + 1).is_err(), "{bytes} bytes hold {steps} steps");
                assert!(tenants.hold(tenant, rest).is_ok(), "{bytes} bytes hold {steps} steps");
            }
        }
        // It is refused where its user has no room for what comes next.
        let (tenants, tenant) = (tenants(), tenant());
        let _other = tenants.hold(tenant, MIB / 2).expect("room");
        let (inner, kept) =
            (body(&[&prefix.concat()[..], &vec![7; MIB]].concat(), 1_000), HeldMessages::default());
        let counted =
            CountedBody::new(inner, tenants.clone(), tenant, NoRoom::Refuse, (kept, Encoding::Protobuf));
        let refused = counted.collect().await.expect_err("no room");
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    }

    #[test]
    fn a_compressed_message_counts_as_the_largest() {
        let mut messages = Messages::default();
        assert_eq!(messages.advance(&[1, 0, 0, 0, 9]), Some(Needed { at: 5, bytes: MESSAGE_BYTES }));
        assert_eq!(messages.advance(&[0; 9]), None);
        assert_eq!(messages.advance(&[0, 0, 0, 0, 9]), Some(Needed { at: 5, bytes: 9 }));
    }
}
