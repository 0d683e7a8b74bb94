//! Unary calls: the same answers as by gRPC, in the same order.

use std::io::Write as _;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use diesel_async::SimpleAsyncConnection as _;
use flate2::{Compression, write::GzEncoder};
use http::{Method, Version};
use milepost::limits;
use milepost_client::pb;
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, MethodDescriptor,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, Status};
use tonic_types::pb::{ErrorInfo, Status as RpcStatus};

use crate::support::connect_client::{Answer, VERSIONS, call, call_json, details, post, request};
use crate::{
    operations::metrics::wait_for_sample,
    support::{TestServer, User, info, raw, step, with_metadata, within_timeout},
};

/// A provider with a job that has events.
async fn scene() -> (TestServer, User, pb::Job) {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1), ("analyse", 3)]).await;
    let job = provider.job(&customer).await;
    let measured = with_metadata(info("measured"), [("mean", 0.25.into()), ("unit", "\"mm\"\n".into())]);
    provider.append(&job, [step("load"), measured]).await;
    (server, provider, job)
}

/// A request for which the method has something to say, and an empty one.
fn requests(method: &MethodDescriptor, job: &pb::Job) -> Vec<Value> {
    let asked = match method.name() {
        "GetJob" | "ListEvents" | "WatchEvents" => json!({ "jobId": job.id }),
        "GetJobConfiguration" => json!({ "id": job.job_configuration_id }),
        "ListJobs" => {
            json!({ "pageSize": 7, "filter": { "statuses": ["JOB_STATUS_RUNNING"], "labels": { "k": "v" } } })
        }
        "CreateJob" => json!({ "providerJobId": "é", "customerId": "no id", "configurationTag": "\n" }),
        "AppendEvents" => {
            json!({ "jobId": job.id, "events": [{ "kind": "EVENT_KIND_STEP", "stepTag": "?" }] })
        }
        _ => json!({}),
    };
    vec![asked, json!({})]
}

fn dynamic(descriptor: &MessageDescriptor, json: &[u8]) -> DynamicMessage {
    let mut json = serde_json::Deserializer::from_slice(json);
    let options = DeserializeOptions::new();
    DynamicMessage::deserialize_with_options(descriptor.clone(), &mut json, &options).unwrap()
}

/// The only message of gRPC's answer.
async fn by_grpc(server: &TestServer, secret: &str, method: &str, message: Vec<u8>) -> Result<Bytes, Status> {
    let mut answers = raw::open(server.channel.clone(), Some(secret), method, [message]).await?;
    Ok(answers.message().await?.expect("a message"))
}

/// The name of a code as Connect has it.
fn code_name(code: Code) -> String {
    match code {
        Code::Cancelled => "canceled".to_owned(),
        code => {
            let name = format!("{code:?}");
            let words = name.char_indices().map(|(at, letter)| match letter.is_uppercase() && at > 0 {
                true => format!("_{}", letter.to_lowercase()),
                false => letter.to_lowercase().to_string(),
            });
            words.collect()
        }
    }
}

