//! Page tokens: where the next page starts, bound to the query of the first
//! one. They grant nothing: whoever sends one is authorized as with any call.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Datelike as _, Utc};
use prost::Message;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::parse;
use crate::{
    error::Violations,
    limits::{MESSAGE_BYTES, TOKEN_BYTES},
};

/// First byte of a token: how the rest is to be read.
const VERSION: u8 = 1;
/// How much of the query's hash a token carries. It tells queries apart, and
/// protects nothing.
const QUERY_BYTES: usize = 8;

/// What a token is bound to: the method, the caller's id, and the request
/// without its page's size and token.
pub(super) fn query(method: &str, caller: Uuid, request: &impl Message) -> Vec<u8> {
    let mut query = method.as_bytes().to_vec();
    query.push(0);
    query.extend_from_slice(caller.as_bytes());
    query.extend(request.encode_to_vec());
    query
}

/// The items of a page: as many as fit into [`MESSAGE_BYTES`] beside the token,
/// but one at least.
#[derive(Debug)]
pub(super) struct Page<M> {
    pub(super) items: Vec<M>,
    bytes: usize,
}

impl<M: Message> Page<M> {
    pub(super) fn new() -> Self {
        Self { items: Vec::new(), bytes: TOKEN_BYTES }
    }

    /// Whether the item fits and is on the page; if not, the page is full.
    pub(super) fn push(&mut self, item: M) -> bool {
        let bytes = item.encoded_len();
        // One more for the field's number.
        self.bytes += 1 + prost::length_delimiter_len(bytes) + bytes;
        let fits = self.bytes <= MESSAGE_BYTES || self.items.is_empty();
        if fits {
            self.items.push(item);
        }
        fits
    }
}

/// A page of what is listed oldest first, by creation and id.
pub(super) struct OldestFirst {
    query: Vec<u8>,
    /// Where the page before ended.
    pub(super) after: Option<(DateTime<Utc>, Uuid)>,
    size: i64,
}

impl OldestFirst {
    pub(super) fn parse(violations: &mut Violations, query: Vec<u8>, size: i32, token: &str) -> Self {
        let size = parse::page_size(violations, size);
        let cursor = decode(violations, "page_token", &query, token);
        let after = cursor.and_then(|cursor| {
            let after = Self::position(&cursor);
            if after.is_none() {
                violations.add("page_token", "must be a next_page_token of this method");
            }
            after
        });
        Self { query, after, size }
    }

    /// How many to look for: one more than fits tells whether there are more.
    pub(super) fn limit(&self) -> i64 {
        self.size + 1
    }

    /// Cuts what was found to the page; the token of the next one.
    pub(super) fn cut<T>(
        &self,
        found: &mut Vec<T>,
        position: impl Fn(&T) -> (DateTime<Utc>, Uuid),
    ) -> String {
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        if found.len() <= size {
            return String::new();
        }
        found.truncate(size);
        found.last().map(position).map_or_else(String::new, |(created_at, id)| {
            let created_at = created_at.timestamp_micros().to_be_bytes();
            encode(&self.query, &[created_at.as_slice(), id.as_bytes()].concat())
        })
    }

    fn position(cursor: &[u8]) -> Option<(DateTime<Utc>, Uuid)> {
        let (created_at, id) = cursor.split_first_chunk()?;
        Some((time(*created_at)?, Uuid::from_slice(id).ok()?))
    }
}

/// A cursor's microseconds since 1970, if it is a time that the database can
/// compare with: anybody can make a token.
pub(super) fn time(micros: [u8; 8]) -> Option<DateTime<Utc>> {
    let time = DateTime::from_timestamp_micros(i64::from_be_bytes(micros))?;
    (1..=9999).contains(&time.year()).then_some(time)
}

/// The token of the page that starts after `cursor`. `query` says all that
/// chooses and orders the items, method and caller included, but for the page's
/// size.
pub(super) fn encode(query: &[u8], cursor: &[u8]) -> String {
    let mut token = Vec::with_capacity(1 + QUERY_BYTES + cursor.len());
    token.push(VERSION);
    token.extend_from_slice(&binding(query));
    token.extend_from_slice(cursor);
    URL_SAFE_NO_PAD.encode(token)
}

