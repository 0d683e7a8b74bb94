//! An answer by gRPC becomes one by Connect.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Response,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, Full};
use tonic::{Code, Status, body::Body};

use super::{
    error::{end_of_stream, error_json, http_status},
    request::Format,
    transcode::frame,
};
use crate::{
    server::{calls::SLICE_BYTES, in_flight::PREFIX_BYTES},
    services::Encoding,
};

/// The flag of the last message of a stream.
const END_OF_STREAM: u8 = 0b10;

impl Format {
    pub(super) async fn answer(self, answer: Response<Body>) -> Response<Body> {
        let (mut parts, body) = answer.into_parts();
        // Of an answer that has ended with its head.
        let status = Status::from_header_map(&parts.headers);
        without_grpc(&mut parts.headers);
        if self.streams {
            parts.headers.insert(CONTENT_TYPE, self.content_type());
            let end = status.map(|status| end_frame(&status, &HeaderMap::new()));
            return Response::from_parts(parts, Body::new(StreamBody { call: body, end, ended: false }));
        }
        match unary(status, body).await {
            Ok((message, trailers, call)) => {
                parts.headers.insert(CONTENT_TYPE, self.content_type());
                add_trailers(&mut parts.headers, &trailers);
                Response::from_parts(parts, Body::new(UnaryBody { rest: message, _call: call }))
            }
            Err((status, trailers)) => {
                let mut refusal = self.refusal(&status);
                // `x-request-id`, and what else the answer's head has.
                let kind = refusal.headers_mut().remove(CONTENT_TYPE);
                *refusal.headers_mut() = parts.headers;
                refusal.headers_mut().extend(kind.map(|kind| (CONTENT_TYPE, kind)));
                add_trailers(refusal.headers_mut(), &trailers);
                refusal
            }
        }
    }

    /// The answer to a call that failed.
    pub(super) fn refusal(self, status: &Status) -> Response<Body> {
        let mut response = Response::new(Body::default());
        if self.streams {
            response.headers_mut().insert(CONTENT_TYPE, self.content_type());
            *response.body_mut() = Body::new(Full::new(end_frame(status, &HeaderMap::new())));
        } else {
            *response.status_mut() = http_status(status.code());
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            *response.body_mut() = Body::new(Full::from(error_json(status).to_string()));
        }
        response
    }

    fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match (self.encoding, self.streams) {
            (Encoding::Json, false) => "application/json",
            (Encoding::Json, true) => "application/connect+json",
            (Encoding::Protobuf, false) => "application/proto",
            (Encoding::Protobuf, true) => "application/connect+proto",
        })
    }
}

/// The message of a unary answer and its trailers, with what is left of the call; or the status
/// with which it failed. The HTTP status is known only at the end of the call.
async fn unary(
    status: Option<Status>,
    mut call: Body,
) -> Result<(Bytes, HeaderMap, Body), (Status, HeaderMap)> {
    if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
        return Err((status, HeaderMap::new()));
    }
    let (mut received, mut trailers) = (BytesMut::new(), HeaderMap::new());
    while let Some(next) = call.frame().await {
        match next.map(Frame::into_data) {
            Ok(Ok(data)) => received.extend_from_slice(&data),
            Ok(Err(end)) => trailers = end.into_trailers().unwrap_or_default(),
            Err(status) => return Err((status, trailers)),
        }
    }
    let status = Status::from_header_map(&trailers);
    let status = status.unwrap_or_else(|| Status::internal("the call ended without a status"));
    without_grpc(&mut trailers);
    if status.code() != Code::Ok {
        return Err((status, trailers));
    }
    // One message, with its prefix.
    match received.freeze() {
        received if received.len() >= PREFIX_BYTES => Ok((received.slice(PREFIX_BYTES..), trailers, call)),
        _ => Err((Status::internal("the call ended without a message"), trailers)),
    }
}

fn end_frame(status: &Status, trailers: &HeaderMap) -> Bytes {
    frame(END_OF_STREAM, end_of_stream(status, trailers).to_string().as_bytes())
}

/// Removes what is gRPC's own from headers or trailers.
fn without_grpc(headers: &mut HeaderMap) {
    let own = [
        "grpc-status",
        "grpc-message",
        "grpc-status-details-bin",
        "grpc-encoding",
        "grpc-accept-encoding",
        CONTENT_TYPE.as_str(),
        CONTENT_LENGTH.as_str(),
    ];
    for name in own {
        headers.remove(name);
    }
}

/// A unary answer has its trailers among its headers.
fn add_trailers(headers: &mut HeaderMap, trailers: &HeaderMap) {
    for (name, value) in trailers {
        if let Ok(name) = HeaderName::try_from(format!("trailer-{name}")) {
            headers.append(name, value.clone());
        }
    }
}

/// A unary answer. The call counts as under way until it was sent.
struct UnaryBody {
    rest: Bytes,
    _call: Body,
}

impl http_body::Body for UnaryBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let bytes = self.rest.len().min(SLICE_BYTES);
        let slice = self.rest.split_to(bytes);
        Poll::Ready((bytes > 0).then_some(Ok(Frame::data(slice))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

/// A stream's answer: the messages, framed as in gRPC, and then a message in place of trailers.
/// The call is under way until this message was sent too.
struct StreamBody {
    call: Body,
    /// The last message, if the call has ended with its head.
    end: Option<Bytes>,
    ended: bool,
}

impl http_body::Body for StreamBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let end = match self.end.take() {
            Some(end) => end,
            None => match ready!(Pin::new(&mut self.call).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                    Err(frame) => {
                        let mut trailers = frame.into_trailers().unwrap_or_default();
                        let status = Status::from_header_map(&trailers).unwrap_or_else(no_status);
                        without_grpc(&mut trailers);
                        end_frame(&status, &trailers)
                    }
                },
                Some(Err(status)) => end_frame(&status, &HeaderMap::new()),
                None => end_frame(&no_status(), &HeaderMap::new()),
            },
        };
        self.ended = true;
        Poll::Ready(Some(Ok(Frame::data(end))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

fn no_status() -> Status {
    Status::internal("the stream ended without a status")
}
