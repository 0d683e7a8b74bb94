//! The head of a request by Connect becomes one by gRPC.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method as Verb, Request, Response, StatusCode, Version,
    header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, TE},
    request::Parts,
};
use http_body::{Body as _, Frame};
use tonic::{Status, body::Body};

use super::{
    methods::Method,
    transcode::{COMPRESSED, MessageFormat},
};
use crate::{
    limits::MESSAGE_BYTES,
    server::{
        in_flight::{PREFIX_BYTES, UNTIL_THE_END},
        plain::plain,
    },
    services::Encoding,
    telemetry::metrics::Protocol,
};

const PROTOCOL_VERSION: &str = "connect-protocol-version";
const TIMEOUT: &str = "connect-timeout-ms";
/// Most digits of a timeout (Connect protocol, "Timeout").
const TIMEOUT_DIGITS: usize = 10;
/// Timeouts of gRPC have at most eight digits.
const LARGEST_GRPC_TIMEOUT: u64 = 99_999_999;
/// The header that names the compression of the messages of a stream.
pub(super) const STREAM_ENCODING: &str = "connect-content-encoding";
/// Headers of the client's connection and of its protocol, which mean nothing to gRPC.
const OF_THE_CLIENT: [HeaderName; 5] = [
    http::header::CONNECTION,
    http::header::TRANSFER_ENCODING,
    http::header::UPGRADE,
    http::header::EXPECT,
    http::header::TRAILER,
];
const UNSUPPORTED: &str = "unary calls take application/json and application/proto, streams \
                           application/connect+json and application/connect+proto\n";

/// How a call's client speaks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Format {
    pub(super) encoding: Encoding,
    /// The messages of the call have envelopes, and its answer has an end of its own.
    pub(super) streams: bool,
}

impl Format {
    /// A request by POST, as one by gRPC; or the answer that refuses it.
    pub(super) fn read(
        method: &Arc<Method>,
        request: Request<Body>,
    ) -> Result<(Self, Request<Body>), Box<Response<Body>>> {
        let format = Self::of_content_type(request.headers(), method).ok_or_else(unsupported)?;
        let (mut parts, body) = request.into_parts();
        let compression = if format.streams { STREAM_ENCODING } else { CONTENT_ENCODING.as_str() };
        let compression = parts.headers.get(compression).map(HeaderValue::as_bytes).unwrap_or_default();
        let gzip = is_gzip(compression).map_err(|status| format.refusal(&status))?;
        let message = MessageFormat { method: Arc::clone(method), encoding: format.encoding, gzip };
        let body = if format.streams {
            body
        } else {
            let length = body.size_hint().exact().and_then(|length| u32::try_from(length).ok());
            let declared = parts.headers.contains_key(CONTENT_LENGTH) || length == Some(0);
            Body::new(Prefixed::new(body, length.filter(|_| declared), gzip))
        };
        format.to_grpc(&mut parts, message).map_err(|status| format.refusal(&status))?;
        Ok((format, Request::from_parts(parts, body)))
    }

    /// None for a type that the method does not take.
    fn of_content_type(headers: &HeaderMap, method: &Method) -> Option<Self> {
        let kind = headers.get(CONTENT_TYPE)?.to_str().ok()?.to_ascii_lowercase();
        let (kind, parameters) = kind.split_once(';').unwrap_or((&kind, ""));
        let (encoding, streams) = match kind.trim() {
            "application/json" => (Encoding::Json, false),
            "application/proto" => (Encoding::Protobuf, false),
            "application/connect+json" => (Encoding::Json, true),
            "application/connect+proto" => (Encoding::Protobuf, true),
            _ => return None,
        };
        let known = matches!(parameters.trim(), "" | "charset=utf-8");
        (known && streams != method.is_unary()).then_some(Self { encoding, streams })
    }

    /// Changes the head to one of gRPC.
    pub(super) fn to_grpc(self, parts: &mut Parts, message: MessageFormat) -> Result<(), Status> {
        let headers = &mut parts.headers;
        if headers.get(PROTOCOL_VERSION).is_some_and(|version| version != "1") {
            return Err(Status::invalid_argument("connect-protocol-version must be 1"));
        }
        let timeout = timeout(headers)?;
        let foreign = |name: &HeaderName| {
            let text = name.as_str();
            text.starts_with("grpc-") || text.starts_with("connect-") || OF_THE_CLIENT.contains(name)
        };
        let foreign: Vec<_> = headers.keys().filter(|name| foreign(name)).cloned().collect();
        for name in foreign.iter().chain([&ACCEPT_ENCODING, &CONTENT_ENCODING, &CONTENT_LENGTH]) {
            headers.remove(name);
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(TE, HeaderValue::from_static("trailers"));
        if let Some(timeout) = timeout {
            headers.insert("grpc-timeout", timeout);
        }
        parts.method = Verb::POST;
        parts.version = Version::HTTP_2;
        parts.extensions.insert(message.encoding);
        parts.extensions.insert(Protocol::Connect);
        parts.extensions.insert(message);
        Ok(())
    }
}

pub(super) fn unsupported() -> Response<Body> {
    plain(StatusCode::UNSUPPORTED_MEDIA_TYPE, UNSUPPORTED)
}

/// Whether messages may be compressed by gzip; an error for any other compression.
pub(super) fn is_gzip(compression: &[u8]) -> Result<bool, Status> {
    match compression {
        b"" | b"identity" => Ok(false),
        b"gzip" => Ok(true),
        _ => Err(Status::unimplemented("a message may be compressed by gzip or not at all")),
    }
}

/// The client's timeout as gRPC has it.
fn timeout(headers: &HeaderMap) -> Result<Option<HeaderValue>, Status> {
    let Some(text) = headers.get(TIMEOUT) else { return Ok(None) };
    let digits = text.to_str().ok().filter(|text| {
        (1..=TIMEOUT_DIGITS).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
    });
    let ms: u64 = digits.and_then(|digits| digits.parse().ok()).ok_or_else(|| {
        Status::invalid_argument(format!("{TIMEOUT} must have 1 to {TIMEOUT_DIGITS} digits"))
    })?;
    let timeout = if ms <= LARGEST_GRPC_TIMEOUT { format!("{ms}m") } else { format!("{}S", ms / 1000) };
    Ok(HeaderValue::try_from(timeout).ok())
}

/// The body of a unary request as the only message of a request by gRPC.
struct Prefixed {
    /// What stands before a message, until it was read.
    prefix: Option<Bytes>,
    message: Body,
}

impl Prefixed {
    /// Without a length, the message ends with the body.
    fn new(message: Body, length: Option<u32>, gzip: bool) -> Self {
        Self { prefix: Some(prefix(length, gzip)), message }
    }
}

/// What stands before a unary message. An empty message is never compressed.
pub(super) fn prefix(length: Option<u32>, gzip: bool) -> Bytes {
    let most = u32::try_from(MESSAGE_BYTES).unwrap_or(u32::MAX);
    let compressed = if gzip && length != Some(0) { COMPRESSED } else { 0 };
    let ends = if length.is_none() { UNTIL_THE_END } else { 0 };
    let mut prefix = BytesMut::with_capacity(PREFIX_BYTES);
    prefix.put_u8(compressed | ends);
    prefix.put_u32(length.unwrap_or(most));
    prefix.freeze()
}

impl http_body::Body for Prefixed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.prefix.take() {
            Some(prefix) => Poll::Ready(Some(Ok(Frame::data(prefix)))),
            None => Pin::new(&mut self.message).poll_frame(cx),
        }
    }
}
