//! Resume tokens: a place in what a watch sees, bound to its scope and filter.
//! Opaque to clients, so that a place may one day span several logs.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::watch::{Filter, Scope};
use crate::{
    error::{Error, Result},
    limits::TOKEN_BYTES,
    models::caller::Visibility,
};

/// Of the token's form; another one is refused.
const VERSION: u8 = 1;

/// How far a watch has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    /// Everything in scope up to here was sent or filtered: a sequence where
    /// one job is watched, a position of the log where all are.
    pub(crate) cursor: i64,
    /// Where all jobs are watched: how many logs retention had removed when it
    /// was last seen that nothing beyond the cursor was lost by that.
    pub(crate) removals: i64,
}

/// What a token is bound to: it says nothing about who may watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Binding([u8; 8]);

impl Binding {
    pub(crate) fn new(Filter { scope, kinds }: &Filter) -> Self {
        let mut digest = Sha256::new();
        let mut text = |text: &str| {
            digest.update(text.len().to_be_bytes());
            digest.update(text);
        };
        match scope {
            Scope::Job(job) => text(&format!("job {}", job.id)),
            Scope::All { viewer, configuration_tag, counterpart_id } => {
                let (role, id) = match viewer.visibility() {
                    Visibility::Provider(id) => ("provider", id),
                    Visibility::Customer(id) => ("customer", id),
                    Visibility::Job(id) => ("job", id),
                };
                text(&format!("all {role} {id} {}", counterpart_id.unwrap_or(Uuid::nil())));
                text(configuration_tag);
            }
        }
        let mut kinds: Vec<String> = kinds.iter().map(|kind| format!("{kind:?}")).collect();
        kinds.sort_unstable();
        kinds.dedup();
        text(&kinds.join(" "));
        let digest = digest.finalize();
        Self(std::array::from_fn(|index| digest[index]))
    }

    /// A token that goes on from there.
    pub(crate) fn token(self, place: Position) -> String {
        let mut bytes = Vec::with_capacity(25);
        bytes.push(VERSION);
        bytes.extend(self.0);
        bytes.extend(place.cursor.to_be_bytes());
        bytes.extend(place.removals.to_be_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Where a token goes on, if it is one of this binding.
    pub(crate) fn place(self, token: &ResumeToken) -> Result<Position> {
        if token.binding != self {
            return Err(Error::invalid("resume_token", "is of a watch with another scope or filter"));
        }
        Ok(token.place)
    }
}

/// A token that a watch may have given, of whatever scope and filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ResumeToken {
    binding: Binding,
    place: Position,
}

impl ResumeToken {
    /// None for what is no token of this service.
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
        let token = Self { binding: Binding(part(0)), place: Position { cursor, removals } };
        (cursor >= 0 && removals >= 0).then_some(token)
    }
}
