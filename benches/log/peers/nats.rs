//! A client for NATS JetStream, with those parts of its protocol that are used here. A log is
//! a subject of one stream; publishes wait for the acknowledgement of the stream, and a watch
//! is an ephemeral push consumer that acknowledges nothing, as an ordered consumer is.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::Result;

const STREAM: &str = "LOGS";
/// The subscription to all answers of a connection; those of watches follow.
const ANSWERS: u64 = 1;
/// Requests that wait to be written, and messages that wait to be read from a watch.
const QUEUE: usize = 1_024;
/// How often an idle consumer says that it lives. A flow of messages needs it.
const HEARTBEAT: Duration = Duration::from_secs(30);
const TIMEOUT: Duration = Duration::from_secs(60);

/// The settings of a server that syncs each message before it acknowledges it.
pub(super) fn configuration(address: SocketAddr, dir: &Path) -> String {
    let dir = dir.display();
    format!("listen: \"{address}\"\njetstream {{ store_dir: \"{dir}\", sync_interval: always }}\n")
}

/// Fails if JetStream does not answer. Creates the stream.
pub(super) async fn probe(server: SocketAddr) -> Result<()> {
    let configuration = json!({
        "name": STREAM, "subjects": ["log.*"], "storage": "file", "retention": "limits", "num_replicas": 1,
        // More than the default, which one row needs.
        "max_consumers": 20_000,
    });
    let connection = Connection::open(server).await?;
    connection.request(&format!("$JS.API.STREAM.CREATE.{STREAM}"), &configuration.to_string()).await?;
    Ok(())
}

pub(crate) struct Connection {
    requests: mpsc::Sender<Bytes>,
    routes: Arc<Routes>,
    /// What the subjects of answers to this connection begin with.
    inbox: String,
    last_number: AtomicU64,
    _tasks: [AbortOnDropHandle<()>; 2],
}

/// Where messages go that the server sends.
#[derive(Default)]
struct Routes {
    /// By the last token of their subject.
    answers: Mutex<HashMap<u64, oneshot::Sender<Message>>>,
    /// By the subscription.
    watches: Mutex<HashMap<u64, mpsc::Sender<Message>>>,
    /// Why the connection has ended.
    end: OnceLock<String>,
}

struct Message {
    subject: String,
    subscription: u64,
    reply: Option<String>,
    /// The first line and the fields behind it; empty of a message without.
    header: String,
    payload: Vec<u8>,
}

/// The messages of a log that were stored after the watch began.
pub(crate) struct Events {
    connection: Arc<Connection>,
    subscription: u64,
    consumer: String,
    messages: mpsc::Receiver<Message>,
    /// The number of the last message that the consumer has sent.
    last: u64,
}

