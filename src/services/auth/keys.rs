//! Requests about API keys, and the message for a key.

use chrono::Utc;

use crate::{
    error::{Result, Violations},
    limits::API_KEY_SCOPES,
    models::{
        api_key::{ApiKey, NewApiKey},
        caller::{KeyManager, KeyScope, UserRole},
    },
    pb,
    proto_enums::{ProtoEnum as _, timestamp},
    secret::Secret,
    services::parse,
};

/// Fails with [`Error::ScopeRequired`](crate::error::Error::ScopeRequired) if the manager
/// lacks a requested scope, even if there are violations.
pub(super) fn new_key(
    request: pb::CreateApiKeyRequest,
    manager: &KeyManager,
    secret: &Secret,
) -> Result<NewApiKey> {
    let mut violations = Violations::default();
    let note = parse::text(&mut violations, "note", request.note);
    let expires_at = parse::timestamp(&mut violations, "expires_at", request.expires_at);
    if expires_at.is_some_and(|at| at <= Utc::now()) {
        violations.add("expires_at", "must be in the future");
    }
    let scopes = scopes(&mut violations, &request.scopes, manager.role());
    manager.require(&scopes)?;
    let key_prefix = secret.display_prefix().to_owned();
    violations.or(NewApiKey { key_hash: secret.hash(), key_prefix, note, scopes, expires_at })
}

/// Parses the requested scopes, each once; without any, returns the role's default.
fn scopes(violations: &mut Violations, requested: &[i32], role: UserRole) -> Vec<KeyScope> {
    if requested.is_empty() {
        return match role {
            UserRole::Customer => vec![KeyScope::Read],
            UserRole::Provider => vec![KeyScope::Read, KeyScope::Append],
        };
    }
    if requested.len() > API_KEY_SCOPES {
        violations.add("scopes", format!("must be at most {API_KEY_SCOPES}"));
    }
    let mut scopes = Vec::new();
    for (index, scope) in requested.iter().take(API_KEY_SCOPES).enumerate() {
        let field = format!("scopes[{index}]");
        match KeyScope::from_proto(*scope) {
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
            revoked_at: key.revoked_at.map(timestamp),
            updated_at: Some(timestamp(key.updated_at)),
        }
    }
}
