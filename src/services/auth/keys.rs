//! Requests about API keys, and the message for a key.

use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    error::{Error, Result, Violations},
    limits::KEY_OVERLAP,
    models::{
        CreationCursor,
        api_key::ApiKey,
        caller::{KeyManager, KeyScope, UserRole},
    },
    pb,
    proto_enums::{ProtoEnum as _, timestamp},
    services::{page::PageRequest, parse},
};

/// Most scopes in a request: each scope once.
const SCOPES: usize = 3;

/// The content of a `CreateApiKeyRequest`.
pub(super) struct KeyTerms {
    pub(super) note: String,
    pub(super) expires_at: Option<DateTime<Utc>>,
    pub(super) scopes: Vec<KeyScope>,
}

impl KeyTerms {
    /// Fails with [`Error::ScopeRequired`] if the manager lacks a requested scope, even
    /// if there are violations.
    pub(super) fn parse(request: pb::CreateApiKeyRequest, manager: &KeyManager) -> Result<Self> {
        let mut violations = Violations::default();
        let note = parse::text(&mut violations, "note", request.note);
        let expires_at = parse::timestamp(&mut violations, "expires_at", request.expires_at);
        if expires_at.is_some_and(|at| at <= Utc::now()) {
            violations.add("expires_at", "must be in the future");
        }
        let scopes = scopes(&mut violations, &request.scopes, manager.role());
        if let Some(missing) = scopes.iter().find(|scope| !manager.scopes().contains(scope)) {
            return Err(Error::ScopeRequired(missing.name()));
        }
        violations.or(Self { note, expires_at, scopes })
    }
}

/// Parses the requested scopes, each once; without any, returns the role's default.
fn scopes(violations: &mut Violations, requested: &[i32], role: UserRole) -> Vec<KeyScope> {
    if requested.is_empty() {
        return match role {
            UserRole::Customer => vec![KeyScope::Read],
            UserRole::Provider => vec![KeyScope::Read, KeyScope::Append],
        };
    }
    if requested.len() > SCOPES {
        violations.add("scopes", format!("must be at most {SCOPES}"));
    }
    let mut scopes = Vec::new();
    for (index, scope) in requested.iter().take(SCOPES).enumerate() {
        let field = format!("scopes[{index}]");
        match KeyScope::from_proto(*scope) {
            Some(KeyScope::Append) if role == UserRole::Customer => {
                violations.add(field, "a customer's key cannot have APPEND");
            }
            Some(scope) => scopes.push(scope),
            None => {
                violations
                    .add(field, "must be API_KEY_SCOPE_READ, API_KEY_SCOPE_APPEND or API_KEY_SCOPE_MANAGE");
            }
        }
    }
    scopes.sort_unstable();
    scopes.dedup();
    scopes
}

pub(super) fn key_page(
    mut request: pb::ListApiKeysRequest,
    manager: &KeyManager,
) -> Result<PageRequest<CreationCursor>> {
    let mut violations = Violations::default();
    let page = PageRequest::take(&mut violations, manager.user_id(), &mut request);
    violations.or(page)
}

/// The id of the key to replace, and how long that key stays valid.
pub(super) fn rotation(request: &pb::RotateApiKeyRequest) -> Result<(Uuid, Duration)> {
    let mut violations = Violations::default();
    let id = parse::uuid(&mut violations, "api_key_id", &request.api_key_id);
    let overlap = parse::duration(&mut violations, "overlap", request.overlap, KEY_OVERLAP);
    violations.or((id, overlap))
}

impl From<ApiKey> for pb::ApiKey {
    fn from(key: ApiKey) -> Self {
        let scopes = key.scopes().map(KeyScope::to_proto);
        Self {
            id: key.id.to_string(),
            scopes: scopes.collect(),
            key_prefix: key.key_prefix,
            note: key.note,
            expires_at: key.expires_at.map(timestamp),
            last_used_at: key.last_used_at.map(timestamp),
            created_at: Some(timestamp(key.created_at)),
        }
    }
}
