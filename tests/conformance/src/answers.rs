//! The answers that a request of the suite asks for.

use std::{pin::Pin, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use futures_util::{Stream, stream};
use prost::Message;
use prost_types::Any;
use tokio::time::sleep;
use tonic::{
    Code, Request, Response, Status,
    metadata::{AsciiMetadataKey, BinaryMetadataKey, BinaryMetadataValue, MetadataMap},
};
use tonic_types::pb::Status as RpcStatus;

use crate::{
    pb::{
        ConformancePayload, Error, Header, StreamResponseDefinition, UnaryResponseDefinition,
        conformance_payload::{ConnectGetInfo, RequestInfo},
        unary_response_definition,
    },
    trailers::{Query, TRAILER},
};

pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub fn any(name: &str, message: &impl Message) -> Any {
    let type_url = format!("type.googleapis.com/connectrpc.conformance.v1.{name}");
    Any { type_url, value: message.encode_to_vec() }
}

/// What the service saw of a request.
pub fn info<T>(request: &Request<T>, requests: impl IntoIterator<Item = Any>) -> RequestInfo {
    let headers = request.metadata().clone().into_headers();
    let texts = |name| {
        let values = headers.get_all(name).iter();
        values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect()
    };
    let request_headers =
        headers.keys().map(|name| Header { name: name.to_string(), value: texts(name) }).collect();
    // Milliseconds, or seconds where those have too many digits.
    let timeout_ms = headers.get("grpc-timeout").map(|timeout| {
        let (digits, unit) = timeout.to_str().unwrap().split_at(timeout.len() - 1);
        digits.parse::<i64>().unwrap() * if unit == "m" { 1 } else { 1000 }
    });
    let connect_get_info = request.extensions().get::<Query>().map(|Query(query)| {
        let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let decoded = |text| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let query_params =
            pairs.map(|(name, value)| Header { name: name.to_owned(), value: vec![decoded(value)] });
        ConnectGetInfo { query_params: query_params.collect() }
    });
    RequestInfo { request_headers, timeout_ms, requests: requests.into_iter().collect(), connect_get_info }
}

/// Adds headers, with this prefix before their names.
pub fn add(metadata: &mut MetadataMap, headers: &[Header], prefix: &str) {
    for (header, value) in
        headers.iter().flat_map(|header| header.value.iter().map(move |value| (header, value)))
    {
        let name = format!("{prefix}{}", header.name.to_ascii_lowercase());
        if name.ends_with("-bin") {
            let value = STANDARD_NO_PAD.decode(value.trim_end_matches('=')).unwrap();
            let value = BinaryMetadataValue::from_bytes(&value);
            metadata.append_bin(BinaryMetadataKey::from_bytes(name.as_bytes()).unwrap(), value);
        } else {
            let key = AsciiMetadataKey::from_bytes(name.as_bytes()).unwrap();
            metadata.append(key, value.parse().unwrap());
        }
    }
}

fn status(error: &Error, info: Option<RequestInfo>) -> Status {
    let info = info.map(|info| any("ConformancePayload.RequestInfo", &info));
    let details = error.details.iter().cloned().chain(info).collect();
    let message = error.message.clone().unwrap_or_default();
    let encoded = RpcStatus { code: error.code, message: message.clone(), details }.encode_to_vec();
    Status::with_details(Code::from(error.code), message, encoded.into())
}

async fn delay(milliseconds: u32) {
    sleep(Duration::from_millis(milliseconds.into())).await;
}

pub async fn unary<T>(
    definition: Option<UnaryResponseDefinition>,
    info: RequestInfo,
    answer: impl Fn(ConformancePayload) -> T,
) -> Result<Response<T>, Status> {
    use unary_response_definition::Response as Defined;
    let definition = definition.unwrap_or_default();
    delay(definition.response_delay_ms).await;
    let data = match definition.response {
        Some(Defined::Error(error)) => {
            let mut status = status(&error, Some(info));
            add(status.metadata_mut(), &definition.response_headers, "");
            add(status.metadata_mut(), &definition.response_trailers, TRAILER);
            return Err(status);
        }
        Some(Defined::ResponseData(data)) => data,
        None => Vec::new(),
    };
    let mut response = Response::new(answer(ConformancePayload { data, request_info: Some(info) }));
    add(response.metadata_mut(), &definition.response_headers, "");
    add(response.metadata_mut(), &definition.response_trailers, TRAILER);
    Ok(response)
}

/// One message of a stream, after its delay.
pub fn one<T, F: Fn(ConformancePayload) -> T>(
    definition: &StreamResponseDefinition,
    index: usize,
    request_info: Option<RequestInfo>,
    answer: F,
) -> impl Future<Output = Result<T, Status>> + use<T, F> {
    let pause = delay(definition.response_delay_ms);
    let payload = ConformancePayload { data: definition.response_data[index].clone(), request_info };
    async move {
        pause.await;
        Ok(answer(payload))
    }
}

/// The messages of a stream from this index on, and its end. Only the first message, or the
/// error in its place, has the information about the request.
pub fn all<T: Send + 'static>(
    definition: StreamResponseDefinition,
    info: Option<RequestInfo>,
    from: usize,
    answer: impl Fn(ConformancePayload) -> T + Clone + Send + 'static,
) -> Answers<T> {
    Box::pin(stream::unfold(Some((definition, info, from)), move |state| {
        let answer = answer.clone();
        async move {
            let (definition, info, index) = state?;
            if index < definition.response_data.len() {
                let message = one(&definition, index, info, answer).await;
                return Some((message, Some((definition, None, index + 1))));
            }
            // tonic has trailers of a stream only with a status, and OK is one too.
            let mut end = match &definition.error {
                Some(error) => status(error, info.filter(|_| index == 0)),
                None if definition.response_trailers.is_empty() => return None,
                None => Status::ok(""),
            };
            add(end.metadata_mut(), &definition.response_trailers, "");
            Some((Err(end), None))
        }
    }))
}