impl Connection {
    pub(crate) async fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        let (reader, mut writer) = stream.into_split();
        let inbox = format!("_INBOX.{}", Uuid::now_v7().simple());
        let options = json!({
            "verbose": false, "pedantic": false, "headers": true, "no_responders": true,
            "lang": "rust", "version": "0", "protocol": 1,
        });
        writer.write_all(format!("CONNECT {options}\r\nSUB {inbox}.* {ANSWERS}\r\n").as_bytes()).await?;
        let (requests, queue) = mpsc::channel(QUEUE);
        let routes = Arc::new(Routes::default());
        let tasks = [
            tokio::spawn(write(writer, queue)),
            tokio::spawn(read(reader, requests.clone(), Arc::clone(&routes))),
        ];
        let tasks = tasks.map(AbortOnDropHandle::new);
        Ok(Self { requests, routes, inbox, last_number: AtomicU64::new(ANSWERS), _tasks: tasks })
    }

    /// Appends a message to a log and returns its sequence in the whole stream.
    pub(crate) async fn publish(&self, log: &str, payload: &str) -> Result<i64> {
        let answer = self.request(&format!("log.{log}"), payload).await?;
        answer["seq"]
            .as_i64()
            .ok_or_else(|| format!("an acknowledgement without a sequence: {answer}").into())
    }

    /// The number of messages in the stream.
    pub(crate) async fn stored(&self) -> Result<i64> {
        let answer = self.request(&format!("$JS.API.STREAM.INFO.{STREAM}"), "").await?;
        answer["state"]["messages"].as_i64().ok_or_else(|| format!("no number of messages: {answer}").into())
    }

    /// Watches a log from now on.
    pub(crate) async fn watch(self: &Arc<Self>, log: &str) -> Result<Events> {
        let subscription = self.number();
        let subject = format!("_DELIVER.{}.{subscription}", Uuid::now_v7().simple());
        let (sender, messages) = mpsc::channel(QUEUE);
        lock(&self.routes.watches).insert(subscription, sender);
        self.requests.send(format!("SUB {subject} {subscription}\r\n").into()).await?;
        let consumer = json!({"stream_name": STREAM, "config": {
            "deliver_policy": "new",
            "deliver_subject": subject,
            "filter_subject": format!("log.{log}"),
            "ack_policy": "none",
            "max_deliver": 1,
            "mem_storage": true,
            "num_replicas": 1,
            "replay_policy": "instant",
            "flow_control": true,
            "idle_heartbeat": u64::try_from(HEARTBEAT.as_nanos())?,
        }});
        let created =
            self.request(&format!("$JS.API.CONSUMER.CREATE.{STREAM}"), &consumer.to_string()).await?;
        let consumer = created["name"].as_str().ok_or("a consumer without a name")?.to_owned();
        Ok(Events { connection: Arc::clone(self), subscription, consumer, messages, last: 0 })
    }

    /// Publishes with a subject for the answer, and returns the answer.
    async fn request(&self, subject: &str, payload: &str) -> Result<Value> {
        let number = self.number();
        let (sender, answer) = oneshot::channel();
        lock(&self.routes.answers).insert(number, sender);
        let request = format!("PUB {subject} {}.{number} {}\r\n{payload}\r\n", self.inbox, payload.len());
        self.requests.send(request.into()).await?;
        let answer = timeout(TIMEOUT, answer).await?.map_err(|_| self.routes.end())?;
        if !answer.header.is_empty() {
            return Err(format!("no answer to a message to {subject}: {}", answer.header).into());
        }
        let value: Value = serde_json::from_slice(&answer.payload)?;
        match value.get("error") {
            None => Ok(value),
            Some(error) => Err(format!("a message to {subject}: {error}").into()),
        }
    }

    fn number(&self) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl Routes {
    fn end(&self) -> crate::Error {
        format!("a connection has ended: {:?}", self.end.get()).into()
    }
}

impl Events {
    /// The payloads of the next messages.
    pub(crate) async fn next(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut received = vec![self.messages.recv().await.ok_or_else(|| self.connection.routes.end())?];
        while let Ok(message) = self.messages.try_recv() {
            received.push(message);
        }
        received.into_iter().map(|message| self.check(message)).collect()
    }

    /// The payload of the message, which must be the one that follows the last.
    fn check(&mut self, message: Message) -> Result<Vec<u8>> {
        let number = message.reply.as_deref().and_then(number_of_delivery);
        if number != Some(self.last + 1) || !message.header.is_empty() {
            let Message { subject, reply, header, .. } = message;
            return Err(format!("message {subject} {reply:?} {header} after message {}", self.last).into());
        }
        self.last += 1;
        Ok(message.payload)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        lock(&self.connection.routes.watches).remove(&self.subscription);
        let (subscription, consumer) = (self.subscription, &self.consumer);
        let delete = format!("PUB $JS.API.CONSUMER.DELETE.{STREAM}.{consumer} 0\r\n\r\n");
        // Without the request the server deletes the consumer, too, after some seconds.
        let _ = self.connection.requests.try_send(format!("UNSUB {subscription}\r\n{delete}").into());
    }
}

/// Which message of its consumer this is, by the subject for acknowledgements:
/// `$JS.ACK.STREAM.CONSUMER.DELIVERED.SEQUENCE.NUMBER.TIME.PENDING`, where newer servers have
/// two tokens more before the stream and one more at the end.
fn number_of_delivery(reply: &str) -> Option<u64> {
    let tokens: Vec<&str> = reply.strip_prefix("$JS.ACK.")?.split('.').collect();
    tokens.get(if tokens.len() == 7 { 4 } else { 6 })?.parse().ok()
}

