//! The records of a spool. See [the format](super).

use prost::Message as _;

use super::super::content::Content;
use crate::pb::{AppendEventsRequest, CreateJobRequest, append_events_request::Job};

pub(super) const HEADER_BYTES: usize = 8;
const CREATE_JOB: u8 = 1;
const APPEND_EVENT: u8 = 2;

/// What stands at a place of a segment.
#[derive(Debug, PartialEq)]
pub(super) enum Found {
    /// A whole record.
    Record { end: usize, job: Job, content: Box<Content> },
    /// Bytes that are no record, up to the next record or the end.
    Damaged { end: usize },
    /// The same, with no record behind it: a record that was not written whole.
    Torn,
}

/// The record of something to send.
pub(in crate::publisher) fn encode(job: Job, content: Content) -> Vec<u8> {
    let mut record = vec![0; HEADER_BYTES];
    match content {
        Content::Job(request) => {
            record.push(CREATE_JOB);
            record.extend(request.encode_to_vec());
        }
        Content::Event(event) => {
            let request =
                AppendEventsRequest { job: Some(job), events: vec![event], expected_sequence: None };
            record.push(APPEND_EVENT);
            record.extend(request.encode_to_vec());
        }
    }
    let (header, payload) = record.split_at_mut(HEADER_BYTES);
    // A longer payload is refused before it is written.
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4..].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    record
}

/// What stands at this place, which is before the end of the bytes.
pub(super) fn find(bytes: &[u8], start: usize) -> Found {
    if let Some((end, job, content)) = decode(bytes, start) {
        return Found::Record { end, job, content: Box::new(content) };
    }
    // First where the record itself says that it ends: inside of a damaged record may be what
    // looks like another one.
    let says = payload(bytes, start).map(|(payload, _)| start + HEADER_BYTES + payload.len());
    let whole = says.filter(|end| *end == bytes.len());
    let is_record = |place: &usize| decode(bytes, *place).is_some();
    let next = || says.into_iter().chain(start + 1..bytes.len()).find(is_record);
    whole.or_else(next).map_or(Found::Torn, |end| Found::Damaged { end })
}

fn decode(bytes: &[u8], start: usize) -> Option<(usize, Job, Content)> {
    let (payload, crc) = payload(bytes, start)?;
    let (kind, message) = payload.split_first()?;
    if !matches!(*kind, CREATE_JOB | APPEND_EVENT) || crc32fast::hash(payload) != crc {
        return None;
    }
    let end = start + HEADER_BYTES + payload.len();
    if *kind == CREATE_JOB {
        let request = CreateJobRequest::decode(message).ok()?;
        return Some((end, Job::ProviderJobId(request.provider_job_id.clone()), Content::Job(request)));
    }
    let mut request = AppendEventsRequest::decode(message).ok()?;
    let event = request.events.pop().filter(|_| request.events.is_empty())?;
    Some((end, request.job?, Content::Event(event)))
}

/// The payload of the record at this place, and the checksum that it should have. None if the
/// bytes are too few.
fn payload(bytes: &[u8], start: usize) -> Option<(&[u8], u32)> {
    let (length, rest) = bytes.get(start..)?.split_first_chunk()?;
    let (crc, rest) = rest.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    // The checksum of nothing is 0, which is what a file without its last data has.
    let payload = rest.get(..length).filter(|payload| !payload.is_empty())?;
    Some((payload, u32::from_le_bytes(*crc)))
}
