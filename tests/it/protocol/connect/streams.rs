//! Streams: watches of browsers, and publish streams over HTTP/2.

use bytes::Bytes;
use http::Version;
use milepost_client::pb::{self, watch_events_response::Message};
use prost::Message as _;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, ReflectMessage as _};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpSocket,
};

use crate::support::connect_client::{JsonWatch, VERSIONS, call, envelope, post};
use crate::{
    limits::fairness::metric,
    support::{TestServer, User, complete, error, info, named, step, with_metadata, within_timeout},
};

const WATCH: &str = "EventService/WatchEvents";

async fn scene() -> (TestServer, User, User, pb::Job) {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1), ("analyse", 3)]).await;
    let job = provider.job(&customer).await;
    (server, provider, customer, job)
}

/// The events in messages of a watch by JSON.
fn events(messages: &[Value]) -> Vec<Value> {
    let of_message = |message: &Value| message["events"]["events"].as_array().cloned().unwrap_or_default();
    messages.iter().flat_map(of_message).collect()
}

/// A message of the API in JSON, decoded.
fn decoded<M: prost::Message + Default>(name: &str, json: &Value) -> M {
    let pool = DescriptorPool::decode(milepost::pb::FILE_DESCRIPTOR_SET).unwrap();
    let descriptor = pool.get_message_by_name(&format!("milepost.v1.{name}")).unwrap();
    let options = DeserializeOptions::new();
    let message = DynamicMessage::deserialize_with_options(descriptor, json, &options).unwrap();
    assert_eq!(message.descriptor().name(), name);
    M::decode(message.encode_to_vec().as_slice()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_in_json_has_the_events_of_one_by_grpc_and_ends_with_its_job() {
    let (server, mut provider, mut customer, job) = scene().await;
    let measured =
        with_metadata(info("\"quoted\" \u{1F9E0}\u{7}"), [("mean", 0.25.into()), ("é", "ü\n".into())]);
    provider.append(&job, [step("load"), measured, error("lost")]).await;
    let mut live = Vec::new();
    for version in VERSIONS {
        let request = json!({ "jobId": job.id });
        let mut watch = JsonWatch::open(server.address, version, &customer.key_secret, &request).await;
        let past = watch.until("caughtUp").await;
        assert_eq!(past.last().unwrap()["caughtUp"]["job"]["lastSequence"], "3");
        live.push((watch, past));
    }
    provider.append(&job, [info("live"), complete()]).await;
    let expected = customer.watch(&job).await.read_to_end().await;
    assert_eq!(expected.events.len(), 5);
    for (mut watch, mut messages) in live {
        messages.extend(watch.until("end").await);
        let received: Vec<pb::Event> =
            events(&messages).iter().map(|event| decoded("Event", event)).collect();
        assert_eq!(received, expected.events);
        let end: pb::WatchEnd = decoded("WatchEnd", &messages.last().unwrap()["end"]);
        assert_eq!(end, expected.end);
        assert!(messages.iter().all(|message| !message["resumeToken"].as_str().unwrap().is_empty()));
        assert_eq!(watch.next().await, Some((2, json!({}))), "the end of the stream, without an error");
        assert_eq!(watch.next().await, None);
    }
    // As bytes, and from the middle.
    let scope = Some(pb::watch_events_request::Scope::JobId(job.id.clone()));
    let start = Some(pb::watch_events_request::Start::AfterSequence(2));
    let request = pb::WatchEventsRequest { scope, start, ..Default::default() }.encode_to_vec();
    for version in VERSIONS {
        let head = post(WATCH, "application/connect+proto", Some(&customer.key_secret));
        let (messages, end) = call(server.address, version, head, envelope(0, &request)).await.messages();
        assert_eq!(end, json!({}));
        let messages: Vec<_> =
            messages.into_iter().map(|message| pb::WatchEventsResponse::decode(message).unwrap()).collect();
        let received = messages.iter().filter_map(|response| match response.message.as_ref().unwrap() {
            Message::Events(watched) => Some(watched.events.clone()),
            _ => None,
        });
        assert_eq!(received.flatten().collect::<Vec<_>>(), expected.events[2..]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_in_json_is_told_of_a_drain_and_resumes_on_another_server() {
    let (mut server, mut provider, customer, job) = scene().await;
    let replica = server.replica().await;
    provider.append(&job, [info("one")]).await;
    for version in VERSIONS {
        let request = json!({ "jobId": job.id });
        let mut watch = JsonWatch::open(replica.address, version, &customer.key_secret, &request).await;
        let past = watch.until("caughtUp").await;
        let token = past.last().unwrap()["resumeToken"].as_str().unwrap();
        let resumed = json!({ "jobId": job.id, "resumeToken": token });
        let mut resumed = JsonWatch::open(server.address, version, &customer.key_secret, &resumed).await;
        assert_eq!(events(&resumed.until("caughtUp").await), Vec::<Value>::new());
    }
    let mut watches = Vec::new();
    for version in VERSIONS {
        let request = json!({ "allJobs": {}, "fromNow": {} });
        let mut watch = JsonWatch::open(server.address, version, &customer.key_secret, &request).await;
        watch.until("caughtUp").await;
        watches.push(watch);
    }
    server.stop();
    for mut watch in watches {
        let end = watch.until("end").await.pop().unwrap();
        assert_eq!(end["end"]["reason"], "WATCH_END_REASON_DRAINING");
        let (flags, end) = watch.next().await.unwrap();
        assert_eq!((flags, &end["error"]["code"]), (2, &json!("unavailable")));
        assert_eq!(end["error"]["details"][0]["debug"]["reason"], "DRAINING");
        assert_eq!(watch.next().await, None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_covers_the_whole_stream() {
    let (server, mut provider, _, job) = scene().await;
    provider.append(&job, [info("past")]).await;
    let request = json!({ "jobId": job.id }).to_string();
    for version in VERSIONS {
        let head = post(WATCH, "application/connect+json", Some(&provider.key_secret));
        let head = head.header("connect-timeout-ms", "1000");
        let answer = call(server.address, version, head, envelope(0, request.as_bytes())).await;
        let (messages, end) = answer.messages();
        assert!(messages.len() >= 2, "the past comes before");
        assert_eq!(end["error"]["code"], "deadline_exceeded");
        assert_eq!(end["error"]["details"][0]["debug"]["reason"], "DEADLINE_EXCEEDED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_request_is_not_one_message_is_refused() {
    let (server, provider, _, job) = scene().await;
    let request = json!({ "jobId": job.id }).to_string();
    let one = envelope(0, request.as_bytes());
    for version in VERSIONS {
        for (body, code) in [
            (Vec::new(), "unimplemented"),
            ([one.clone(), one.clone()].concat(), "unimplemented"),
            (one[..9].to_vec(), "invalid_argument"),
            (one[..3].to_vec(), "invalid_argument"),
            (envelope(2, b"{}"), "invalid_argument"),
            (envelope(0x80, b"{}"), "invalid_argument"),
            (envelope(1, b"{}"), "internal"),
            (envelope(0, b"{"), "invalid_argument"),
            (envelope(0, b"{}"), "invalid_argument"),
            (vec![0, 0xff, 0xff, 0xff, 0xff], "resource_exhausted"),
        ] {
            let head = post(WATCH, "application/connect+json", Some(&provider.key_secret));
            let answer = call(server.address, version, head, body.clone()).await;
            let (messages, end) = answer.messages();
            assert_eq!((messages.len(), &end["error"]["code"]), (0, &json!(code)), "{body:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_published_in_json_and_binary_over_http2() {
    let (server, mut provider, _, job) = scene().await;
    let batch = |id: &str, name: &str| json!({ "batchId": id, "jobId": job.id, "events": [{ "kind": "EVENT_KIND_INFO", "name": name }] });
    let refused = json!({ "batchId": "two", "jobId": job.id, "events": [{ "kind": "EVENT_KIND_STEP", "stepTag": "?" }] });
    let batches = [batch("one", "first"), refused, batch("three", "second")];
    let body: Vec<u8> = batches.iter().flat_map(|batch| envelope(0, batch.to_string().as_bytes())).collect();
    let head = post("EventService/PublishEvents", "application/connect+json", Some(&provider.key_secret));
    let (answers, end) = call(server.address, Version::HTTP_2, head, body).await.messages();
    assert_eq!(end, json!({}));
    let answers: Vec<Value> = answers.iter().map(|answer| serde_json::from_slice(answer).unwrap()).collect();
    let ids: Vec<_> = answers.iter().map(|answer| answer["batchId"].as_str().unwrap()).collect();
    assert_eq!(ids, ["one", "two", "three"]);
    assert_eq!(answers[0]["appended"]["events"][0]["sequence"], "1");

    let batches =
        batches.iter().map(|batch| decoded::<pb::PublishEventsRequest>("PublishEventsRequest", batch));
    let body: Vec<u8> = batches.flat_map(|batch| envelope(0, &batch.encode_to_vec())).collect();
    let head = post("EventService/PublishEvents", "application/connect+proto", Some(&provider.key_secret));
    let (answers, _) = call(server.address, Version::HTTP_2, head, body).await.messages();
    let answer = |bytes: Bytes| pb::PublishEventsResponse::decode(bytes).unwrap();
    let ids: Vec<_> = answers.into_iter().map(|bytes| answer(bytes).batch_id).collect();
    assert_eq!(ids, ["one", "two", "three"]);
    let names: Vec<_> = provider.list(&job).await.into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["first", "second", "first", "second"]);
}

/// Appends more than a connection holds of a watch that nobody reads.
async fn append_much(provider: &mut User, job: &pb::Job) -> usize {
    for _ in 0..20 {
        provider.append(job, (0..500).map(|n| named(info("x"), format!("{n:0>250}")))).await;
    }
    20 * 500
}

/// Sends the request of a watch over HTTP/1.1 and reads nothing.
async fn unread_watch(server: &TestServer, secret: &str, job: &pb::Job) -> tokio::net::TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(server.address).await.unwrap();
    let body = envelope(0, json!({ "jobId": job.id }).to_string().as_bytes());
    let head = format!(
        "POST /milepost.v1.{WATCH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/connect+json\r\n\
         authorization: Bearer {secret}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), &body].concat()).await.unwrap();
    let watches = async || metric(server, "milepost_watches{scope=\"job\"}").await;
    within_timeout("the watch", async { while watches().await < 1 {} }).await;
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_over_http1_whose_client_does_not_read_its_end_is_closed() {
    let (server, mut provider, mut customer, job) = scene().await;
    let mut stream = unread_watch(&server, &customer.key_secret, &job).await;
    append_much(&mut provider, &job).await;
    let me = customer.auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap().into_inner();
    let Some(pb::get_current_user_response::Credential::ApiKey(key)) = me.credential else {
        panic!("{:?}", me.credential)
    };
    customer.session.auth.expire_api_key(pb::ExpireApiKeyRequest { api_key_id: key.id }).await.unwrap();
    let watches = async || metric(&server, "milepost_watches{scope=\"job\"}").await;
    within_timeout("the reset", async { while watches().await > 0 {} }).await;
    // What was sent before can be read, and then nothing comes any more.
    let mut received = Vec::new();
    let _ = within_timeout("the end", stream.read_to_end(&mut received)).await;
    let text = String::from_utf8_lossy(&received);
    assert!(!text.contains("\"end\""), "the end was not taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_over_http1_gets_every_event() {
    let (server, mut provider, customer, job) = scene().await;
    let mut stream = unread_watch(&server, &customer.key_secret, &job).await;
    let count = append_much(&mut provider, &job).await;
    provider.append(&job, [complete()]).await;
    let mut received = Vec::new();
    // The last chunk of the answer, since the connection stays open.
    while !received.ends_with(b"\r\n0\r\n\r\n") {
        let mut part = vec![0; 64 * 1024];
        let bytes = within_timeout("more of the watch", stream.read(&mut part)).await.unwrap();
        assert!(bytes > 0, "the connection broke off");
        received.extend_from_slice(&part[..bytes]);
    }
    let text = String::from_utf8_lossy(&received);
    assert!(text.contains("WATCH_END_REASON_JOB_CLOSED"));
    // Chunks may cut a few of them in two.
    let sequences = text.matches("\"sequence\":\"").count();
    assert!((count - 500..=count + 1).contains(&sequences), "{sequences}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_over_http2_whose_client_does_not_read_its_end_is_reset_alone() {
    let (server, mut provider, mut customer, job) = scene().await;
    let stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let (mut client, connection) =
        h2::client::Builder::new().initial_window_size(4096).handshake::<_, Bytes>(stream).await.unwrap();
    tokio::spawn(connection);
    let head = |secret: &str, method: &str, kind: &str| {
        let (head, ()) = post(method, kind, Some(secret)).body(()).unwrap().into_parts();
        let mut request = http::Request::from_parts(head, ());
        let path = request.uri().path().to_owned();
        *request.uri_mut() = format!("http://{}{path}", server.address).parse().unwrap();
        request
    };
    let watch = head(&customer.key_secret, WATCH, "application/connect+json");
    let (answer, mut body) = client.send_request(watch, false).unwrap();
    let request = json!({ "jobId": job.id }).to_string();
    body.send_data(envelope(0, request.as_bytes()).into(), true).unwrap();
    let mut unread = within_timeout("an answer", answer).await.unwrap().into_body();
    append_much(&mut provider, &job).await;
    let me = customer.auth.get_current_user(pb::GetCurrentUserRequest {}).await.unwrap().into_inner();
    let Some(pb::get_current_user_response::Credential::ApiKey(key)) = me.credential else {
        panic!("{:?}", me.credential)
    };
    customer.session.auth.expire_api_key(pb::ExpireApiKeyRequest { api_key_id: key.id }).await.unwrap();
    let error = loop {
        match within_timeout("the reset", unread.data()).await {
            // What was sent before; its window is not given back.
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => panic!("the stream ended"),
        }
    };
    assert!(error.is_reset() && error.is_remote(), "{error:?}");
    // The connection goes on.
    let (answer, mut body) = client
        .send_request(head(&provider.key_secret, "JobService/GetJob", "application/json"), false)
        .unwrap();
    body.send_data(request.into(), true).unwrap();
    assert_eq!(within_timeout("an answer", answer).await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_its_client_leaves_is_no_longer_counted() {
    let (server, _, customer, job) = scene().await;
    for version in VERSIONS {
        let request = json!({ "jobId": job.id });
        let mut watch = JsonWatch::open(server.address, version, &customer.key_secret, &request).await;
        watch.until("caughtUp").await;
        assert_eq!(metric(&server, "milepost_watches{scope=\"job\"}").await, 1);
        drop(watch);
        let watches = async || metric(&server, "milepost_watches{scope=\"job\"}").await;
        within_timeout("the end of the watch", async { while watches().await > 0 {} }).await;
    }
}
