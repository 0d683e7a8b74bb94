//! Resume tokens: a place in what a watch sees, bound to its scope and filter.
//! Opaque to clients, so that a place may one day span several logs.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::watch::Scope;
use crate::{
    error::{Error, Result},
    limits::TOKEN_BYTES,
    models::caller::Sight,
    progress::EventKind,
};

/// Of the token's form; another one is refused.
const VERSION: u8 = 1;

/// How far a watch has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
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
    pub(crate) fn new(scope: &Scope, kinds: &[EventKind]) -> Self {
        let mut digest = Sha256::new();
        let mut text = |text: &str| {
            digest.update(text.len().to_be_bytes());
            digest.update(text);
        };
        match scope {
            Scope::Job(job) => text(&format!("job {}", job.id)),
            Scope::All { viewer, configuration_tag, counterpart_id } => {
                let (role, id) = match viewer.sight() {
                    Sight::Provider(id) => ("provider", id),
                    Sight::Customer(id) => ("customer", id),
                    Sight::Job(id) => ("job", id),
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
    pub(crate) fn token(self, place: Place) -> String {
        let mut bytes = Vec::with_capacity(25);
        bytes.push(VERSION);
        bytes.extend(self.0);
        bytes.extend(place.cursor.to_be_bytes());
        bytes.extend(place.removals.to_be_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Where a token goes on, if it is one of this binding.
    pub(crate) fn place(self, token: &str) -> Result<Place> {
        let at_fault = |description| Err(Error::invalid("resume_token", description));
        if token.len() > TOKEN_BYTES {
            return at_fault("is no token of this service");
        }
        let Ok(bytes) = URL_SAFE_NO_PAD.decode(token) else {
            return at_fault("is no token of this service");
        };
        match bytes.split_first() {
            Some((&VERSION, rest)) if rest.len() == 24 => {
                if rest[..8] != self.0 {
                    return at_fault("is of a watch with another scope or filter");
                }
                let number = |at| i64::from_be_bytes(std::array::from_fn(|index| rest[at + index]));
                let place = Place { cursor: number(8), removals: number(16) };
                if place.cursor < 0 || place.removals < 0 {
                    return at_fault("is no token of this service");
                }
                Ok(place)
            }
            _ => at_fault("is no token of this service"),
        }
    }
}
