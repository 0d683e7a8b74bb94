//! How far a watch has read, and the resume token that says so to a client.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use super::scope::{Binding, Filter};
use crate::{
    error::{Error, Result},
    limits::TOKEN_BYTES,
};

/// First byte of a token; tokens of another version are refused.
const VERSION: u8 = 1;

/// How far a watch has read the event log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    /// Every event of the scope up to here was sent or filtered: a sequence in a
    /// watch of one job, a position of the log in a watch of all jobs.
    pub(crate) cursor: i64,
    /// In a watch of all jobs, the number of logs that retention had removed when
    /// the watch last saw that no removal had taken events beyond the cursor.
    pub(crate) removals: i64,
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
        let mut bytes = Vec::with_capacity(25);
        bytes.push(VERSION);
        bytes.extend(self.binding.0);
        bytes.extend(self.position.cursor.to_be_bytes());
        bytes.extend(self.position.removals.to_be_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// `None` for a text that no server of milepost can have made.
    pub(crate) fn parse(token: &str) -> Option<Self> {
        if token.len() > TOKEN_BYTES {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (VERSION, rest) = (*bytes.first()?, <&[u8; 24]>::try_from(bytes.get(1..)?).ok()?) else {
            return None;
        };
        let part = |at| std::array::from_fn(|index| rest[at + index]);
        let [cursor, removals] = [8, 16].map(|at| i64::from_be_bytes(part(at)));
        let token = Self { binding: Binding(part(0)), position: Position { cursor, removals } };
        (cursor >= 0 && removals >= 0).then_some(token)
    }

    /// The position, if the token was made for this filter.
    pub(crate) fn position(self, filter: &Filter) -> Result<Position> {
        if self.binding != filter.binding() {
            return Err(Error::invalid("resume_token", "is of a watch with another scope or filter"));
        }
        Ok(self.position)
    }
}