/// Writes requests, those that wait together in one call.
async fn write(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Bytes>) {
    let (mut requests, mut buffer) = (Vec::new(), Vec::new());
    while queue.recv_many(&mut requests, QUEUE).await > 0 {
        buffer.clear();
        requests.drain(..).for_each(|request| buffer.extend_from_slice(&request));
        if writer.write_all(&buffer).await.is_err() {
            return;
        }
    }
}

/// Reads until the connection fails, which all that wait then learn.
async fn read(reader: OwnedReadHalf, requests: mpsc::Sender<Bytes>, routes: Arc<Routes>) {
    let mut reader = BufReader::with_capacity(64 * 1024, reader);
    if let Err(error) = read_all(&mut reader, &requests, &routes).await {
        let _ = routes.end.set(error.to_string());
    }
    lock(&routes.answers).clear();
    lock(&routes.watches).clear();
}

async fn read_all(
    reader: &mut BufReader<OwnedReadHalf>,
    requests: &mpsc::Sender<Bytes>,
    routes: &Routes,
) -> Result<()> {
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line).await? == 0 {
            return Err("the server has closed it".into());
        }
        let mut words = line.split_ascii_whitespace();
        let operation = words.next().unwrap_or_default();
        match operation {
            "MSG" | "HMSG" => {
                let words: Vec<&str> = words.collect();
                let message = read_message(reader, operation == "HMSG", &words).await?;
                route(message, requests, routes).await?;
            }
            "PING" => requests.send(Bytes::from_static(b"PONG\r\n")).await?,
            "INFO" | "PONG" | "+OK" => {}
            _ => return Err(line.trim().into()),
        }
    }
}

/// Reads the header and the payload of a message, whose first line has these words behind
/// the operation: subject, subscription, perhaps the subject for a reply, and one or two
/// lengths.
async fn read_message(
    reader: &mut BufReader<OwnedReadHalf>,
    has_header: bool,
    words: &[&str],
) -> Result<Message> {
    let lengths = if has_header { 2 } else { 1 };
    let short = || format!("a message of {} words", words.len());
    let (names, lengths) = words.split_at(words.len().checked_sub(lengths).ok_or_else(short)?);
    let [subject, subscription, reply @ ..] = names else { return Err(short().into()) };
    let length: usize = lengths[lengths.len() - 1].parse()?;
    let header_length: usize = if has_header { lengths[0].parse()? } else { 0 };
    let mut bytes = vec![0; length + 2];
    reader.read_exact(&mut bytes).await?;
    bytes.truncate(length);
    let payload = bytes.split_off(header_length.min(length));
    Ok(Message {
        subject: (*subject).to_owned(),
        subscription: subscription.parse()?,
        reply: reply.first().map(|reply| (*reply).to_owned()),
        header: String::from_utf8(bytes)?,
        payload,
    })
}

/// Hands a message on. Messages that only control the flow are answered here.
async fn route(message: Message, requests: &mpsc::Sender<Bytes>, routes: &Routes) -> Result<()> {
    if message.subscription == ANSWERS {
        let number = message.subject.rsplit('.').next().unwrap_or_default().parse()?;
        if let Some(waiting) = lock(&routes.answers).remove(&number) {
            // A caller that has given up waits no more.
            let _ = waiting.send(message);
        }
        return Ok(());
    }
    if message.header.starts_with("NATS/1.0 100") {
        let stalled = message.header.lines().find_map(|line| line.strip_prefix("Nats-Consumer-Stalled:"));
        if let Some(reply) = message.reply.as_deref().or(stalled.map(str::trim)) {
            requests.send(format!("PUB {reply} 0\r\n\r\n").into()).await?;
        }
        return Ok(());
    }
    let watch = lock(&routes.watches).get(&message.subscription).cloned();
    if let Some(watch) = watch {
        // A watch that has ended reads no more.
        let _ = watch.send(message).await;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