/// The cursor of a token that was made for the same query; none for the first
/// page, whose token is empty, and for what is no such token, which is noted.
pub(super) fn decode(violations: &mut Violations, field: &str, query: &[u8], token: &str) -> Option<Vec<u8>> {
    if token.is_empty() {
        return None;
    }
    let cursor = (token.len() <= TOKEN_BYTES)
        .then(|| URL_SAFE_NO_PAD.decode(token).ok())
        .flatten()
        .and_then(|bytes| bytes.strip_prefix(&[VERSION]).map(<[u8]>::to_vec));
    let Some(cursor) = cursor else {
        violations.add(field, "must be a next_page_token of this method");
        return None;
    };
    let Some(cursor) = cursor.strip_prefix(&binding(query)) else {
        violations.add(field, "must be of the same query: only page_size may change between pages");
        return None;
    };
    Some(cursor.to_vec())
}

fn binding(query: &[u8]) -> [u8; QUERY_BYTES] {
    let mut binding = [0; QUERY_BYTES];
    binding.copy_from_slice(&Sha256::digest(query)[..QUERY_BYTES]);
    binding
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(query: &[u8], token: &str) -> (Option<Vec<u8>>, usize) {
        let mut violations = Violations::default();
        let cursor = decode(&mut violations, "page_token", query, token);
        (cursor, violations.iter().len())
    }

    #[test]
    fn a_token_comes_back_for_its_query_only() {
        let token = encode(b"query", b"cursor");
        assert_eq!(decoded(b"query", &token), (Some(b"cursor".to_vec()), 0));
        assert_eq!(decoded(b"other", &token), (None, 1));
        assert_eq!(decoded(b"query", &encode(b"query", b"")), (Some(vec![]), 0));
        assert_eq!(decoded(b"query", ""), (None, 0));
    }

    #[test]
    fn a_page_takes_what_fits_and_one_item_at_least() {
        let half = "x".repeat(MESSAGE_BYTES / 2 - TOKEN_BYTES);
        let mut page = Page::new();
        assert!(page.push(half.clone()) && page.push(half) && !page.push("x".repeat(TOKEN_BYTES)));
        assert_eq!(page.items.len(), 2);
        let mut page = Page::new();
        assert!(page.push("x".repeat(2 * MESSAGE_BYTES)) && !page.push(String::new()));
        assert_eq!(page.items.len(), 1);
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let token = encode(b"query", b"cursor");
        let mut other_version = URL_SAFE_NO_PAD.decode(&token).expect("base64");
        other_version[0] = 2;
        let other_version = URL_SAFE_NO_PAD.encode(other_version);
        for bad in ["x", "é", "AQ", &token[..6], &other_version, &format!("{token}="), &"A".repeat(100_000)]
        {
            assert_eq!(decoded(b"query", bad), (None, 1), "{bad}");
        }
    }

    #[test]
    fn a_time_that_no_database_knows_is_no_cursor() {
        for there in [-62_135_596_800_000_000, 0, 253_402_300_799_999_999_i64] {
            assert_eq!(time(there.to_be_bytes()).map(|time| time.timestamp_micros()), Some(there));
        }
        for beyond in [i64::MIN, -62_135_596_800_000_001, 253_402_300_800_000_000, 8_000_000_000_000_000_000]
        {
            assert_eq!(time(beyond.to_be_bytes()), None, "{beyond}");
            let query = b"ListApiKeys".to_vec();
            let cursor = [beyond.to_be_bytes().as_slice(), Uuid::nil().as_bytes()].concat();
            let mut violations = Violations::default();
            let page = OldestFirst::parse(&mut violations, query.clone(), 0, &encode(&query, &cursor));
            assert!(page.after.is_none() && violations.iter().len() == 1, "{beyond}");
        }
    }
}
