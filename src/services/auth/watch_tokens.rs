//! Requests about watch tokens, and the message for a token.

use std::time::Duration;

use uuid::Uuid;

use crate::{
    error::{Result, Violations},
    limits::WATCH_TOKEN_LIFETIME,
    models::{CreationCursor, caller::Provider, job::JobKey, watch_token::WatchToken},
    pb,
    proto_enums::timestamp,
    services::{jobs::job_key, page::PageRequest, parse},
};

/// The content of a `CreateWatchTokenRequest`.
pub(super) struct TokenTerms {
    pub(super) job: JobKey,
    pub(super) note: String,
    pub(super) lifetime: Duration,
}

impl TokenTerms {
    pub(super) fn parse(request: pb::CreateWatchTokenRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let job = job_key!(&mut violations, request.job, create_watch_token_request);
        let note = parse::text(&mut violations, "note", request.note);
        let lifetime = parse::duration(&mut violations, "lifetime", request.lifetime, WATCH_TOKEN_LIFETIME);
        violations.or(Self { job, note, lifetime })
    }
}

pub(super) fn token_page(
    mut request: pb::ListWatchTokensRequest,
    provider: Provider,
) -> Result<(JobKey, PageRequest<CreationCursor>)> {
    let mut violations = Violations::default();
    let page = PageRequest::take(&mut violations, provider.id(), &mut request);
    let job = job_key!(&mut violations, request.job, list_watch_tokens_request);
    violations.or((job, page))
}

pub(super) fn token_id(request: &pb::ExpireWatchTokenRequest) -> Result<Uuid> {
    let mut violations = Violations::default();
    let id = parse::uuid(&mut violations, "watch_token_id", &request.watch_token_id);
    violations.or(id)
}

impl From<WatchToken> for pb::WatchToken {
    fn from(token: WatchToken) -> Self {
        Self {
            id: token.id.to_string(),
            job_id: token.job_id.to_string(),
            secret_prefix: token.secret_prefix,
            note: token.note,
            expires_at: Some(timestamp(token.expires_at)),
            last_used_at: token.last_used_at.map(timestamp),
            created_at: Some(timestamp(token.created_at)),
        }
    }
}
