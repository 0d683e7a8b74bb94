//! Pages of lists, and page tokens. A page token has the start of the next page and is
//! bound to the query of the first page. It grants nothing: each call is authorized
//! without regard to its token.

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

/// First byte of a token: the version of its format.
const VERSION: u8 = 1;
/// Bytes of the query's hash in a token. They tell queries apart and are no protection
/// against forged tokens.
const QUERY_BYTES: usize = 8;

/// Encodes what a token is bound to: the method, the caller's id, and the request. The
/// request must come without page size and page token.
pub(super) fn query(method: &str, caller: Uuid, request: &impl Message) -> Vec<u8> {
    let mut query = method.as_bytes().to_vec();
    query.push(0);
    query.extend_from_slice(caller.as_bytes());
    query.extend(request.encode_to_vec());
    query
}

/// The items of a page: as many as fit into [`MESSAGE_BYTES`] together with the token,
/// and at least one.
#[derive(Debug)]
pub(super) struct Page<M> {
    pub(super) items: Vec<M>,
    bytes: usize,
}

impl<M: Message> Page<M> {
    pub(super) fn new() -> Self {
        Self { items: Vec::new(), bytes: TOKEN_BYTES }
    }

    /// Adds the item if it fits. Returns false if it does not: the page is then full.
    pub(super) fn push(&mut self, item: M) -> bool {
        let bytes = item.encoded_len();
        // One byte for the field's tag.
        self.bytes += 1 + prost::length_delimiter_len(bytes) + bytes;
        let fits = self.bytes <= MESSAGE_BYTES || self.items.is_empty();
        if fits {
            self.items.push(item);
        }
        fits
    }
}

/// The parameters of a page in a list that is ordered by creation and id, oldest first.
pub(super) struct OldestFirst {
    query: Vec<u8>,
    /// Creation time and id of the last item of the previous page.
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

    /// How many items to read: one more than the page has, to know whether there is a
    /// next page.
    pub(super) fn limit(&self) -> i64 {
        self.size + 1
    }

    /// Cuts `found` to the page and returns the token of the next page.
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

/// Decodes microseconds since 1970 in a cursor. Returns none outside the years 1 to
/// 9999, because a forged token may have a time that Postgres cannot represent.
pub(super) fn time(micros: [u8; 8]) -> Option<DateTime<Utc>> {
    let time = DateTime::from_timestamp_micros(i64::from_be_bytes(micros))?;
    (1..=9999).contains(&time.year()).then_some(time)
}

/// Encodes the token of the page that starts after `cursor`. `query` has everything
/// that selects and orders the items, including method and caller, except the page
/// size.
pub(super) fn encode(query: &[u8], cursor: &[u8]) -> String {
    let mut token = Vec::with_capacity(1 + QUERY_BYTES + cursor.len());
    token.push(VERSION);
    token.extend_from_slice(&binding(query));
    token.extend_from_slice(cursor);
    URL_SAFE_NO_PAD.encode(token)
}

/// Decodes the cursor of a token that was made for the same query. Returns none for the
/// empty token of the first page, and after a violation for any other token.
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
    fn a_token_is_decoded_for_its_own_query_only() {
        let token = encode(b"query", b"cursor");
        assert_eq!(decoded(b"query", &token), (Some(b"cursor".to_vec()), 0));
        assert_eq!(decoded(b"other", &token), (None, 1));
        assert_eq!(decoded(b"query", &encode(b"query", b"")), (Some(vec![]), 0));
        assert_eq!(decoded(b"query", ""), (None, 0));
    }

    #[test]
    fn a_page_has_the_items_that_fit_and_at_least_one() {
        let half = "x".repeat(MESSAGE_BYTES / 2 - TOKEN_BYTES);
        let mut page = Page::new();
        assert!(page.push(half.clone()) && page.push(half) && !page.push("x".repeat(TOKEN_BYTES)));
        assert_eq!(page.items.len(), 2);
        let mut page = Page::new();
        assert!(page.push("x".repeat(2 * MESSAGE_BYTES)) && !page.push(String::new()));
        assert_eq!(page.items.len(), 1);
    }

    #[test]
    fn malformed_tokens_are_refused() {
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
    fn a_cursor_with_a_time_outside_the_years_1_to_9999_is_refused() {
        for valid in [-62_135_596_800_000_000, 0, 253_402_300_799_999_999_i64] {
            assert_eq!(time(valid.to_be_bytes()).map(|time| time.timestamp_micros()), Some(valid));
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
