//! How far a watch has read, and the resume token that says so to a client.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::DateTime;
use uuid::Uuid;

use super::scope::{Binding, Filter, Scope};
use crate::{
    db::Identity,
    error::{Error, Result},
    limits::TOKEN_BYTES,
    models::{CreationCursor, job::WalkPoint},
};

/// First byte of a token; tokens of another version are refused.
const VERSION: u8 = 3;
/// Bytes of a token: version, binding, history and the three numbers of a position.
const BYTES: usize = 1 + 8 + 16 + 3 * 8;
/// Bytes that a token has more within a walk: the id of a job and three numbers.
const WALK_BYTES: usize = 16 + 3 * 8;

/// What tells the events of one run of a primary from those of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) identity: Identity,
    /// That of the run, or that of a run before, if nothing was appended in this one yet.
    pub(crate) history: Uuid,
}

/// How far a watch has read the event log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    /// The history of the log in which the watch came here. In another one, other events
    /// may have these numbers.
    pub(crate) history: Uuid,
    /// The position of the log of the last event that was sent or filtered. It says whether
    /// what the watch has read is lost.
    pub(crate) log: i64,
    /// Every event of the scope up to here was sent or filtered: a sequence in a
    /// watch of one job, a position of the log in a watch of all jobs.
    pub(crate) cursor: i64,
    /// In a watch of all jobs, the number of logs that retention had removed when
    /// the watch last saw that no removal had taken events beyond the cursor.
    pub(crate) removals: i64,
    /// How far a watch of all jobs has come beyond the cursor that walks its jobs.
    pub(crate) walk: Option<Walk>,
}

/// How far a watch of all jobs has come that walks its jobs, in the order of their creation,
/// instead of scanning the log.
///
/// The jobs of all events of the walk were committed before the walk began. A job that is
/// created later may have its place anywhere in that order, since clocks are set back; it has
/// no event of the walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Walk {
    /// The walk sends the events of the scope after the cursor and up to this position of the
    /// log. Then the cursor moves here.
    pub(crate) end: i64,
    pub(crate) point: WalkPoint,
}

impl Walk {
    pub(crate) fn begin(end: i64) -> Self {
        Self { end, point: WalkPoint::START }
    }

    /// The same walk, no further than up to a position.
    pub(crate) fn up_to(self, position: i64) -> Self {
        Self { end: self.end.min(position), ..self }
    }

    fn encode(self, bytes: &mut Vec<u8>) {
        let Self { end, point: WalkPoint { job: CreationCursor { created_at, id }, sequence } } = self;
        bytes.extend(id.into_bytes());
        let numbers = [end, created_at.timestamp_micros(), sequence];
        numbers.into_iter().for_each(|number| bytes.extend(number.to_be_bytes()));
    }

    fn parse(bytes: &[u8; WALK_BYTES]) -> Option<Self> {
        let (id, numbers) = bytes.split_first_chunk::<16>()?;
        let [end, micros, sequence] = parse_numbers(numbers)?;
        let job = CreationCursor {
            created_at: DateTime::from_timestamp_micros(micros)?,
            id: Uuid::from_bytes(*id),
        };
        Some(Self { end, point: WalkPoint { job, sequence } })
    }
}

/// Three numbers, none of which is negative.
fn parse_numbers(bytes: &[u8]) -> Option<[i64; 3]> {
    let bytes: &[u8; 3 * 8] = bytes.try_into().ok()?;
    let mut numbers = [0; 3];
    for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
        *number = i64::from_be_bytes(bytes.try_into().ok()?);
    }
    numbers.iter().all(|number| *number >= 0).then_some(numbers)
}

/// A position and the binding to the filter that it was reached with. Opaque to
/// clients, so that a position may one day span several logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ResumeToken {
    binding: Binding,
    position: Position,
}

impl ResumeToken {
    pub(crate) fn new(filter: &Filter, position: Position) -> Self {
        Self { binding: filter.binding(), position }
    }

    pub(crate) fn encode(self) -> String {
        let Position { history, log, cursor, removals, walk } = self.position;
        let mut bytes = Vec::with_capacity(BYTES + WALK_BYTES);
        bytes.push(VERSION);
        bytes.extend(self.binding.0);
        bytes.extend(history.into_bytes());
        [log, cursor, removals].into_iter().for_each(|number| bytes.extend(number.to_be_bytes()));
        if let Some(walk) = walk {
            walk.encode(&mut bytes);
        }
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// `None` for a text that no server of milepost can have made.
    pub(crate) fn parse(token: &str) -> Option<Self> {
        if token.len() > TOKEN_BYTES {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (bytes, walk) = bytes.split_first_chunk::<BYTES>()?;
        if bytes[0] != VERSION {
            return None;
        }
        let walk = match walk {
            [] => None,
            walk => Some(Walk::parse(walk.try_into().ok()?)?),
        };
        let (binding, history) = (bytes[1..9].try_into().ok()?, bytes[9..25].try_into().ok()?);
        let [log, cursor, removals] = parse_numbers(&bytes[25..])?;
        let position = Position { history: Uuid::from_bytes(history), log, cursor, removals, walk };
        Some(Self { binding: Binding(binding), position })
    }

    /// The position, if the token was made for this filter.
    pub(crate) fn position(self, filter: &Filter) -> Result<Position> {
        let walks_one_job = self.position.walk.is_some() && matches!(filter.scope, Scope::Job(_));
        if self.binding != filter.binding() || walks_one_job {
            return Err(Error::invalid("resume_token", "is of a watch with another scope or filter"));
        }
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(walk: Option<Walk>) -> Position {
        Position { history: Uuid::from_u128(1), log: 7, cursor: 5, removals: 2, walk }
    }

    #[test]
    fn a_token_says_where_it_was_made() {
        let job = CreationCursor {
            created_at: DateTime::from_timestamp_micros(1_700_000_000_123_456).expect("a time"),
            id: Uuid::from_u128(3),
        };
        let walk = Walk { end: 9, point: WalkPoint { job, sequence: 4 } };
        for walk in [None, Some(Walk::begin(9)), Some(walk)] {
            let token = ResumeToken { binding: Binding([1; 8]), position: position(walk) };
            let encoded = token.encode();
            assert_eq!(ResumeToken::parse(&encoded), Some(token));
            assert!(encoded.len() <= 200, "{} characters", encoded.len());
            assert_eq!(ResumeToken::parse(&encoded[..encoded.len() - 4]), None);
            assert_eq!(ResumeToken::parse(&format!("{encoded}AAAA")), None);
        }
    }

    #[test]
    fn a_token_with_a_negative_number_or_of_another_version_is_refused() {
        let token = ResumeToken { binding: Binding([1; 8]), position: position(Some(Walk::begin(9))) };
        let bytes = URL_SAFE_NO_PAD.decode(token.encode()).expect("base64");
        for at in [25, 33, 41, 65, 73, 81] {
            let mut bytes = bytes.clone();
            bytes[at] = 0x80;
            assert_eq!(ResumeToken::parse(&URL_SAFE_NO_PAD.encode(bytes)), None, "at {at}");
        }
        let former = [&[2], &bytes[1..BYTES]].concat();
        assert_eq!(ResumeToken::parse(&URL_SAFE_NO_PAD.encode(former)), None);
    }
}
