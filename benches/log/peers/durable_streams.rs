//! A client for the Durable Streams server: appends over connections that are kept open, and
//! watches by Server-Sent Events, each on a connection of its own, as HTTP/1.1 demands.

use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use bytes::{Buf as _, Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::Result;

/// With it the server keeps each message of a stream apart from the next.
const CONTENT_TYPE: &str = "application/json";

pub(crate) struct Connections {
    server: SocketAddr,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Connections {
    /// Creates the streams that do not exist yet.
    pub(crate) async fn open(server: SocketAddr, logs: &[String]) -> Result<Self> {
        let connections = Self { server, idle: Mutex::default() };
        for log in logs {
            match connections.call(Method::PUT, log, Bytes::new()).await?.status() {
                StatusCode::CREATED | StatusCode::OK => {}
                status => return Err(format!("PUT of a stream: {status}").into()),
            }
        }
        Ok(connections)
    }

    /// Appends a message and returns the length of the stream after it, in bytes.
    pub(crate) async fn append(&self, log: &str, message: String) -> Result<i64> {
        let response = self.call(Method::POST, log, message.into()).await?;
        match response.status() {
            StatusCode::OK | StatusCode::NO_CONTENT => length(&response),
            status => Err(format!("POST to a stream: {status}").into()),
        }
    }

    /// The length of a stream in bytes, with one byte for each message beside its own.
    pub(crate) async fn length(&self, log: &str) -> Result<i64> {
        length(&self.call(Method::HEAD, log, Bytes::new()).await?)
    }

    async fn call(&self, method: Method, log: &str, body: Bytes) -> Result<Response<()>> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => connect(self.server).await?,
        };
        connection.ready().await?;
        let request = Request::builder()
            .method(method)
            .uri(format!("/{log}"))
            .header(header::HOST, self.server.to_string())
            .header(header::CONTENT_TYPE, CONTENT_TYPE)
            .body(Full::new(body))?;
        let (head, body) = connection.send_request(request).await?.into_parts();
        body.collect().await?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        Ok(Response::from_parts(head, ()))
    }

    /// Watches a stream from now on.
    pub(crate) async fn watch(&self, log: &str) -> Result<Events> {
        let body = subscribe(self.server, log, "now").await?;
        let mut events =
            Events { server: self.server, log: log.to_owned(), body, unread: BytesMut::new(), offset: None };
        // The server says first where the watch begins.
        while events.offset.is_none() {
            if !events.read().await?.is_empty() {
                return Err("a watch from now began with messages".into());
            }
        }
        Ok(events)
    }
}

/// A watch. The server ends it every minute, and the client goes on from the last offset.
pub(crate) struct Events {
    server: SocketAddr,
    log: String,
    body: Incoming,
    unread: BytesMut,
    offset: Option<String>,
}

impl Events {
    /// The next messages.
    pub(crate) async fn next(&mut self) -> Result<Vec<String>> {
        loop {
            let messages = self.read().await?;
            if !messages.is_empty() {
                return Ok(messages);
            }
        }
    }

    /// The messages that one frame of the body completes, which may be none.
    async fn read(&mut self) -> Result<Vec<String>> {
        match self.body.frame().await.transpose() {
            Ok(Some(frame)) => {
                self.unread.extend_from_slice(&frame.into_data().unwrap_or_default());
                self.parse()
            }
            Ok(None) => {
                let offset = self.offset.as_deref().ok_or("a watch ended before it began")?;
                self.body = subscribe(self.server, &self.log, offset).await?;
                self.unread.clear();
                Ok(Vec::new())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the complete events from what was read.
    fn parse(&mut self) -> Result<Vec<String>> {
        let mut messages = Vec::new();
        while let Some(length) = self.unread.windows(2).position(|bytes| bytes == b"\n\n") {
            let event = self.unread.split_to(length);
            self.unread.advance(2);
            let event = std::str::from_utf8(&event)?;
            let data =
                event.split_once("\ndata:").ok_or_else(|| format!("an event without data: {event}"))?;
            match data {
                ("event: data", data) => messages.extend(serde_json::from_str::<Vec<String>>(data)?),
                ("event: control", data) => {
                    let control: Value = serde_json::from_str(data)?;
                    let offset =
                        control["streamNextOffset"].as_str().ok_or("a control event without an offset")?;
                    self.offset = Some(offset.to_owned());
                }
                _ => return Err(format!("an event of an unknown type: {event}").into()),
            }
        }
        Ok(messages)
    }
}

async fn subscribe(server: SocketAddr, log: &str, offset: &str) -> Result<Incoming> {
    let request = Request::builder()
        .uri(format!("/{log}?offset={offset}&live=sse"))
        .header(header::HOST, server.to_string())
        .body(Full::default())?;
    let response = connect(server).await?.send_request(request).await?;
    match response.status() {
        StatusCode::OK => Ok(response.into_body()),
        status => Err(format!("a watch of a stream: {status}").into()),
    }
}

async fn connect(server: SocketAddr) -> Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Calls report the connection's error.
    tokio::spawn(connection);
    Ok(sender)
}

/// The length of the stream that an answer gives, as in `0000000000000000_0000000000000123`.
fn length(response: &Response<()>) -> Result<i64> {
    let offset = response.headers().get("stream-next-offset").ok_or("an answer without an offset")?;
    Ok(offset.to_str()?.split_once('_').ok_or("an offset without `_`")?.1.parse()?)
}
