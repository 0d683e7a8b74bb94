//! How far a watch has read, and the resume token that says so to a client.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use uuid::Uuid;

use super::scope::{Binding, Filter};
use crate::{
    db::Identity,
    error::{Error, Result},
    limits::TOKEN_BYTES,
};

/// First byte of a token; tokens of another version are refused.
const VERSION: u8 = 2;
/// Bytes of a token: version, binding, history and the three numbers of a position.
const BYTES: usize = 1 + 8 + 16 + 3 * 8;

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
        let Position { history, log, cursor, removals } = self.position;
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.push(VERSION);
        bytes.extend(self.binding.0);
        bytes.extend(history.into_bytes());
        [log, cursor, removals].into_iter().for_each(|number| bytes.extend(number.to_be_bytes()));
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// `None` for a text that no server of milepost can have made.
    pub(crate) fn parse(token: &str) -> Option<Self> {
        if token.len() > TOKEN_BYTES {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let bytes: [u8; BYTES] = bytes.try_into().ok()?;
        if bytes[0] != VERSION {
            return None;
        }
        let (binding, history) = (bytes[1..9].try_into().ok()?, bytes[9..25].try_into().ok()?);
        let number = |at: usize| Some(i64::from_be_bytes(bytes[at..at + 8].try_into().ok()?));
        let (log, cursor, removals) = (number(25)?, number(33)?, number(41)?);
        let position = Position { history: Uuid::from_bytes(history), log, cursor, removals };
        [log, cursor, removals]
            .iter()
            .all(|number| *number >= 0)
            .then_some(Self { binding: Binding(binding), position })
    }

    /// The position, if the token was made for this filter.
    pub(crate) fn position(self, filter: &Filter) -> Result<Position> {
        if self.binding != filter.binding() {
            return Err(Error::invalid("resume_token", "is of a watch with another scope or filter"));
        }
        Ok(self.position)
    }
}
