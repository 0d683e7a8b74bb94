//! Pages of lists, and page tokens. A page token has the start of the next page and is
//! bound to the query of the first page. It grants nothing: each call is authorized
//! without regard to its token.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Datelike as _};
use prost::Message;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::parse;
use crate::{
    error::Violations,
    limits::{MESSAGE_BYTES, TOKEN_BYTES},
    models::CreationCursor,
    pb,
};

/// First byte of a token: the version of its format.
const VERSION: u8 = 1;
/// Bytes of the query's hash in a token. They tell queries apart and are no protection
/// against forged tokens.
pub(super) const QUERY_BYTES: usize = 8;

/// A request for a page of a list.
pub(super) trait ListRequest: Message {
    const NAME: &'static str;

    /// Takes page size and page token out, so that the query is left.
    fn take_page(&mut self) -> (i32, String);
}

macro_rules! list_requests {
    ($($request:ident),*) => {$(
        impl ListRequest for pb::$request {
            const NAME: &'static str = stringify!($request);

            fn take_page(&mut self) -> (i32, String) {
                (std::mem::take(&mut self.page_size), std::mem::take(&mut self.page_token))
            }
        }
    )*};
}

list_requests!(
    ListApiKeysRequest,
    ListEventsRequest,
    ListJobConfigurationsRequest,
    ListJobsRequest,
    ListWatchTokensRequest,
    SummarizeJobsRequest
);

/// What a page token says: after which item the next page starts.
pub(super) trait Cursor: Sized {
    fn to_bytes(&self) -> Vec<u8>;
    /// None for bytes that no token of this method has.
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

/// The page that a request asks for.
pub(super) struct PageRequest<C> {
    pub(super) size: i64,
    /// The cursor of the last item of the page before; none for the first page.
    pub(super) after: Option<C>,
    binding: [u8; QUERY_BYTES],
}

impl<C: Cursor> PageRequest<C> {
    /// Takes the page out of the request. The tokens of its pages are bound to the caller's
    /// id and to the rest of the request.
    pub(super) fn take(violations: &mut Violations, caller: Uuid, request: &mut impl ListRequest) -> Self {
        let (size, token) = request.take_page();
        let binding = binding(caller, request);
        let size = parse::page_size(violations, size);
        let after = decode(violations, binding, &token);
        Self { size, after, binding }
    }

    /// How many items to read: one more than the page has, to know whether there is a
    /// next page.
    pub(super) fn limit(&self) -> i64 {
        self.size + 1
    }

    /// The token of the page after this item; empty if there is no next page.
    pub(super) fn next_token(&self, last: Option<&C>) -> String {
        last.map_or_else(String::new, |last| encode(self.binding, last))
    }

    /// Cuts `found` to the page and returns the token of the next page.
    pub(super) fn cut<T>(&self, found: &mut Vec<T>, cursor: impl Fn(&T) -> C) -> String {
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        if found.len() <= size {
            return String::new();
        }
        found.truncate(size);
        self.next_token(found.last().map(cursor).as_ref())
    }
}

fn binding<R: ListRequest>(caller: Uuid, query: &R) -> [u8; QUERY_BYTES] {
    binding_of(R::NAME, caller, query)
}

/// What binds a token to the caller and to a request, without the token itself.
pub(super) fn binding_of(name: &str, caller: Uuid, query: &impl Message) -> [u8; QUERY_BYTES] {
    let digest = Sha256::new()
        .chain_update(name)
        .chain_update(caller.as_bytes())
        .chain_update(query.encode_to_vec())
        .finalize();
    std::array::from_fn(|index| digest[index])
}

fn encode(binding: [u8; QUERY_BYTES], cursor: &impl Cursor) -> String {
    URL_SAFE_NO_PAD.encode([&[VERSION][..], &binding, &cursor.to_bytes()].concat())
}

/// The cursor of a token with this binding. Returns none for the empty token of the first
/// page, and after a violation for any other token.
fn decode<C: Cursor>(violations: &mut Violations, binding: [u8; QUERY_BYTES], token: &str) -> Option<C> {
    if token.is_empty() {
        return None;
    }
    let bytes = (token.len() <= TOKEN_BYTES).then(|| URL_SAFE_NO_PAD.decode(token).ok()).flatten();
    let content = bytes.as_ref().and_then(|bytes| bytes.strip_prefix(&[VERSION]));
    let of_query = content.and_then(|content| content.strip_prefix(&binding));
    let cursor = of_query.and_then(C::from_bytes);
    if content.is_some() && of_query.is_none() {
        violations.add("page_token", "must be of the same query: only page_size may change between pages");
    } else if cursor.is_none() {
        violations.add("page_token", "must be a next_page_token of this method");
    }
    cursor
}

/// The id of the last item.
impl Cursor for Uuid {
    fn to_bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::from_slice(bytes).ok()
    }
}

/// A sequence.
impl Cursor for i64 {
    fn to_bytes(&self) -> Vec<u8> {
        self.to_be_bytes().to_vec()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().map(Self::from_be_bytes).ok().filter(|sequence| *sequence >= 0)
    }
}

/// The key of the last item.
impl Cursor for String {
    fn to_bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }

    /// None also for NUL, which Postgres has in no text.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::from_utf8(bytes.to_vec()).ok().filter(|text| !text.contains('\0'))
    }
}