/// Asserts that both answers say the same.
fn assert_same(method: &MethodDescriptor, grpc: &Result<Bytes, Status>, connect: &Answer) {
    let name = method.full_name();
    assert!(connect.header("x-request-id").is_some(), "{name}");
    match grpc {
        Ok(message) => {
            assert_eq!(connect.status, 200, "{name}: {connect:?}");
            let json = match connect.header("content-type") {
                Some("application/json") => true,
                Some("application/proto") => false,
                other => panic!("{name}: {other:?}"),
            };
            let output = method.output();
            let expected = DynamicMessage::decode(output.clone(), message.clone()).unwrap();
            let received = if json {
                dynamic(&output, &connect.body)
            } else {
                DynamicMessage::decode(output, connect.body.clone()).unwrap()
            };
            // What a method makes differs each time.
            if is_safe(method) {
                assert_eq!(received, expected, "{name}");
            }
        }
        Err(status) => {
            let error = connect.json();
            assert!(connect.status.as_u16() >= 400, "{name}: {connect:?}");
            assert_eq!(error["code"], code_name(status.code()), "{name}: {error}");
            assert_eq!(error["message"], status.message(), "{name}");
            let expected = RpcStatus::decode(status.details()).unwrap().details;
            let expected: Vec<_> = expected
                .into_iter()
                .map(|any| (any.type_url.rsplit('/').next().unwrap().to_owned(), any.value))
                .collect();
            // How long to wait depends on when it is said, and the metadata of ErrorInfo have no
            // order.
            let lasting = |details: Vec<(String, Vec<u8>)>| {
                let details = details.into_iter().filter(|(name, _)| name != "google.rpc.RetryInfo");
                let unordered = details.map(|(name, value)| {
                    let is_info = name == "google.rpc.ErrorInfo";
                    let info = is_info.then(|| ErrorInfo::decode(value.as_slice()).unwrap());
                    let value = if is_info { Vec::new() } else { value };
                    (name, value, info)
                });
                unordered.collect::<Vec<_>>()
            };
            assert_eq!(lasting(details(&error)), lasting(expected), "{name}");
            let reason = error["details"][0]["debug"]["reason"].as_str();
            assert!(reason.is_some_and(|reason| !reason.is_empty()), "{name}: {error}");
        }
    }
}

/// Calls by Connect and compares the answer with gRPC's to the same message. What is used and
/// when it was used last may change in between; then both are called again.
async fn assert_same_as_grpc(
    (server, secret): (&TestServer, &str),
    method: &MethodDescriptor,
    message: &[u8],
    call: impl AsyncFn() -> Answer,
) {
    let grpc = async || by_grpc(server, secret, &raw::name(method), message.to_vec()).await;
    loop {
        let (before, connect, after) = (grpc().await, call().await, grpc().await);
        if before.as_ref().ok() == after.as_ref().ok() || !is_safe(method) {
            return assert_same(method, &before, &connect);
        }
    }
}

