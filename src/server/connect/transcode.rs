//! The messages of a call by Connect: JSON and gzip become messages of gRPC and back.
//!
//! A message is read when the service asks for it, after authentication. It has its length
//! before it, so that it was counted before.

use std::{
    convert::Infallible,
    io::Read as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use flate2::read::GzDecoder;
use futures_util::future::{BoxFuture, Either};
use http::{Request, Response};
use http_body::{Body as _, Frame};
use prost_reflect::MessageDescriptor;
use tonic::{Status, body::Body};
use tower::Service;

use super::methods::Method;
use crate::{
    error::Error,
    json::{from_json, to_json},
    limits::MESSAGE_BYTES,
    server::in_flight::{PREFIX_BYTES, UNTIL_THE_END},
    services::Encoding,
};

/// The message is compressed.
pub(super) const COMPRESSED: u8 = 1;

/// How the messages of a request travel. It is an extension of the request.
#[derive(Clone, Debug)]
pub(super) struct MessageFormat {
    pub(super) method: Arc<Method>,
    pub(super) encoding: Encoding,
    /// Messages may be compressed.
    pub(super) gzip: bool,
}

/// A service whose messages may travel as [`MessageFormat`] says.
#[derive(Clone, Debug)]
pub(in crate::server) struct Transcoder<S>(S);

impl<S> Transcoder<S> {
    /// In front of services that speak gRPC.
    pub(in crate::server) fn new(services: S) -> Self {
        Self(services)
    }
}

impl<S> Service<Request<Body>> for Transcoder<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, BoxFuture<'static, Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let Some(format) = request.extensions_mut().remove::<MessageFormat>() else {
            return Either::Left(self.0.call(request));
        };
        let (encoding, output) = (format.encoding, format.method.output());
        let answer = self.0.call(request.map(|body| Body::new(RequestBody::new(body, format))));
        match encoding {
            Encoding::Protobuf => Either::Left(answer),
            Encoding::Json => Either::Right(Box::pin(async move {
                let Ok(answer) = answer.await;
                Ok(answer.map(|body| {
                    // An answer without a body ends with its head, and must go on to.
                    if body.is_end_stream() { body } else { Body::new(JsonBody::new(body, output)) }
                }))
            })),
        }
    }
}

/// A message with its prefix.
pub(super) fn frame(flags: u8, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    put_frame(flags, message, &mut frame);
    frame.freeze()
}

fn put_frame(flags: u8, message: &[u8], to: &mut BytesMut) {
    to.put_u8(flags);
    to.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    to.put_slice(message);
}

/// Flags and length of the next message.
fn prefix(received: &[u8]) -> Option<(u8, usize)> {
    let [flags, length @ ..] = received.first_chunk::<PREFIX_BYTES>()?;
    Some((*flags, usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX)))
}

/// The messages of a request.
struct RequestBody {
    inner: Body,
    format: MessageFormat,
    received: BytesMut,
    /// `inner` has ended.
    received_all: bool,
    /// The last message or an error was returned.
    ended: bool,
}

impl RequestBody {
    fn new(inner: Body, format: MessageFormat) -> Self {
        Self { inner, format, received: BytesMut::new(), received_all: false, ended: false }
    }

    /// The next message if it was received, as one of gRPC. Of a method that takes one
    /// message, it is the next one only when nothing follows.
    fn next(&mut self) -> Result<Option<Bytes>, Status> {
        let one = !self.format.method.takes_many();
        let Some((flags, length)) = prefix(&self.received) else {
            return match (self.received_all, self.received.is_empty()) {
                (true, true) if one => Err(Status::unimplemented("the method takes one message")),
                (true, false) => Err(incomplete()),
                _ => Ok(None),
            };
        };
        let until_the_end = flags & UNTIL_THE_END != 0 && self.format.method.is_unary();
        if length > MESSAGE_BYTES {
            return Err(too_large());
        }
        let message_bytes = self.received.len() - PREFIX_BYTES;
        if one && message_bytes > length {
            return Err(if until_the_end {
                too_large()
            } else {
                Status::unimplemented("the method takes one message")
            });
        }
        let complete = if until_the_end { self.received_all } else { message_bytes >= length };
        if !complete || (one && !self.received_all) {
            return if self.received_all { Err(incomplete()) } else { Ok(None) };
        }
        self.received.advance(PREFIX_BYTES);
        let message = self.received.split_to(length.min(message_bytes)).freeze();
        self.ended = one;
        // A client's own flag is unknown.
        let flags = if until_the_end { flags & !UNTIL_THE_END } else { flags };
        self.transcoded(flags, message).map(Some)
    }

