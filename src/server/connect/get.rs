//! Calls by GET, whose message is a part of the query.

use std::{collections::HashMap, sync::Arc};

use base64::{
    Engine as _,
    alphabet::URL_SAFE,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use http_body_util::Full;
use percent_encoding::percent_decode_str;
use tonic::{Status, body::Body};

use super::{
    methods::Method,
    request::{Format, is_gzip, prefix, unsupported},
    transcode::MessageFormat,
};
use crate::services::Encoding;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A request by GET, as one by gRPC; or the answer that refuses it.
pub(super) fn read(
    method: &Arc<Method>,
    request: Request<Body>,
) -> Result<(Format, Request<Body>), Box<Response<Body>>> {
    let (mut parts, _) = request.into_parts();
    let query = query(parts.uri.query().unwrap_or_default());
    let encoding = match query.get("encoding").map(Vec::as_slice) {
        Some(b"json") => Encoding::Json,
        Some(b"proto") => Encoding::Protobuf,
        _ => return Err(unsupported().into()),
    };
    let format = Format { encoding, streams: false };
    let read = message(&query).and_then(|(message, gzip)| {
        format.to_grpc(&mut parts, MessageFormat { method: Arc::clone(method), encoding, gzip })?;
        let mut framed = BytesMut::from(prefix(u32::try_from(message.len()).ok(), gzip));
        framed.extend_from_slice(&message);
        Ok(framed.freeze())
    });
    match read {
        Ok(framed) => Ok((format, Request::from_parts(parts, Body::new(Full::new(framed))))),
        Err(status) => Err(format.refusal(&status).into()),
    }
}

/// The parameters of a query, decoded.
fn query(query: &str) -> HashMap<&str, Vec<u8>> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.map(|(name, value)| (name, percent_decode_str(&value.replace('+', " ")).collect())).collect()
}

/// The message, and whether it is compressed.
fn message(query: &HashMap<&str, Vec<u8>>) -> Result<(Bytes, bool), Status> {
    if query.get("connect").is_some_and(|version| version != b"v1") {
        return Err(Status::invalid_argument("the query parameter connect must be v1"));
    }
    let gzip = is_gzip(query.get("compression").map(Vec::as_slice).unwrap_or_default())?;
    let Some(message) = query.get("message") else {
        return Err(Status::invalid_argument("the query parameter message is missing"));
    };
    if query.get("base64").is_none_or(|base64| base64 != b"1") {
        return Ok((message.clone().into(), gzip));
    }
    let decoded = BASE64.decode(message);
    let decoded = decoded.map_err(|_| Status::invalid_argument("the message is not in URL-safe base64"))?;
    Ok((decoded.into(), gzip))
}
