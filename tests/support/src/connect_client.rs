//! A client of the Connect protocol, on hyper.

use std::net::SocketAddr;

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;

use crate::within_timeout;

pub const VERSIONS: [Version; 2] = [Version::HTTP_11, Version::HTTP_2];

/// The head of a request that is still without a body.
pub fn request(method: Method, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(path)
}

/// A POST to `SERVICE/METHOD` of the API with this credential, if any.
pub fn post(method: &str, kind: &str, secret: Option<&str>) -> http::request::Builder {
    let request = request(Method::POST, &format!("/milepost.v1.{method}")).header("content-type", kind);
    match secret {
        Some(secret) => request.header("authorization", format!("Bearer {secret}")),
        None => request,
    }
}

/// Sends a request over a connection of its own, which closes with the guard.
pub async fn send(
    address: SocketAddr,
    version: Version,
    mut request: Request<Body>,
) -> (Response<Incoming>, AbortOnDropHandle<()>) {
    let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let path = request.uri().path_and_query().unwrap().to_string();
    if version == Version::HTTP_2 {
        *request.uri_mut() = format!("http://{address}{path}").parse().unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        let connection = AbortOnDropHandle::new(tokio::spawn(async { drop(connection.await) }));
        let answer = within_timeout("an answer", sender.send_request(request)).await.unwrap();
        (answer, connection)
    } else {
        request.headers_mut().insert("host", address.to_string().parse().unwrap());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        let connection = AbortOnDropHandle::new(tokio::spawn(async { drop(connection.await) }));
        let answer = within_timeout("an answer", sender.send_request(request)).await.unwrap();
        (answer, connection)
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The messages of a stream, and what its end says.
    pub fn messages(&self) -> (Vec<Bytes>, Value) {
        let (mut messages, mut rest) = (Vec::new(), self.body.clone());
        while let Some((flags, message)) = take(&mut rest) {
            if flags == 2 {
                assert!(rest.is_empty(), "nothing follows the end");
                return (messages, serde_json::from_slice(&message).unwrap());
            }
            assert_eq!(flags, 0);
            messages.push(message);
        }
        panic!("no end: {self:?}")
    }
}

/// Sends a request and reads the whole answer.
pub async fn call(
    address: SocketAddr,
    version: Version,
    request: http::request::Builder,
    body: impl Into<Bytes>,
) -> Answer {
    let request = request.body(Body::new(Full::new(body.into()))).unwrap();
    let (answer, _connection) = send(address, version, request).await;
    let (head, body) = answer.into_parts();
    let body = within_timeout("the whole answer", body.collect()).await.unwrap().to_bytes();
    Answer { status: head.status, headers: head.headers, body }
}

/// As [`call`], by JSON and with the credential; the answer must be JSON.
pub async fn call_json(
    address: SocketAddr,
    secret: &str,
    method: &str,
    message: &Value,
) -> (StatusCode, Value) {
    let request = post(method, "application/json", Some(secret));
    let answer = call(address, Version::HTTP_11, request, message.to_string()).await;
    (answer.status, answer.json())
}

/// A message of a stream with what stands before it.
pub fn envelope(flags: u8, message: &[u8]) -> Vec<u8> {
    let mut envelope = vec![flags];
    envelope.put_u32(message.len().try_into().unwrap());
    envelope.put_slice(message);
    envelope
}

/// The flags and the content of the first message, if it is there whole.
pub fn take(bytes: &mut Bytes) -> Option<(u8, Bytes)> {
    let (flags, length) = (*bytes.first()?, bytes.get(1..5)?);
    let length = u32::from_be_bytes(length.try_into().unwrap()) as usize;
    if bytes.len() < 5 + length {
        return None;
    }
    bytes.advance(5);
    Some((flags, bytes.split_to(length)))
}

/// The details of an error: names and encoded messages.
pub fn details(error: &Value) -> Vec<(String, Vec<u8>)> {
    let details = error["details"].as_array().into_iter().flatten();
    details
        .map(|detail| {
            let value = STANDARD_NO_PAD.decode(detail["value"].as_str().unwrap()).unwrap();
            (detail["type"].as_str().unwrap().to_owned(), value)
        })
        .collect()
}

/// A watch by JSON, read message by message.
pub struct JsonWatch {
    body: Incoming,
    received: BytesMut,
    _connection: AbortOnDropHandle<()>,
}

impl JsonWatch {
    pub async fn open(address: SocketAddr, version: Version, secret: &str, request: &Value) -> Self {
        let head = post("EventService/WatchEvents", "application/connect+json", Some(secret));
        let body = envelope(0, request.to_string().as_bytes());
        let request = head.body(Body::new(Full::from(body))).unwrap();
        let (answer, connection) = send(address, version, request).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-type"], "application/connect+json");
        Self { body: answer.into_body(), received: BytesMut::new(), _connection: connection }
    }

    /// The next message, or the end of the stream; none if the stream broke off.
    pub async fn next(&mut self) -> Option<(u8, Value)> {
        loop {
            let mut received = self.received.clone().freeze();
            if let Some((flags, message)) = take(&mut received) {
                self.received = received.into();
                return Some((flags, serde_json::from_slice(&message).unwrap()));
            }
            let frame = within_timeout("more of the watch", self.body.frame()).await?.ok()?;
            self.received.extend_from_slice(&frame.into_data().unwrap());
        }
    }

    /// Reads up to the first message that has this field.
    pub async fn until(&mut self, field: &str) -> Vec<Value> {
        let mut messages = Vec::new();
        loop {
            let (flags, message) = self.next().await.expect("the watch goes on");
            assert_eq!(flags, 0, "{message}");
            let found = message.get(field).is_some();
            messages.push(message);
            if found {
                return messages;
            }
        }
    }
}