    fn transcoded(&self, flags: u8, message: Bytes) -> Result<Bytes, Status> {
        let message = match flags {
            0 => message,
            COMPRESSED if self.format.gzip => decompressed(&message)?,
            COMPRESSED => {
                return Err(Status::internal("the message is compressed, but by what was not said"));
            }
            _ => return Err(Status::invalid_argument("the flags of a message are unknown")),
        };
        match self.format.encoding {
            Encoding::Protobuf => Ok(frame(0, &message)),
            Encoding::Json => {
                let read = from_json(&self.format.method.input(), &message);
                let bytes = read.map_err(|error| Error::invalid("body", error.to_string()))?;
                if bytes.len() > MESSAGE_BYTES { Err(too_large()) } else { Ok(frame(0, &bytes)) }
            }
        }
    }
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let body = &mut *self;
        while !body.ended {
            match body.next() {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(Frame::data(message)))),
                Ok(None) if body.received_all => body.ended = true,
                Ok(None) => match ready!(Pin::new(&mut body.inner).poll_frame(cx)) {
                    Some(Ok(frame)) => {
                        // A client's trailers say nothing.
                        if let Ok(data) = frame.into_data() {
                            body.received.extend_from_slice(&data);
                        }
                    }
                    Some(Err(status)) => {
                        body.ended = true;
                        return Poll::Ready(Some(Err(status)));
                    }
                    None => body.received_all = true,
                },
                Err(status) => {
                    body.ended = true;
                    return Poll::Ready(Some(Err(status)));
                }
            }
        }
        Poll::Ready(None)
    }
}

fn decompressed(message: &[u8]) -> Result<Bytes, Status> {
    let mut decompressed = Vec::new();
    let mut limited = GzDecoder::new(message).take(MESSAGE_BYTES as u64 + 1);
    limited
        .read_to_end(&mut decompressed)
        .map_err(|error| Error::invalid("body", format!("the message is not gzip: {error}")))?;
    if decompressed.len() > MESSAGE_BYTES { Err(too_large()) } else { Ok(decompressed.into()) }
}

fn too_large() -> Status {
    Status::resource_exhausted(format!("a message has at most {MESSAGE_BYTES} bytes, as JSON too"))
}

fn incomplete() -> Status {
    Status::invalid_argument("the request ends within a message")
}

/// The messages of an answer, as JSON.
struct JsonBody {
    inner: Body,
    output: MessageDescriptor,
    received: BytesMut,
}

impl JsonBody {
    fn new(inner: Body, output: MessageDescriptor) -> Self {
        Self { inner, output, received: BytesMut::new() }
    }

    /// The messages that were received whole.
    fn messages(&mut self) -> Result<Option<Bytes>, Status> {
        let (mut messages, mut json) = (BytesMut::new(), Vec::new());
        while let Some((flags, length)) = prefix(&self.received) {
            if self.received.len() < PREFIX_BYTES + length {
                break;
            }
            self.received.advance(PREFIX_BYTES);
            json.clear();
            to_json(&self.output, &self.received.split_to(length), &mut json)
                .map_err(|error| Status::from(Error::internal(error)))?;
            put_frame(flags, &json, &mut messages);
        }
        if self.received.is_empty() {
            // A watch that waits needs no memory for what was sent.
            self.received = BytesMut::new();
        }
        Ok(Some(messages.freeze()).filter(|messages| !messages.is_empty()))
    }
}

impl http_body::Body for JsonBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        self.received.extend_from_slice(&data);
                        if let Some(messages) = self.messages()? {
                            return Poll::Ready(Some(Ok(Frame::data(messages))));
                        }
                    }
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return Poll::Ready(end),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
}