/// When the last item was created, in microseconds since 1970, and its id.
impl Cursor for CreationCursor {
    fn to_bytes(&self) -> Vec<u8> {
        [&self.created_at.timestamp_micros().to_be_bytes()[..], self.id.as_bytes()].concat()
    }

    /// None also for a time outside the years 1 to 9999: Postgres cannot represent each
    /// time of a forged token.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (micros, id) = bytes.split_first_chunk()?;
        let created_at = DateTime::from_timestamp_micros(i64::from_be_bytes(*micros))?;
        let id = Uuid::from_slice(id).ok()?;
        (1..=9999).contains(&created_at.year()).then_some(Self { created_at, id })
    }
}

/// The items of a page: as many as fit into [`MESSAGE_BYTES`] together with the token,
/// and at least one.
#[derive(Debug, Default)]
pub(super) struct Page<M> {
    pub(super) items: Vec<M>,
    bytes: usize,
}

impl<M: Message> Page<M> {
    /// Adds the item if it fits. Returns false if it does not: the page is then full.
    pub(super) fn push(&mut self, item: M) -> bool {
        let bytes = item.encoded_len();
        // One byte for the field's tag.
        self.bytes += 1 + prost::length_delimiter_len(bytes) + bytes;
        let fits = TOKEN_BYTES + self.bytes <= MESSAGE_BYTES || self.items.is_empty();
        if fits {
            self.items.push(item);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BINDING: [u8; QUERY_BYTES] = [1; QUERY_BYTES];

    fn decoded<C: Cursor>(binding: [u8; QUERY_BYTES], token: &str) -> (Option<C>, usize) {
        let mut violations = Violations::default();
        let cursor = decode(&mut violations, binding, token);
        (cursor, violations.iter().len())
    }

    #[test]
    fn a_token_is_decoded_for_its_own_query_only() {
        let token = encode(BINDING, &7_i64);
        assert_eq!(decoded(BINDING, &token), (Some(7_i64), 0));
        assert_eq!(decoded::<i64>([2; QUERY_BYTES], &token), (None, 1));
        assert_eq!(decoded::<Uuid>(BINDING, &token), (None, 1));
        assert_eq!(decoded::<i64>(BINDING, ""), (None, 0));
    }

    #[test]
    fn the_binding_tells_callers_methods_and_queries_apart() {
        let (caller, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let jobs = pb::ListJobsRequest::default();
        let filter = pb::JobFilter { configuration_tag: "ct".to_owned(), ..Default::default() };
        let of_tag = pb::ListJobsRequest { filter: Some(filter), ..Default::default() };
        let bindings = [
            binding(caller, &jobs),
            binding(other, &jobs),
            binding(caller, &of_tag),
            binding(caller, &pb::ListApiKeysRequest::default()),
        ];
        for (index, one) in bindings.iter().enumerate() {
            assert!(!bindings[..index].contains(one), "{index}");
        }
    }

    #[test]
    fn a_negative_sequence_is_no_cursor() {
        assert_eq!(decoded(BINDING, &encode(BINDING, &0_i64)), (Some(0_i64), 0));
        for sequence in [-1, i64::MIN] {
            assert_eq!(decoded::<i64>(BINDING, &encode(BINDING, &sequence)), (None, 1));
        }
    }

    #[test]
    fn a_page_has_the_items_that_fit_and_at_least_one() {
        let half = "x".repeat(MESSAGE_BYTES / 2 - TOKEN_BYTES);
        let mut page = Page::default();
        assert!(page.push(half.clone()) && page.push(half) && !page.push("x".repeat(TOKEN_BYTES)));
        assert_eq!(page.items.len(), 2);
        let mut page = Page::default();
        assert!(page.push("x".repeat(2 * MESSAGE_BYTES)) && !page.push(String::new()));
        assert_eq!(page.items.len(), 1);
    }

    #[test]
    fn malformed_tokens_are_refused() {
        let token = encode(BINDING, &7_i64);
        let mut other_version = URL_SAFE_NO_PAD.decode(&token).expect("base64");
        other_version[0] = 2;
        let other_version = URL_SAFE_NO_PAD.encode(other_version);
        for bad in ["x", "é", "AQ", &token[..6], &other_version, &format!("{token}="), &"A".repeat(100_000)]
        {
            assert_eq!(decoded::<i64>(BINDING, bad), (None, 1), "{bad}");
        }
    }

    #[test]
    fn a_cursor_with_a_time_outside_the_years_1_to_9999_is_refused() {
        let bytes = |micros: i64| [&micros.to_be_bytes()[..], Uuid::nil().as_bytes()].concat();
        for valid in [-62_135_596_800_000_000, 0, 253_402_300_799_999_999_i64] {
            let cursor = CreationCursor::from_bytes(&bytes(valid)).expect("a cursor");
            assert_eq!(cursor.created_at.timestamp_micros(), valid);
            assert_eq!(cursor.to_bytes(), bytes(valid));
        }
        for beyond in [i64::MIN, -62_135_596_800_000_001, 253_402_300_800_000_000, 8_000_000_000_000_000_000]
        {
            assert_eq!(CreationCursor::from_bytes(&bytes(beyond)), None, "{beyond}");
        }
    }
}