fn is_safe(method: &MethodDescriptor) -> bool {
    let options = method.method_descriptor_proto().options.as_ref();
    options.is_some_and(|options| options.idempotency_level.is_some())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_unary_method_answers_json_and_binary_as_it_answers_grpc() {
    let (server, provider, job) = scene().await;
    let secret = provider.key_secret.as_str();
    let unary = raw::methods().into_iter().filter(|m| !m.is_client_streaming() && !m.is_server_streaming());
    for method in unary {
        for message in requests(&method, &job) {
            let name = raw::name(&method);
            let encoded = dynamic(&method.input(), message.to_string().as_bytes()).encode_to_vec();
            for version in VERSIONS {
                for (kind, body) in [
                    ("application/json", message.to_string().into_bytes()),
                    ("application/proto", encoded.clone()),
                ] {
                    let call = async || {
                        let head = post(&name, kind, Some(secret));
                        call(server.address, version, head, body.clone()).await
                    };
                    assert_same_as_grpc((&server, secret), &method, &encoded, call).await;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_can_be_got_and_nothing_else() {
    let (server, provider, job) = scene().await;
    let bearer = format!("Bearer {}", provider.key_secret);
    let get = async |version, name: &str, query: String| {
        let head = request(Method::GET, &format!("/milepost.v1.{name}?{query}"));
        call(server.address, version, head.header("authorization", &bearer), "").await
    };
    let unary = raw::methods().into_iter().filter(|m| !m.is_client_streaming() && !m.is_server_streaming());
    let mut reads = 0;
    for method in unary {
        let (name, message) = (raw::name(&method), requests(&method, &job).swap_remove(0));
        let encoded = dynamic(&method.input(), message.to_string().as_bytes()).encode_to_vec();
        let text =
            percent_encoding::utf8_percent_encode(&message.to_string(), percent_encoding::NON_ALPHANUMERIC)
                .to_string();
        let is_read =
            ["Get", "List", "Estimate", "Summarize"].iter().any(|verb| method.name().starts_with(verb));
        for version in VERSIONS {
            let json = format!("connect=v1&encoding=json&message={text}");
            if !is_read {
                let answer = get(version, &name, json).await;
                assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, Some("POST")), "{name}");
                continue;
            }
            reads += 1;
            let binary = format!("encoding=proto&base64=1&message={}", URL_SAFE_NO_PAD.encode(&encoded));
            for query in [json, binary] {
                let call = async || get(version, &name, query.clone()).await;
                assert_same_as_grpc((&server, &provider.key_secret), &method, &encoded, call).await;
            }
        }
    }
    assert!(reads >= 18, "{reads}");
    for (query, status) in [
        ("encoding=json", 400),
        ("encoding=json&message=x", 400),
        ("encoding=json&base64=1&message=%2B", 400),
        ("encoding=json&message={}&connect=v2", 400),
        ("encoding=json&message={}&compression=br", 501),
        ("encoding=xml&message={}", 415),
        ("", 415),
    ] {
        let query = query.replace("{}", "%7B%7D");
        let answer = get(Version::HTTP_11, "AuthService/GetCurrentUser", query.clone()).await;
        assert_eq!(answer.status.as_u16(), status, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_credential_is_checked_before_the_message_is_read() {
    let server = TestServer::start().await;
    for version in VERSIONS {
        for method in raw::methods() {
            let name = raw::name(&method);
            if ["AuthService/SignUp", "AuthService/LogIn"].contains(&name.as_str())
                || (method.is_client_streaming() && version == Version::HTTP_11)
            {
                continue;
            }
            let streams = method.is_client_streaming() || method.is_server_streaming();
            let kind = if streams { "application/connect+json" } else { "application/json" };
            // Neither an envelope nor JSON.
            let answer = call(server.address, version, post(&name, kind, None), "{").await;
            let error = if streams {
                assert_eq!(answer.status, 200);
                answer.messages().1["error"].clone()
            } else {
                assert_eq!(answer.status, 401, "{name}");
                answer.json()
            };
            assert_eq!(error["code"], "unauthenticated", "{name}");
            assert_eq!(error["details"][0]["debug"]["reason"], "CREDENTIAL_INVALID");
        }
    }
    // Without a byte of the message.
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = "POST /milepost.v1.JobService/GetJob HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                content-length: 1000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    within_timeout("an answer", stream.read_exact(&mut status)).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 401");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_no_call_is_told_so() {
    let (server, provider, _) = scene().await;
    let head = |method, kind| post(method, kind, Some(&provider.key_secret));
    let get_job = "JobService/GetJob";
    for (request, status, text) in [
        (head("JobService/Nothing", "application/json"), 404, "no method"),
        (request(Method::GET, "/nothing"), 404, "no method"),
        (head(get_job, "text/plain"), 415, "application/json"),
        (head(get_job, "application/json; charset=latin1"), 415, "application/json"),
        (head(get_job, "application/connect+json"), 415, "application/json"),
        (head("EventService/WatchEvents", "application/json"), 415, "application/connect+json"),
        (head(get_job, "application/json").method(Method::PUT), 405, "GET or POST"),
        (head("JobService/CreateJob", "application/json").method(Method::DELETE), 405, "call by POST"),
        (head(get_job, "application/json").header("connect-protocol-version", "2"), 400, "must be 1"),
        (head(get_job, "application/json").header("connect-timeout-ms", "1s"), 400, "digits"),
        (head(get_job, "application/json").header("content-encoding", "br"), 501, "gzip"),
    ] {
        let asked = format!("{request:?}");
        let answer = call(server.address, Version::HTTP_11, request, "{}").await;
        assert_eq!(answer.status.as_u16(), status, "{asked}");
        let body = String::from_utf8(answer.body.to_vec()).unwrap();
        assert!(body.contains(text), "{asked}: {body}");
    }
    let json = head(get_job, "application/json; charset=utf-8").header("connect-protocol-version", "1");
    assert_eq!(call(server.address, Version::HTTP_11, json, "{}").await.status, 400);
    for request in [
        head("EventService/PublishEvents", "application/connect+json"),
        head(get_job, "application/grpc"),
        head("JobService/Nothing", "application/grpc+proto"),
    ] {
        let answer = call(server.address, Version::HTTP_11, request, "").await;
        assert_eq!(answer.status, 505);
        assert!(answer.body.starts_with(b"gRPC, and streams of requests, need HTTP/2"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn json_at_fault_is_an_invalid_argument_with_the_place() {
    let (server, provider, job) = scene().await;
    for (message, why) in [
        ("", "EOF"),
        ("{\"jobId\"", "EOF"),
        ("{\"jobId\": 7}", "line 1 column 11"),
        ("[]", "an object for milepost.v1.GetJobRequest"),
        ("{\"jobId\": \"a\", \"providerJobId\": \"b\"}", "only one of"),
    ] {
        let request = post("JobService/GetJob", "application/json", Some(&provider.key_secret));
        let answer = call(server.address, Version::HTTP_11, request, message).await;
        assert_eq!(answer.status, 400, "{message}");
        let error = answer.json();
        assert_eq!(error["code"], "invalid_argument");
        assert_eq!(error["details"][0]["debug"]["reason"], "FIELD_INVALID");
        let violation = &error["details"][1]["debug"]["fieldViolations"][0]["description"];
        assert!(violation.as_str().unwrap().contains(why), "{message}: {error}");
    }
    // What a newer client may send.
    let unknown = json!({ "jobId": job.id, "newer": { "field": [1, 2] } });
    let (status, answer) =
        call_json(server.address, &provider.key_secret, "JobService/GetJob", &unknown).await;
    assert_eq!((status.as_u16(), answer["job"]["id"].as_str()), (200, Some(job.id.as_str())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_has_the_same_limits_as_json_and_compressed() {
    let (server, provider, _) = scene().await;
    let gzip = |bytes: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let head = |method| post(method, "application/json", Some(&provider.key_secret));
    let padded = |bytes: usize| format!("{{\"jobId\": \"x\"{}}}", " ".repeat(bytes - 14));
    let get_job = "JobService/GetJob";
    for version in VERSIONS {
        let fits = call(server.address, version, head(get_job), padded(limits::MESSAGE_BYTES)).await;
        assert_eq!(fits.status, 400, "the id is none: {fits:?}");
        assert_eq!(fits.json()["details"][0]["debug"]["reason"], "FIELD_INVALID");
        let large = call(server.address, version, head(get_job), padded(limits::MESSAGE_BYTES + 1)).await;
        assert_eq!((large.status.as_u16(), &large.json()["code"]), (429, &json!("resource_exhausted")));

        let compressed = head(get_job).header("content-encoding", "gzip");
        let answer = call(server.address, version, compressed, gzip(padded(100).as_bytes())).await;
        assert_eq!(answer.json()["details"][0]["debug"]["reason"], "FIELD_INVALID");
        let bomb = gzip(padded(limits::MESSAGE_BYTES + 1).as_bytes());
        let compressed = head(get_job).header("content-encoding", "gzip");
        let answer = call(server.address, version, compressed, bomb).await;
        assert_eq!(answer.json()["code"], "resource_exhausted");

        let sign_up = || post("AuthService/SignUp", "application/json", None);
        let large = " ".repeat(limits::UNAUTHENTICATED_CALL_BYTES + 1);
        let answer = call(server.address, version, sign_up(), large).await;
        assert_eq!(answer.json()["code"], "out_of_range");
    }
    // JSON that is a larger message than it is itself.
    let entries = (0..100_000).map(|n| format!("\"{n:x}\":1")).collect::<Vec<_>>().join(",");
    let request = format!("{{\"events\":[{{\"metadata\":{{{entries}}}}}]}}");
    assert!(request.len() < limits::MESSAGE_BYTES);
    let answer = call(server.address, Version::HTTP_11, head("EventService/AppendEvents"), request).await;
    assert_eq!(answer.json()["code"], "resource_exhausted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_past_its_connect_timeout_gets_deadline_exceeded_with_details() {
    let (server, provider, job) = scene().await;
    let mut locker = server.database.lock_job(&job).await;
    let append = json!({ "jobId": job.id, "events": [{ "kind": "EVENT_KIND_INFO", "name": "held" }] });
    for version in VERSIONS {
        let head = post("EventService/AppendEvents", "application/json", Some(&provider.key_secret));
        let head = head.header("connect-timeout-ms", "100");
        let answer = call(server.address, version, head, append.to_string()).await;
        assert_eq!(answer.status, 504);
        assert_eq!(answer.json()["details"][0]["debug"]["reason"], "DEADLINE_EXCEEDED");
    }
    locker.batch_execute("COMMIT").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_of_grpc_mean_nothing_in_a_call_by_connect() {
    let (server, provider, job) = scene().await;
    for (name, value) in [("grpc-timeout", "1n"), ("grpc-encoding", "gzip"), ("grpc-encoding", "br")] {
        let head = post("JobService/GetJob", "application/json", Some(&provider.key_secret));
        let asked = json!({ "jobId": job.id }).to_string();
        let answer = call(server.address, Version::HTTP_2, head.header(name, value), asked).await;
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_by_connect_are_counted_apart_from_those_by_grpc() {
    let (server, mut provider, job) = scene().await;
    provider.get(&job).await;
    let asked = json!({ "jobId": job.id });
    call_json(server.address, &provider.key_secret, "JobService/GetJob", &asked).await;
    call_json(server.address, &provider.key_secret, "JobService/GetJob", &asked).await;
    for (protocol, calls) in [("grpc", 1.0), ("connect", 2.0)] {
        let series = format!(
            "milepost_calls_total{{method=\"milepost.v1.JobService/GetJob\",code=\"OK\",protocol=\"{protocol}\"}}"
        );
        wait_for_sample(&server, &series, |count| count == calls).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_bytes_are_sent_no_call_answers_with_a_fault_of_the_server() {
    let (server, provider, _) = scene().await;
    let mut random = fastrand::Rng::with_seed(16);
    let pieces: [&[u8]; 12] = [
        b"{",
        b"}",
        b"[",
        b"]",
        b"\"jobId\"",
        b":",
        b",",
        b"\"\\ud800\"",
        b"1e999",
        b"null",
        b"\xff",
        b"\x00\x00\x00\x00\x02{}",
    ];
    for method in raw::methods() {
        let streams = method.is_client_streaming() || method.is_server_streaming();
        let kind = if streams { "application/connect+json" } else { "application/json" };
        for round in 0..12 {
            let count = random.usize(..12);
            let body: Vec<u8> = (0..count).flat_map(|_| random.choice(pieces).unwrap().to_vec()).collect();
            let head = post(&raw::name(&method), kind, Some(&provider.key_secret));
            let head = if round % 4 == 0 { head.header("content-encoding", "gzip") } else { head };
            let shown = format!("{}: {:?}", method.full_name(), String::from_utf8_lossy(&body));
            let answer = call(server.address, Version::HTTP_2, head, body).await;
            let code = if streams {
                answer.messages().1["error"]["code"].clone()
            } else if answer.status == 200 {
                // Some methods need no field.
                continue;
            } else {
                answer.json()["code"].clone()
            };
            assert!(
                !["internal", "unknown"].contains(&code.as_str().unwrap_or_default()),
                "{shown}: {answer:?}"
            );
        }
    }
}

#[test]
fn reads_and_nothing_else_are_marked_as_without_side_effects() {
    for method in raw::methods() {
        let options = method.method_descriptor_proto().options.clone().unwrap_or_default();
        let verbs = ["Get", "List", "Watch", "Estimate", "Summarize", "Export"];
        let reads = verbs.iter().any(|verb| method.name().starts_with(verb));
        assert_eq!(options.idempotency_level == Some(1), reads, "{}", method.full_name());
    }
    assert!(DescriptorPool::decode(milepost::pb::FILE_DESCRIPTOR_SET).is_ok());
}
